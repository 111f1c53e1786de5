"""Snapshots, layers and objects in the database. Every function that writes takes the open transaction.

A snapshot passes through states: `creating` (intent), `ready`, `removing` (intent). Only `ready` ones are seen by
anybody; the others have an owner, and are undone once that owner is dead.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from hpmapper.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from hpmapper.labels import TARGET_LABEL
from hpmapper.meta.db import Database
from hpmapper.meta.schema import CHAINS_CHANGED
from hpmapper.model import Kind, ObjectDigest, SnapshotId


class Snapshot(NamedTuple):
    """A snapshot as the database has it; see `schema.py` for the columns. `applied`: what a differ read into it."""

    id: SnapshotId
    key: str
    kind: Kind
    parent: SnapshotId | None
    layer: SnapshotId | None
    created: int
    updated: int
    applied: SnapshotId | None = None


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer as the database has it; see `schema.py` for the columns."""

    id: SnapshotId
    diff_id: str
    bound: bool
    digest: bytes | None
    tar_size: int
    size: int
    inodes: int
    damaged: bool
    sealed: bool = False


Transaction = sqlite3.Connection
"""An open write transaction, as `Database.transaction` yields it."""

Source = Database | Transaction
"""Where a query runs: by itself, or inside the open transaction."""


def _rows(source: Source, sql: str, *values: object) -> list[Any]:
    return source.rows(sql, *values) if isinstance(source, Database) else source.execute(sql, values).fetchall()


_COLUMNS = (
    "snapshot.id, key, kind, parent, snapshot.layer, created, updated, "
    "(SELECT applied.layer FROM applied WHERE applied.snapshot = snapshot.id)"
)
_KINDS = {kind.value: kind for kind in Kind}

_READY = "SELECT 1 FROM snapshot WHERE id = ?1 AND state = 'ready'"
"""Whether a snapshot may be a parent: its row outlives its removal until the storage is gone."""

_CHAINS_KEPT = 1024
"""Chains that are remembered at a time."""


def _snapshot(row: Any) -> Snapshot:
    number, key, kind, parent, layer_id, created, updated, applied = row  # by position: this is on every call's path
    return Snapshot(number, key, _KINDS[kind], parent, layer_id, created, updated, applied)


def find(db: Source, key: str) -> Snapshot | None:
    """The ready snapshot of that key, or None."""
    rows = _rows(db, f"SELECT {_COLUMNS} FROM snapshot WHERE key = ? AND state = 'ready'", key)
    return _snapshot(rows[0]) if rows else None


def get(db: Database, key: str) -> Snapshot:
    """The ready snapshot of that key.

    Raises:
        NotFound: there is none.
    """
    found = find(db, key)
    if found is None:
        raise NotFound(f"snapshot {key!r} does not exist")
    return found


def by_id(db: Source, snapshot: SnapshotId) -> Snapshot:
    """The snapshot of that id, whatever its state."""
    rows = _rows(db, f"SELECT {_COLUMNS} FROM snapshot WHERE id = ?", snapshot)
    if not rows:
        raise NotFound(f"snapshot {snapshot} does not exist")
    return _snapshot(rows[0])


def walk(db: Database) -> Iterator[Snapshot]:
    """Every ready snapshot, parents before their children."""
    yield from map(_snapshot, db.rows(f"SELECT {_COLUMNS} FROM snapshot WHERE state = 'ready' ORDER BY id"))


def layers_below(db: Database, parent: SnapshotId | None) -> list[SnapshotId]:
    """The storage ids of a chain of committed snapshots, nearest first.

    Each start asks three times, so what was found is kept. It holds until the database notes that a chain has changed.
    """
    if parent is None:
        return []
    if db.in_transaction():  # what this sees may never come to be
        return _layers_below(db, parent)
    changed = db.setting(CHAINS_CHANGED)  # asked first: what is kept under it is never older than it
    kept = db.chains.get(parent)
    if kept is None or kept[0] != changed:
        if len(db.chains) >= _CHAINS_KEPT:
            db.chains.clear()
        kept = db.chains[parent] = (changed, _layers_below(db, parent))
    return kept[1].copy()


