"""A database of an older version is brought up to date when it is opened."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from hpmapper.meta import schema, snapshots
from hpmapper.meta.db import Database
from hpmapper.model import Kind


def test_limits_come_with_version_3(tmp_path: Path) -> None:
    Database(tmp_path / "db").close()
    with sqlite3.connect(tmp_path / "db") as older:
        older.execute("DROP TABLE size_limit")
        older.execute("PRAGMA user_version = 2")
    older.close()
    db = Database(tmp_path / "db")
    with db.transaction() as transaction:
        made = snapshots.add(transaction, "one", Kind.ACTIVE, None)
        snapshots.set_size_limit(transaction, made.id, 1 << 20)
    assert snapshots.size_limit(db, made.id) == 1 << 20
    assert db.row("PRAGMA user_version")[0] == schema.VERSION
    with db.transaction() as transaction:
        snapshots.forget(transaction, made.id)
    assert snapshots.size_limit(db, made.id) is None
    db.close()
