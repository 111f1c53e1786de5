"""Blobs of containerd's content store: from its files where they can be seen, over its socket else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpmapper.containerd.content import ContentStore
from hpmapper.errors import NotFound
from tests.serving import FakeContent

BLOB = os.urandom(3_000_000)


@pytest.fixture
def content(tmp_path: Path) -> FakeContent:
    return FakeContent(files=tmp_path / "content")


@pytest.fixture
def store(content: FakeContent, tmp_path: Path) -> Iterator[ContentStore]:
    with content.served(tmp_path / "c.sock"):
        made = ContentStore(os.fspath(tmp_path / "c.sock"))
        yield made
        made.close()


def read(store: ContentStore, digest: str) -> bytes:
    with store.open(digest, ()) as stream:
        return b"".join(iter(lambda: stream.read(1 << 20), b""))


def test_a_blob_is_read_from_its_file(store: ContentStore, content: FakeContent) -> None:
    assert read(store, content.add(BLOB).digest) == BLOB
    assert not content.reads


def test_a_file_that_cannot_be_seen_is_read_over_the_socket(store: ContentStore, content: FakeContent) -> None:
    digest = content.add(BLOB).digest
    assert content.files is not None
    content.files.rename(content.files.with_name("elsewhere"))
    assert read(store, digest) == BLOB
    assert content.reads == {digest: 1}


def test_a_store_without_files_is_read_over_the_socket(store: ContentStore, content: FakeContent) -> None:
    content.files = None
    digest = content.add(BLOB).digest
    assert read(store, digest) == BLOB
    assert content.reads == {digest: 1}


def test_another_namespaces_blob_is_not_to_be_had(store: ContentStore, content: FakeContent) -> None:
    digest = content.add(BLOB).digest
    del content.blobs[digest]  # its file stays, as in containerd
    with pytest.raises(NotFound, match=digest):
        read(store, digest)
