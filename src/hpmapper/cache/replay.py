"""Reading ahead what a start will read, in one sweep.

The container runs meanwhile and asks the same disk for other things: what its own files hold, for one. So no more is
asked for at a time than keeps the disk busy. Asked for all at once, a disk with one queue would let the container wait
behind the whole sweep.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from hpmapper.cache.count import count_open, opened
from hpmapper.cache.places import Places
from hpmapper.cache.profile import Profile, file_size
from hpmapper.kernel import lock
from hpmapper.kernel.mincore import Run
from hpmapper.model import ObjectDigest

_THREADS = 16
"""Files opened at a time: opening a cold one waits for its inode, and the others need not wait with it."""

_PIECE = 256 << 10
_UNDER_WAY = 8
"""Bytes asked for at a time, and how many times that at once. More is time that the container waits behind it; smaller
pieces are more requests, which some disks count (docs/measurements.md)."""

_NICE = -10

_FREE_SHARE = 0.5
"""Of the memory that is available; what would push other things out of the cache is left to the start itself."""

_SAMPLES = 16


class Swept(NamedTuple):
    """Files and bytes asked for; `skipped`: bytes for which there was no room."""

    files: int
    bytes: int
    skipped: int


def sweep(profile: Profile, places: Places, map_file: Path | None, budget: int | None = None) -> Swept:
    """Read it all ahead, as `read_ahead` does, if there is anything to do."""
    with claimed(profile, places, map_file) as claim:
        return Swept(0, 0, 0) if claim is None else read_ahead(profile, places, map_file, budget)


@contextmanager
def claimed(profile: Profile, places: Places, map_file: Path | None) -> Iterator[Collection[int] | None]:
    """The right to read an image ahead, which one process has at a time: ten containers that start at once need one.

    None if somebody else has it, or if all is cached. Otherwise the open files that it hangs on: a process forked
    meanwhile that keeps them open has the right until it ends.
    """
    with opened(map_file or "") as fd:
        free = fd is None or lock.take(fd)
        yield None if not free or is_cached(profile, places) else () if fd is None else (fd,)


def read_ahead(profile: Profile, places: Places, map_file: Path | None, budget: int | None = None) -> Swept:
    """Have the kernel read it all, as far as `budget` bytes go (None: half of the available memory)."""
    room = available_memory() * _FREE_SHARE if budget is None else budget
    paths = _within(list(_paths(profile, places, map_file)), room)
    turn, done, under_way = threading.Lock(), iter(paths), threading.Semaphore(_UNDER_WAY)

    def work() -> int:
        files = 0
        while True:
            with turn:  # taken in the profile's order
                one = next(done, None)
            if one is None:
                return files
            files += _read_file(*one, under_way)

    with ThreadPoolExecutor(_THREADS, "read-ahead", _hurry) as threads:
        files = sum(threads.map(lambda _: work(), range(_THREADS)))
    asked = sum(run.end - run.start for _, runs in paths for run in runs)
    return Swept(files, asked, profile.size - asked)


def _hurry() -> None:
    """Let this thread go first (setpriority(2) is about one thread, whatever POSIX says).

    It does little but wait, and the containers that start meanwhile wait for it.
    """
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, _NICE)


def is_cached(profile: Profile, places: Places) -> bool:
    """Whether it is in the cache already, told from a few of its files: then a sweep would only cost time."""
    step = max(1, len(profile.objects) // _SAMPLES)
    chosen = profile.objects[::step]
    return bool(chosen) and all(_is_file_cached(places, digest, runs) for digest, runs in chosen)


def available_memory() -> int:
    """Bytes that can be had without swapping (MemAvailable, proc_meminfo(5))."""
    with open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0


def _paths(profile: Profile, places: Places, map_file: Path | None) -> Iterator[tuple[str, tuple[Run, ...]]]:
    """The map first: without names nothing is found. Another map than the recorded one is left alone."""
    if map_file is not None and profile.map_size and file_size(map_file) == profile.map_size:
        yield str(map_file), profile.map
    for digest, runs in profile.objects:
        path = places.object_file(digest)
        if path is not None:
            yield path, runs


def _within(paths: list[tuple[str, tuple[Run, ...]]], room: float) -> list[tuple[str, tuple[Run, ...]]]:
    kept = []
    for path, runs in paths:
        room -= sum(run.end - run.start for run in runs)
        if room < 0:
            break
        kept.append((path, runs))
    return kept


def _read_file(path: str, runs: tuple[Run, ...], under_way: threading.Semaphore) -> int:
    with opened(path) as fd:
        if fd is None or not runs:
            return 0
        for start, end in runs:
            for piece in range(start, end, _PIECE):
                length = min(_PIECE, end - piece)
                with under_way:
                    os.posix_fadvise(fd, piece, length, os.POSIX_FADV_WILLNEED)
                    os.pread(fd, 1, piece + length - 1)  # waits until the last of it is there
        return 1


def _is_file_cached(places: Places, digest: ObjectDigest, runs: tuple[Run, ...]) -> bool:
    with opened(places.object_file(digest) or "", known=True) as fd:
        return fd is not None and count_open(fd).cached >= sum(run.end - run.start for run in runs)
