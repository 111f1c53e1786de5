"""A database of an older version is brought up to date when it is opened."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from hpmapper.meta import schema
from hpmapper.meta.db import Database

_MADE = re.compile(r"CREATE (TABLE|TRIGGER) (\w+)|ALTER TABLE (\w+) ADD COLUMN (\w+)")


def _schema(db: sqlite3.Connection) -> dict[str, object]:
    """The columns of each table, the text of each index and trigger."""
    tables = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    columns = {table: db.execute(f"PRAGMA table_info({table})").fetchall() for table in tables}
    return columns | dict(db.execute("SELECT name, sql FROM sqlite_master WHERE type <> 'table'"))


def _schema_of(path: Path) -> dict[str, object]:
    with closing(sqlite3.connect(path)) as db:
        return _schema(db)


def _take_back(db: sqlite3.Connection, version: int) -> None:
    """Undo what the migrations from `version` on bring."""
    for later in range(version, schema.VERSION):
        for kind, name, altered, column in _MADE.findall(schema.MIGRATIONS[later]):
            db.execute(f"DROP {kind} IF EXISTS {name}" if kind else f"ALTER TABLE {altered} DROP COLUMN {column}")
    db.execute("DROP INDEX snapshot_layer")
    db.execute("CREATE INDEX snapshot_layer ON snapshot (layer)")
    if version == 4:
        db.execute(schema.MIGRATIONS[3])  # what the next one takes away
    db.execute(f"PRAGMA user_version = {version}")


@pytest.mark.parametrize("version", range(1, schema.VERSION))
def test_an_older_database_becomes_as_a_new_one(tmp_path: Path, version: int) -> None:
    Database(tmp_path / "new").close()
    Database(tmp_path / "old").close()
    with sqlite3.connect(tmp_path / "old") as older:
        older.execute("INSERT INTO setting VALUES ('driver', 'kept')")
        _take_back(older, version)
        assert _schema(older) != _schema_of(tmp_path / "new")
    older.close()
    db = Database(tmp_path / "old")
    assert db.row("PRAGMA user_version")[0] == schema.VERSION
    assert db.setting("driver") == "kept"
    db.close()
    assert _schema_of(tmp_path / "old") == _schema_of(tmp_path / "new")
