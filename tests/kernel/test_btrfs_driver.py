"""The btrfs driver beyond the contract: its quick diff against a whole walk, and subvolumes made by containers."""

from __future__ import annotations

import io
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpmapper.config import Config
from hpmapper.drivers.btrfs import BtrfsDriver
from hpmapper.errors import FailedPrecondition, InvalidArgument
from hpmapper.kernel import btrfs, sync
from hpmapper.layer.compare import compare
from hpmapper.layer.diff import write_tar
from hpmapper.layer.scan import scan
from hpmapper.layer.stream import Expected
from hpmapper.meta import snapshots
from hpmapper.model import SnapshotId
from hpmapper.pool.base import MIB, PoolConfig, PoolFs, PoolKind
from hpmapper.pool.loop import LoopPool
from hpmapper.root import open_root, remove_root
from hpmapper.testing.tars import folder, member, tar
from tests.drivers import ingest
from tests.randomly import do_something
from tests.scenario import assert_no_groups

pytestmark = pytest.mark.kernel

BASE, ONE, TWO = SnapshotId(1), SnapshotId(2), SnapshotId(3)


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[BtrfsDriver]:
    pool = LoopPool(tmp_path, PoolConfig(kind=PoolKind.LOOP, fs=PoolFs.BTRFS, size=300 * MIB))
    pool.create()
    made = BtrfsDriver(pool, min_space=32 * MIB)
    made.attach()
    yield made
    made.detach()
    pool.destroy()


def _ingest(driver: BtrfsDriver, *members: bytes) -> None:
    ingest(driver, BASE, tar(*members))


def _diff(driver: BtrfsDriver, snapshot: SnapshotId, *chain: SnapshotId) -> bytes:
    out = io.BytesIO()
    driver.write_diff(snapshot, chain, out)
    return out.getvalue()


def _walked(driver: BtrfsDriver, snapshot: SnapshotId, below: SnapshotId) -> bytes:
    """The diff as a comparison of both whole trees gives it."""
    top = driver.home / f"a/{snapshot}/diff"
    before = scan(os.fsencode(driver.home / f"l/{below}/diff"), overlay=False)
    out = io.BytesIO()
    tree = compare(before, scan(os.fsencode(top), overlay=False))
    write_tar(tree, lambda path: (top / os.fsdecode(path)).open("rb"), out)
    return out.getvalue()


def _subvolumes(driver: BtrfsDriver) -> int:
    return len(btrfs.nested(driver.home, 5))


@pytest.mark.parametrize("seed", range(6))
def test_the_quick_diff_is_that_of_a_whole_walk(driver: BtrfsDriver, seed: int) -> None:
    chance = random.Random(seed)
    _ingest(driver, *(member(b"%s/f%d" % (where, n), b"%d" % n) for where in (b"a", b"a/b", b"c") for n in range(40)))
    driver.prepare(ONE, [BASE])
    root = driver.mount(ONE, [BASE])
    for step in range(120):
        do_something(chance, root, step)
        if step % 40 == 39:
            assert _diff(driver, ONE, BASE) == _walked(driver, ONE, BASE)
        elif step % 40 == 20:
            sync.syncfs(root)  # so that several transactions are between