def _layers_below(db: Database, parent: SnapshotId) -> list[SnapshotId]:
    rows = db.rows(
        """WITH RECURSIVE chain (id, parent, layer, depth) AS (
               SELECT id, parent, layer, 0 FROM snapshot WHERE id = ?
               UNION ALL
               SELECT s.id, s.parent, s.layer, depth + 1 FROM snapshot s JOIN chain ON s.id = chain.parent
           ) SELECT layer FROM chain ORDER BY depth""",
        parent,
    )
    return [SnapshotId(row[0]) for row in rows]


def layer(db: Database, layer_id: SnapshotId) -> Layer:
    """The layer of that id."""
    row = db.row("SELECT * FROM layer WHERE id = ?", layer_id)
    if row is None:
        raise NotFound(f"layer {layer_id} does not exist")
    return _layer(row)


def diff_id(db: Source, layer_id: SnapshotId) -> str:
    """The DiffID of a layer, "" if it never was a tar."""
    return str(_rows(db, "SELECT diff_id FROM layer WHERE id = ?", layer_id)[0][0])


def tar_size(db: Source, layer_id: SnapshotId) -> int:
    """Bytes of the tar that a layer came from, 0 if there was none."""
    return int(_rows(db, "SELECT tar_size FROM layer WHERE id = ?", layer_id)[0][0])


def layers(db: Database) -> list[Layer]:
    """Every layer that a snapshot uses, parents before their children."""
    used = "SELECT layer FROM snapshot WHERE layer IS NOT NULL UNION SELECT layer FROM applied"
    return [_layer(row) for row in db.rows(f"SELECT * FROM layer WHERE id IN ({used}) ORDER BY id")]


def _layer(row: Any) -> Layer:
    return Layer(
        SnapshotId(row["id"]),
        row["diff_id"],
        bool(row["bound"]),
        row["digest"],
        row["tar_size"],
        row["size"],
        row["inodes"],
        bool(row["damaged"]),
        bool(row["sealed"]),
    )


def unbound_layer(db: Source, diff_id: str) -> SnapshotId | None:
    """A layer of that DiffID that is right above any parent."""
    rows = _rows(
        db, "SELECT id FROM layer WHERE diff_id = ? AND NOT bound AND NOT damaged ORDER BY id LIMIT 1", diff_id
    )
    return SnapshotId(rows[0][0]) if rows else None


def users_of_diff_id(db: Source, diff_id: str) -> list[Snapshot]:
    """The committed snapshots made of a whole layer of that DiffID."""
    rows = _rows(
        db,
        f"SELECT {_COLUMNS} FROM snapshot WHERE state = 'ready' AND layer IN "
        "(SELECT id FROM layer WHERE diff_id = ? AND NOT damaged)",
        diff_id,
    )
    return [_snapshot(row) for row in rows]


def begin(db: Transaction, key: str, kind: Kind, parent: Snapshot | None, owner: str) -> SnapshotId:
    """Record the intent to make a snapshot; raises as `add`."""
    return _insert(db, key, kind, parent, "creating", owner, time.time_ns())


def add(db: Transaction, key: str, kind: Kind, parent: Snapshot | None) -> Snapshot:
    """Record an active snapshot or a view. Its storage need not be there: it is made when first asked for.

    Raises:
        AlreadyExists: the key is taken.
        InvalidArgument: the parent is not committed. NotFound: it is gone.
    """
    now = time.time_ns()
    number = _insert(db, key, kind, parent, "ready", None, now)
    return Snapshot(number, key, kind, parent.id if parent else None, None, now, now)


