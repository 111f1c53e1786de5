"""The zfs driver on real ZFS, which only a guest has: the contract, its quick diff, and what may be missing."""

from __future__ import annotations

import io
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpmapper.config import Config
from hpmapper.drivers.directory import CONTENTS
from hpmapper.drivers.registry import by_name, probe
from hpmapper.drivers.zfs import FSNAME, ZfsDriver, driver
from hpmapper.drivers.zfs.diff import suspects
from hpmapper.errors import FailedPrecondition, InvalidArgument, NotFound, Unsupported
from hpmapper.kernel import dmudev, loop, mount
from hpmapper.layer.compare import compare
from hpmapper.layer.diff import write_tar
from hpmapper.layer.scan import scan
from hpmapper.layer.stream import Expected
from hpmapper.model import SnapshotId
from hpmapper.pool.base import MIB, PoolConfig, PoolKind
from hpmapper.pool.tools import run_tool
from hpmapper.root import open_root, remove_root
from hpmapper.store.workspace import workspace
from hpmapper.testing import contract
from hpmapper.testing.tars import LINK, folder, member, tar
from tests import zpools
from tests.randomly import do_something

pytestmark = [pytest.mark.kernel, pytest.mark.guest("zfs")]
short = pytest.mark.guest("zfs", short=True)

DEEP = ("lifecycle.many_layers", "graphtest.deep_layer_read", "containerd.mount_128_layers")
CASES = sorted([*contract.CASES, *contract.LIMITS], key=lambda case: contract.name_of(case) in DEEP)
"""Those that take minutes come last: each layer is several programs, which start slowly in a guest."""

BASE, TOP, ONE, TWO = map(SnapshotId, range(1, 5))


@pytest.fixture
def fsname(tmp_path: Path) -> Iterator[str]:
    with zpools.dataset(tmp_path) as name:
        yield name


@pytest.fixture
def made(tmp_path: Path, fsname: str) -> Iterator[ZfsDriver]:
    found = ZfsDriver(tmp_path / "data", fsname)
    found.attach()
    yield found
    found.detach()


def _ingest(made: ZfsDriver, *members: bytes, layer: SnapshotId = BASE, chain: tuple[SnapshotId, ...] = ()) -> None:
    with workspace(made.scratch) as work:
        made.ingest(layer, lambda: chain, io.BytesIO(tar(*members)), work, Expected(), None, lambda digest: False)


def _diff(made: ZfsDriver, snapshot: SnapshotId, *chain: SnapshotId) -> bytes:
    out = io.BytesIO()
    made.write_diff(snapshot, chain, out)
    return out.getvalue()


def _walked(made: ZfsDriver, snapshot: SnapshotId, below: str) -> bytes:
    """The diff as a comparison of both whole trees gives it."""
    top = made.root(snapshot)
    with mount.detached("zfs", below, attributes=1) as layer:
        tree = compare(scan(os.fsencode(layer / CONTENTS), overlay=False), scan(os.fsencode(top), overlay=False))
    out = io.BytesIO()
    write_tar(tree, lambda path: (top / os.fsdecode(path)).open("rb"), out)
    return out.getvalue()


def _names(fsname: str) -> set[str]:
    listed = run_tool(["zfs", "list", "-H", "-o", "name", "-r", "-t", "all", fsname]).stdout.splitlines()
    return {name.removeprefix(fsname).removeprefix("/") for name in listed} - {""}


# What changed.


@pytest.mark.parametrize("seed", range(4))
def test_the_quick_diff_is_that_of_a_whole_walk(made: ZfsDriver, fsname: str, seed: int) -> None:
    chance = random.Random(seed)
    _ingest(made, *(member(b"%s/f%d" % (where, n), b"%d" % n) for where in (b"a", b"a/b", b"c") for n in range(40)))
    made.prepare(ONE, [BASE])
    root = made.mount(ONE, [BASE])
    for step in range(120):
        do_something(chance, root, step)
        if step % 30 == 29:
            assert _diff(made, ONE, BASE) == _walked(made, ONE, f"{fsname}/l1@layer")
    made.unmount(ONE)
    unmounted = _diff(made, ONE, BASE)
    assert not mount.mounts_below(made.home)
    made.mount(ONE, [BASE])
    assert unmounted == _diff(made, ONE, BASE)


def _was_asked(made: ZfsDriver, snapshot: SnapshotId, *chain: SnapshotId) -> bool:
    with made._trees(snapshot, chain) as trees:
        assert trees.before is not None
        return driver._asked(trees, trees.before) is not None