def test_a_file_whose_time_was_set_back_is_in(driver: BtrfsDriver) -> None:
    _ingest(driver, member(b"file", b"before"), member(b"other", b"other"))
    driver.prepare(ONE, [BASE])
    root = driver.mount(ONE, [BASE])
    for name, data in (("file", b"after!"), ("other", b"other")):
        times = (root / name).stat()
        (root / name).write_bytes(data)
        os.utime(root / name, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert [change.path for change in driver.changes(ONE, [BASE])] == [b"/file"]
    assert b"after!" in _diff(driver, ONE, BASE)


def test_all_names_of_a_file_with_very_many_are_in(driver: BtrfsDriver) -> None:
    """More than fit into one reference item: btrfs keeps the rest elsewhere."""
    names = [b"d%d/%s-%d" % (number % 3, b"n" * 200, number) for number in range(300)]
    links = [member(name[:90] + b"%d" % number, kind=b"1", link=b"file") for number, name in enumerate(names)]
    _ingest(driver, member(b"file", b"before"), folder(b"d0/"), folder(b"d1/"), folder(b"d2/"), *links)
    driver.prepare(ONE, [BASE])
    root = driver.mount(ONE, [BASE])
    for number in range(300):
        (root / f"d{number % 3}" / ("long" * 50 + str(number))).hardlink_to(root / "file")
    assert driver.seal(ONE)
    driver.prepare(TWO, [ONE])
    (driver.mount(TWO, [ONE]) / "file").write_bytes(b"after")
    found = {change.path for change in driver.changes(TWO, [ONE])}
    assert len(found) == 1 + 300 + 300 + 3
    assert _diff(driver, ONE, BASE) == _walked(driver, ONE, BASE)


def test_a_directory_in_the_place_of_a_symlink_is_whole(driver: BtrfsDriver) -> None:
    """Its unchanged files lie where the former symlink led to: they are new under this path all the same."""
    _ingest(driver, folder(b"usr/lib/"), member(b"usr/lib/so", b"so"), member(b"lib", kind=b"2", link=b"usr/lib"))
    driver.prepare(ONE, [BASE])
    root = driver.mount(ONE, [BASE])
    (root / "lib").unlink()
    (root / "usr/lib").rename(root / "lib")
    (root / "usr/lib").symlink_to("../lib")
    found = {change.path for change in driver.changes(ONE, [BASE])}
    assert found == {b"/lib", b"/lib/so", b"/usr", b"/usr/lib"}
    assert _diff(driver, ONE, BASE) == _walked(driver, ONE, BASE)


def test_subvolumes_made_inside_are_committed_and_removed(driver: BtrfsDriver) -> None:
    _ingest(driver, member(b"d/f"))
    driver.prepare(ONE, [BASE])
    root = driver.mount(ONE, [BASE])
    btrfs.create_subvolume(root / "d/inner")
    btrfs.create_subvolume(root / "d/inner/deeper")
    (root / "d/inner/deeper/file").write_bytes(b"deep")
    assert [change.path for change in driver.changes(ONE, [BASE])] == [
        b"/d",
        b"/d/inner",
        b"/d/inner/deeper",
        b"/d/inner/deeper/file",
    ]
    assert not driver.seal(ONE), "a snapshot would not have what is in the subvolume"
    ingest(driver, TWO, _diff(driver, ONE, BASE), BASE)
    assert (driver.home / "l/3/diff/d/inner/deeper/file").read_bytes() == b"deep"
    assert _subvolumes(driver) == 5
    driver.remove(ONE)
    assert _subvolumes(driver) == 2


def test_a_layer_is_read_only_and_goes_all_the_same(driver: BtrfsDriver) -> None:
    _ingest(driver, member(b"f", b"f"))
    with pytest.raises(OSError, match="Read-only"):
        (driver.home / "l/1/diff/f").write_bytes(b"no")
    for _ in range(2):
        driver.remove_layer(BASE)
    assert _subvolumes(driver) == 0


def test_a_sealed_snapshot_is_what_the_next_starts_from(driver: BtrfsDriver) -> None:
    driver.prepare(ONE, [])
    (driver.mount(ONE, []) / "file").write_bytes(b"sealed")
    assert driver.seal(ONE)
    driver.prepare(TWO, [ONE])
    root = driver.mount(TWO, [ONE])
    assert (root / "file").read_bytes() == b"sealed"
    (root / "file").unlink()
    assert [str(change.kind) for change in driver.changes(TWO, [ONE])] == ["D"]
    assert (driver.root(ONE) / "file").read_bytes() == b"sealed"
    driver.remove(TWO)
    driver.remove_layer(ONE)
    assert _subvolumes(driver) == 0


def test_limits_smaller_than_the_configured_are_refused(driver: BtrfsDriver) -> None:
    with pytest.raises(InvalidArgument, match=r"16\.0 MiB") as caught:
        driver.prepare(ONE, [], size=16 * MIB)
    assert "btrfs.min_space" in caught.value.hint
    driver.prepare(ONE, [], size=32 * MIB)


def test_the_smallest_limit_is_a_storage_option(tmp_path: Path) -> None:
    config = Config(root=tmp_path / "root", driver="btrfs")
    config = config.with_options(["btrfs.min_space=32M", "pool.size=300M", "min_free_space=0"])
    with open_root(config) as opened:
        with pytest.raises(InvalidArgument, match=r"16\.0 MiB"):
            opened.engine.prepare("small", None, size=16 * MIB)
        assert opened.engine.driver.stored().snapshots == set()
        opened.engine.prepare("enough", None, size=32 * MIB)
    with (
        pytest.raises(InvalidArgument, match="'-1' is not a size"),
        open_root(config.with_options(["btrfs.min_space=-1"])),
    ):
        pass
    remove_root(config, force=True)


def test_subvolumes_made_inside_a_limited_container_count_and_go_with_it(tmp_path: Path) -> None:
    config = Config(root=tmp_path / "root", driver="btrfs").with_options(["pool.size=300M", "min_free_space=0"])
    with open_root(config) as opened:
        engine = opened.engine
        layer = engine.ingest(None, io.BytesIO(tar(member(b"f", b"f"))), Expected()).snapshot
        container = engine.prepare("one", layer, size=16 * MIB)
        root = engine.mount(container)
        btrfs.create_subvolume(root / "inner")
        btrfs.create_subvolume(root / "inner/deeper")
        with pytest.raises(OSError, match="quota"):
            (root / "inner/deeper/file").write_bytes(os.urandom(20 * MIB))
        assert 15 * MIB < engine.usage(container).size <= 16 * MIB
        (root / "inner/deeper/file").unlink()
        sync.syncfs(root)
        (root / "inner/deeper/file").write_bytes(b"kept")
        second = engine.commit(container).snapshot
        engine.remove(container)
        again = engine.mount(engine.prepare("two", second))
        assert (again / "inner/deeper/file").read_bytes() == b"kept"
        assert not btrfs.is_subvolume(again / "inner")
        engine.remove(snapshots.get(engine.db, "two"))
        assert len(btrfs.nested(engine.driver.scratch, 5)) == 2, "more than the layers is left"
        assert_no_groups(engine.driver.scratch)
    remove_root(config, force=True)


def test_a_pool_of_another_kind_is_refused(tmp_path: Path) -> None:
    pool = LoopPool(tmp_path, PoolConfig(kind=PoolKind.LOOP, fs=PoolFs.XFS, size=300 * MIB))
    pool.create()
    with pytest.raises(FailedPrecondition, match="is xfs, not btrfs"):
        BtrfsDriver(pool).attach()
    pool.destroy()


def test_a_root_on_btrfs_is_taken_as_it_is(tmp_path: Path) -> None:
    """Without a loop device; and removed with all its subvolumes, read-only ones too."""
    host = LoopPool(tmp_path, PoolConfig(kind=PoolKind.LOOP, fs=PoolFs.BTRFS, size=300 * MIB))
    host.create()
    config = Config(root=host.attach() / "root", driver="btrfs")
    with open_root(config) as opened:
        assert opened.pool is not None
        assert opened.pool.config.kind is PoolKind.DIRECTORY
        layer = opened.engine.ingest(None, io.BytesIO(tar(member(b"f"))), Expected()).snapshot
        opened.engine.mount(opened.engine.prepare("one", layer))
    assert len(btrfs.nested(host.path, 5)) == 2
    remove_root(config, force=True)
    assert btrfs.nested(host.path, 5) == []
    assert os.listdir(host.path) == []
    host.destroy()
