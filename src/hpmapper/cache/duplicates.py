"""The same bytes in the page cache twice.

*Shared extents.* A container's copied-up file still refers to its object's blocks, but has an inode, and so a cache, of
its own. Pages that both inodes cache of one physical block are duplicates: FIEMAP's physical ranges × mincore's
residency. The same finds files that were deduplicated, and copies of the vfs driver made by clones.

*Whole files.* The overlay and vfs drivers hold the same file in several directories, with blocks of its own in each.
Only contents tell; for comparison, not for dropping.
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import NamedTuple

from blake3 import blake3

from hpmapper.cache.activity import Work
from hpmapper.cache.count import count_open, opened, regular_files
from hpmapper.cache.inventory import Inventory
from hpmapper.cache.origins import Blocks, Coverage, Origins, shared_extents
from hpmapper.errors import Unsupported
from hpmapper.kernel import fiemap
from hpmapper.kernel.cachestat import cachestat
from hpmapper.kernel.mincore import PAGE, Run, resident
from hpmapper.model import ObjectDigest, SnapshotId

_GRAIN = 64 * 1024
"""Around a dirty page this much is left alone: finding each single one would take longer than it gives."""

_WHOLE_FROM = 4 * PAGE
"""Bytes from which whole files are compared."""


class Piece(NamedTuple):
    """Cached, clean bytes of a file whose blocks another file shares."""

    logical: int
    physical: int
    length: int


class SharedFile(NamedTuple):
    """A file with such pieces. `owner`: the container it belongs to; None: it serves all of an image's.

    `blocks`: all that it shares, cached or not.
    """

    path: str
    owner: SnapshotId | None
    pieces: Sequence[Piece]
    blocks: Sequence[Blocks]


class Duplicate(NamedTuple):
    """Bytes [start, end) of a file, cached here and in another inode that deserves it more."""

    path: str
    owner: SnapshotId | None
    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start


def find(
    inventory: Inventory, work: Mapping[SnapshotId, Work] | None = None, origins: Origins | None = None
) -> list[Duplicate]:
    """All pages whose blocks are cached through another inode as well, those that are missed least first.

    None where each container has a device of its own: what it shares with others, no file system knows.

    Of the copies of one block the one stays that is read most: the object's, while a live container reads it there;
    then that of the busiest container (`work`: of each live one; by default all are taken for idle). An object that
    every reader has copied up comes last: nobody reads it there any more.

    Args:
        origins: of whoever looks again and again.

    Raises:
        Unsupported: the kernel has no cachestat(2), without which nobody knows what is dirty.
    """
    _require_cachestat()
    own = list(_own_files(inventory)) if inventory.places.one_disk else []
    if not own:
        return []
    layers = (origins or Origins()).of(inventory, [blocks for file in own for blocks in file.blocks])
    shared = [file for path in layers if (file := shared_file(path, None))]
    index = _Index(shared)
    copies: dict[str, set[SnapshotId]] = defaultdict(set)
    for file in own:
        if file.owner in inventory.live:
            for path in index.paths_of(file):
                copies[path].add(file.owner)
    readers = {file.path: _live_readers(inventory, layers[file.path]) for file in shared}
    left = [file for file in shared if readers[file.path] > len(copies[file.path])]
    orphaned = [file for file in shared if readers[file.path] <= len(copies[file.path])]
    own.sort(key=lambda file: _rank(file.owner, inventory, work or {}), reverse=True)
    return _beyond_first([*left, *own, *orphaned])


def _require_cachestat() -> None:
    try:
        cachestat("/")  # of a directory: no pages, and no error
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        raise Unsupported("this kernel cannot tell which cached pages are dirty", hint="Linux 6.5 or newer") from None


def _rank(owner: SnapshotId | None, inventory: Inventory, work: Mapping[SnapshotId, Work]) -> tuple[bool, Work]:
    assert owner is not None
    return owner in inventory.live, work.get(owner, Work())


def _beyond_first(files: Sequence[SharedFile]) -> list[Duplicate]:
    """Duplicates of what files before have; those of the last file first."""
    covered = Coverage()
    found: list[list[Duplicate]] = []
    for file in files:
        of_file: list[Duplicate] = []
        for piece in file.pieces:
            shift = piece.logical - piece.physical
            for start, end in covered.add(piece.physical, piece.physical + piece.length):
                one = _whole_pages(start + shift, end + shift)
                if one is not None:
                    of_file.append(Duplicate(file.path, file.owner, *one))
        found.append(_joined(of_file))
    return [one for of_file in reversed(found) for one in of_file]


def _whole_pages(start: int, end: int) -> Run | None:
    start, end = -(-start // PAGE) * PAGE, end // PAGE * PAGE
    return Run(start, end) if start < end else None


def _joined(found: Iterable[Duplicate]) -> list[Duplicate]:
    joined: list[Duplicate] = []
    for one in sorted(found, key=lambda one: one.start):
        if joined and joined[-1].end == one.start:
            joined[-1] = joined[-1]._replace(end=one.end)
        else:
            joined.append(one)
    return joined


class _Index:
    """Which of some files has a block."""

    def __init__(self, files: Iterable[SharedFile]) -> None:
        pieces = sorted(
            (piece.physical, piece.physical + piece.length, file.path) for file in files for piece in file.pieces
        )
        self._starts = [piece[0] for piece in pieces]
        self._pieces = pieces

    def paths_of(self, file: SharedFile) -> Iterator[str]:
        """The files that have blocks of this one."""
        for piece in file.pieces:
            at = max(0, bisect_right(self._starts, piece.physical) - 1)
            while at < len(self._pieces) and self._pieces[at][0] < piece.physical + piece.length:
                if self._pieces[at][1] > piece.physical:
                    yield self._pieces[at][2]
                at += 1


def _own_files(inventory: Inventory) -> Iterator[SharedFile]:
    for one in inventory.containers:
        for path, _ in regular_files(inventory.places.own_files(one.snapshot)):
            file = shared_file(path, one.snapshot)
            if file:
                yield file


def _live_readers(inventory: Inventory, layers: Set[SnapshotId]) -> int:
    """How many live containers stand on one of these layers."""
    return sum(number for chain, number in inventory.live_chains().items() if not layers.isdisjoint(chain))


def shared_file(path: str, owner: SnapshotId | None) -> SharedFile | None:
    """What of a file is cached, clean, and in blocks that it shares; None if that is nothing."""
    with opened(path, known=True) as fd:
        if fd is None:
            return None
        counts = count_open(fd)
        extents = shared_extents(fd) if counts.cached else []
        if not extents:
            return None
        runs = resident(fd)
        if counts.dirty or counts.writeback:
            runs = [clean for run in runs for clean in clean_parts(fd, run)]
    pieces = list(_pieces(extents, runs))
    return SharedFile(path, owner, pieces, [Blocks.of(extent) for extent in extents]) if pieces else None


def _pieces(extents: Sequence[fiemap.Extent], runs: Sequence[Run]) -> Iterator[Piece]:
    """Where both are; each is in order."""
    at = 0
    for extent in extents:
        while at < len(runs) and runs[at].end <= extent.logical:
            at += 1
        here = at
        while here < len(runs) and runs[here].start < extent.end:
            start, end = max(extent.logical, runs[here].start), min(extent.end, runs[here].end)
            yield Piece(start, extent.physical + start - extent.logical, end - start)
            here += 1


def clean_parts(fd: int, run: Run) -> Iterator[Run]:
    """The parts of a run in which nothing is dirty or being written.

    XFS shows a block that was written to, but is not on the disk yet, at its old place: such pages are no duplicates.
    """
    counted = cachestat(fd, run.start, run.end - run.start)
    if not counted.dirty and not counted.writeback:
        yield run
    elif run.end - run.start > _GRAIN:
        middle = (run.start + run.end) // 2 // PAGE * PAGE
        yield from clean_parts(fd, Run(run.start, middle))
        yield from clean_parts(fd, Run(middle, run.end))


class SameFiles(NamedTuple):
    """Files with the same contents, each wholly cached; `size` bytes each."""

    digest: ObjectDigest
    size: int
    paths: Sequence[str]

    @property
    def wasted(self) -> int:
        return self.size * (len(self.paths) - 1)


def same_files(tops: Iterable[Path]) -> list[SameFiles]:
    """Files below directories that are wholly cached and have the same contents, the most wasteful first.

    Reads them, but only from the cache: what is not cached is not cached twice.
    """
    by_size: dict[int, list[str]] = defaultdict(list)
    for top in tops:
        for path, status in regular_files(top):
            if status.st_size >= _WHOLE_FROM:
                by_size[status.st_size].append(path)
    found = []
    for size, paths in by_size.items():
        by_digest: dict[bytes, list[str]] = defaultdict(list)
        for path in paths if len(paths) > 1 else ():
            digest = _digest_of_cached(path, size)
            if digest is not None:
                by_digest[digest].append(path)
        found += [SameFiles(ObjectDigest(one), size, same) for one, same in by_digest.items() if len(same) > 1]
    return sorted(found, key=lambda one: -one.wasted)


def _digest_of_cached(path: str, size: int) -> bytes | None:
    with opened(path, known=True) as fd:
        if fd is None or count_open(fd).cached < size:
            return None
        return blake3().update_mmap(f"/proc/self/fd/{fd}").digest()


def directories(inventory: Inventory) -> list[Path]:
    """Where an inventory's files lie that are not objects."""
    layers = [inventory.places.layer_files(layer) for layer in sorted(inventory.layers())]
    own = [inventory.places.own_files(one.snapshot) for one in inventory.containers]
    return [path for path in (*layers, *own) if path is not None]