@short
def test_a_file_that_zfs_diff_cannot_tell_is_in(made: ZfsDriver) -> None:
    """Its last name but one was taken away by a layer: `zfs diff` then passes over it in silence."""
    _ingest(made, member(b"a/kept", b"1"), folder(b"b/"), member(b"b/taken", kind=LINK, link=b"a/kept"))
    made.prepare(TWO, [BASE])
    root = made.mount(TWO, [BASE])
    assert _was_asked(made, TWO, BASE)
    (root / "b/taken").write_bytes(b"both")
    assert not _was_asked(made, TWO, BASE), "several names of one file: which of them is told?"
    assert {change.path for change in made.changes(TWO, [BASE])} == {b"/a", b"/a/kept", b"/b", b"/b/taken"}
    made.remove(TWO)

    _ingest(made, member(b"b/.wh.taken"), layer=TOP, chain=(BASE,))
    made.prepare(ONE, [TOP, BASE])
    root = made.mount(ONE, [TOP, BASE])
    with (root / "a/kept").open("ab") as file:
        file.write(b"2")
    with made._trees(ONE, (TOP, BASE)) as trees:
        told = suspects(trees.origin, trees.dataset, trees.whole, trees.place, CONTENTS.encode())
    assert told is not None
    assert b"a/kept" not in told, "ZFS has learnt it: the mark of such layers can go"
    assert not _was_asked(made, ONE, TOP, BASE)
    assert {change.path for change in made.changes(ONE, [TOP, BASE])} == {b"/a", b"/a/kept"}


def test_names_that_are_taken_away_above_are_told(made: ZfsDriver, fsname: str) -> None:
    """What a container does to a file's names itself leaves enough for `zfs diff` to be believed."""
    _ingest(made, folder(b"d/"), *(member(name, name) for name in (b"linked", b"moved", b"both", b"d/still")))
    made.prepare(ONE, [BASE])
    root = made.mount(ONE, [BASE])
    for name in ("linked", "both", "new"):
        with (root / name).open("ab") as file:
            file.write(b"more")
        (root / "d/by the way").hardlink_to(root / name)
        (root / "d/by the way").unlink()
    (root / "d/moved too").hardlink_to(root / "moved")
    (root / "moved").unlink()
    (root / "both").rename(root / "d/both \\ \t ü")
    assert _was_asked(made, ONE, BASE)
    assert _diff(made, ONE, BASE) == _walked(made, ONE, f"{fsname}/l1@layer")


def test_what_is_mapped_and_not_yet_written_is_in(made: ZfsDriver) -> None:
    import mmap

    _ingest(made, member(b"file", bytes(8192)))
    made.prepare(ONE, [BASE])
    with (made.mount(ONE, [BASE]) / "file").open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[4096] = 1
        assert [change.path for change in made.changes(ONE, [BASE])] == [b"/file"]


# Layers and datasets.


@short
def test_sealed_layers_can_be_built_on_and_go_last(made: ZfsDriver, fsname: str) -> None:
    _ingest(made, member(b"base"))
    made.prepare(ONE, [BASE])
    (made.mount(ONE, [BASE]) / "sealed").touch()
    assert made.seal(ONE)
    (made.root(ONE) / "after").touch()
    assert made.seal(ONE), "again, as nobody built on it yet"
    _ingest(made, member(b"top"), layer=TOP, chain=(ONE, BASE))
    made.prepare(TWO, [TOP, ONE, BASE])
    assert sorted(os.listdir(made.mount(TWO, [TOP, ONE, BASE]))) == ["after", "base", "sealed", "top"]
    made.unmount(ONE)
    for remove in (made.remove_layer, made.remove):
        with pytest.raises(FailedPrecondition, match="dependent clones"):
            remove(ONE)
    with pytest.raises(FailedPrecondition, match="dependent clones"):
        made.remove_layer(BASE)
    assert _names(fsname) == {"l1", "l1@layer", "l2", "l2@layer", "a3", "a3@layer", "a4"}
    made.remove(TWO)
    for layer in (TOP, ONE, BASE):
        made.remove_layer(layer)
    assert _names(fsname) == set()


@short
def test_a_container_does_not_see_what_zfs_and_the_driver_keep(made: ZfsDriver) -> None:
    _ingest(made, member(b"file"))
    made.prepare(ONE, [BASE])
    root = made.mount(ONE, [BASE])
    assert os.listdir(root) == ["file"]
    assert not (root / ".zfs").exists()
    assert (made.home / "a/3/fs/.zfs").exists()
    assert (made.home / "a/3").stat().st_mode & 0o7777 == 0o700


