"""Advisory locks between processes and threads: flock(2), which ends with the process that holds it.

Every lock opens its path anew, so two threads of one process exclude each other too. Locks do not nest.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from contextlib import AbstractContextManager

from hpmapper.kernel.syscall import AnyPath, fail

_FIRST_WAIT = 0.001
_LONGEST_WAIT = 0.05


def exclusive(path: AnyPath | int, *, timeout: float | None = None) -> AbstractContextManager[int]:
    """Hold `path` alone; yields its fd. A file is created when missing, a directory must exist.

    Args:
        path: a path, or an open fd. The lock belongs to the fd's open file description, which fork and dup share.
        timeout: seconds to wait; None: as long as it takes; 0: not at all.

    Raises:
        BlockingIOError: somebody else still held it when the time was over.
    """
    return _Held(path, fcntl.LOCK_EX, timeout)


def shared(path: AnyPath | int, *, timeout: float | None = None) -> AbstractContextManager[int]:
    """As `exclusive`, but together with other shared holders."""
    return _Held(path, fcntl.LOCK_SH, timeout)


def take(fd: int) -> bool:
    """Hold an open file alone, until all who share its open file description have closed it; False if another does."""
    return _try(fd, fcntl.LOCK_EX)


class _Held(AbstractContextManager[int]):
    """A lock that is held in a `with`. Not a generator, which takes three times as long: each start waits for one."""

    def __init__(self, path: AnyPath | int, operation: int, timeout: float | None) -> None:
        self._path = path
        self._operation = operation
        self._timeout = timeout
        self._fd = -1

    def __enter__(self) -> int:
        self._fd = self._path if isinstance(self._path, int) else _open(self._path)
        try:
            _acquire(self._fd, self._operation, self._timeout)
        except BaseException:
            self._close()
            raise
        return self._fd

    def __exit__(self, *_: object) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        finally:
            self._close()

    def _close(self) -> None:
        if not isinstance(self._path, int):
            os.close(self._fd)


def _open(path: AnyPath) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


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
