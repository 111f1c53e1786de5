"""Advisory locks between processes and threads: flock(2), which ends with the process that holds it.

Every lock opens its path anew, so two threads of one process exclude each other too. Locks do not nest.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from hpmapper.kernel.syscall import AnyPath, fail, opened

_FIRST_WAIT = 0.001
_LONGEST_WAIT = 0.05


@contextmanager
def exclusive(path: AnyPath | int, *, timeout: float | None = None) -> Iterator[int]:
    """Hold `path` alone; yields its fd. A file is created when missing, a directory must exist.

    Args:
        path: a path, or an open fd. The lock belongs to the fd's open file description, which fork and dup share.
        timeout: seconds to wait; None: as long as it takes; 0: not at all.

    Raises:
        BlockingIOError: somebody else still held it when the time was over.
    """
    with _held(path, fcntl.LOCK_EX, timeout) as fd:
        yield fd


@contextmanager
def shared(path: AnyPath | int, *, timeout: float | None = None) -> Iterator[int]:
    """As `exclusive`, but together with other shared holders."""
    with _held(path, fcntl.LOCK_SH, timeout) as fd:
        yield fd


@contextmanager
def _held(path: AnyPath | int, operation: int, timeout: float | None) -> Iterator[int]:
    with opened(path, _open_flags(path)) as fd:
        _acquire(fd, operation, timeout)
        try:
            yield fd
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)


def _open_flags(path: AnyPath | int) -> int:
    if isinstance(path, int) or os.path.isdir(path):
        return os.O_RDONLY
    return os.O_RDWR | os.O_CREAT


def _acquire(fd: int, operation: int, timeout: float | None) -> None:
    """flock has no timeout, and an alarm would hit other threads: ask again, at growing distances."""
    if timeout is None:
        fcntl.flock(fd, operation)
        return
    deadline = time.monotonic() + timeout
    wait = _FIRST_WAIT
    while not _try(fd, operation):
        if time.monotonic() >= deadline:
            fail(errno.EWOULDBLOCK, fd, "locked by another process")
        time.sleep(wait)
        wait = min(wait * 2, _LONGEST_WAIT)


def _try(fd: int, operation: int) -> bool:
    try:
        fcntl.flock(fd, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