def test_datasets_that_lie_beside_ours_are_left_alone(tmp_path: Path, made: ZfsDriver, fsname: str) -> None:
    for name in ("a7x", "data", "l9/inner"):
        run_tool(["zfs", "create", "-p", f"{fsname}/{name}"])
    assert made.stored().layers == {SnapshotId(9)}, "what has a name of ours is taken for ours"
    run_tool(["zfs", "destroy", "-r", f"{fsname}/l9"])
    _ingest(made, member(b"file"))
    made.prepare(ONE, [BASE])
    assert made.stored().layers == {BASE}
    assert made.stored().snapshots == {ONE}
    made.destroy()
    assert _names(fsname) == {"a7x", "data"}


@short
def test_a_dataset_has_one_root(tmp_path: Path, made: ZfsDriver, fsname: str) -> None:
    with pytest.raises(FailedPrecondition, match="belongs to another root") as caught:
        ZfsDriver(tmp_path / "other", fsname).attach()
    assert "zfs inherit hpmapper:root" in caught.value.hint
    assert not (tmp_path / "other").exists()
    below = f"{fsname}/below"
    run_tool(["zfs", "create", below])
    other = ZfsDriver(tmp_path / "third", below)
    other.attach()
    with pytest.raises(FailedPrecondition, match=f"in the dataset {fsname}, not {below}"):
        ZfsDriver(made.home, below).attach()
    ZfsDriver(made.home).attach()
    other.destroy()
    made.destroy()
    ZfsDriver(tmp_path / "fourth", fsname).attach()


def test_a_pool_that_was_exported_and_imported_has_everything(tmp_path: Path, made: ZfsDriver, fsname: str) -> None:
    _ingest(made, member(b"file", b"base"))
    made.prepare(ONE, [BASE], size=16 * MIB)
    (made.mount(ONE, [BASE]) / "more").write_bytes(b"more")
    made.detach()
    pool = fsname.partition("/")[0]
    run_tool(["zpool", "export", pool])
    with pytest.raises(Unsupported, match=f"no ZFS pool {pool}") as caught:
        made.attach()
    assert f"zpool import {pool}" in caught.value.hint
    run_tool(["zpool", "import", "-d", tmp_path, pool])
    made.attach()
    assert made.has(ONE)
    assert (made.mount(ONE, [BASE]) / "more").read_bytes() == b"more"


def test_a_limit_that_was_taken_away_is_missed(made: ZfsDriver, fsname: str) -> None:
    _ingest(made, member(b"file"))
    made.prepare(ONE, [BASE], size=16 * MIB)
    run_tool(["zfs", "set", "quota=none", f"{fsname}/a3"])
    with pytest.raises(FailedPrecondition, match="not enforced any more"):
        made.mount(ONE, [BASE])


def test_storage_that_is_half_gone_is_not_there(made: ZfsDriver, fsname: str) -> None:
    _ingest(made, member(b"file"))
    made.prepare(ONE, [BASE])
    run_tool(["zfs", "destroy", f"{fsname}/a3"])
    assert not made.has(ONE)
    made.prepare(ONE, [BASE])
    assert os.listdir(made.mount(ONE, [BASE])) == ["file"]
    made.unmount(ONE)
    run_tool(["zfs", "destroy", "-R", f"{fsname}/l1"])
    assert list(made.check_layer(BASE, None))
    with pytest.raises(NotFound, match="does not exist"):
        made.prepare(TWO, [BASE])


def test_names_with_every_character_that_zfs_takes(tmp_path: Path, fsname: str) -> None:
    name = f"{fsname}/with a space-._:x"
    run_tool(["zfs", "create", name])
    (tmp_path / "a =,: ü").mkdir()
    found = ZfsDriver(tmp_path / "a =,: ü" / "data", name)
    found.attach()
    _ingest(found, member(b"file"))
    found.prepare(ONE, [BASE])
    (found.mount(ONE, [BASE]) / "new").touch()
    assert _was_asked(found, ONE, BASE)
    assert {change.path for change in found.changes(ONE, [BASE])} == {b"/new"}
    found.detach()


@pytest.mark.parametrize("name", ["", "-o", "tank/", "/tank", "tank//x", "tank/../x", "tank@snap", "1tank", "t" * 201])
def test_names_that_zfs_does_not_take_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidArgument, match="not the name of a dataset"):
        ZfsDriver(tmp_path, name)


# What a pool stands on.


