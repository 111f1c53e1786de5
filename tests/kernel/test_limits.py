"""What limits leave behind, and what becomes of them when the file system stops to enforce them: on a real btrfs.

That writers are held to them: hpmapper.testing.contract.limits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpmapper.config import Config
from hpmapper.docker.layers import Layers
from hpmapper.drivers import limits
from hpmapper.drivers.overlay import OverlayDriver
from hpmapper.engine import Engine
from hpmapper.errors import FailedPrecondition, InvalidArgument, Unsupported
from hpmapper.forest import Forest
from hpmapper.kernel import btrfs, loop, mount, qgroup
from hpmapper.labels import MAX_SIZE_LABEL
from hpmapper.meta.db import Database
from hpmapper.model import Kind, SnapshotId
from hpmapper.pool.base import MIB
from hpmapper.pool.floor import Floor
from hpmapper.pool.tools import run_tool
from hpmapper.root import open_root, remove_root

pytestmark = pytest.mark.kernel

ONE, TWO = SnapshotId(1), SnapshotId(2)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A mounted btrfs, without quotas."""
    image, target = tmp_path / "btrfs.img", tmp_path / "btrfs"
    target.mkdir()
    image.touch()
    os.truncate(image, 300 * MIB)
    run_tool(["mkfs.btrfs", "-q", image])
    with loop.attached(image, block_size=4096) as device:
        mount.filesystem("btrfs", device, target)
    yield target
    for one in mount.mounts_below(target):
        mount.umount(one.target)


def _groups(place: Path) -> list[str]:
    """The groups that limits made."""
    shown = run_tool(["btrfs", "qgroup", "show", "--raw", place]).stdout
    return [word for word in shown.split() if word.startswith(f"{limits.GROUP_LEVEL}/")]


def test_quotas_of_the_hosts_own_file_system_are_the_hosts_affair(place: Path) -> None:
    driver = OverlayDriver(place / "data")
    driver.attach()
    assert not driver.capabilities.size_limits
    with pytest.raises(Unsupported, match="quotas are off") as caught:
        driver.prepare(ONE, [], size=16 * MIB)
    assert "btrfs quota enable --simple" in caught.value.hint
    assert qgroup.mode(place) is qgroup.Mode.NONE
    assert driver.stored().snapshots == set()


def test_full_quotas_are_refused_with_the_way_out(place: Path) -> None:
    run_tool(["btrfs", "quota", "enable", place])
    assert qgroup.mode(place) is qgroup.Mode.FULL
    found = limits.limits_of(place)
    with pytest.raises(Unsupported, match="full ones") as caught:
        found.make(place / "top", ONE, 16 * MIB)
    assert "btrfs quota disable" in caught.value.hint


def test_our_own_file_system_gets_quotas_with_the_first_limit(place: Path) -> None:
    found = limits.limits_of(place, ours=True)
    assert found.available
    assert qgroup.mode(place) is qgroup.Mode.NONE
    found.make(place / "top", ONE, 16 * MIB)
    assert qgroup.mode(place) is qgroup.Mode.SIMPLE
    assert found.is_in_force(place / "top")


def test_nothing_of_a_limit_is_left(place: Path) -> None:
    qgroup.enable_simple(place)
    driver = OverlayDriver(place / "data")
    driver.attach()
    for snapshot in (ONE, TWO):
        driver.prepare(snapshot, [], size=16 * MIB)
    assert len(_groups(place)) == 2
    driver.remove(ONE)
    assert len(_groups(place)) == 1
    # Cut short after the limit was lifted: removing again finishes it.
    driver._limits.lift(place / "data/a/2")
    driver.remove(TWO)
    assert _groups(place) == []
    assert os.listdir(place / "data/a") == os.listdir(place / "data/t") == []


def test_a_limit_made_half_is_finished(place: Path) -> None:
    qgroup.enable_simple(place)
    driver = OverlayDriver(place / "data")
    driver.attach()
    btrfs.create_subvolume(place / "data/a/1")
    driver.prepare(ONE, [], size=16 * MIB)
    assert limits.limit_of(place / "data/a/1") == 16 * MIB
    assert len(_groups(place)) == 1
    driver.mount(ONE, [])
    driver.remove(ONE)


