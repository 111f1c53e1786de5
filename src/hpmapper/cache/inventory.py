"""Whose what is: a picture of the database and the mounts at one moment, for everything that looks at the cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial

from hpmapper.cache.places import Places, places
from hpmapper.drivers.base import Driver
from hpmapper.drivers.upper import mounted_snapshots
from hpmapper.meta import images, uses
from hpmapper.meta.db import Database
from hpmapper.meta.uses import ContainerUse
from hpmapper.model import ObjectDigest, SnapshotId

Chain = tuple[SnapshotId, ...]


@dataclass(frozen=True, slots=True)
class ImageUse:
    """An image: its id, a name of it (or its id), and its layers, nearest first."""

    id: str
    name: str
    chain: Chain


@dataclass(frozen=True)
class Inventory:
    """What a root has.

    Attributes:
        places: where it is.
        live: the containers that somebody can read from: those whose root is mounted. A driver without mounts has all.
    """

    places: Places
    images: list[ImageUse]
    containers: list[ContainerUse]
    live: frozenset[SnapshotId]
    read_objects: Callable[[], dict[SnapshotId, list[ObjectDigest]]] = field(repr=False)

    @cached_property
    def objects(self) -> dict[SnapshotId, list[ObjectDigest]]:
        """Of each layer; read when it is first asked for, since there are many. A layer's objects never change."""
        return self.read_objects()

    def objects_of(self, chain: Chain) -> set[ObjectDigest]:
        """Every object of a chain's layers, those included that a layer above hides."""
        return {digest for layer in chain for digest in self.objects.get(layer, ())}

    def chains(self) -> Iterator[Chain]:
        """The chains of all images and containers, each once."""
        chains = [*(one.chain for one in self.images), *(one.chain for one in self.containers)]
        yield from (chain for chain in dict.fromkeys(chains) if chain)

    def live_chains(self) -> Counter[Chain]:
        """How many live containers stand on each chain."""
        return Counter(one.chain for one in self.containers if one.snapshot in self.live)

    def layers(self) -> set[SnapshotId]:
        """All layers of the above."""
        return {layer for chain in self.chains() for layer in chain}


def take(db: Database, driver: Driver) -> Inventory:
    """Look.

    Raises:
        Unsupported: the driver's data lies in no files.
    """
    containers = uses.container_uses(db)
    if driver.capabilities.mounts:
        live = frozenset(mounted_snapshots(driver.scratch.parent))
    else:
        live = frozenset(one.snapshot for one in containers)
    return Inventory(places(driver), _images(db), containers, live, partial(uses.objects_of_layers, db))


def _images(db: Database) -> list[ImageUse]:
    chains = uses.image_chains(db)
    return [ImageUse(row.id, (*row.names, row.id)[0], chains.get(row.id, ())) for row in images.images(db)]