def test_a_pool_on_a_loop_device(tmp_path: Path, udev: None) -> None:
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, 512 * MIB)
    with loop.attached(image) as device, zpools.pool_on(Path(device)) as pool:
        _try_out(tmp_path, pool)


def test_a_pool_on_a_disk(tmp_path: Path, udev: None) -> None:
    serials = {file.read_text().strip(): file.parent.name for file in Path("/sys/block").glob("*/serial")}
    with zpools.pool_on(Path("/dev", serials["spare0"])) as pool:
        _try_out(tmp_path, pool)


@pytest.fixture
def udev() -> Iterator[None]:
    """It tells `zpool` when a device's partitions are there."""
    with subprocess.Popen(["/usr/lib/systemd/systemd-udevd"], stderr=subprocess.DEVNULL) as udevd:
        while not dmudev.is_running():
            assert udevd.poll() is None
        subprocess.run(["udevadm", "trigger", "--subsystem-match=block"], check=True)
        subprocess.run(["udevadm", "settle"], check=True)
        yield
        udevd.terminate()


def _try_out(directory: Path, pool: str) -> None:
    found = ZfsDriver(directory / "data", pool)
    found.attach()
    _ingest(found, member(b"file", b"data"))
    found.prepare(ONE, [BASE])
    assert (found.mount(ONE, [BASE]) / "file").read_bytes() == b"data"
    found.detach()
    assert found.space().free > 256 * MIB


# A root with it, and what may be missing.


def _verdict(root: Path, **options: str) -> str:
    root.mkdir(exist_ok=True)
    verdict = probe(by_name("zfs"), root, PoolConfig(PoolKind.LOOP), options)
    return "works" if verdict.works else verdict.reason


@short
def test_what_is_missing_is_said(tmp_path: Path, fsname: str) -> None:
    pool = fsname.partition("/")[0]
    run_tool(["zfs", "create", "-V", "16M", f"{pool}/volume"])
    root = tmp_path / "root"
    assert _verdict(root, **{FSNAME: fsname}) == "works"
    assert "no dataset is named, and" in _verdict(root)
    assert "there is no ZFS pool nothing; to get it: zpool import nothing" in _verdict(root, **{FSNAME: "nothing/here"})
    assert f"zfs create -o mountpoint=none {pool}/absent" in _verdict(root, **{FSNAME: f"{pool}/absent"})
    assert "is a volume" in _verdict(root, **{FSNAME: f"{pool}/volume"})


@short
def test_a_root_from_first_use_to_removal(tmp_path: Path, fsname: str) -> None:
    config = Config(root=tmp_path / "root", driver="zfs").with_options([f"{FSNAME}={fsname}", "min_free_space=0"])
    with open_root(config) as opened:
        assert opened.engine.driver.status()["Parent Dataset"] == fsname
        layer = opened.engine.ingest(None, io.BytesIO(tar(member(b"file"))), Expected()).snapshot
        root = opened.engine.mount(opened.engine.prepare("container", layer))
        (root / "new").touch()
    assert _verdict(tmp_path / "root") == "works", "the dataset is known"
    with open_root(Config(root=tmp_path / "root")) as opened:
        assert opened.engine.driver.name == "zfs"
        opened.engine.detach()
    remove_root(config, force=True)
    assert not (tmp_path / "root").exists()
    assert _names(fsname) == set()


def test_a_root_on_zfs_needs_no_name(tmp_path: Path, fsname: str) -> None:
    run_tool(["zfs", "set", "mountpoint=legacy", fsname])
    (tmp_path / "root").mkdir()
    mount.filesystem("zfs", fsname, tmp_path / "root")
    try:
        assert _verdict(tmp_path / "root") == "works"
        config = Config(root=tmp_path / "root", driver="zfs").with_options(["min_free_space=0"])
        with open_root(config) as opened:
            opened.engine.prepare("container", None)
        assert "a1" in _names(fsname)
        remove_root(config, force=True)
        assert _names(fsname) == set()
    finally:
        mount.umount(tmp_path / "root")


# The contract, which takes longest.


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory, private_mounts: None) -> Iterator[ZfsDriver]:
    """A driver with nothing in it, used by all cases in turn."""
    directory = tmp_path_factory.mktemp("zfs")
    with zpools.dataset(directory) as fsname:
        made = ZfsDriver(directory / "data", fsname)
        made.attach()
        yield made
        made.detach()


@pytest.mark.parametrize("case", CASES, ids=contract.name_of)
def test_contract(used: ZfsDriver, case: contract.Case, tmp_path: Path) -> None:
    with contract.subject(used, tmp_path) as subject:
        case(subject)
