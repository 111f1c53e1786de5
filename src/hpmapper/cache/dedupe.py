"""Identical contents in what containers wrote, made to share extents again (FIDEDUPERANGE).

Fifty containers that install the same package write fifty copies. A whole file that is the same as an object of the
store, or as another container's file, comes to share its blocks; from then on `hpmapper.cache.trim` knows its cached
pages as duplicates. The kernel compares the bytes under its own locks and changes nothing that anybody can see, so
containers may run, and a wrong guess does no harm.

Reading everything would spoil the cache and keep the disk busy: only files are read whose size some object or other
file has, what was not cached is dropped again, and pressure on the disk (PSI) makes it wait.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from blake3 import blake3

from hpmapper.cache.count import opened, regular_files
from hpmapper.cache.inventory import Inventory
from hpmapper.errors import Unsupported
from hpmapper.kernel import fiemap
from hpmapper.kernel.clone import NOT_CLONEABLE, dedupe_range
from hpmapper.kernel.mincore import resident
from hpmapper.kernel.psi import pressure
from hpmapper.model import ObjectDigest

MIN_AGE = 600.0
"""Seconds since the last change from which a file is looked at: one that is being written to would only be unshared
again, at a price (docs/measurements.md and design trap 12: the first overwrite of a shared block is slow)."""

SMALLEST = 16 * 1024
"""Bytes that a file must have for itself to be worth it."""

_STEP = 4 << 20
"""Bytes compared in one call, during which writers of both files wait."""

_READ = 1 << 20


class Key(NamedTuple):
    """What tells a file's contents as long as it does not change."""

    device: int
    inode: int
    size: int
    mtime: int
    ctime: int

    @classmethod
    def of(cls, status: os.stat_result) -> Key:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@dataclass(slots=True)
class Throttle:
    """Waits while the disk is busy.

    Attributes:
        limit: percent of time in which some task waits for the disk, from which on to wait; 100: never.
        resource: as for `hpmapper.kernel.psi.pressure`.
        patience: seconds to wait at most each time, so that a disk that is always busy only slows this down.
        waited: seconds waited so far.
    """

    limit: float = 10.0
    resource: str = "io"
    patience: float = 30.0
    waited: float = 0.0

    def wait(self, stop: threading.Event) -> None:
        """Return when the disk is idle enough, patience has run out, or `stop` is set."""
        deadline = self.waited + self.patience
        while not stop.is_set() and self.waited < deadline and self._is_busy():
            stop.wait(0.5)
            self.waited += 0.5

    def _is_busy(self) -> bool:
        return self.limit < 100 and pressure(self.resource).some > self.limit


@dataclass(slots=True)
class Deduped:
    """What a run did: files looked at, read, and made to share; bytes read, and bytes that are shared now."""

    looked: int = 0
    read: int = 0
    files: int = 0
    read_bytes: int = 0
    bytes: int = 0


