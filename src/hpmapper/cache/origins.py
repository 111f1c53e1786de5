"""Which files of the images share blocks with what containers have for themselves.

    origins = Origins()
    origins.of(inventory, blocks)       again and again

Nothing leads from a copied-up file back to its object, so every file of every image is asked once where it lies: 10 µs
each. The answer is kept, because a copy of the same file has the same blocks, and a write only takes some away. Then a
look at the cache asks those few.
"""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

from hpmapper.cache.count import opened, regular_files
from hpmapper.cache.inventory import Inventory
from hpmapper.kernel import fiemap
from hpmapper.model import SnapshotId

_AGAIN_SECONDS = 60.0
"""After which all are asked again: those that the kernel had forgotten were passed over, and may have been read."""


class Blocks(NamedTuple):
    """Bytes [start, end) of the disk."""

    start: int
    end: int

    @classmethod
    def of(cls, extent: fiemap.Extent) -> Blocks:
        """Where an extent lies."""
        return cls(extent.physical, extent.physical + extent.length)


class Coverage:
    """Disjoint ranges of the disk."""

    def __init__(self) -> None:
        self._ranges: list[Blocks] = []

    def parts(self, start: int, end: int) -> list[Blocks]:
        """Those parts of a range that are covered."""
        found: list[Blocks] = []
        at = max(0, bisect_left(self._ranges, (start,)) - 1)
        while at < len(self._ranges) and self._ranges[at].start < end:
            low, high = max(start, self._ranges[at].start), min(end, self._ranges[at].end)
            if low < high:
                found.append(Blocks(low, high))
            at += 1
        return found

    def covers(self, start: int, end: int) -> bool:
        """Whether all of a range is covered."""
        return sum(part.end - part.start for part in self.parts(start, end)) == end - start

    def add(self, start: int, end: int) -> list[Blocks]:
        """Cover a range; returns those parts of it that were covered already."""
        known = self.parts(start, end)
        position = start
        for low, high in [*known, (end, end)]:
            if position < low:
                insort(self._ranges, Blocks(position, low))
            position = high
        return known


class Origins:
    """See the module's text. For one thread."""

    def __init__(self) -> None:
        self._found: dict[str, Set[SnapshotId]] = {}
        self._layers: Set[SnapshotId] = frozenset()
        self._asked = Coverage()
        self._due = 0.0

    def of(self, inventory: Inventory, blocks: Sequence[Blocks]) -> Mapping[str, Set[SnapshotId]]:
        """The paths of the images' files that have some of these blocks, and perhaps others; and their layers.

        Of all images, since a file that was deduplicated may have any origin. Files that the kernel has forgotten, of
        which nothing is cached, may be missing.
        """
        layers = inventory.layers()
        known = layers == self._layers and time.monotonic() < self._due
        if not known or not all(self._asked.covers(*one) for one in blocks):
            self._asked, self._layers = Coverage(), layers
            for one in blocks:
                self._asked.add(*one)
            self._found = {path: of for path, of in _files(inventory).items() if _has_some(path, self._asked)}
            self._due = time.monotonic() + _AGAIN_SECONDS
        return self._found


def _files(inventory: Inventory) -> dict[str, set[SnapshotId]]:
    """The images' files, and the layers that each is of."""
    found: dict[str, set[SnapshotId]] = defaultdict(set)
    for layer, digests in inventory.objects.items():
        for digest in digests:
            path = inventory.places.object_file(digest)
            if path is not None:
                found[path].add(layer)
    for layer in inventory.layers():
        directory = inventory.places.layer_files(layer)
        for path, _ in regular_files(directory) if directory else ():
            found[path].add(layer)
    return found


def _has_some(path: str, wanted: Coverage) -> bool:
    with opened(path, known=True) as fd:
        extents = [] if fd is None else shared_extents(fd)
    return any(wanted.parts(*Blocks.of(extent)) for extent in extents)


def shared_extents(fd: int) -> list[fiemap.Extent]:
    """The extents of an open file that another file refers to as well, and that hold data."""
    return [
        extent
        for extent in fiemap.extents(fd)
        if extent.shared and extent.placed and not extent.flags & fiemap.FIEMAP_EXTENT_UNWRITTEN
    ]
