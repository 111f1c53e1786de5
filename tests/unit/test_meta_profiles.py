"""The table of start profiles: on a new database and on one that an older hpmapper made."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from hpmapper.errors import NotFound
from hpmapper.meta import images, profiles, schema
from hpmapper.meta.db import Database


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    with closing(Database(tmp_path / "db")) as opened:
        with opened.transaction() as transaction:
            images.add_image(transaction, "sha256:1", b"{}", None, 0)
        yield opened


def test_a_profile_is_stored_replaced_and_dropped(db: Database) -> None:
    assert profiles.find(db, "sha256:1") is None
    for data in (b"one", b"two"):
        with db.transaction() as transaction:
            profiles.store(transaction, "sha256:1", data)
    found = profiles.find(db, "sha256:1")
    assert found is not None
    assert found[0] == b"two"
    with db.transaction() as transaction:
        assert profiles.drop(transaction, "sha256:1")
        assert not profiles.drop(transaction, "sha256:1")


def test_it_goes_with_the_image(db: Database) -> None:
    with db.transaction() as transaction:
        profiles.store(transaction, "sha256:1", b"one")
        images.forget_image(transaction, "sha256:1")
    assert profiles.find(db, "sha256:1") is None
    with pytest.raises(NotFound), db.transaction() as transaction:
        profiles.store(transaction, "sha256:1", b"late")


def test_an_older_database_gets_the_table(tmp_path: Path) -> None:
    before = max(version for version, script in schema.MIGRATIONS.items() if "start_profile" in script)
    with closing(Database(tmp_path / "db")):
        pass
    with closing(sqlite3.connect(tmp_path / "db")) as raw:
        raw.execute("DROP TABLE start_profile")
        raw.execute(f"PRAGMA user_version = {before}")
    with closing(Database(tmp_path / "db")) as opened:
        assert profiles.find(opened, "sha256:1") is None
