"""Who shows what: which layers have which objects, which snapshots stand on which layers. Queries only."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from hpmapper.meta.db import Database
from hpmapper.meta.snapshots import layers_below
from hpmapper.model import ObjectDigest, SnapshotId


class ContainerUse(NamedTuple):
    """A snapshot that somebody works in: a container of ours (`image`: its id), or another front end's."""

    snapshot: SnapshotId
    name: str
    image: str | None
    chain: tuple[SnapshotId, ...]


def objects_of_layers(
    db: Database, layers: Collection[SnapshotId] | None = None
) -> dict[SnapshotId, list[ObjectDigest]]:
    """The objects of each of these layers that has any; None: of all."""
    query = "SELECT layer, digest FROM layer_object JOIN object ON object = object.id"
    if layers is None:
        rows = db.rows(query)
    else:
        rows = [row for layer in layers for row in db.rows(f"{query} WHERE layer = ?", layer)]
    found: dict[SnapshotId, list[ObjectDigest]] = {}
    for layer, digest in rows:
        found.setdefault(SnapshotId(layer), []).append(ObjectDigest(digest))
    return found


def some_objects(db: Database, layers: Collection[SnapshotId], number: int) -> set[ObjectDigest]:
    """A few objects of these layers, not more than `number`, from all over each: quick, however many there are."""
    found: set[ObjectDigest] = set()
    of_each = max(1, number // max(1, len(layers)))
    for layer in layers:
        if len(found) + of_each > number:
            break
        first, last = db.rows("SELECT min(object), max(object) FROM layer_object WHERE layer = ?", layer)[0]
        for place in range(of_each) if first is not None else ():
            rows = db.rows(
                "SELECT digest FROM layer_object JOIN object ON object = object.id "
                "WHERE layer = ? AND object >= ? ORDER BY object LIMIT 1",
                layer,
                first + (last - first) * place // of_each,
            )
            found.update(ObjectDigest(row[0]) for row in rows)
    return found


def image_chains(db: Database) -> dict[str, tuple[SnapshotId, ...]]:
    """The layers of each image by its id, nearest first."""
    return {
        row[0]: tuple(layers_below(db, row[1])) for row in db.rows("SELECT id, top FROM image ORDER BY created, id")
    }


def container_uses(db: Database) -> list[ContainerUse]:
    """Every active snapshot and view, oldest first."""
    rows = db.rows(
        "SELECT s.id, coalesce(c.name, s.key), c.image, s.parent FROM snapshot s LEFT JOIN container c "
        "ON c.snapshot = s.id WHERE s.state = 'ready' AND s.kind <> 'committed' ORDER BY s.id"
    )
    chains: dict[int | None, tuple[SnapshotId, ...]] = {}
    for row in rows:
        if row[3] not in chains:
            chains[row[3]] = tuple(layers_below(db, row[3]))
    return [ContainerUse(SnapshotId(row[0]), row[1], row[2], chains[row[3]]) for row in rows]
