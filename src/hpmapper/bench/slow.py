"""A block device with a given latency and bandwidth, for hosts whose kernel has no dm-delay.

    with slow_device(file, target) as device:      /dev/loopN, whose reads take 1 ms or more, side by side

A loop device with direct I/O over a file that a small FUSE server (`bench/go/slowfs`) hands out: one file, mounted on a
file. Reads wait; writes pass. In Go: a server in Python reached 41 MB/s in one stream, and the rate asked for is 200.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hpmapper.bench.gobuild import SOURCES, build, cache
from hpmapper.kernel import loop, mount

_MAX = 1 << 20
"""Bytes of one request, as the server has it."""


@contextmanager
def slow_device(file: Path, target: Path, *, seconds: float = 0.001, rate: float = 200e6) -> Iterator[Path]:
    """The device over `file`, by way of `target`, which is made; each read takes `seconds` and its share of `rate`."""
    program = build(cache(), SOURCES / "slowfs")
    target.touch()
    fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = {"fd": str(fuse), "rootmode": "100000", "user_id": "0", "group_id": "0", "max_read": str(_MAX)}
    mount.filesystem("fuse", "slow", target, options=options)
    try:
        with _served(program, fuse, file, seconds, rate), loop.attached(target, block_size=4096) as device:
            yield device
    finally:
        mount.umount(target, lazy=True)


@contextmanager
def _served(program: Path, fuse: int, file: Path, seconds: float, rate: float) -> Iterator[None]:
    """Serve what is mounted. The server alone has the connection then: with its end requests fail, and none waits."""
    backing = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    # In a mount namespace of its own: the last process of one unmounts what is in it before it closes its files, and
    # would wait for its own answers.
    line = ["unshare", "--mount", "--propagation", "private", str(program)]
    line += [f"{seconds * 1e6:g}", f"{rate:.0f}", str(fuse), str(backing)]
    try:
        # In a session of its own: a terminal's signal goes to all, and whoever mounted must end first.
        server = subprocess.Popen(line, stdout=subprocess.DEVNULL, pass_fds=(fuse, backing), start_new_session=True)
    finally:
        os.close(fuse)
        os.close(backing)
    try:
        yield
    finally:
        server.kill()
        server.wait()