def _insert(
    db: Transaction, key: str, kind: Kind, parent: Snapshot | None, state: str, owner: str | None, now: int
) -> SnapshotId:
    if parent is not None and parent.kind is not Kind.COMMITTED:
        raise InvalidArgument(f"parent {parent.key!r} is not committed")
    try:
        # In one statement, as starting a container waits for it: without a ready parent the state is NULL, and refused.
        cursor = db.execute(
            "INSERT INTO snapshot (parent, state, key, kind, owner, created, updated) "
            f"VALUES (?1, iif(?1 IS NULL OR EXISTS ({_READY}), ?2, NULL), ?3, ?4, ?5, ?6, ?6)",
            (parent.id if parent else None, state, key, str(kind), owner, now),
        )
    except sqlite3.IntegrityError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_CONSTRAINT_UNIQUE:
            raise AlreadyExists(f"snapshot {key!r} exists already") from None
        if parent is None:
            raise
        raise _gone(parent) from None
    assert cursor.lastrowid is not None
    return SnapshotId(cursor.lastrowid)


def _require_ready(db: Transaction, parent: Snapshot) -> None:
    if not _rows(db, _READY, parent.id):
        raise _gone(parent)


def _gone(parent: Snapshot) -> NotFound:
    return NotFound(f"parent {parent.key!r} was removed meanwhile", hint="try again")


def committed(db: Transaction, snapshot: SnapshotId, key: str, layer_id: SnapshotId, parent: Snapshot | None) -> None:
    """Record that a snapshot is there under its final key, made of that layer, on top of `parent`.

    Raises:
        AlreadyExists: the key is taken. NotFound: the parent was removed meanwhile.
    """
    now = time.time_ns()
    if parent is not None:
        _require_ready(db, parent)
    try:
        db.execute(
            "UPDATE snapshot SET key = ?, kind = 'committed', state = 'ready', owner = NULL, layer = ?, parent = ?, "
            "created = ?, updated = ? WHERE id = ?",
            (key, layer_id, parent.id if parent else None, now, now, snapshot),
        )
    except sqlite3.IntegrityError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_CONSTRAINT_UNIQUE:
            raise AlreadyExists(f"snapshot {key!r} exists already") from None
        raise NotFound(f"the layers below {key} were removed meanwhile", hint="try again") from None


def is_damaged(db: Source, snapshot: Snapshot) -> bool:
    """Whether the snapshot's layer is known to be damaged."""
    rows = _rows(db, "SELECT damaged FROM layer WHERE id = ?", snapshot.layer)
    return bool(rows and rows[0][0])


def replace_layer(db: Transaction, old: SnapshotId, new: SnapshotId) -> None:
    """Let every snapshot of a layer use another one with the same contents."""
    db.execute("UPDATE snapshot SET layer = ? WHERE layer = ?", (new, old))
    db.execute("UPDATE applied SET layer = ? WHERE layer = ?", (new, old))


def mark_damaged(db: Transaction, layer_id: SnapshotId, *, damaged: bool = True) -> None:
    """Record that a layer cannot be repaired from what is here (or is whole again)."""
    db.execute("UPDATE layer SET damaged = ? WHERE id = ?", (damaged, layer_id))


def mark_users_damaged(db: Transaction, digest: ObjectDigest) -> None:
    """Record that every layer that needs an object is damaged."""
    db.execute(
        "UPDATE layer SET damaged = 1 WHERE id IN (SELECT layer FROM layer_object JOIN object ON object = object.id "
        "WHERE digest = ?)",
        (digest,),
    )


def add_layer(db: Transaction, new: Layer, objects: Mapping[ObjectDigest, int]) -> None:
    """Record a layer and the objects that it needs."""
    db.execute(
        "INSERT INTO layer VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (new.id, new.diff_id, new.bound, new.digest, new.tar_size, new.size, new.inodes, new.damaged, new.sealed),
    )
    if not objects:
        return
    db.executemany("INSERT OR IGNORE INTO object (digest, size) VALUES (?, ?)", objects.items())
    db.executemany(
        "INSERT INTO layer_object SELECT ?, id FROM object WHERE digest = ?",
        ((new.id, digest) for digest in objects),
    )


