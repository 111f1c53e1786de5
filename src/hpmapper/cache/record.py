"""Recording a start: fanotify tells which objects are opened, residency which parts of them were read.

fanotify alone knows nothing of pages that a mapping faults in. Residency before and after alone must open every object
of the image, twice, and finds nothing when the image was cached before the start, as it is after a pull. Together they
open only what the start opened, and see what it read however it read it. Measured: docs/measurements.md.

Residency is looked at several times, ever more rarely: a kernel that is short of memory, or that takes away by itself
what is not used for a while (DAMON), has dropped at the end what the start read first.
"""

from __future__ import annotations

import os
import re
import select
import time
from collections.abc import Callable, Collection, Container, Iterable, Sequence
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

_FIRST_LOOK = 1.0
"""Seconds after the beginning; the next look is after twice that, and so on."""

_OBJECT = re.compile(r"([0-9a-f]{2})/([0-9a-f]{62})$")
"""How an object's path ends: `hpmapper.model.object_path`."""


class Seen:
    """What a start was seen to read: of the image's objects, and of its map.

    Attributes:
        objects: those that were opened, in the order of that; of other images, too, until the next look.
    """

    def __init__(
        self, places: Places, of: Callable[[], Container[ObjectDigest]], map_file: Path | None, *, cold: bool
    ) -> None:
        """`of`: tells the image's objects, later. `cold`: next to nothing of them was cached before."""
        self.objects: dict[ObjectDigest, tuple[Run, ...]] = {}
        self._places = places
        self._of = of
        self._map_file = map_file
        self._map_runs: tuple[Run, ...] = ()
        self._cold = cold

    def opened(self, digest: ObjectDigest) -> None:
        """An object was opened by somebody."""
        self.objects.setdefault(digest, ())

    def look(self) -> None:
        """Note what is cached of them now, too."""
        of = self._of()
        self.objects = {digest: known for digest, known in self.objects.items() if digest in of}
        for digest, known in self.objects.items():
            now = _cached_parts(self._places.object_file(digest) or "", cold=self._cold)
            self.objects[digest] = joined((*known, *now), _GAP)
        if self._map_file:
            self._map_runs = joined((*self._map_runs, *_cached_parts(str(self._map_file), cold=True)), _GAP)

    def profile(self, seconds: float) -> Profile:
        """The profile of the start, which was watched for so long."""
        parts = tuple((digest, runs) for digest, runs in self.objects.items() if runs)
        map_size = file_size(self._map_file) if self._map_file else 0
        return for_this_disk(Profile(map_size, self._map_runs, parts, self._cold, seconds), self._places)


def watch(
    places: Places,
    seen: Seen,
    until: Callable[[float], bool],
    ready: Callable[[], None] = lambda: None,
    untouchable: Iterable[Path] = (),
) -> None:
    """Note what is read, until `until(seconds to wait)` says that it is enough.

    `untouchable`: files that must not be opened here, as those of an open database (`Database.files`).
    """
    with fanotify.watching(places.scratch.parent, fanotify.FAN_OPEN, ignored=untouchable) as fd:
        ready()
        began, due = time.monotonic(), _FIRST_LOOK
        while not until(0.05):
            _drain(fd, seen)
            if time.monotonic() - began >= due:
                seen.look()
                due *= 2
        _drain(fd, seen)
    seen.look()


def _drain(fd: int, seen: Seen) -> None:
    own = os.getpid()
    while events := fanotify.read_events(fd):
        for event in events:
            if event.fd >= 0:
                # Opened by overlayfs through a mount of its own, whose root is the directory of objects or above.
                match = _OBJECT.search(os.readlink(f"/proc/self/fd/{event.fd}"))
                if match and event.pid != own:
                    seen.opened(ObjectDigest(bytes.fromhex(match[1] + match[2])))
                os.close(event.fd)


def _cached_parts(path: str, *, cold: bool) -> Sequence[Run]:
    with opened(path) as fd:
        if fd is None or (not cold and os.fstat(fd).st_size > _WARM_LIMIT):
            return ()
        return resident(fd)


def is_cold(places: Places, objects: Collection[ObjectDigest]) -> bool:
    """Whether next to nothing of these objects is cached."""
    total = cached = 0
    for digest in objects:
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
