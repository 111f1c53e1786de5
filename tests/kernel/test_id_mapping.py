"""Roots for user namespaces: files appear under other owners, and what is written under them lies unshifted on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpmapper.config import Config
from hpmapper.engine import Engine
from hpmapper.errors import InvalidArgument, Unsupported
from hpmapper.forest import Forest
from hpmapper.kernel import mount
from hpmapper.labels import GID_LABEL, UID_LABEL
from hpmapper.layer.stream import Expected
from hpmapper.root import open_root
from hpmapper.testing import tars

pytestmark = [pytest.mark.kernel]

LABELS = {UID_LABEL: "0:200000:1000,5000:300000:10", GID_LABEL: "0:200000:65536"}
TAR = tars.tar(
    tars.folder(b"./", 0o755),
    tars.member(b"small", b"small", uid=7, gid=8),
    tars.member(b"large", bytes(range(256)) * 800, uid=5003, gid=9),
)


@pytest.fixture(params=["hpmapper", "overlay", "vfs"])
def engine(request: pytest.FixtureRequest, tmp_path: Path, private_mounts: None) -> Iterator[Engine]:
    config = Config(root=tmp_path / "root", driver=request.param).with_options(["pool.size=400M", "min_free_space=0"])
    with open_root(config) as opened:
        yield opened.engine
        for one in mount.mounts_below(tmp_path):
            if one.fstype == "overlay":
                mount.umount(one.target)
        opened.engine.detach()


def image(engine: Engine, forest: Forest) -> None:
    from io import BytesIO

    recorded = forest.prepare("unpack", "", {})
    forest.first_mounts(recorded)
    forest.apply(recorded.snapshot, lambda: BytesIO(TAR), Expected())
    forest.commit("image", "unpack", {})


def owners(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_uid, status.st_gid


def test_files_appear_under_mapped_owners_and_are_kept_unshifted(engine: Engine) -> None:
    forest = Forest(engine, "containerd")
    image(engine, forest)
    if not engine.driver.capabilities.maps_ids:
        with pytest.raises(Unsupported, match="cannot map the ids"):
            forest.first_mounts(forest.prepare("mapped", "image", LABELS))
        return
    spec = forest.first_mounts(forest.prepare("mapped", "image", LABELS))
    assert spec.type == "bind"
    root = Path(spec.source)
    assert owners(root / "small") == (200007, 200008)
    assert owners(root / "large") == (300003, 200009)
    with (root / "large").open("r+b") as file:
        file.write(b"changed")
    (root / "new").write_bytes(b"new")
    os.chown(root / "new", 200042, 200043)
    os.link(root / "small", root / "again")
    forest.commit("written", "mapped", {})
    plain = Path(forest.first_mounts(forest.prepare("plain", "written", {})).source)
    if not os.path.ismount(plain):  # the overlay driver lets others mount
        plain = engine.mount(forest.get("plain"))
    assert owners(plain / "new") == (42, 43)
    assert owners(plain / "large") == (5003, 9)
    assert owners(plain / "again") == (7, 8)
    assert (plain / "large").read_bytes().startswith(b"changed")


def test_a_mapping_is_made_again_after_the_mount_is_gone(engine: Engine) -> None:
    if not engine.driver.capabilities.maps_ids:
        return  # refused: see above
    forest = Forest(engine, "containerd")
    image(engine, forest)
    root = Path(forest.first_mounts(forest.prepare("mapped", "image", LABELS)).source)
    mount.umount(root)
    assert owners(Path(forest.mounts("mapped").source) / "small") == (200007, 200008)


@pytest.mark.parametrize("text", ["", "0", "0:1", "0:1:0", "0:1:x", "0:-1:5", "0:1:4294967296", "0:1:2:3"])
def test_a_malformed_mapping_is_refused_before_anything_is_made(engine: Engine, text: str) -> None:
    forest = Forest(engine, "containerd")
    with pytest.raises(InvalidArgument, match="mapping of ids"):
        forest.prepare("mapped", "", {UID_LABEL: text, GID_LABEL: "0:1:1"})
    assert list(forest.walk()) == []