def forget(db: Transaction, snapshot: SnapshotId) -> None:
    """Record that a snapshot is gone."""
    db.execute("DELETE FROM snapshot WHERE id = ?", (snapshot,))


def begin_removal(db: Transaction, snapshot: Snapshot, owner: str | None) -> None:
    """Record the intent to remove a snapshot; from here on nobody sees it. Without an owner anybody may finish it.

    Raises:
        FailedPrecondition: it has children, or an image or container uses it.
    """
    user = db.execute(
        "SELECT key || ' is made from it' FROM snapshot WHERE parent = ?1 "
        "UNION ALL SELECT 'image ' || id || ' uses it' FROM image WHERE top = ?1 "
        "UNION ALL SELECT 'container ' || name || ' uses it' FROM container WHERE snapshot = ?1 LIMIT 1",
        (snapshot.id,),
    ).fetchone()
    if user:
        raise FailedPrecondition(f"cannot remove snapshot {snapshot.key!r}: {user[0]}")
    changed = db.execute(
        "UPDATE snapshot SET state = 'removing', owner = ?, layer = NULL, parent = NULL, key = 'removing-' || id "
        "WHERE id = ? AND state = 'ready'",
        (owner, snapshot.id),
    )
    if changed.rowcount == 0:
        raise NotFound(f"snapshot {snapshot.key!r} does not exist")


def any_user(db: Database, layer_id: SnapshotId) -> Snapshot | None:
    """A snapshot that is made of the layer."""
    row = db.row(f"SELECT {_COLUMNS} FROM snapshot WHERE layer = ? LIMIT 1", layer_id)
    return _snapshot(row) if row else None


def unfinished(db: Database) -> list[tuple[SnapshotId, str | None]]:
    """(id, owner) of the snapshots that were being made or removed when their owner stopped, or still are.

    The last comes first: what is mounted on others goes before them.
    """
    rows = db.rows("SELECT id, owner FROM snapshot WHERE state <> 'ready' ORDER BY id DESC")
    return [(SnapshotId(row[0]), row[1]) for row in rows]


def hold(db: Transaction, holder: str, snapshot: SnapshotId) -> None:
    """Lease a snapshot: `forget_unused_chains` leaves it alone until `release`."""
    db.execute("INSERT OR IGNORE INTO lease VALUES (?, ?)", (holder, snapshot))


def release(db: Transaction, holder: str) -> None:
    """End a lease."""
    db.execute("DELETE FROM lease WHERE holder = ?", (holder,))


def lease_holders(db: Database) -> list[str]:
    """Who holds leases."""
    return [str(row[0]) for row in db.rows("SELECT DISTINCT holder FROM lease")]


def forget_unused_chains(db: Transaction) -> int:
    """Drop the images' layers that no image, container, snapshot or lease has any more; returns how many."""
    count = 0
    while True:
        gone = db.execute(
            """DELETE FROM snapshot WHERE (key LIKE 'sha256:%' OR key LIKE 'applied:%')
               AND state = 'ready' AND kind = 'committed'
               AND NOT EXISTS (SELECT 1 FROM snapshot AS child WHERE child.parent = snapshot.id)
               AND NOT EXISTS (SELECT 1 FROM image WHERE top = snapshot.id)
               AND NOT EXISTS (SELECT 1 FROM lease WHERE lease.snapshot = snapshot.id)"""
        ).rowcount
        if not gone:
            return count
        count += gone


@dataclass(frozen=True, slots=True)
class StorageIds:
    """Whose storage may be on disk: of snapshots and layers, half-made ones included; `ready`: should be there."""

    snapshots: set[SnapshotId]
    layers: set[SnapshotId]
    ready: set[SnapshotId]


