"""Layers' tars made again from Docker's records: byte for byte, and from nowhere but the layer's root."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from hpmapper.errors import Corrupt
from hpmapper.migrate.tarsplit import assemble
from hpmapper.testing.tars import LINK, SYMLINK, folder, member, tar
from tests.dockerdir import tar_split

LAYER = tar(
    folder(b"etc/"),
    member(b"etc/small", b"small"),
    member(b"etc/empty", b""),
    member(b"./etc/dotted", b"x" * 513),
    member(b"etc/link", kind=SYMLINK, link=b"small"),
    member(b"etc/hard", kind=LINK, link=b"etc/small"),
    member(b"etc/.wh.gone", b""),
    member(b"big", bytes(range(256)) * 9000),
    member("n\u00e4me".encode("latin-1"), b"odd"),
    member("n\u00e4me2".encode(), b"utf-8"),
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = tmp_path / "root"
    with tarfile.open(fileobj=io.BytesIO(LAYER)) as layer:
        layer.extractall(made, filter="fully_trusted")
    return made


@pytest.fixture
def records(tmp_path: Path) -> Path:
    file = tmp_path / "tar-split.json.gz"
    file.write_bytes(tar_split(LAYER))
    return file


def _spoilt(records: Path, *entries: dict[str, object]) -> Path:
    records.write_bytes(gzip.compress("\n".join(map(json.dumps, entries)).encode()))
    return records


def test_the_tar_comes_out_as_it_went_in(records: Path, root: Path) -> None:
    assert b"".join(assemble(records, root)) == LAYER


def test_a_symlink_of_a_lower_layer_is_followed_in_the_root_alone(records: Path, root: Path, tmp_path: Path) -> None:
    """An image with lib → usr/lib and a layer with lib/file; absolute links begin at the root, too."""
    (root / "etc").rename(root / "real")
    (root / "etc").symlink_to("/real")
    assert b"".join(assemble(records, root)) == LAYER


@pytest.mark.parametrize(
    "name", ["../secret", "/../../secret", "up/secret", "abs", "etc/nothing", "etc", "pipe", "etc/small/x"]
)
def test_nothing_outside_is_read(name: str, records: Path, root: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (root / "up").symlink_to("../..")
    (root / "abs").symlink_to(tmp_path / "secret")
    os.mkfifo(root / "pipe")
    with pytest.raises(Corrupt, match="the layer's file"):
        b"".join(assemble(_spoilt(records, {"type": 1, "name": name, "size": 6}), root))


def test_a_file_of_another_size_is_named(records: Path, root: Path) -> None:
    (root / "etc/small").write_text("larger")
    with pytest.raises(Corrupt, match="'etc/small' is not the one that was unpacked"):
        b"".join(assemble(records, root))


@pytest.mark.parametrize(
    "damage",
    [
        b"no gzip",
        b"",
        gzip.compress(b"{"),
        gzip.compress(b"[]"),
        gzip.compress(b'{"type": 9}'),
        gzip.compress(b'{"type": 2, "payload": "!!"}'),
        gzip.compress(b'{"type": 1, "name": "x", "size": -1}'),
        gzip.compress(b'{"type": 1, "name": "a\\u0000b", "size": 1}'),
        tar_split(LAYER)[:-30],
    ],
)
def test_damaged_records_are_refused(damage: bytes, records: Path, root: Path) -> None:
    records.write_bytes(damage)
    try:
        made = b"".join(assemble(records, root))
    except Corrupt:
        return
    assert made == b"", "an empty file has no records, which the DiffID tells"


def test_missing_records_are_refused(tmp_path: Path, root: Path) -> None:
    with pytest.raises(Corrupt, match=r"tar-split\.json\.gz is missing"):
        b"".join(assemble(tmp_path / "tar-split.json.gz", root))


def test_raw_names_are_taken(records: Path, root: Path) -> None:
    raw = base64.b64encode("n\u00e4me".encode("latin-1")).decode()
    assert b"".join(assemble(_spoilt(records, {"type": 1, "name_raw": raw, "size": 3}), root)) == b"odd"