def test_a_limit_that_is_not_enforced_any_more_is_not_passed_over(place: Path) -> None:
    qgroup.enable_simple(place)
    driver = OverlayDriver(place / "data")
    driver.attach()
    driver.prepare(ONE, [], size=16 * MIB)
    driver.mount(ONE, [])
    driver.unmount(ONE)
    run_tool(["btrfs", "quota", "disable", place])
    for _ in range(2):
        with pytest.raises(FailedPrecondition, match=r"16\.0 MiB .* not enforced any more"):
            driver.mount(ONE, [])
        driver.attach()  # another process, later
    driver.remove(ONE)
    assert driver.stored().snapshots == set()


def test_subvolumes_made_inside_count_too(place: Path) -> None:
    found = limits.limits_of(place, ours=True)
    top = place / "top"
    found.make(top, ONE, 16 * MIB)
    btrfs.create_subvolume(top / "inner")
    btrfs.create_subvolume(top / "inner/deeper")
    refused = run_tool(["dd", "if=/dev/zero", f"of={top}/inner/deeper/file", "bs=1M", "count=20"], accept=[1])
    assert "Disk quota exceeded" in refused.stderr
    used = found.usage(top)
    assert 15 * MIB < used.size <= 16 * MIB
    assert used.inodes == 5  # three roots, the file, and the mark
    found.lift(top)
    assert _groups(place) == []
    btrfs.delete_subvolume(top)


@pytest.fixture
def engine(place: Path) -> Iterator[Engine]:
    """An engine of the overlay driver, with quotas on."""
    qgroup.enable_simple(place)
    driver = OverlayDriver(place / "data")
    driver.attach()
    made = Engine(Database(place / "db"), driver, Floor())
    made.rubbish.reconcile()
    yield made
    made.detach()
    made.close()


def test_containerds_label_is_a_limit(engine: Engine, place: Path) -> None:
    forest = Forest(engine, "containerd")
    made = forest.prepare("limited", "", {MAX_SIZE_LABEL: str(16 * MIB)})
    forest.first_mounts(made)
    assert limits.limit_of(place / f"data/a/{made.snapshot.id}") == 16 * MIB
    for text in ("-1", "16M", "", "9" * 30, "²"):
        with pytest.raises(InvalidArgument, match="max-size"):
            forest.prepare("wrong", "", {MAX_SIZE_LABEL: text})
    small = forest.prepare("small", "", {MAX_SIZE_LABEL: "1"})
    with pytest.raises(InvalidArgument, match="too small"):
        forest.first_mounts(small)
    assert [info.key for info in forest.walk()] == ["limited"]
    view = forest.prepare("view", "", {MAX_SIZE_LABEL: "1"}, Kind.VIEW)
    forest.first_mounts(view)


def test_dockers_storage_option_is_a_limit(engine: Engine, place: Path) -> None:
    layers = Layers(Forest(engine, "docker"), lambda: None)
    layers.create("init", "", {"size": "16M"}, "")
    layers.create("container", "init", {"size": "16M"}, "")
    assert [limits.limit_of(top) for top in sorted(place.glob("data/a/*"))] == [16 * MIB] * 2
    root = layers.mount("container")
    refused = run_tool(["dd", "if=/dev/zero", f"of={root}/file", "bs=1M", "count=20"], accept=[1])
    assert "Disk quota exceeded" in refused.stderr
    layers.unmount("container")


def test_a_root_that_is_removed_leaves_no_limits(place: Path) -> None:
    qgroup.enable_simple(place)
    config = Config(root=place / "root", driver="overlay")
    with open_root(config) as opened:
        opened.engine.mount(opened.engine.prepare("one", None, size=16 * MIB))
    assert len(_groups(place)) == 1
    remove_root(config, force=True)
    assert _groups(place) == []
    assert os.listdir(place) == []
