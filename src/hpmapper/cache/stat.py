"""What is in the page cache, for whom, and what the same would take without sharing.

Complete as far as files go: objects, maps (the file, and the inodes of its mount, which cache small files a second
time: design trap 4), layers' directories, what containers wrote, loop devices and the files behind them. The file
system's own metadata in caches other than the page cache is not counted.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

from hpmapper.cache.count import NOTHING, Counts, count, regular_files
from hpmapper.cache.inventory import Chain, Inventory
from hpmapper.cache.places import devices
from hpmapper.drivers.base import Driver
from hpmapper.kernel.mincore import PAGE
from hpmapper.model import ObjectDigest, SnapshotId


@dataclass(frozen=True, slots=True)
class CacheStat:
    """Every cached byte of a root, by what holds it.

    Attributes:
        objects, layers, own: of each object, each layer's directory, each container's own files.
        maps: of each chain's map: its files, and the inodes of its mount. Several chains may share a layer's file.
        devices: block devices, and files behind loop devices.
        readers: how many live containers show each object.
        layer_readers: the same for layers.
    """

    inventory: Inventory
    objects: Mapping[ObjectDigest, Counts]
    layers: Mapping[SnapshotId, Counts]
    own: Mapping[SnapshotId, Counts]
    maps: Mapping[str, Counts]
    devices: Mapping[str, Counts]
    readers: Mapping[ObjectDigest, int]
    layer_readers: Mapping[SnapshotId, int]

    @property
    def total(self) -> Counts:
        """All of it."""
        return total(
            one for kind in (self.objects, self.layers, self.own, self.maps, self.devices) for one in kind.values()
        )

    @property
    def plain_copies(self) -> int:
        """Bytes that would be cached if each live container read what is cached from a copy of its own.

        What containers share counts once for each that shows it (once, if none does): an estimate from above, since
        not every one need have read all of it. Devices are left out: they are ours alone.
        """
        shared = sum(one.cached * max(1, self.readers.get(digest, 0)) for digest, one in self.objects.items())
        shared += sum(one.cached * max(1, self.layer_readers.get(layer, 0)) for layer, one in self.layers.items())
        maps = total(self.maps.values()).cached
        return shared + maps + total(self.own.values()).cached

    def sharing(self) -> dict[int, int]:
        """Bytes cached, by the number of live containers that show them."""
        found: Counter[int] = Counter()
        for digest, one in self.objects.items():
            found[self.readers.get(digest, 0)] += one.cached
        for layer, one in self.layers.items():
            found[self.layer_readers.get(layer, 0)] += one.cached
        return {readers: size for readers, size in sorted(found.items()) if size}

    def of_chain(self, chain: Chain) -> Counts:
        """What is cached of an image's (or a container's image's) files and map."""
        files = total(self.objects[digest] for digest in self.inventory.objects_of(chain))
        layers = total(self.layers.get(layer, NOTHING) for layer in chain)
        return files.plus(layers).plus(self.of_map(chain))

    def of_map(self, chain: Chain) -> Counts:
        """What is cached of a chain's maps."""
        return total(self.maps.get(name, NOTHING) for name in _map_names(self.inventory, chain))


def total(counts: Iterable[Counts]) -> Counts:
    """The sum."""
    return reduce(Counts.plus, counts, NOTHING)


def cache_stat(inventory: Inventory, driver: Driver) -> CacheStat:
    """Count. Ten thousand objects take a tenth of a second."""
    where = inventory.places
    paths = {digest: where.object_file(digest) for found in inventory.objects.values() for digest in found}
    objects = {digest: count(path) for digest, path in paths.items() if path is not None}
    layers = {}
    for layer in inventory.layers():
        directory = where.layer_files(layer)
        if directory is not None:
            layers[layer] = count_below(directory)
    own = {one.snapshot: count_below(where.own_files(one.snapshot)) for one in inventory.containers}
    maps = _count_maps(inventory)
    known = {os.path.realpath(path) for path in maps}
    behind = {str(path): count(path) for path in devices(driver) if os.path.realpath(path) not in known}
    readers, layer_readers = _readers(inventory)
    return CacheStat(inventory, objects, layers, own, maps, behind, readers, layer_readers)


def count_below(top: Path, *, below: int | None = None) -> Counts:
    """The pages of all regular files below a directory (smaller than `below`)."""
    return total(count(path) for path, _ in regular_files(top, below=below))


def _count_maps(inventory: Inventory) -> dict[str, Counts]:
    found: dict[str, Counts] = {}
    for chain in inventory.chains():
        for path in inventory.places.map_files(chain):
            if str(path) not in found:
                found[str(path)] = count(path)
        for target in inventory.places.map_mounts(chain):
            if str(target) not in found:
                # Larger ones are objects: their inodes in the map have no data.
                found[str(target)] = count_below(target, below=PAGE)
    return found


def _map_names(inventory: Inventory, chain: Chain) -> list[str]:
    return [*map(str, inventory.places.map_files(chain)), *map(str, inventory.places.map_mounts(chain))]


def _readers(inventory: Inventory) -> tuple[Counter[ObjectDigest], Counter[SnapshotId]]:
    objects: Counter[ObjectDigest] = Counter()
    layers: Counter[SnapshotId] = Counter()
    for chain, containers in inventory.live_chains().items():
        for digest in inventory.objects_of(chain):
            objects[digest] += containers
        for layer in set(chain):
            layers[layer] += containers
    return objects, layers
