"""The object store's way in: what is written where, and what is believed of a file that is there already."""

from __future__ import annotations

import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
from blake3 import blake3

from hpmapper.model import ObjectDigest
from hpmapper.store.objects import IsObject, ObjectStore, Staging

DATA = b"some data" * 1000
DIGEST = ObjectDigest(blake3(DATA).digest())
LARGE = bytes(9 << 20)

Stage = Callable[[IsObject], Staging]


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    made = ObjectStore(tmp_path / "o")
    made.make()
    return made


@pytest.fixture
def stage(tmp_path: Path, store: ObjectStore) -> Stage:
    """An ingest's part in the store; it is told what the database names."""

    def made(is_object: IsObject) -> Staging:
        number = len(list(tmp_path.iterdir()))
        (tmp_path / f"work{number}").mkdir()
        return Staging(store, tmp_path / f"work{number}", BytesIO(), 0, is_object)

    return made


def nothing(digest: ObjectDigest) -> bool:
    return False


def everything(digest: ObjectDigest) -> bool:
    return True


def put(staging: Staging, data: bytes) -> ObjectDigest:
    digest, name = staging.put((data,), len(data), None)
    assert digest == name == blake3(data).digest()
    return ObjectDigest(name)


def lying_there(store: ObjectStore, data: bytes) -> os.stat_result:
    """Put `data` where DIGEST's object is to be."""
    path = Path(store.path(DIGEST))
    path.write_bytes(data)
    return path.stat()


def inode(store: ObjectStore) -> int:
    return os.stat(store.path(DIGEST)).st_ino


@pytest.mark.parametrize("data", [DATA, LARGE, b""])
def test_a_new_object(store: ObjectStore, stage: Stage, data: bytes) -> None:
    with stage(nothing) as staging:
        digest = put(staging, data)
        assert put(staging, data) == digest
        staging.publish()
    assert list(store) == [digest]
    assert store.verify(digest)
    assert os.stat(store.path(digest)).st_mode & 0o777 == 0o444
    assert staging.objects == {digest: len(data)}
    assert staging.new_bytes == len(data)


def test_what_the_database_names_is_not_written_again(store: ObjectStore, stage: Stage) -> None:
    there = lying_there(store, DATA)
    with stage(everything) as staging:
        put(staging, DATA)
        staging.publish()
    assert inode(store) == there.st_ino
    assert staging.objects == {DIGEST: len(DATA)}
    assert staging.new_bytes == 0


@pytest.mark.parametrize("found", [DATA, DATA[:100], b"other data"])
def test_what_it_does_not_name_is_replaced_and_not_before_the_sync(
    store: ObjectStore, stage: Stage, found: bytes
) -> None:
    """It may be rubbish, or another ingest's that may yet fail: until ours is durable, nobody touches it."""
    there = lying_there(store, found)
    with stage(nothing) as staging:
        put(staging, DATA)
        assert Path(store.path(DIGEST)).read_bytes() == found
        staging.publish()
    assert inode(store) != there.st_ino
    assert store.verify(DIGEST)
    assert staging.new_bytes == len(DATA)


def test_a_damaged_object_is_replaced(store: ObjectStore, stage: Stage) -> None:
    lying_there(store, DATA[:-1])
    with stage(everything) as staging:
        put(staging, DATA)
        staging.publish()
    assert store.verify(DIGEST)


def test_two_at_once(store: ObjectStore, stage: Stage) -> None:
    """Each stands on its own: whichever is published last, and whether the other fails, the object is whole."""
    with stage(nothing) as first, stage(nothing) as second:
        put(first, DATA)
        put(second, DATA)
        second.publish()
        assert store.verify(DIGEST)
        first.publish()
    assert store.verify(DIGEST)
    assert list(store) == [DIGEST]


def test_a_sparse_file(store: ObjectStore, stage: Stage) -> None:
    with stage(nothing) as staging:
        _, name = staging.put((b"abc",), 1 << 20, [(4096, 3)])
        staging.publish()
    digest = ObjectDigest(name)
    assert digest == blake3(bytes(4096) + b"abc" + bytes((1 << 20) - 4099)).digest()
    assert store.size(digest) == 1 << 20
    assert store.verify(digest)
