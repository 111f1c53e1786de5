"""Options that Docker's overlay2 and vfs drivers have: taken by their names, and held to on real file systems."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpmapper.config import Config, load
from hpmapper.containers import Containers
from hpmapper.docker.layers import Layers
from hpmapper.drivers import registry
from hpmapper.drivers.limits import limit_of
from hpmapper.drivers.overlay import OverlayDriver
from hpmapper.drivers.upper import disk_usage
from hpmapper.drivers.vfs import VfsDriver
from hpmapper.engine import Engine
from hpmapper.errors import InvalidArgument, Unsupported
from hpmapper.forest import Forest
from hpmapper.image.opening import SourceOptions
from hpmapper.images import Images
from hpmapper.kernel import loop, mount, probe, qgroup
from hpmapper.labels import MAX_SIZE_LABEL, TARGET_LABEL
from hpmapper.layer.stream import Expected
from hpmapper.meta import snapshots
from hpmapper.meta.db import Database
from hpmapper.model import SnapshotId
from hpmapper.pool.base import MIB, PoolFs
from hpmapper.pool.floor import Floor
from hpmapper.pool.tools import run_tool
from hpmapper.root import open_root, remove_root
from hpmapper.testing.tars import member, tar
from tests.filesystems import mounted
from tests.scenario import Silent
from tests.serving import served

pytestmark = pytest.mark.kernel

LIMIT = 16 * MIB


@pytest.fixture
def limited(tmp_path: Path) -> Iterator[Path]:
    """A btrfs that can limit directories."""
    place = mounted(PoolFs.BTRFS, tmp_path, 512 * MIB)
    qgroup.enable_simple(place)
    yield place
    for one in mount.mounts_below(place):
        mount.umount(one.target)


@pytest.mark.parametrize(("driver", "option"), [("overlay", "overlay2.size"), ("vfs", "size"), ("vfs", "vfs.size")])
def test_a_default_size_is_each_containers(limited: Path, tmp_path: Path, driver: str, option: str) -> None:
    config = Config(root=limited / "root", driver=driver)
    config = config.with_options([f"{option}=16M", "min_free_space=0"])
    (tmp_path / "rootfs.tar").write_bytes(tar(member(b"etc", b"x" * (2 * MIB))))
    with open_root(config) as opened:
        images, containers = Images(opened.engine), Containers(opened.engine)
        images.bring(f"tar:{tmp_path / 'rootfs.tar'}", SourceOptions(spool=tmp_path), ["one"], Silent())
        usual, larger = containers.create("one", "usual"), containers.create("one", "larger", size=64 * MIB)
        assert (containers.limit(usual), containers.limit(larger)) == (LIMIT, 64 * MIB)
        refused = run_tool(["dd", "if=/dev/zero", f"of={containers.mount(usual)}/f", "bs=1M", "count=20"], accept=[1])
        assert "Disk quota exceeded" in refused.stderr
        run_tool(["dd", "if=/dev/zero", f"of={containers.mount(larger)}/f", "bs=1M", "count=20"])
    remove_root(config, force=True)


def test_where_nothing_can_be_limited_a_default_size_is_refused(xfs: Path) -> None:
    config = Config(root=xfs / "root", driver="overlay").with_options(["overlay2.size=16M"])
    with pytest.raises(Unsupported, match=r"overlay2\.size not supported.*Project Quota"), open_root(config):
        pass
    vfs = VfsDriver(xfs / "vfs", default_size=LIMIT)
    with pytest.raises(Unsupported, match="option size not supported"):
        vfs.attach()


def test_too_small_a_default_size_is_refused(limited: Path) -> None:
    with pytest.raises(InvalidArgument, match="too small"):
        OverlayDriver(limited / "data", default_size=4096).attach()


def test_dockers_containers_have_the_default_size_and_its_images_layers_have_none(limited: Path) -> None:
    driver = OverlayDriver(limited / "data", default_size=LIMIT)
    driver.attach()
    engine = Engine(Database(limited / "db"), driver, Floor())
    engine.rubbish.reconcile()
    layers = Layers(Forest(engine, "docker"), lambda: None)
    layers.create("image", "", {}, "")
    layers.create("container", "image", {}, "", writable=True)
    layers.create("other", "image", {"size": "32M"}, "", writable=True)
    found = [limit_of(top) for top in sorted(limited.glob("data/a/*"))]
    engine.close()
    assert found == [None, LIMIT, 32 * MIB]


def test_containerds_containers_have_it_too_and_what_it_unpacks_has_not(limited: Path) -> None:
    with served(limited, "overlay", options=("overlay2.size=16M",)) as root:
        root.client.prepare("container")
        root.client.prepare("own", labels={MAX_SIZE_LABEL: str(32 * MIB)})
        root.client.prepare("unpacking", labels={TARGET_LABEL: "sha256:" + "0" * 64})
        found = {
            snapshot.key: snapshots.size_limit(root.engine.db, snapshot.id)
            for snapshot in snapshots.walk(root.engine.db)
        }
        assert found == {"containerd:container": LIMIT, "containerd:own": 32 * MIB, "containerd:unpacking": None}
        root.clear()


@pytest.mark.parametrize("value", ["true", "1", "F", "False"])
def test_the_override_of_a_check_that_there_is_not_is_taken(value: str, tmp_path: Path) -> None:
    config = Config(root=tmp_path / "root", driver="overlay")
    with open_root(config.with_options([f"overlay2.override_kernel_check={value}"])):
        pass


def test_as_a_boolean_only(tmp_path: Path) -> None:
    config = Config(root=tmp_path / "root", driver="overlay").with_options(["overlay2.override_kernel_check=maybe"])
    with pytest.raises(InvalidArgument, match='ParseBool: parsing "maybe"'), open_root(config):
        pass


def test_dockers_file_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "daemon.json"
    file.write_text(
        '{"storage-driver": "overlay2", "storage-opts": ["overlay2.size=20G", "overlay2.override_kernel_check=true"]}'
    )
    overlay = load(file)
    assert overlay.own_options(registry.by_name("overlay")) == {
        "overlay2.size": "20G",
        "overlay2.override_kernel_check": "true",
    }
    file.write_text('{"storage-driver": "vfs", "storage-opts": ["size=20G"]}')
    assert load(file).own_options(registry.by_name("vfs")) == {"vfs.size": "20G"}


def test_vfs_copies_share_their_blocks_where_the_file_system_can(xfs: Path, tmp_path: Path) -> None:
    driver = VfsDriver(xfs / "data")
    driver.attach()
    blob = tmp_path / "layer.tar"
    blob.write_bytes(tar(member(b"big", os.urandom(8 * MIB))))
    (driver.scratch / "work").mkdir()
    with blob.open("rb") as data:
        driver.ingest(SnapshotId(1), list, data, driver.scratch / "work", Expected(), None, lambda _: False)
    for number in range(2, 6):
        driver.prepare(SnapshotId(number), [SnapshotId(1)])
        assert disk_usage(driver.root(SnapshotId(number))).size < MIB
    assert driver.space().used < 100 * MIB
    for number in range(2, 6):
        driver.remove(SnapshotId(number))
    driver.remove_layer(SnapshotId(1))


def test_a_file_system_without_file_types_has_no_overlay(tmp_path: Path) -> None:
    """XFS with ftype=0 is gone from current tools; ext4 without filetype is the same."""
    image, place = tmp_path / "image", tmp_path / "place"
    place.mkdir()
    image.touch()
    os.truncate(image, 64 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-O", "^filetype", os.fspath(image)], check=True)
    with loop.attached(image) as device:
        mount.filesystem("ext4", device, place)
    try:
        assert not probe.probe("d_type", place).available
        config = Config(root=place / "root", driver="overlay")
        verdict = registry.probe(registry.by_name("overlay"), place, config.pool())
        assert not verdict.works
        assert "d_type" in verdict.why
        assert "ftype=1" in verdict.how
        with pytest.raises(Unsupported, match="d_type"), open_root(config):
            pass
    finally:
        mount.umount(place)


def _chain(driver: OverlayDriver, count: int, tmp_path: Path) -> list[SnapshotId]:
    chain: list[SnapshotId] = []
    for number in range(1, count + 1):
        (tmp_path / "layer.tar").write_bytes(
            tar(member(b"file-%d" % number, b"%d" % number), member(b"top", b"%d" % number))
        )
        work = driver.scratch / f"work-{number}"
        work.mkdir()
        with (tmp_path / "layer.tar").open("rb") as data:
            below = list(chain)
            driver.ingest(SnapshotId(number), below.copy, data, work, Expected(), None, lambda _: False)
        work.rmdir()
        chain.insert(0, SnapshotId(number))
    return chain


def test_more_layers_than_docker_has_and_than_a_page_of_options_holds(xfs: Path, tmp_path: Path) -> None:
    driver = OverlayDriver(xfs / "data")
    driver.attach()
    chain = _chain(driver, 200, tmp_path)
    few, many = SnapshotId(1001), SnapshotId(1002)
    driver.prepare(few, chain[-3:])
    assert driver.handout(few, chain[-3:]).type == "overlay"
    driver.prepare(many, chain)
    spec = driver.handout(many, chain)
    assert spec.type == "bind", "mount(2) would refuse the overlay with E2BIG or EINVAL"
    root = Path(spec.source)
    assert (root / "top").read_bytes() == b"200"
    assert [(root / f"file-{number}").read_bytes() for number in (1, 100, 200)] == [b"1", b"100", b"200"]
    (root / "file-1").write_bytes(b"changed")
    assert [change.path for change in driver.changes(many, chain)] == [b"/file-1"]
    driver.remove(few)
    driver.remove(many)


def test_the_status_has_dockers_labels(xfs: Path) -> None:
    driver = OverlayDriver(xfs / "data")
    driver.attach()
    shown = list(driver.status().items())
    assert shown[:5] == [
        ("Backing Filesystem", "xfs"),
        ("Supports d_type", "true"),
        ("Using metacopy", "false"),
        ("Native Overlay Diff", "true"),
        ("userxattr", "false"),
    ]


def test_uppers_are_made_without_an_index(xfs: Path) -> None:
    driver = OverlayDriver(xfs / "data")
    driver.attach()
    driver.prepare(SnapshotId(1), [])
    root = driver.mount(SnapshotId(1), [])
    shown = next(one.super_options for one in mount.mounts() if one.target == os.path.realpath(root))
    assert "index=on" not in shown.split(",")
    assert not (xfs / "data/a/1/w/index").exists()
    assert "index=off" in driver.handout(SnapshotId(1), [SnapshotId(1)]).options
    driver.remove(SnapshotId(1))


PARAMETERS = Path("/sys/module/overlay/parameters")


@pytest.mark.guest("overlay")
def test_a_kernel_that_copies_metadata_alone_is_told_not_to(xfs: Path, tmp_path: Path) -> None:
    """With metacopy and redirect_dir on by default, what an engine mounts itself must still leave whole files."""
    parameters = [PARAMETERS / "metacopy", PARAMETERS / "redirect_dir"]
    before = [one.read_text() for one in parameters]
    try:
        for one in parameters:
            one.write_text("Y")
        driver = OverlayDriver(xfs / "data")
        driver.attach()
        (tmp_path / "bundle").mkdir()
        work = driver.scratch / "work"
        work.mkdir()
        (tmp_path / "layer.tar").write_bytes(tar(member(b"big", b"data" * MIB), member(b"dir/file", b"x")))
        with (tmp_path / "layer.tar").open("rb") as data:
            driver.ingest(SnapshotId(1), list, data, work, Expected(), None, lambda _: False)
        driver.prepare(SnapshotId(2), [SnapshotId(1)])
        spec = driver.handout(SnapshotId(2), [SnapshotId(1)])
        assert {"metacopy=off", "redirect_dir=nofollow"} <= set(spec.options)
        command = ["mount", "-t", spec.type, spec.source, "-o", ",".join(spec.options), str(tmp_path / "bundle")]
        subprocess.run(command, check=True)
        try:
            (tmp_path / "bundle/big").chmod(0o600)
            with pytest.raises(OSError, match="cross-device"):
                os.rename(tmp_path / "bundle/dir", tmp_path / "bundle/moved")
        finally:
            mount.umount(tmp_path / "bundle")
        assert (xfs / "data/a/2/u/big").read_bytes() == b"data" * MIB
    finally:
        for one, value in zip(parameters, before, strict=True):
            one.write_text(value)


@pytest.mark.guest("quota")
def test_overlay2_size_is_a_project_of_xfs(tmp_path: Path) -> None:
    image, place = tmp_path / "image", tmp_path / "place"
    place.mkdir()
    image.touch()
    os.truncate(image, 320 * MIB)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", os.fspath(image)], check=True)
    with loop.attached(image) as device:
        mount.filesystem("xfs", device, place, options={"prjquota": None})
    config = Config(root=place / "root", driver="overlay").with_options(["overlay2.size=16M", "min_free_space=0"])
    try:
        (tmp_path / "rootfs.tar").write_bytes(tar(member(b"file", b"x")))
        with open_root(config) as opened:
            containers = Containers(opened.engine)
            images = Images(opened.engine)
            images.bring(f"tar:{tmp_path / 'rootfs.tar'}", SourceOptions(spool=tmp_path), ["one"], Silent())
            one = containers.create("one", "one")
            assert containers.limit(one) == LIMIT
            refused = run_tool(["dd", "if=/dev/zero", f"of={containers.mount(one)}/f", "bs=1M", "count=20"], accept=[1])
            assert "No space left" in refused.stderr
            assert containers.usage(one).size <= LIMIT
        remove_root(config, force=True)
    finally:
        mount.umount(place)
