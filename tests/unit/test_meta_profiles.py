"""The table of start profiles: on a new database and on one that an older hpmapper made."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from hpmapper.errors import NotFound
from hpmapper.meta import images, profiles, schema, snapshots
from hpmapper.meta.db import Database
from hpmapper.meta.snapshots import Layer, Snapshot
from hpmapper.model import Kind, SnapshotId

CHAIN = "sha256:" + "1" * 64


def committed(db: Database, key: str, parent: Snapshot | None = None) -> Snapshot:
    """A committed snapshot of an empty layer."""
    with db.transaction() as transaction:
        new = snapshots.add(transaction, f"making {key}", Kind.ACTIVE, parent)
        snapshots.add_layer(
            transaction,
            Layer(new.id, "", bound=False, digest=None, tar_size=0, size=0, inodes=0, damaged=False),
            {},
        )
        snapshots.committed(transaction, new.id, key, new.id, parent)
    return snapshots.get(db, key)


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    with closing(Database(tmp_path / "db")) as opened:
        committed(opened, CHAIN)
        yield opened


def test_a_profile_is_stored_replaced_and_dropped(db: Database) -> None:
    assert profiles.find(db, CHAIN) is None
    for data in (b"one", b"two"):
        with db.transaction() as transaction:
            profiles.store(transaction, CHAIN, data)
    found = profiles.find(db, CHAIN)
    assert found is not None
    assert found[0] == b"two"
    assert [one.chain_id for one in profiles.all_of(db)] == [CHAIN]
    with db.transaction() as transaction:
        assert profiles.drop(transaction, CHAIN)
        assert not profiles.drop(transaction, CHAIN)


def test_it_goes_with_the_layers(db: Database) -> None:
    with db.transaction() as transaction:
        profiles.store(transaction, CHAIN, b"one")
        assert profiles.forget_unused(transaction) == 0
        snapshots.forget_unused_chains(transaction)
        assert profiles.forget_unused(transaction) == 1
    with pytest.raises(NotFound), db.transaction() as transaction:
        profiles.store(transaction, CHAIN, b"late")


def test_layers_that_containerd_unpacked_itself_are_known_by_its_label(db: Database) -> None:
    other = "sha256:" + "2" * 64
    one = committed(db, "containerd:k8s.io/7/x")
    assert profiles.chain_of(db, one.id) is None
    with db.transaction() as transaction:
        snapshots.set_labels(transaction, one.id, {"containerd.io/snapshot.ref": other})
        profiles.store(transaction, other, b"one")
        assert profiles.forget_unused(transaction) == 0
    assert profiles.chain_of(db, one.id) == (other, one.id)
    assert [found.id for found in profiles.labelled(db, other)] == [one.id]


def test_what_lies_between_a_container_and_its_image_is_passed_over(db: Database) -> None:
    image = snapshots.get(db, CHAIN)
    init = committed(db, "docker:ro/1-init", image)
    with db.transaction() as transaction:
        container = snapshots.add(transaction, "docker:rw/1", Kind.ACTIVE, init)
    assert profiles.chain_of(db, container.id) == (CHAIN, image.id)
    assert profiles.chain_of(db, None) is None


def test_profiles_of_an_older_database_are_kept(tmp_path: Path) -> None:
    with closing(Database(tmp_path / "db")) as opened:
        top = committed(opened, CHAIN).id
        with opened.transaction() as transaction:
            images.add_image(transaction, "sha256:1", b"{}", SnapshotId(top), 0)
    with closing(sqlite3.connect(tmp_path / "db")) as raw:
        raw.execute("DROP TRIGGER chain_changed")
        raw.execute("DROP TABLE chain_profile")
        raw.executescript(schema.MIGRATIONS[3])
        raw.execute("INSERT INTO start_profile VALUES ('sha256:1', x'6f6e65', 5)")
        raw.execute("PRAGMA user_version = 4")
        raw.commit()
    with closing(Database(tmp_path / "db")) as opened:
        assert profiles.find(opened, CHAIN) == (b"one", 5)
