"""fsck: each stated invariant is broken on purpose, found, repaired, and found whole the second time."""

from __future__ import annotations

import hashlib
import io
import os
import sqlite3
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from hpmapper.check import Finding, check
from hpmapper.config import Config
from hpmapper.drivers.hpmapper import HpmapperDriver
from hpmapper.engine import Blob, Engine, chain_id
from hpmapper.erofs.reader import Map
from hpmapper.layer.stream import Expected
from hpmapper.meta import images, snapshots
from hpmapper.meta.snapshots import Layer, Snapshot
from hpmapper.model import ObjectDigest
from hpmapper.root import open_root

pytestmark = pytest.mark.kernel

LARGE = os.urandom(100_000)


def layer_tar(files: dict[str, bytes]) -> bytes:
    """A layer's tar with these files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


TARS = [layer_tar({"large": LARGE, "small": b"small"}), layer_tar({"second": LARGE[::-1], "other": b"x" * 2000})]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    config = Config(root=tmp_path / "root", driver="hpmapper").with_options(["pool.size=400M", "min_free_space=0"])
    with open_root(config) as opened:
        yield opened.engine
        opened.engine.detach()


def bring(engine: Engine) -> Snapshot:
    """Two layers, as a pull brings them; returns the upper one's snapshot."""
    parent = None
    for tar in TARS:
        diff_id = f"sha256:{hashlib.sha256(tar).hexdigest()}"
        parent = engine.take_layer(parent, Blob(Expected(diff_id), partial(io.BytesIO, tar))).snapshot
    assert parent is not None
    engine.finish(parent)
    with engine.db.transaction() as transaction:
        images.add_image(transaction, "sha256:image", b"{}", parent.id, 0)
    return parent


def bottom_of(engine: Engine, top: Snapshot) -> Snapshot:
    assert top.parent is not None
    return snapshots.by_id(engine.db, top.parent)


def home(engine: Engine) -> Path:
    assert isinstance(engine.driver, HpmapperDriver)
    return engine.driver.home


def layer_of(engine: Engine, snapshot: Snapshot) -> Layer:
    """The layer that the snapshot has now."""
    now = snapshots.by_id(engine.db, snapshot.id)
    assert now.layer is not None
    return snapshots.layer(engine.db, now.layer)


def object_of(engine: Engine, size: int) -> ObjectDigest:
    return next(digest for digest, found in snapshots.objects(engine.db) if found == size)


def object_path(engine: Engine, digest: ObjectDigest) -> Path:
    return home(engine) / "o" / digest.hex()[:2] / digest.hex()[2:]


def repaired(engine: Engine) -> list[Finding]:
    """What was wrong; afterwards nothing is."""
    seen = list(check(engine))
    assert all(not finding.repair for finding in seen)
    mended = list(check(engine, repair=True))
    assert [(f.invariant, f.subject, f.problem) for f in mended] == [(f.invariant, f.subject, f.problem) for f in seen]
    assert all(finding.repair for finding in mended)
    return mended


def assert_whole(engine: Engine, top: Snapshot) -> None:
    assert list(check(engine)) == []
    view = engine.prepare("whole", top)
    root = engine.mount(view)
    assert (root / "large").read_bytes() == LARGE
    assert (root / "second").read_bytes() == LARGE[::-1]
    assert (root / "small").read_bytes() == b"small"
    engine.remove(view)


def test_a_whole_root_has_no_findings(engine: Engine) -> None:
    assert_whole(engine, bring(engine))


def test_lost_storage_of_a_snapshot_is_made_anew(engine: Engine) -> None:
    top = bring(engine)
    active = engine.prepare("active", top)
    engine.driver.remove(active.id)
    (finding,) = repaired(engine)
    assert (finding.invariant, finding.subject) == ("snapshot", f"snapshot {active.id}")
    assert list(engine.changes(active)) == []
    assert_whole(engine, top)


def test_storage_that_nothing_names_is_removed(engine: Engine) -> None:
    top = bring(engine)
    for name in ("a/900", "l/901"):
        (home(engine) / name / "u").mkdir(parents=True)
    stray = ObjectDigest(bytes(32))
    object_path(engine, stray).parent.mkdir(exist_ok=True)
    object_path(engine, stray).write_bytes(b"stray")
    assert {finding.invariant for finding in repaired(engine)} == {"unnamed"}
    assert not (home(engine) / "a/900").exists()
    assert not object_path(engine, stray).exists()
    assert_whole(engine, top)


@pytest.mark.parametrize("damage", ["flipped", "shorter", "missing"])
def test_a_damaged_object_is_healed_by_the_next_pull(engine: Engine, damage: str) -> None:
    top = bring(engine)
    path = object_path(engine, object_of(engine, len(LARGE)))
    if damage == "missing":
        path.unlink()
    else:
        path.chmod(0o600)
        path.write_bytes(LARGE[:-1] + bytes([LARGE[-1] ^ 1]) if damage == "flipped" else LARGE[:5000])
    findings = list(check(engine, repair=True))
    assert findings[0].invariant == "object"
    assert all(finding.repair for finding in findings)
    assert layer_of(engine, bottom_of(engine, top)).damaged
    assert bring(engine).key == top.key
    assert_whole(engine, top)


def test_a_damaged_map_is_made_again_from_its_tar(engine: Engine) -> None:
    top = bring(engine)
    bottom = bottom_of(engine, top)
    before = layer_of(engine, bottom)
    path = home(engine) / "l" / str(before.id) / "map"
    data = bytearray(path.read_bytes())
    data[1200] ^= 1
    path.write_bytes(data)
    findings = repaired(engine)
    assert findings[0].invariant == "layer"
    assert findings[0].repair == "made again from its own tar"
    assert layer_of(engine, bottom).digest == before.digest
    assert layer_of(engine, bottom).id != before.id
    engine.rubbish.collect()
    assert_whole(engine, top)


def test_a_damaged_recipe_waits_for_the_next_pull(engine: Engine) -> None:
    top = bring(engine)
    path = home(engine) / "l" / str(layer_of(engine, top).id) / "tar"
    path.write_bytes(path.read_bytes()[:-10])
    (finding,) = list(check(engine, repair=True))
    assert (finding.invariant, finding.repair) == ("tar", "marked: pull the images that need it again")
    bring(engine)
    engine.rubbish.collect()
    assert_whole(engine, top)


def test_a_damaged_image_map_is_dropped_and_made_again(engine: Engine) -> None:
    top = bring(engine)
    (image,) = (home(engine) / "i").iterdir()
    with Map.open(image / "map") as found:
        owner = found.root.address + 24
    data = bytearray((image / "map").read_bytes())
    data[owner] ^= 1
    (image / "map").write_bytes(data)
    (finding,) = repaired(engine)
    assert finding.invariant == "derived"
    assert_whole(engine, top)


def test_a_damaged_database_is_said(engine: Engine) -> None:
    bring(engine)
    other = sqlite3.connect(engine.db.path)  # one that does not mind references
    other.execute("UPDATE image SET top = 999")
    other.commit()
    other.close()
    assert "database" in {finding.invariant for finding in check(engine)}


def test_the_key_of_a_layer_is_its_chain_id(engine: Engine) -> None:
    top = bring(engine)
    bottom = bottom_of(engine, top)
    assert bottom.key == layer_of(engine, bottom).diff_id
    assert top.key == chain_id(bottom.key, layer_of(engine, top).diff_id)