def storage_ids(db: Database) -> StorageIds:
    """The ids of all storage that the database names."""
    rows = db.rows("SELECT id, state = 'ready' FROM snapshot WHERE kind <> 'committed' OR state <> 'ready'")
    named = {SnapshotId(row[0]) for row in rows}
    layers = {SnapshotId(row[0]): bool(row[1]) for row in db.rows("SELECT id, sealed FROM layer")}
    sealed = {layer for layer, is_sealed in layers.items() if is_sealed}
    applied = {SnapshotId(row[0]) for row in db.rows("SELECT snapshot FROM applied")}
    ready = {SnapshotId(row[0]) for row in rows if row[1]} - applied
    # A half-made committed snapshot has its storage among the layers, a sealed layer among the snapshots.
    return StorageIds(named | sealed, layers.keys() | named, ready)


def unused_layers(db: Database) -> list[SnapshotId]:
    """Layers that no snapshot uses."""
    used = "SELECT layer FROM snapshot WHERE layer IS NOT NULL UNION ALL SELECT layer FROM applied"
    rows = db.rows(f"SELECT id FROM layer WHERE id NOT IN ({used})")
    return [SnapshotId(row[0]) for row in rows]


def forget_layer(db: Transaction, layer_id: SnapshotId) -> bool:
    """Record that a layer is gone, unless a snapshot has taken it up meanwhile; says whether it is."""
    cursor = db.execute(
        "DELETE FROM layer WHERE id = ?1 AND NOT EXISTS (SELECT 1 FROM snapshot WHERE layer = ?1) "
        "AND NOT EXISTS (SELECT 1 FROM applied WHERE layer = ?1)",
        (layer_id,),
    )
    return cursor.rowcount > 0


def forget_unused_objects(db: Transaction) -> int:
    """Drop the objects that no layer needs; returns how many."""
    return db.execute("DELETE FROM object WHERE id NOT IN (SELECT object FROM layer_object)").rowcount


def objects(db: Database) -> Iterator[tuple[ObjectDigest, int]]:
    """(digest, size) of every object."""
    return ((ObjectDigest(row[0]), row[1]) for row in db.rows("SELECT digest, size FROM object"))


def is_object(db: Database, digest: ObjectDigest) -> bool:
    """Whether the object is still one."""
    return db.row("SELECT 1 FROM object WHERE digest = ?", digest) is not None


def labels(db: Source, snapshot: SnapshotId) -> dict[str, str]:
    """A snapshot's labels."""
    return dict(map(tuple, _rows(db, "SELECT name, value FROM label WHERE snapshot = ?", snapshot)))


def set_labels(db: Transaction, snapshot: SnapshotId, new: Mapping[str, str]) -> None:
    """Replace a snapshot's labels."""
    db.execute("DELETE FROM label WHERE snapshot = ?", (snapshot,))
    add_labels(db, snapshot, new)


def add_labels(db: Transaction, snapshot: SnapshotId, new: Mapping[str, str]) -> None:
    """Give labels to a snapshot that has none of them. An empty value is none, as in containerd."""
    if new:
        db.executemany("INSERT INTO label VALUES (?, ?, ?)", ((snapshot, *item) for item in new.items() if item[1]))


# What front ends add.


def walk_prefix(db: Database, prefix: str) -> Iterator[Snapshot]:
    """Every ready snapshot whose key begins with `prefix`, parents before their children."""
    end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
    rows = db.rows(
        f"SELECT {_COLUMNS} FROM snapshot WHERE key >= ? AND key < ? AND state = 'ready' ORDER BY id", prefix, end
    )
    yield from map(_snapshot, rows)


def count_of_front_ends(db: Database) -> int:
    """How many snapshots belong to front ends, such as containerd."""
    own = "key LIKE 'sha256:%' OR key LIKE 'applied:%'"
    return int(db.row(f"SELECT count(*) FROM snapshot WHERE state = 'ready' AND key LIKE '%:%' AND NOT ({own})")[0])


