"""Recording a start: fanotify tells which objects are opened, residency which parts of them were read.

fanotify alone knows nothing of pages that a mapping faults in. Residency before and after alone must open every object
of the image, twice, and finds nothing when the image was cached before the start, as it is after a pull. Together they
open only what the start opened, and see what it read however it read it. Measured: docs/measurements.md.
"""

from __future__ import annotations

import os
import re
import select
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from hpmapper.cache.count import count_open, opened
from hpmapper.cache.places import Places
from hpmapper.cache.profile import Profile, file_size, for_this_disk, joined
from hpmapper.kernel import fanotify
from hpmapper.kernel.mincore import Run, resident
from hpmapper.model import ObjectDigest

_GAP = 64 * 1024
"""Bytes between two parts that are read ahead all the same: half of the kernel's own readahead."""

_WARM_LIMIT = 4 << 20
"""Bytes of a file from which, when it was cached before the start, nothing is known of what the start reads of it."""

_SAMPLES = 16

_OBJECT = re.compile(r"([0-9a-f]{2})/([0-9a-f]{62})$")
"""How an object's path ends: `hpmapper.model.object_path`."""


def watch(
    places: Places, until: Callable[[float], bool], ready: Callable[[], None] = lambda: None
) -> list[ObjectDigest]:
    """The objects that are opened until `until(seconds to wait)` says that it is enough, in the order of that."""
    found: dict[ObjectDigest, None] = {}
    with fanotify.watching(places.scratch.parent, fanotify.FAN_OPEN) as fd:
        ready()
        while not until(0.05):
            _drain(fd, found)
        _drain(fd, found)
    return list(found)


def _drain(fd: int, found: dict[ObjectDigest, None]) -> None:
    own = os.getpid()
    while events := fanotify.read_events(fd):
        for event in events:
            if event.fd >= 0:
                # Opened by overlayfs through a mount of its own, whose root is the directory of objects or above.
                match = _OBJECT.search(os.readlink(f"/proc/self/fd/{event.fd}"))
                if match and event.pid != own:
                    found.setdefault(ObjectDigest(bytes.fromhex(match[1] + match[2])))
                os.close(event.fd)


def profile_of(
    places: Places,
    map_file: Path | None,
    read: Iterable[ObjectDigest],
    seconds: float,
    *,
    cold: bool,
) -> Profile:
    """The profile of a start that opened the objects `read`."""
    parts = []
    for digest in read:
        runs = _read_parts(places.object_file(digest) or "", cold=cold)
        if runs:
            parts.append((digest, runs))
    map_runs = _read_parts(str(map_file), cold=True) if map_file else ()
    map_size = file_size(map_file) if map_file else 0
    return for_this_disk(Profile(map_size, map_runs, tuple(parts), cold, seconds), places)


def _read_parts(path: str, *, cold: bool) -> tuple[Run, ...]:
    with opened(path) as fd:
        if fd is None or (not cold and os.fstat(fd).st_size > _WARM_LIMIT):
            return ()
        return joined(resident(fd), _GAP)


def is_cold(places: Places, objects: Collection[ObjectDigest]) -> bool:
    """Whether next to nothing of these objects is cached, told from a few of them."""
    total = cached = 0
    for digest in sorted(objects)[:: max(1, len(objects) // _SAMPLES)]:
        with opened(places.object_file(digest) or "") as fd:
            if fd is not None:
                total += os.fstat(fd).st_size
                cached += count_open(fd).cached
    return cached * 10 <= total


def forget(places: Places, map_files: Collection[Path], objects: Collection[ObjectDigest]) -> None:
    """Drop an image's clean, unmapped pages, so that the next start reads from the disk."""
    for path in [*map(str, map_files), *(places.object_file(digest) for digest in objects)]:
        with opened(path or "") as fd:
            if fd is not None:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def enough(told: int, seconds: float) -> Callable[[float], bool]:
    """An `until` for `watch`: when `told` is readable, or time is up."""
    deadline = time.monotonic() + seconds

    def is_enough(wait: float) -> bool:
        left = deadline - time.monotonic()
        return left <= 0 or bool(select.select([told], [], [], min(wait, left))[0])

    return is_enough
