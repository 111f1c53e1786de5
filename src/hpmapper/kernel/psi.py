"""Pressure stall information: being woken when the machine waits for memory or disk (accounting/psi.rst)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from hpmapper.kernel.syscall import fail


class Pressure(NamedTuple):
    """Percent of the last 10 s in which some task, or all that could run, waited; and microseconds since boot."""

    some: float
    full: float
    some_us: int


def pressure(resource: str) -> Pressure:
    """How much the machine waits for "memory", "io" or "cpu", or a control group by its pressure file's path."""
    return parse_pressure(_file(resource).read_text(encoding="ascii"))


def parse_pressure(text: str) -> Pressure:
    """A pressure file's two lines. The second is missing for cpu on kernels before 5.13."""
    lines = {}
    for line in text.splitlines():
        kind, *words = line.split()
        lines[kind] = dict(word.split("=", 1) for word in words)
    full = lines.get("full", {"avg10": "0"})
    return Pressure(float(lines["some"]["avg10"]), float(full["avg10"]), int(lines["some"]["total"]))


def _file(resource: str) -> Path:
    return Path(resource) if "/" in resource else Path("/proc/pressure", resource)


@contextmanager
def trigger(resource: str, *, stall_us: int, window_us: int, kind: str = "some") -> Iterator[int]:
    """An fd on which poll(2) reports POLLPRI when tasks stalled for `stall_us` within `window_us`.

    Args:
        resource: "memory", "io", "cpu", or a cgroup's pressure file.
        window_us: 500,000 to 10,000,000; without CAP_SYS_RESOURCE a multiple of 2,000,000 (Linux 6.5, commit
            d82caa273565), else EINVAL.
    """
    path = _file(resource)
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        try:
            os.write(fd, f"{kind} {stall_us} {window_us}\0".encode())
        except OSError as error:
            fail(error.errno or 0, path)
        yield fd
    finally:
        os.close(fd)
