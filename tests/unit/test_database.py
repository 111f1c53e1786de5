"""Transactions: whole or not at all, alone or many in one batch, whatever fails in the middle."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from hpmapper.errors import NoSpace, NotFound
from hpmapper.meta.db import Database


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    with closing(Database(tmp_path / "test.db")) as made:
        yield made


def _orphan(db: Database) -> None:
    """Record something that cannot be committed."""
    with db.transaction() as transaction:
        transaction.execute("PRAGMA defer_foreign_keys = ON")
        transaction.execute("INSERT INTO tag VALUES ('name', 'no such image')")


def test_the_parts_of_a_batch_fail_one_by_one(db: Database) -> None:
    def fail() -> None:
        with db.transaction() as transaction:
            transaction.execute("INSERT INTO setting VALUES ('lost', '1')")
            raise NotFound("as it happens")

    with db.batch():
        db.set_setting("first", "1")
        with pytest.raises(NotFound):
            fail()
        db.set_setting("second", "2")
        assert db.setting("first") == "1", "its own thread sees what it did"
    assert [db.setting(key) for key in ("first", "lost", "second")] == ["1", None, "2"]


def test_nobody_else_sees_a_batch_before_its_end(db: Database) -> None:
    seen: list[str | None] = []

    def look() -> None:
        seen.append(db.setting("key"))

    with db.batch():
        db.set_setting("key", "value")
        _in_thread(look)
    _in_thread(look)
    assert seen == [None, "value"]


def _in_thread(act: object) -> None:
    thread = threading.Thread(target=act)  # type: ignore[arg-type]
    thread.start()
    thread.join()


def test_what_comes_afterwards_comes_after_the_batch(db: Database) -> None:
    seen: list[str | None] = []

    def look() -> None:
        _in_thread(lambda: seen.append(db.setting("key")))

    with db.batch():
        db.set_setting("key", "value")
        db.afterwards(look)
        assert seen == []
    assert seen == ["value"]
    db.afterwards(look)
    assert seen == ["value", "value"]


def test_a_failed_batch_leaves_nothing_and_is_not_told_of(db: Database) -> None:
    told: list[int] = []

    def fail() -> None:
        with db.batch():
            db.set_setting("key", "value")
            db.afterwards(lambda: told.append(1))
            _orphan(db)

    with pytest.raises(Exception, match="FOREIGN KEY"):
        fail()
    assert db.setting("key") is None
    assert told == []
    db.set_setting("key", "after")  # neither the lock nor a transaction is left behind
    with db.batch():
        db.set_setting("more", "1")
    assert (db.setting("key"), db.setting("more")) == ("after", "1")


def test_a_failed_commit_leaves_nothing(db: Database) -> None:
    with pytest.raises(Exception, match="FOREIGN KEY"):
        _orphan(db)
    db.set_setting("key", "after")
    with closing(Database(db.path)) as other:
        assert other.setting("key") == "after"
        assert other.row("SELECT count(*) FROM tag")[0] == 0


def test_without_space_a_batch_fails_as_a_whole(db: Database) -> None:
    """SQLite ends the whole transaction then, not only the part."""
    pages = db.row("PRAGMA page_count")[0]
    db.row(f"PRAGMA max_page_count = {pages + 2}")

    def fail() -> None:
        with db.batch():
            db.set_setting("small", "1")
            with pytest.raises(NoSpace):
                db.set_setting("large", "x" * 1_000_000)
            db.set_setting("last", "1")

    with pytest.raises(NoSpace):
        fail()
    assert [db.setting(key) for key in ("small", "large", "last")] == [None, None, None]
    db.row("PRAGMA max_page_count = 100000")
    db.set_setting("key", "after")
    assert db.setting("key") == "after"


def test_reading_sees_one_state(db: Database) -> None:
    db.set_setting("key", "old")
    with db.reading():
        assert db.setting("key") == "old"
        _in_thread(lambda: db.set_setting("key", "new"))
        assert db.setting("key") == "old"
    assert db.setting("key") == "new"
