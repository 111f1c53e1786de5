"""What each container has of the cache, and does with processor and disk: for `hpmapper top` and for metrics."""

from __future__ import annotations

import errno
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from hpmapper.cache import inventory as inventories
from hpmapper.cache.activity import processes
from hpmapper.cache.count import Counts, regular_files
from hpmapper.cache.inventory import Inventory
from hpmapper.cache.stat import CacheStat, cache_stat
from hpmapper.drivers.base import Driver
from hpmapper.drivers.upper import UpperDriver
from hpmapper.meta.db import Database
from hpmapper.meta.uses import ContainerUse
from hpmapper.model import SnapshotId, Space

_ORIGIN = "trusted.overlay.origin"
"""What overlayfs gives a file that it copies up (Documentation/filesystems/overlayfs.rst, "Non-standard behavior")."""

_UTIME, _STIME = 11, 12  # proc_pid_stat(5), counted behind the command's name
_TICKS = os.sysconf("SC_CLK_TCK")


class Used(NamedTuple):
    """Seconds of processor time, and bytes read from and sent to storage."""

    seconds: float = 0.0
    read: int = 0
    written: int = 0

    def plus(self, other: Used) -> Used:
        """The sum of both."""
        return Used(self.seconds + other.seconds, self.read + other.read, self.written + other.written)

    def since(self, earlier: Used) -> Used:
        """What came after `earlier`."""
        return Used(self.seconds - earlier.seconds, self.read - earlier.read, self.written - earlier.written)


class CopyUps(NamedTuple):
    """Files of the image that a container has opened for writing, and their sizes' sum in bytes."""

    files: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class ContainerFacts:
    """One container.

    Attributes:
        image: a name of its image, "" if no image of ours has its layers.
        own: what is cached of its own files. shown: bytes cached of its image, which others may share.
        used: by its processes, as far as they were seen.
    """

    name: str
    image: str
    live: bool
    processes: int
    own: Counts
    shown: int
    copy_ups: CopyUps
    used: Used


@dataclass(frozen=True, slots=True)
class Overview:
    """A root at one moment; containers in the order in which they were made."""

    space: Space
    stat: CacheStat
    containers: list[ContainerFacts]

    @property
    def private(self) -> int:
        """Bytes cached of containers' own files."""
        return sum(one.own.cached for one in self.containers)

    @property
    def shared(self) -> int:
        """Bytes cached of images."""
        files = (self.stat.objects, self.stat.layers, self.stat.maps)
        return sum(one.cached for kind in files for one in kind.values())


class Observer:
    """Looks again and again, and adds up what processes did in between. For use by one thread at a time."""

    def __init__(self, db: Database, driver: Driver) -> None:
        self._db = db
        self._driver = driver
        self._seen: dict[int, Used] = {}
        self._used: dict[SnapshotId, Used] = defaultdict(Used)

    def look(self) -> Overview:
        """What there is now.

        Raises:
            Unsupported: the driver's cache cannot be looked into.
        """
        taken = inventories.take(self._db, self._driver)
        running = self._add_up(taken)
        stat = cache_stat(taken, self._driver)
        images = {one.chain: one.name for one in taken.images}
        return Overview(
            self._driver.space(), stat, [self._facts(one, stat, images, running) for one in taken.containers]
        )

    def _facts(
        self,
        one: ContainerUse,
        stat: CacheStat,
        images: Mapping[inventories.Chain, str],
        running: Mapping[SnapshotId, int],
    ) -> ContainerFacts:
        return ContainerFacts(
            one.name,
            images.get(one.chain, ""),
            one.snapshot in stat.inventory.live,
            running.get(one.snapshot, 0),
            stat.own[one.snapshot],
            stat.of_chain(one.chain).cached,
            self._copy_ups(stat.inventory, one.snapshot),
            self._used[one.snapshot],
        )

    def _add_up(self, taken: Inventory) -> dict[SnapshotId, int]:
        """Note what processes did since the last time; returns how many each container has."""
        running: dict[SnapshotId, int] = defaultdict(int)
        seen: dict[int, Used] = {}
        for pid, snapshot in processes(taken):
            running[snapshot] += 1
            used = _used_by(pid)
            if used is not None:
                seen[pid] = used
                self._used[snapshot] = self._used[snapshot].plus(used.since(self._seen.get(pid, Used())))
        self._seen = seen
        known = {one.snapshot for one in taken.containers}
        for gone in self._used.keys() - known:
            del self._used[gone]
        return running

    def _copy_ups(self, taken: Inventory, snapshot: SnapshotId) -> CopyUps:
        if not isinstance(self._driver, UpperDriver):
            return CopyUps()
        files = size = 0
        for path, status in regular_files(taken.places.own_files(snapshot)):
            if _has_origin(path):
                files += 1
                size += status.st_size
        return CopyUps(files, size)


def _has_origin(path: str) -> bool:
    try:
        os.getxattr(path, _ORIGIN, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.ENOENT):
            return False
        raise
    return True


def _used_by(pid: int) -> Used | None:
    """What a process used since it began; None when it has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            words = file.read().rpartition(b")")[2].split()
        with open(f"/proc/{pid}/io", "rb") as file:
            amounts = dict(line.split(b": ") for line in file.read().splitlines())
    except (OSError, ValueError):
        return None
    ticks = int(words[_UTIME]) + int(words[_STIME])
    return Used(ticks / _TICKS, int(amounts[b"read_bytes"]), int(amounts[b"write_bytes"]))
