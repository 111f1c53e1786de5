"""A chain that was looked up is remembered, and forgotten once it is another one, whoever changed it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from hpmapper.errors import AlreadyExists, NotFound
from hpmapper.meta import snapshots
from hpmapper.meta.db import Database
from hpmapper.meta.snapshots import Layer, Snapshot
from hpmapper.model import Kind, SnapshotId

_SPARE = SnapshotId(90), SnapshotId(91)
"""Layers that nothing uses yet."""


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    with closing(Database(tmp_path / "test.db")) as made:
        with made.transaction() as transaction:
            for spare in _SPARE:
                snapshots.add_layer(transaction, _layer(spare), {})
        yield made


@pytest.fixture
def other(db: Database) -> Iterator[Database]:
    """The same database, as another process has it."""
    with closing(Database(db.path)) as opened:
        yield opened


def _layer(number: SnapshotId) -> Layer:
    return Layer(number, f"sha256:{number}", False, None, 0, 0, 0, damaged=False)


def _commit(db: Database, key: str, parent: Snapshot | None = None) -> Snapshot:
    with db.transaction() as transaction:
        number = snapshots.begin(transaction, key, Kind.COMMITTED, parent, "owner")
        snapshots.add_layer(transaction, _layer(number), {})
        snapshots.committed(transaction, number, key, number, parent)
    return snapshots.get(db, key)


def _replace(db: Database, old: Snapshot, new: SnapshotId) -> None:
    assert old.layer is not None
    with db.transaction() as transaction:
        snapshots.replace_layer(transaction, old.layer, new)


def test_a_replaced_layer_is_seen_by_all(db: Database, other: Database) -> None:
    low = _commit(db, "low")
    top = _commit(db, "top", low)
    assert [snapshots.layers_below(one, top.id) for one in (db, other)] == [[top.id, low.id]] * 2
    _replace(other, low, _SPARE[0])
    assert [snapshots.layers_below(one, top.id) for one in (db, other)] == [[top.id, _SPARE[0]]] * 2
    assert snapshots.layers_below(db, low.id) == [_SPARE[0]]
    _replace(db, top, _SPARE[1])
    assert [snapshots.layers_below(one, top.id) for one in (db, other)] == [[*reversed(_SPARE)]] * 2


def test_what_was_remembered_is_not_the_callers(db: Database) -> None:
    top = _commit(db, "top")
    snapshots.layers_below(db, top.id).clear()
    assert snapshots.layers_below(db, top.id) == [top.id]


def test_what_is_not_recorded_yet_is_not_remembered(db: Database, other: Database) -> None:
    top = _commit(db, "top")

    def look_at_a_replaced_one() -> None:
        with db.transaction() as transaction:
            snapshots.replace_layer(transaction, top.id, _SPARE[0])
            assert snapshots.layers_below(db, top.id) == [_SPARE[0]], "what this thread itself did"
            assert snapshots.layers_below(other, top.id) == [top.id]
            raise NotFound("as it happens")

    with pytest.raises(NotFound):
        look_at_a_replaced_one()
    assert [snapshots.layers_below(one, top.id) for one in (db, other)] == [[top.id]] * 2
    with db.batch():
        with pytest.raises(NotFound):
            look_at_a_replaced_one()
        assert snapshots.layers_below(db, top.id) == [top.id]
    assert [snapshots.layers_below(one, top.id) for one in (db, other)] == [[top.id]] * 2


def test_a_number_that_was_taken_back_may_be_another_snapshots(db: Database) -> None:
    taken_back: list[SnapshotId] = []

    def make_and_fail() -> None:
        with db.batch():
            taken_back.append(_commit(db, "taken back").id)
            assert snapshots.layers_below(db, taken_back[0]) == taken_back
            raise NotFound("as it happens")

    with pytest.raises(NotFound):
        make_and_fail()
    low = _commit(db, "low")
    top = _commit(db, "top", low)
    assert taken_back == [low.id]
    assert snapshots.layers_below(db, top.id) == [top.id, low.id]


def test_one_state_is_read_from_first_to_last(db: Database, other: Database) -> None:
    top = _commit(db, "top")
    with db.reading():
        assert snapshots.layers_below(db, top.id) == [top.id]
        _replace(other, top, _SPARE[0])
        assert snapshots.layers_below(db, top.id) == [top.id]
    assert snapshots.layers_below(db, top.id) == [_SPARE[0]]


def test_only_so_many_are_remembered(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "_CHAINS_KEPT", 2)
    made = [_commit(db, f"layer-{number}") for number in range(5)]
    assert [snapshots.layers_below(db, one.id) for one in made] == [[one.id] for one in made]
    assert len(db.chains) <= 2


def test_nothing_is_made_on_a_snapshot_that_is_gone(db: Database) -> None:
    def add(key: str, parent: Snapshot) -> None:
        with db.transaction() as transaction:
            snapshots.add(transaction, key, Kind.ACTIVE, parent)

    top = _commit(db, "top")
    add("first", top)
    with pytest.raises(AlreadyExists, match="'first' exists"):
        add("first", top)
    with db.transaction() as transaction:
        snapshots.forget(transaction, snapshots.get(db, "first").id)
        snapshots.begin_removal(transaction, top, "owner")
    with pytest.raises(NotFound, match="'top' was removed meanwhile"):
        add("second", top)
    with db.transaction() as transaction:
        snapshots.forget(transaction, top.id)
    with pytest.raises(NotFound, match="'top' was removed meanwhile"):
        add("second", top)
