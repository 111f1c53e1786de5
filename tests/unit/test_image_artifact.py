"""Start profiles as OCI artifacts."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from hpmapper.errors import Corrupt, InvalidArgument, NotFound
from hpmapper.image import artifact

CHAIN = "sha256:" + "a" * 64


def unpacked(path: Path) -> Path:
    top = path.with_suffix(".layout")
    with tarfile.open(path) as tar:
        tar.extractall(top, filter="data")
    return top


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    artifact.save(tmp_path / "p.tar", CHAIN, b'{"version": 1}')
    assert artifact.read(tmp_path / "p.tar") == (CHAIN, b'{"version": 1}')
    assert artifact.read(unpacked(tmp_path / "p.tar")) == (CHAIN, b'{"version": 1}')


def test_it_is_an_artifact(tmp_path: Path) -> None:
    artifact.save(tmp_path / "p.tar", CHAIN, b"{}2")
    top = unpacked(tmp_path / "p.tar")
    (entry,) = json.loads((top / "index.json").read_text())["manifests"]
    manifest = json.loads((top / "blobs/sha256" / entry["digest"][7:]).read_text())
    assert manifest["artifactType"] == entry["artifactType"] == "application/vnd.hpmapper.start-profile.v1+json"
    assert manifest["config"]["mediaType"] == "application/vnd.oci.empty.v1+json"
    assert (top / "blobs/sha256" / manifest["config"]["digest"][7:]).read_bytes() == b"{}"


def test_what_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        artifact.read(tmp_path / "none")
    (tmp_path / "text").write_text("text")
    with pytest.raises(Corrupt, match="no OCI archive"):
        artifact.read(tmp_path / "text")
    artifact.save(tmp_path / "p.tar", CHAIN, b"{}2")
    top = unpacked(tmp_path / "p.tar")
    for blob in (top / "blobs/sha256").iterdir():
        if blob.read_bytes() == b"{}2":
            blob.write_bytes(b"{}3")
    with pytest.raises(Corrupt, match="other contents"):
        artifact.read(top)
    (top / "index.json").write_text('{"schemaVersion": 2, "manifests": []}')
    with pytest.raises(InvalidArgument, match="no start profile"):
        artifact.read(top)
    (top / "index.json").write_text("{")
    with pytest.raises(Corrupt, match="damaged"):
        artifact.read(top)
    with pytest.raises(NotFound, match="directory"):
        artifact.save(tmp_path / "no" / "p.tar", CHAIN, b"")
