"""What every benchmark needs: cold and warm caches, walks, and the page cache counted inode by inode."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from hpmapper.kernel.cachestat import cachestat

PAGE = os.sysconf("SC_PAGE_SIZE")
_DROP = Path("/proc/sys/vm/drop_caches")


def drop_caches() -> None:
    """Write everything out and forget all clean cached data, names and inodes."""
    os.sync()
    _DROP.write_text("3")


def files(top: Path) -> Iterator[tuple[str, os.stat_result]]:
    """(path, lstat) of everything below a directory that lies on one file system."""
    device = os.lstat(top).st_dev
    stack = [os.fspath(top)]
    while stack:
        for entry in os.scandir(stack.pop()):
            status = entry.stat(follow_symlinks=False)
            yield entry.path, status
            if stat.S_ISDIR(status.st_mode) and status.st_dev == device:
                stack.append(entry.path)


def regular_files(top: Path) -> Iterator[tuple[str, int]]:
    """(path, size) of the regular files among `files`, each inode once."""
    seen = set()
    for path, status in files(top):
        if stat.S_ISREG(status.st_mode) and (status.st_dev, status.st_ino) not in seen:
            seen.add((status.st_dev, status.st_ino))
            yield path, status.st_size


def read_all(top: Path) -> int:
    """Read every regular file below a directory; returns the bytes."""
    total = 0
    for path, _ in regular_files(top):
        with open(path, "rb", buffering=0) as file:
            while piece := file.read(1 << 20):
                total += len(piece)
    return total


def cached_bytes(paths: Iterable[str | Path]) -> int:
    """Bytes of these files' (or devices') inodes in the page cache, by cachestat(2)."""
    return sum(cachestat(path).cached for path in paths) * PAGE


def cached_below(*tops: Path) -> int:
    """Bytes in the page cache of all regular files below directories, each inode once."""
    return sum(cached_bytes(path for path, _ in regular_files(top)) for top in tops)
