"""The benchmark's images: layouts that readers accept, versions that differ in exactly what they should."""

from __future__ import annotations

import gzip
import hashlib
import json
import tarfile
from pathlib import Path

import pytest

from hpmapper.bench import images
from hpmapper.errors import InvalidArgument, NotFound, Unsupported

FILES = 50


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root file system of many small files, a device directory and links."""
    root = tmp_path / "root"
    for folder in ("etc", "dev", "usr/lib"):
        (root / folder).mkdir(parents=True)
    for number in range(FILES):
        (root / "usr/lib" / f"file{number:02}").write_bytes(bytes([number]) * (number + 1))
    (root / "etc/empty").touch()
    (root / "etc/link").symlink_to("../usr/lib/file01")
    (root / "etc/hard").hardlink_to(root / "usr/lib/file02")
    (root / "dev/node").write_bytes(b"not for images")
    return root


def _layout(root: Path, layout: Path) -> Path:
    images.write_layout(layout, "example", [images.write_layer(layout, root, "example")])
    return layout


def _contents(layout: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for blob in images.layer_blobs(layout):
        with tarfile.open(blob) as archive:
            for member in archive:
                data = archive.extractfile(member) if member.isreg() else None
                found[member.name] = data.read() if data else b""
    return found


def test_every_digest_in_a_layout_is_right(root: Path, tmp_path: Path) -> None:
    layout = _layout(root, tmp_path / "layout")
    for blob in (layout / "blobs/sha256").iterdir():
        assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name
    [layer] = images.layer_blobs(layout)
    entry = json.loads((layout / "index.json").read_bytes())["manifests"][0]
    document = json.loads(images._blob(layout, entry).read_bytes())
    config = json.loads(images._blob(layout, document["config"]).read_bytes())
    diff_id = hashlib.sha256(gzip.decompress(layer.read_bytes())).hexdigest()
    assert config["rootfs"]["diff_ids"] == [f"sha256:{diff_id}"]


def test_a_layer_is_the_same_whenever_it_is_made(root: Path, tmp_path: Path) -> None:
    first, second = (images.write_layer(tmp_path / name, root, "") for name in ("one", "two"))
    assert first == second


def test_a_layer_leaves_devices_out(root: Path, tmp_path: Path) -> None:
    names = _contents(_layout(root, tmp_path / "layout"))
    assert "dev" in names
    assert "dev/node" not in names


def test_a_changed_version_differs_in_a_tenth_of_the_files(root: Path, tmp_path: Path) -> None:
    before = _contents(_layout(root, tmp_path / "a"))
    changed = images.change_files(root)
    after = _contents(_layout(root, tmp_path / "b"))
    different = [name for name in before if before[name] != after[name]]
    assert before.keys() == after.keys()
    assert changed == FILES // images.CHANGED_PART
    assert 0 < len(different) <= changed
    assert all(len(before[name]) == len(after[name]) for name in different)


def test_an_image_is_built_once(root: Path, tmp_path: Path) -> None:
    built: list[Path] = []

    def build(new: Path, scratch: Path) -> None:
        built.append(scratch)
        _layout(root, new)

    for _ in range(2):
        assert images.layer_blobs(images.cached(tmp_path / "cache/example", build))
    assert len(built) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["example"]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def build(new: Path, scratch: Path) -> None:
        raise Unsupported("no")

    with pytest.raises(Unsupported):
        images.cached(tmp_path / "cache/example", build)
    assert not list((tmp_path / "cache").iterdir())


def test_deletions_are_not_flattened(root: Path, tmp_path: Path) -> None:
    (root / "etc/.wh.gone").touch()
    with pytest.raises(InvalidArgument, match="gone"):
        images.flatten(_layout(root, tmp_path / "layout"), tmp_path / "flat")


def test_a_program_that_fails_is_named_with_its_last_words() -> None:
    with pytest.raises(Unsupported, match="sh failed with status 3: no luck"):
        images.run(["sh", "-c", "echo no luck >&2; exit 3"])
    with pytest.raises(NotFound, match="no-such-program"):
        images.run(["no-such-program"])