def all_labels(db: Database) -> dict[SnapshotId, dict[str, str]]:
    """The labels of every snapshot that has any."""
    found: dict[SnapshotId, dict[str, str]] = {}
    for row in db.rows("SELECT snapshot, name, value FROM label"):
        found.setdefault(SnapshotId(row[0]), {})[row[1]] = row[2]
    return found


def rename(db: Transaction, snapshot: SnapshotId, key: str) -> None:
    """Give a snapshot another key, which is free."""
    db.execute("UPDATE snapshot SET key = ? WHERE id = ?", (key, snapshot))


def set_times(db: Transaction, snapshot: SnapshotId, created: int, updated: int) -> None:
    """Let a snapshot that came from elsewhere keep its times."""
    db.execute("UPDATE snapshot SET created = ?, updated = ? WHERE id = ?", (created, updated, snapshot))


def touch(db: Transaction, snapshot: SnapshotId) -> None:
    """Record that a snapshot was updated now."""
    db.execute("UPDATE snapshot SET updated = ? WHERE id = ?", (time.time_ns(), snapshot))


def size_limit(db: Source, snapshot: SnapshotId) -> int | None:
    """How much an active snapshot may keep, in bytes; None: without limit."""
    rows = _rows(db, "SELECT size FROM size_limit WHERE snapshot = ?", snapshot)
    return int(rows[0][0]) if rows else None


def set_size_limit(db: Transaction, snapshot: SnapshotId, size: int) -> None:
    """Record how much a snapshot that has just been added may keep."""
    db.execute("INSERT INTO size_limit VALUES (?, ?)", (snapshot, size))


def set_applied(db: Transaction, snapshot: SnapshotId, layer_id: SnapshotId) -> None:
    """Record which layer a differ read for an active snapshot.

    Raises:
        NotFound: the layer or the snapshot was removed meanwhile.
        AlreadyExists: somebody else has applied one meanwhile.
    """
    try:
        db.execute("INSERT INTO applied VALUES (?, ?)", (snapshot, layer_id))
    except sqlite3.IntegrityError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY:
            raise AlreadyExists(f"another layer was applied to snapshot {snapshot} meanwhile") from None
        raise NotFound(f"snapshot {snapshot} was removed meanwhile") from None


def forget_applied(db: Transaction, snapshot: SnapshotId) -> None:
    """Record that the layer is the snapshot's own now."""
    db.execute("DELETE FROM applied WHERE snapshot = ?", (snapshot,))


def chain_id_of(db: Source, snapshot: Snapshot) -> str | None:
    """A committed snapshot's chain ID, if all DiffIDs below it are known."""
    if snapshot.key.startswith("sha256:"):
        return snapshot.key
    rows = _rows(db, "SELECT chain_id FROM chain WHERE snapshot = ?", snapshot.id)
    return str(rows[0][0]) if rows else None


def set_chain_id(db: Transaction, snapshot: SnapshotId, chain_id: str) -> None:
    """Record a committed snapshot's chain ID."""
    db.execute("INSERT OR REPLACE INTO chain VALUES (?, ?)", (snapshot, chain_id))


def with_chain_id(db: Source, chain_id: str) -> list[Snapshot]:
    """The committed snapshots that have that chain ID, and whose layer is whole."""
    rows = _rows(
        db,
        f"SELECT {_COLUMNS} FROM snapshot WHERE state = 'ready' AND kind = 'committed' AND "
        "(key = ?1 OR id IN (SELECT snapshot FROM chain WHERE chain_id = ?1)) "
        "AND layer NOT IN (SELECT id FROM layer WHERE damaged) ORDER BY id",
        chain_id,
    )
    return [_snapshot(row) for row in rows]


def sealed_layers(db: Database) -> list[SnapshotId]:
    """Layers that lie as they were written and that some snapshot uses, the lowest first."""
    rows = db.rows("SELECT id FROM layer WHERE sealed AND id IN (SELECT layer FROM snapshot) ORDER BY id")
    return [SnapshotId(row[0]) for row in rows]