@dataclass(slots=True)
class Deduper:
    """Goes through what containers wrote.

    Attributes:
        known: digests of files that were read before; kept by whoever runs this again and again.
    """

    throttle: Throttle = field(default_factory=Throttle)
    stop: threading.Event = field(default_factory=threading.Event)
    min_age: float = MIN_AGE
    known: MutableMapping[Key, bytes] = field(default_factory=dict)

    def run(self, inventory: Inventory, object_sizes: Mapping[ObjectDigest, int], now: float) -> Deduped:
        """One pass; `now`: seconds since 1970. Nothing is done where containers have devices of their own.

        Raises:
            Unsupported: the file system cannot share extents.
        """
        done = Deduped()
        if not inventory.places.one_disk:
            return done
        sizes = set(object_sizes.values())
        groups: dict[bytes, list[str]] = defaultdict(list)
        for path, key in self._worth_reading(inventory, sizes, now, done):
            if self.stop.is_set():
                return done
            digest = self.known.get(key) or self._read(path, key, done)
            if digest is not None:
                self.known[key] = digest
                groups[digest].append(path)
        for digest, paths in groups.items():
            if ObjectDigest(digest) in object_sizes:
                source = inventory.places.object_file(ObjectDigest(digest))
                paths = [source, *paths] if source else paths
            for path in paths[1:]:
                if self.stop.is_set():
                    return done
                gained = self._share(paths[0], path)
                done.files += gained > 0
                done.bytes += gained
        return done

    def _worth_reading(
        self, inventory: Inventory, sizes: set[int], now: float, done: Deduped
    ) -> Iterator[tuple[str, Key]]:
        """Files with enough for themselves, of a size that something else has too."""
        by_size: dict[int, list[tuple[str, Key]]] = defaultdict(list)
        for container in inventory.containers:
            for path, status in regular_files(inventory.places.own_files(container.snapshot)):
                done.looked += 1
                old = max(status.st_mtime, status.st_ctime) <= now - self.min_age
                if old and status.st_size >= SMALLEST and status.st_blocks * 512 >= SMALLEST:
                    by_size[status.st_size].append((path, Key.of(status)))
        for size, found in by_size.items():
            if size in sizes or len(found) > 1:
                yield from (one for one in found if _unshared(one[0]) >= SMALLEST)

    def _read(self, path: str, key: Key, done: Deduped) -> bytes | None:
        """The digest of a file, or None if it changed meanwhile; leaves the cache as it was."""
        hasher = blake3()
        with opened(path) as fd:
            if fd is None:
                return None
            before = resident(fd)
            try:
                for offset in range(0, key.size, _READ):
                    if offset % (8 * _READ) == 0:
                        self.throttle.wait(self.stop)
                    if self.stop.is_set():
                        return None
                    hasher.update(os.pread(fd, _READ, offset))
            finally:
                _drop_outside(fd, before, key.size)
            unchanged = Key.of(os.fstat(fd)) == key
        done.read += 1
        done.read_bytes += key.size
        return hasher.digest() if unchanged else None

    def _share(self, source: str, target: str) -> int:
        """Let `target` share `source`'s blocks; returns the bytes that it gave up."""
        with opened(source) as one, opened(target) as two:
            if one is None or two is None or _same_blocks(one, two):
                return 0
            before = [resident(one), resident(two)]
            own = _unshared_open(two)
            size = os.fstat(one).st_size
            for offset in range(0, size, _STEP):
                self.throttle.wait(self.stop)
                if self.stop.is_set() or not _share_range(one, two, offset, min(_STEP, size - offset)):
                    break
            for fd, runs in zip((one, two), before, strict=True):
                _drop_outside(fd, runs, size)
            return max(0, own - _unshared_open(two))


def _share_range(source: int, target: int, offset: int, length: int) -> bool:
    """Whether the bytes are the same, and shared now."""
    end = offset + length
    while offset < end:
        try:
            (answer,) = dedupe_range(source, offset, end - offset, [(target, offset)])
        except OSError as error:
            number = error.errno or 0
        else:
            number = answer.errno
        if number in NOT_CLONEABLE - {errno.EINVAL}:
            raise Unsupported("this file system cannot share extents", hint="XFS with reflink or btrfs can")
        if number or not answer.same or not answer.bytes:
            return False  # changed, truncated or busy: the next run looks again
        offset += answer.bytes
    return True


def _drop_outside(fd: int, kept: Sequence[tuple[int, int]], size: int) -> None:
    """Drop the clean pages outside of the ranges."""
    position = 0
    for start, end in [*kept, (size, size)]:
        if position < start:
            os.posix_fadvise(fd, position, start - position, os.POSIX_FADV_DONTNEED)
        position = end


def _same_blocks(one: int, two: int) -> bool:
    first, second = ([(extent.logical, extent.physical) for extent in fiemap.extents(fd)] for fd in (one, two))
    return bool(first) and first == second


def _unshared(path: str) -> int:
    with opened(path) as fd:
        return 0 if fd is None or not stat.S_ISREG(os.fstat(fd).st_mode) else _unshared_open(fd)


def _unshared_open(fd: int) -> int:
    return sum(extent.length for extent in fiemap.extents(fd) if not extent.shared)
