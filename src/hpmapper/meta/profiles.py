"""Start profiles in the database: one for a chain of layers, as bytes that `hpmapper.cache.profile` makes and reads.

By chain ID (OCI image spec), so that containers have the same one whoever starts them: an image of ours, containerd's
of the same layers, or Docker's.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from hpmapper.errors import NotFound
from hpmapper.meta import snapshots
from hpmapper.meta.db import Database
from hpmapper.meta.snapshots import Snapshot, Transaction
from hpmapper.model import SnapshotId

_HERE = f"""
SELECT key FROM snapshot WHERE kind = 'committed' AND state = 'ready'
UNION SELECT chain_id FROM chain
UNION SELECT chain_id FROM ({snapshots.OF_IMAGES})
"""
"""The chain IDs of what is here."""


class Stored(NamedTuple):
    """A profile in the database: the layers' chain ID, its bytes, when it was recorded (nanoseconds since 1970)."""

    chain_id: str
    profile: bytes
    recorded: int


def chain_of(db: Database, snapshot: SnapshotId | None) -> tuple[str, SnapshotId] | None:
    """The chain ID of the nearest committed snapshot, from this one downwards, that has one; and that snapshot.

    Below a container of Docker's lies a snapshot with the few files that Docker writes for it; the image comes next.
    """
    while snapshot is not None:
        row = snapshots.by_id(db, snapshot)
        found = _chain_id(db, row)
        if found:
            return found, row.id
        snapshot = row.parent
    return None


def _chain_id(db: Database, row: Snapshot) -> str | None:
    if row.layer is None:
        return None
    known = snapshots.chain_id_of(db, row)
    if known is None:
        named = db.row(f"SELECT chain_id FROM ({snapshots.OF_IMAGES}) WHERE snapshot = ?", row.id)
        known = str(named[0]) if named else None
    return known


def labelled(db: Database, chain_id: str) -> list[Snapshot]:
    """The committed snapshots that containerd knows by that chain ID."""
    rows = db.rows(f"SELECT DISTINCT snapshot FROM ({snapshots.OF_IMAGES}) WHERE chain_id = ?", chain_id)
    found = [snapshots.by_id(db, SnapshotId(row[0])) for row in rows]
    return [one for one in found if one.layer is not None]


def find(db: Database, chain_id: str) -> tuple[bytes, int] | None:
    """A chain's profile and when it was recorded, in nanoseconds since 1970; None if it has none."""
    row = db.row("SELECT profile, recorded FROM chain_profile WHERE chain_id = ?", chain_id)
    return (bytes(row[0]), int(row[1])) if row else None


def all_of(db: Database) -> list[Stored]:
    """Every profile, by chain ID."""
    rows = db.rows("SELECT chain_id, profile, recorded FROM chain_profile ORDER BY chain_id")
    return [Stored(row[0], bytes(row[1]), int(row[2])) for row in rows]


def store(db: Transaction, chain_id: str, profile: bytes) -> None:
    """Replace a chain's profile.

    Raises:
        NotFound: there is no such chain (any more).
    """
    query = f"INSERT OR REPLACE INTO chain_profile SELECT ?1, ?2, ?3 WHERE ?1 IN ({_HERE})"
    if not db.execute(query, (chain_id, profile, time.time_ns())).rowcount:
        raise NotFound(f"there are no layers {chain_id} here", hint="hpmapper profile ls shows what has a profile")


def drop(db: Transaction, chain_id: str) -> bool:
    """Forget a chain's profile; whether it had one."""
    return db.execute("DELETE FROM chain_profile WHERE chain_id = ?", (chain_id,)).rowcount > 0


def forget_unused(db: Transaction) -> int:
    """Forget the profiles of chains that are gone; returns how many."""
    return db.execute(f"DELETE FROM chain_profile WHERE chain_id NOT IN ({_HERE})").rowcount