_CHAIN_ID = len("sha256:") + 64
OF_IMAGES = f"""
SELECT snapshot, value AS chain_id FROM label WHERE name = '{TARGET_LABEL}'
UNION ALL SELECT id, substr(key, -{_CHAIN_ID}) FROM snapshot
WHERE kind = 'committed' AND substr(key, -{_CHAIN_ID}, 7) = 'sha256:'
"""
"""The snapshots that are images' layers, and the chain IDs by which containerd knows them: by a label, or by their
keys, since containerd 1.6's own client unpacks without one. Those that have both are in it twice."""


def sealed_of_images(db: Database) -> list[SnapshotId]:
    """As `sealed_layers`, of snapshots that are images' layers."""
    users = f"SELECT layer FROM snapshot WHERE id IN (SELECT snapshot FROM ({OF_IMAGES}))"
    rows = db.rows(f"SELECT id FROM layer WHERE sealed AND id IN ({users}) ORDER BY id")
    return [SnapshotId(row[0]) for row in rows]


def tops(db: Database) -> list[Snapshot]:
    """The committed snapshots that are images' layers and on which there is no other one."""
    images = f"SELECT snapshot FROM ({OF_IMAGES})"
    rows = db.rows(
        f"SELECT {_COLUMNS} FROM snapshot WHERE kind = 'committed' AND state = 'ready' AND id IN ({images}) "
        "AND NOT EXISTS (SELECT 1 FROM snapshot AS child WHERE child.parent = snapshot.id "
        f"AND child.id IN ({images}) AND child.kind = 'committed')"
    )
    return [_snapshot(row) for row in rows]


def forget_hidden(db: Transaction, key: str) -> None:
    """Drop a committed snapshot that stood below the one that was just removed, and that nobody else sees."""
    db.execute("DELETE FROM snapshot WHERE key = ?", (key,))


def is_layer(db: Source, number: SnapshotId) -> bool:
    """Whether there is a layer of that number."""
    return bool(_rows(db, "SELECT 1 FROM layer WHERE id = ?", number))


def removed(db: Database) -> list[SnapshotId]:
    """Snapshots marked for removal that nobody is at work on, the last first: it may be mounted on the others."""
    rows = db.rows("SELECT id FROM snapshot WHERE state = 'removing' AND owner IS NULL ORDER BY id DESC")
    return [SnapshotId(row[0]) for row in rows]


def set_usage(db: Transaction, layer_id: SnapshotId, size: int, inodes: int) -> None:
    """Record what a sealed layer occupies."""
    db.execute("UPDATE layer SET size = ?, inodes = ? WHERE id = ?", (size, inodes, layer_id))


def remember_blob(db: Transaction, digest: str, diff_id: str, tar_size: int) -> None:
    """Record which tar is in a compressed layer."""
    db.execute("INSERT OR REPLACE INTO blob VALUES (?, ?, ?)", (digest, diff_id, tar_size))


def known_blob(db: Database, digest: str) -> tuple[str, int] | None:
    """(DiffID, size in bytes) of the tar in a compressed layer that was read before."""
    row = db.row("SELECT diff_id, tar_size FROM blob WHERE digest = ?", digest)
    return (str(row[0]), int(row[1])) if row else None


def blobs(db: Database) -> Iterator[tuple[str, str, int]]:
    """(digest, DiffID, tar's size in bytes) of every compressed layer that was read before."""
    return ((row[0], row[1], row[2]) for row in db.rows("SELECT digest, diff_id, tar_size FROM blob ORDER BY digest"))


def forget_unused_blobs(db: Transaction) -> None:
    """Forget the compressed layers whose tar no layer was made from."""
    db.execute("DELETE FROM blob WHERE diff_id NOT IN (SELECT diff_id FROM layer)")
