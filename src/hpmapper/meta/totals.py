"""Running totals of a root, over all processes that work on it: rows of `setting` whose keys begin with "total:"."""

from __future__ import annotations

from hpmapper.meta.db import Database
from hpmapper.meta.snapshots import Transaction

_PREFIX = "total:"

NAMES = {
    "layers_read": "layers that were read",
    "layers_known": "layers that were here already, and not read again",
    "bytes_not_unpacked": "bytes of the tars of layers that were here already",
    "bytes_written": "bytes that new layers newly occupied",
    "bytes_not_written": "bytes of new layers that were stored already",
}
"""What is counted."""


def add(db: Transaction, **amounts: int) -> None:
    """Add to totals, by their `NAMES`."""
    for name, amount in amounts.items():
        db.execute(
            "INSERT INTO setting VALUES (?, ?) "
            "ON CONFLICT (key) DO UPDATE SET value = CAST(value AS INTEGER) + CAST(excluded.value AS INTEGER)",
            (_PREFIX + name, str(amount)),
        )


def totals(db: Database) -> dict[str, int]:
    """All of `NAMES`."""
    rows = db.rows("SELECT key, value FROM setting WHERE key LIKE ?", _PREFIX + "%")
    found = {row[0].removeprefix(_PREFIX): int(row[1]) for row in rows}
    return {name: found.get(name, 0) for name in NAMES}
