"""Cached bytes of single files."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from hpmapper.kernel.cachestat import cachestat
from hpmapper.kernel.fs import open_known
from hpmapper.kernel.mincore import PAGE, resident


class Counts(NamedTuple):
    """Bytes in the page cache, of these dirty and under write-back; and bytes evicted, of these lately.

    "Lately" is the kernel's: so recently that reading them again would have been spared by a little more memory
    (workingset.c). Counts of what the kernel forgot together with an inode are gone.
    """

    cached: int = 0
    dirty: int = 0
    writeback: int = 0
    evicted: int = 0
    recently_evicted: int = 0

    def plus(self, other: Counts) -> Counts:
        """The sum of both."""
        return Counts(*map(int.__add__, self, other))


NOTHING = Counts()

_FLAGS = os.O_RDONLY | os.O_NOATIME | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_GONE = frozenset({errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.ESTALE})


@contextmanager
def opened(path: str | os.PathLike[str], *, known: bool = False) -> Iterator[int | None]:
    """A file to look at, without touching its times; None when it is gone, or has become something else.

    With `known` also None when the kernel has forgotten it, and so has nothing of it cached: no disk is asked then.
    """
    try:
        fd = open_known(path, _FLAGS) if known else os.open(path, _FLAGS)
    except OSError as error:
        if error.errno not in _GONE:
            raise
        fd = None
    if fd is None:
        yield None
        return
    try:
        yield fd
    finally:
        os.close(fd)


def count(path: str | os.PathLike[str]) -> Counts:
    """The pages of a file or block device; nothing when it is gone, or forgotten by the kernel."""
    with opened(path, known=True) as fd:
        return NOTHING if fd is None else count_open(fd)


def count_open(fd: int) -> Counts:
    """The pages of an open file, by cachestat(2). Before Linux 6.5 by mincore(2), which knows of cached ones only."""
    try:
        return Counts(*(pages * PAGE for pages in cachestat(fd)))
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
    return Counts(sum(run.end - run.start for run in resident(fd)))


def regular_files(top: str | os.PathLike[str], *, below: int | None = None) -> Iterator[tuple[str, os.stat_result]]:
    """(path, lstat) of the regular, non-empty files of one file system below a directory, each inode once.

    Args:
        below: only of files smaller than this.
    """
    seen: set[int] = set()
    try:
        device = os.lstat(top).st_dev
    except FileNotFoundError:
        return
    stack = [os.fspath(top)]
    while stack:
        try:
            entries = list(os.scandir(stack.pop()))
        except FileNotFoundError:
            continue
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                stack.append(entry.path)
            elif entry.is_file(follow_symlinks=False):
                status = _status(entry)
                if status is None or not 0 < status.st_size < (below or status.st_size + 1):
                    continue
                if status.st_dev == device and status.st_ino not in seen:
                    seen.add(status.st_ino)
                    yield entry.path, status


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    try:
        status = entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None
    return status if stat.S_ISREG(status.st_mode) else None
