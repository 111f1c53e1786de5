"""What every benchmark needs: cold and warm caches, walks, and the page cache counted by inode or by reader.

`python -m hpmapper.bench.measure GROUP DIR...` reads all that is in directories as a member of a control group.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
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


def brought_in(tops: Iterable[Path]) -> int:
    """Read all regular files below directories, and return how many bytes of page cache that brought in.

    Counted by a memory control group of the reader's own, so that others' reading does not matter, but neither does
    what a file server reads for it. Where there are none, the host's page cache is counted before and after.
    """
    group = _new_group()
    if group is None:
        before = _host_cached()
        for top in tops:
            read_all(top)
        return _host_cached() - before
    try:
        words = [sys.executable, "-m", "hpmapper.bench.measure", str(group), *map(str, tops)]
        subprocess.run(words, check=True, capture_output=True)
        found = re.search(r"^(?:cache|file) (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
        return int(found[1]) if found else 0
    finally:
        remove_group(group)


def _new_group() -> Path | None:
    """A memory control group of version 1 or 2; None: they cannot be had."""
    for top in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")):
        group = top / f"hpmapper-bench-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        if (group / "memory.stat").exists():
            return group
        group.rmdir()
    return None


def remove_group(group: Path) -> None:
    """Remove a control group, which its last processes may take a moment to leave."""
    for _ in range(200):
        try:
            group.rmdir()
            return
        except OSError:
            time.sleep(0.05)


def _host_cached() -> int:
    """Bytes of the host's page cache."""
    text = Path("/proc/meminfo").read_text()
    found = {name: int(kib) for name, kib in re.findall(r"^(Cached|Buffers|Shmem):\s+(\d+) kB", text, re.MULTILINE)}
    return (found["Cached"] + found["Buffers"] - found["Shmem"]) * 1024


def main(arguments: Sequence[str]) -> None:
    """Read as a member of a control group."""
    group, *tops = map(Path, arguments)
    (group / "cgroup.procs").write_text(str(os.getpid()))
    for top in tops:
        read_all(top)


if __name__ == "__main__":
    main(sys.argv[1:])
