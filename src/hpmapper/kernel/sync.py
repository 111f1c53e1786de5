"""Making data durable and names atomic."""

from __future__ import annotations

import os

from hpmapper.kernel.syscall import (
    AT_FDCWD,
    NR_RENAMEAT2,
    NR_SYNC_FILE_RANGE,
    NR_SYNCFS,
    AnyPath,
    fail,
    opened,
    syscall,
)

SYNC_FILE_RANGE_WAIT_BEFORE = 1
SYNC_FILE_RANGE_WRITE = 2
SYNC_FILE_RANGE_WAIT_AFTER = 4

_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2


def syncfs(path: AnyPath | int) -> None:
    """Write everything of the file system that holds `path` (or an open fd) to its device.

    Since Linux 5.8 (commit 735e4ae5ba28) this also reports write-back errors that nobody has seen yet.
    """
    with opened(path) as fd:
        syscall(NR_SYNCFS, fd, path=fd)


def start_writeback(fd: int, offset: int = 0, length: int = 0) -> None:
    """Begin to write dirty pages and return at once; no durability, only a shorter sync later. Length 0: to the end."""
    sync_file_range(fd, offset, length, SYNC_FILE_RANGE_WRITE)


def sync_file_range(fd: int, offset: int, length: int, flags: int) -> None:
    """sync_file_range(2). It never writes metadata or flushes the device's cache: not a durability primitive."""
    syscall(NR_SYNC_FILE_RANGE, fd, offset, length, flags, path=fd)


def fdatasync(path: AnyPath | int) -> None:
    """Make a file's data and size durable (or a directory's entries: directories have no difference)."""
    with opened(path) as fd:
        try:
            os.fdatasync(fd)
        except OSError as error:
            fail(error.errno or 0, fd)


def rename_noreplace(
    source: AnyPath, target: AnyPath, *, source_dir: int = AT_FDCWD, target_dir: int = AT_FDCWD
) -> None:
    """Rename, but raise FileExistsError when `target` exists already, in one atomic step."""
    _renameat2(source, target, _RENAME_NOREPLACE, source_dir, target_dir)


def rename_exchange(
    source: AnyPath, target: AnyPath, *, source_dir: int = AT_FDCWD, target_dir: int = AT_FDCWD
) -> None:
    """Swap two existing names in one atomic step."""
    _renameat2(source, target, _RENAME_EXCHANGE, source_dir, target_dir)


def _renameat2(source: AnyPath, target: AnyPath, flags: int, source_dir: int, target_dir: int) -> None:
    names = os.fsencode(source), os.fsencode(target)
    syscall(NR_RENAMEAT2, source_dir, names[0], target_dir, names[1], flags, path=target)
