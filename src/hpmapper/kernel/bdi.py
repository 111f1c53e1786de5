"""How far the kernel reads ahead on a device (/sys/class/bdi, Documentation/ABI/testing/sysfs-class-bdi)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from hpmapper.kernel import lock
from hpmapper.kernel.syscall import AnyPath


@contextmanager
def read_ahead(path: AnyPath, kib: int) -> Iterator[None]:
    """Let the kernel read so many KiB ahead where `path` is, at most; as before at the end.

    It goes for all who read from that device, by files that they open meanwhile. Nothing changes while somebody else
    does the same, or on a file system that has no single device.
    """
    number = os.stat(path).st_dev
    try:
        fd = os.open(f"/sys/class/bdi/{os.major(number)}:{os.minor(number)}/read_ahead_kb", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield
        return
    try:
        before = int(os.pread(fd, 32, 0))
        if before <= kib or not lock.take(fd):
            yield
            return
        os.pwrite(fd, str(kib).encode(), 0)
        try:
            yield
        finally:
            os.pwrite(fd, str(before).encode(), 0)
    finally:
        os.close(fd)
