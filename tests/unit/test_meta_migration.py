"""A database of an older version is brought up to date when it is opened."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from hpmapper.meta import schema
from hpmapper.meta.db import Database

_MADE = re.compile(r"CREATE TABLE (\w+)|ALTER TABLE (\w+) ADD COLUMN (\w+)")


def _columns(db: sqlite3.Connection) -> dict[str, list[tuple[object, ...]]]:
    tables = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    return {table: db.execute(f"PRAGMA table_info({table})").fetchall() for table in tables}


def _columns_of(path: Path) -> dict[str, list[tuple[object, ...]]]:
    with closing(sqlite3.connect(path)) as db:
        return _columns(db)


def _take_back(db: sqlite3.Connection, version: int) -> None:
    """Undo what the migrations from `version` on bring."""
    for later in range(version, schema.VERSION):
        for table, altered, column in _MADE.findall(schema.MIGRATIONS[later]):
            db.execute(f"DROP TABLE IF EXISTS {table}" if table else f"ALTER TABLE {altered} DROP COLUMN {column}")
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
        assert _columns(older) != _columns_of(tmp_path / "new")
    older.close()
    db = Database(tmp_path / "old")
    assert db.row("PRAGMA user_version")[0] == schema.VERSION
    assert db.setting("driver") == "kept"
    db.close()
    assert _columns_of(tmp_path / "old") == _columns_of(tmp_path / "new")
