"""Pressure stall information: being woken when the machine waits for memory or disk (accounting/psi.rst)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hpmapper.kernel.syscall import fail


@contextmanager
def trigger(resource: str, *, stall_us: int, window_us: int, kind: str = "some") -> Iterator[int]:
    """An fd on which poll(2) reports POLLPRI when tasks stalled for `stall_us` within `window_us`.

    Args:
        resource: "memory", "io", "cpu", or a cgroup's pressure file.
        window_us: 500,000 to 10,000,000; without CAP_SYS_RESOURCE a multiple of 2,000,000 (Linux 6.5, commit
            d82caa273565), else EINVAL.
    """
    path = Path(resource) if "/" in resource else Path("/proc/pressure", resource)
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        try:
            os.write(fd, f"{kind} {stall_us} {window_us}\0".encode())
        except OSError as error:
            fail(error.errno or 0, path)
        yield fd
    finally:
        os.close(fd)
