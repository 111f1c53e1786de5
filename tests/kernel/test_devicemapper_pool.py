"""Pools of the devicemapper driver: set up, grown, full, found again, and refused where they differ."""

from __future__ import annotations

import errno
import mmap
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hpmapper.drivers.devicemapper import DeviceMapperDriver, parse, thin
from hpmapper.drivers.devicemapper.admin import Severity, grow, repair, watch
from hpmapper.errors import FailedPrecondition, InvalidArgument, NoSpace, Unsupported
from hpmapper.kernel import dm, fs, loop, mount
from hpmapper.model import SnapshotId
from tests.drivers import ingest_file
from tests.kernel.test_devicemapper import attached

pytestmark = [pytest.mark.kernel, pytest.mark.guest("dm", short=True)]

_MIB = 1 << 20
_ONE, _TWO, _THREE, _LATE = (SnapshotId(number) for number in (1, 2, 3, 100))


def _cut_off(driver: DeviceMapperDriver) -> None:
    """What a power failure does to a machine's state: no mounts, no devices, and no mark in /run."""
    for one in mount.mounts_below(driver.home):
        mount.umount(one.target)
    driver.devices.detach()


def test_everything_is_found_again(tmp_path: Path) -> None:
    with attached(tmp_path / "d") as driver:
        ingest_file(driver, _ONE, b"one")
        driver.prepare(_TWO, [_ONE])
        (driver.mount(_TWO, [_ONE]) / "g").write_text("g")
        driver.detach()
        again = DeviceMapperDriver(tmp_path / "d", parse([]))
        again.attach()
        root = again.mount(_TWO, [_ONE])
        assert ((root / "f").read_text(), (root / "g").read_text()) == ("one", "g")
        again.detach()


def test_loss_of_power_between_pool_and_records(tmp_path: Path) -> None:
    """A device without a record goes; a container's record without a device goes, so that it is made anew."""
    with attached(tmp_path / "d") as driver:
        pool = driver.devices.pool
        ingest_file(driver, _ONE, b"one")
        driver.prepare(_TWO, [_ONE])
        driver.prepare(_THREE, [_ONE])
        shutil.rmtree(driver.home / "a" / "2")  # the record was not on the disk yet
        thin.delete(pool, 3)  # as if the pool had lost its last second
        (driver.home / "a" / "4").mkdir()
        (driver.home / "a" / "4" / "device").touch()  # a name without data
        _cut_off(driver)
        driver.attach()
        with driver.devices.metadata() as (found, root):
            assert set(found.devices(root)) == {0, 1}
        assert driver.stored().layers == {1}
        assert not any(driver.has(SnapshotId(number)) for number in (2, 3, 4))
        driver.prepare(_THREE, [_ONE])
        assert (driver.mount(_THREE, [_ONE]) / "f").read_text() == "one"
        driver.remove(_THREE)
        driver.remove(SnapshotId(4))


def test_another_pool_is_refused(tmp_path: Path) -> None:
    """By the base device's UUID, and by a transaction that is older than what was promised."""
    with attached(tmp_path / "d") as driver:
        saved = tmp_path / "metadata"
        _cut_off(driver)
        shutil.copyfile(driver.home / "metadata", saved)
        driver.attach()
        ingest_file(driver, _ONE, b"one")
        _cut_off(driver)
        newer = tmp_path / "newer"
        shutil.copyfile(driver.home / "metadata", newer)
        shutil.copyfile(saved, driver.home / "metadata")
        with pytest.raises(FailedPrecondition, match="older than this root: transaction 1, known is 2"):
            driver.attach()
        driver.devices.detach()
        shutil.copyfile(newer, driver.home / "metadata")
        known = driver.home / "deviceset"
        text = known.read_text()
        uuid = driver.devices.device_set.base_uuid
        known.write_text(text.replace(uuid, "00000000" + uuid[8:]))
        with pytest.raises(FailedPrecondition, match=f"Current Base Device UUID:{uuid} does not match with stored"):
            DeviceMapperDriver(driver.home, driver.devices.options).attach()
        driver.devices.detach()
        known.write_text(text)
        driver.attach()


def test_a_lost_file_is_not_made_anew(tmp_path: Path) -> None:
    with attached(tmp_path / "d") as driver:
        _cut_off(driver)
        (driver.home / "data").rename(tmp_path / "data")
        with pytest.raises(FailedPrecondition, match=r"loopback file .*data is gone"):
            driver.attach()
        assert not (driver.home / "data").exists()
        (tmp_path / "data").rename(driver.home / "data")
        driver.attach()


def test_a_larger_base_size(tmp_path: Path) -> None:
    """Layers that were there keep their size, new ones have the larger one; smaller is refused in Docker's words."""
    with attached(tmp_path / "d") as driver:
        ingest_file(driver, _ONE, b"one")
        _cut_off(driver)
        larger = DeviceMapperDriver(tmp_path / "d", parse([("dm.basesize", "1G")]))
        larger.attach()
        assert larger.status()["Base Device Size"] == "1.074GB"
        ingest_file(larger, _TWO, b"two")
        for number, layer, size in ((_THREE, _ONE, 512 * _MIB), (SnapshotId(4), _TWO, 1024 * _MIB)):
            larger.prepare(number, [layer])
            seen = os.statvfs(larger.mount(number, [layer]))
            assert 0.7 * size < seen.f_blocks * seen.f_frsize <= size
            larger.remove(number)
        _cut_off(larger)
        smaller = DeviceMapperDriver(tmp_path / "d", parse([("dm.basesize", "400M")]))
        with pytest.raises(InvalidArgument, match=r"Base device size cannot be smaller than 1\.074GB"):
            smaller.attach()
        smaller.devices.detach()


def test_ext4(tmp_path: Path) -> None:
    with attached(tmp_path / "d", fs="ext4", mkfsarg="-m0") as driver:
        assert driver.status()["Backing Filesystem"] == "ext4"
        ingest_file(driver, _ONE, b"one")
        driver.prepare(_TWO, [_ONE])
        assert (driver.mount(_TWO, [_ONE]) / "f").read_text() == "one"
        assert driver.usage(_TWO).size == 0
        _cut_off(driver)
        larger = DeviceMapperDriver(tmp_path / "d", parse([("dm.basesize", "1G")]))
        larger.attach()
        larger.prepare(_THREE, [])
        seen = os.statvfs(larger.mount(_THREE, []))
        assert seen.f_blocks * seen.f_frsize > 900 * _MIB
        larger.remove(_THREE)


def test_info_has_dockers_labels_in_dockers_order(tmp_path: Path) -> None:
    with attached(tmp_path / "d") as driver:
        status = driver.status()
        assert list(status) == [
            "Pool Name", "Pool Blocksize", "Base Device Size", "Backing Filesystem", "Udev Sync Supported", "Data file",
            "Metadata file", "Data loop file", "Metadata loop file", "Data Space Used", "Data Space Total",
            "Data Space Available", "Metadata Space Used", "Metadata Space Total", "Metadata Space Available",
            "Thin Pool Minimum Free Space", "Deferred Removal Enabled", "Deferred Deletion Enabled",
            "Deferred Deleted Device Count", "Library Version", "Pool Mode",
        ]  # fmt: skip
        assert status["Pool Blocksize"] == "65.54kB"
        assert status["Base Device Size"] == "536.9MB"
        assert status["Data Space Total"] == "4.295GB"
        assert status["Metadata Space Total"] == "67.11MB"
        assert status["Thin Pool Minimum Free Space"] == "429.5MB"
        assert status["Data loop file"] == str(tmp_path / "d" / "data")
        assert status["Pool Mode"] == "rw"


def _fill(path: Path) -> int:
    """Write until it fails, each MiB synced; the errno."""
    number = 0
    try:
        while True:
            with (path / f"fill{number}").open("wb") as file:
                file.write(os.urandom(_MIB))
                file.flush()
                os.fsync(file.fileno())
            number += 1
    except OSError as error:
        return error.errno or 0


def test_a_full_pool(tmp_path: Path) -> None:
    """Writers get an error, and soon; nothing new is made; what is there can be deleted, and then all goes on."""
    with attached(tmp_path / "d", loopdatasize="128M", min_free_space="0%", xfs_nospace_max_retries="0") as driver:
        ingest_file(driver, _ONE, b"one")
        driver.prepare(_TWO, [_ONE])
        assert _fill(driver.mount(_TWO, [_ONE])) in (errno.ENOSPC, errno.EIO)
        assert thin.pool_status(driver.devices.pool).mode is thin.Mode.OUT_OF_DATA_SPACE
        assert driver.space().free == 0
        with pytest.raises(NoSpace, match="thin pool is full"):
            ingest_file(driver, _THREE, os.urandom(_MIB))
        assert driver.stored().layers == {1}
        driver.detach()
        driver.attach()  # starts all the same
        driver.remove(_TWO)
        assert thin.pool_status(driver.devices.pool).mode is thin.Mode.WRITE
        driver.prepare(_THREE, [_ONE])
        assert (driver.mount(_THREE, [_ONE]) / "f").read_text() == "one"
        driver.remove(_THREE)


def test_min_free_space(tmp_path: Path) -> None:
    with attached(tmp_path / "d", loopdatasize="128M", min_free_space="99%") as driver:
        with pytest.raises(NoSpace, match=r"devmapper: Thin Pool has \d+ free data blocks which is less than minimum"):
            driver.prepare(_ONE, [])
        assert not driver.has(_ONE)


def test_growing_under_a_writer(tmp_path: Path) -> None:
    """A pool that was full takes writes again once its files have grown; smaller is refused."""
    with attached(tmp_path / "d", loopdatasize="128M", min_free_space="0%") as driver:
        driver.prepare(_ONE, [])
        root = driver.mount(_ONE, [])
        _fill(root)
        before = thin.pool_status(driver.devices.pool)
        driver.devices.backing.grow(256 * _MIB, 96 * _MIB)  # type: ignore[union-attr]
        after = thin.pool_status(driver.devices.pool)
        assert after.mode is thin.Mode.WRITE
        assert after.data_total == 2 * before.data_total
        assert after.metadata_total > before.metadata_total
        driver.unmount(_ONE)
        (driver.mount(_ONE, []) / "more").write_bytes(os.urandom(_MIB))
        driver.unmount(_ONE)
        with pytest.raises(InvalidArgument, match="devmapper: Can't shrink file"):
            driver.devices.backing.grow(128 * _MIB, 0)  # type: ignore[union-attr]
        driver.remove(_ONE)


def test_removal_gives_space_back_to_the_file_system_below(tmp_path: Path) -> None:
    with attached(tmp_path / "d") as driver:
        data = driver.home / "data"
        driver.prepare(_ONE, [])
        (driver.mount(_ONE, []) / "f").write_bytes(os.urandom(20 * _MIB))
        driver.unmount(_ONE)
        used = data.stat().st_blocks
        assert used * 512 > 20 * _MIB
        driver.remove(_ONE)
        assert (used - data.stat().st_blocks) * 512 > 19 * _MIB


def test_options_reach_the_kernel(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is asked for is what is mounted, made and left; and loop-lvm says what it is for."""
    asked = {"mountopt": "logbufs=4", "mkfsarg": "-isize=1024", "blkdiscard": "false", "use_deferred_removal": "false"}
    with attached(tmp_path / "d", xfs_nospace_max_retries="3", **asked) as driver:
        assert "Usage of loopback devices is strongly discouraged for production use" in caplog.text
        assert driver.status()["Deferred Removal Enabled"] == "false"
        driver.prepare(_ONE, [])
        root = driver.mount(_ONE, [])
        found = dm.find(driver.devices.name(_ONE))
        assert found is not None
        assert not found.removing
        assert "logbufs=4" in next(one.super_options for one in mount.mounts() if one.target == str(root))
        assert fs.xfs_geometry(root).inode_size == 1024
        knob = Path("/sys/fs/xfs", found.kernel_name, "error/metadata/ENOSPC/max_retries")
        assert knob.read_text() == "3\n"
        (root / "f").write_bytes(os.urandom(20 * _MIB))
        driver.unmount(_ONE)
        used = (driver.home / "data").stat().st_blocks
        driver.remove(_ONE)
        assert (driver.home / "data").stat().st_blocks >= used, "nothing was given back"


def test_a_busy_device_is_deleted_later(tmp_path: Path) -> None:
    """A mount that leaked into another namespace: removal is quick, counted, and done when the leak has gone."""
    with attached(tmp_path / "d") as driver:
        driver.prepare(_ONE, [])
        (driver.mount(_ONE, []) / "f").write_text("f")
        with _leak():
            driver.remove(_ONE)
            assert not driver.stored().snapshots
            assert driver.status()["Deferred Deleted Device Count"] == "1"
            driver.attach()
            assert driver.devices.records.buried_ids() == {1}
            strict = DeviceMapperDriver(driver.home, parse([("dm.use_deferred_deletion", "false")]))
            driver.prepare(_TWO, [])
        driver.sweep_objects(set, 0)  # as collecting does
        assert driver.status()["Deferred Deleted Device Count"] == "0"
        driver.mount(_TWO, [])
        with _leak(), pytest.raises(FailedPrecondition, match=r"is busy: process \d+ \(sleep\) has it mounted at"):
            strict.remove(_TWO)
        strict.remove(_TWO)


def test_a_device_without_a_table(tmp_path: Path) -> None:
    """A process that died while it activated a device has left it so."""
    with attached(tmp_path / "d") as driver:
        driver.prepare(_ONE, [])
        dm._call(dm._CMD_CREATE, driver.devices.name(_ONE))
        assert driver.mount(_ONE, []).is_dir()
        driver.unmount(_ONE)
        dm._call(dm._CMD_CREATE, driver.devices.name(_ONE))
        driver.remove(_ONE)


@contextmanager
def _leak() -> Iterator[None]:
    """A process with a mount namespace of its own, in which everything stays mounted."""
    process = subprocess.Popen(["unshare", "-m", "--propagation", "private", "sleep", "100"])
    try:
        while Path(f"/proc/{process.pid}/comm").read_text() != "sleep\n":
            pass
        yield
    finally:
        process.kill()
        process.wait()


def test_raw_devices(tmp_path: Path) -> None:
    """dm.datadev and dm.metadatadev, remembered; a metadata device that is not blank is refused."""
    files = [tmp_path / name for name in ("data", "meta")]
    for file, size in zip(files, (2048 * _MIB, 32 * _MIB), strict=True):
        file.touch()
        os.truncate(file, size)
    with loop.attached(files[0]) as data, loop.attached(files[1]) as metadata:
        metadata.write_bytes(b"x" * 4096)
        with (
            pytest.raises(FailedPrecondition, match="is not empty"),
            attached(tmp_path / "bad", datadev=str(data), metadatadev=str(metadata)),
        ):
            pass
        metadata.write_bytes(bytes(4096))
        with attached(tmp_path / "d", datadev=str(data), metadatadev=str(metadata)) as driver:
            assert not driver.devices.discards()
            ingest_file(driver, _ONE, b"one")
            assert "Data loop file" not in driver.status()
            _cut_off(driver)
            again = DeviceMapperDriver(tmp_path / "d", parse([]))
            again.attach()
            again.prepare(_TWO, [_ONE])
            assert (again.mount(_TWO, [_ONE]) / "f").read_text() == "one"
            again.remove(_TWO)
            other = DeviceMapperDriver(tmp_path / "d", parse([("dm.thinpooldev", "nonsense")]))
            with pytest.raises(FailedPrecondition, match="was set up on"):
                other.attach()


def test_a_given_pool(tmp_path: Path) -> None:
    """dm.thinpooldev: it must be there, be a thin pool, and be empty; it is not taken down with the driver."""
    file = tmp_path / "disk"
    file.touch()
    os.truncate(file, 2048 * _MIB)
    sectors = _MIB // dm.SECTOR
    home = tmp_path / "d"

    def refused(message: str) -> None:
        with pytest.raises(Exception, match=message), attached(home, thinpooldev="t-pool"):
            pass

    with loop.attached(file) as disk:
        refused("devicemapper: Non existing device t-pool")
        names = {"t-meta": dm.Target(0, 16 * sectors, "linear", f"{disk} 0")}
        names["t-data"] = dm.Target(0, 1024 * sectors, "linear", f"{disk} {16 * sectors}")
        pool = f"{dm.path('t-meta')} {dm.path('t-data')} 1024 0 1 skip_block_zeroing"
        names["t-pool"] = dm.Target(0, 1024 * sectors, "thin-pool", pool)
        try:
            dm.activate("t-pool", [names["t-data"]])
            refused("devmapper: Device t-pool is not a thin pool")
            dm.remove("t-pool")
            for name, target in names.items():
                dm.activate(name, [target])
            thin.set_transaction("t-pool", 0, 7)
            refused("with non-zero transaction ID")
            thin.set_transaction("t-pool", 7, 0)
            with attached(home, thinpooldev="/dev/mapper/t-pool") as driver:
                assert driver.status()["Pool Name"] == "t-pool"
                assert driver.status()["Pool Blocksize"] == "524.3kB"
                ingest_file(driver, _ONE, b"one")
            assert dm.find("t-pool") is not None
            shutil.copytree(home, tmp_path / "elsewhere")
            shutil.rmtree(home)
            refused("already has used data blocks")
        finally:
            for name in reversed(names):
                dm.remove(name)


def test_a_size_of_its_own(tmp_path: Path) -> None:
    with attached(tmp_path / "d") as driver:
        with pytest.raises(Unsupported, match=r"devmapper: Container size cannot be smaller than 536\.9MB"):
            driver.prepare(_ONE, [], size=5 * _MIB)
        driver.prepare(_ONE, [], size=1024 * _MIB)
        seen = os.statvfs(driver.mount(_ONE, []))
        assert seen.f_blocks * seen.f_frsize > 900 * _MIB
        assert fs.filesystem_name(driver.root(_ONE)) == "xfs"
        driver.remove(_ONE)


def _write_blocks(device: Path, blocks: range) -> None:
    """4 KiB into each of these blocks of 64 KiB, past the page cache."""
    page = mmap.mmap(-1, 4096)
    page.write(b"x" * 4096)
    fd = os.open(device, os.O_WRONLY | os.O_DIRECT)
    try:
        for block in blocks:
            os.pwritev(fd, [page], block << 16)
        os.fsync(fd)
    finally:
        os.close(fd)


def _copy_and_write(driver: DeviceMapperDriver, made: list[SnapshotId]) -> None:
    """Each copy, written here and there, takes a copy of nearly the whole tree of mappings."""
    for number in range(2, 60):
        made.append(SnapshotId(number))
        driver.prepare(made[-1], [_ONE])
        _write_blocks(driver.as_block(made[-1]).path, range(0, 8000, 60))
        driver.unmount(made[-1])


def test_full_metadata(tmp_path: Path) -> None:
    """The pool goes read-only, and everybody says why and what to do; after that has been done all goes on."""
    with attached(tmp_path / "d", loopmetadatasize="2M", min_free_space="0%") as driver:
        pool = driver.devices.pool
        driver.prepare(_ONE, [])
        _write_blocks(driver.as_block(_ONE).path, range(8000))
        driver.unmount(_ONE)
        made = [_ONE]
        with pytest.raises((OSError, FailedPrecondition)):
            _copy_and_write(driver, made)
        assert thin.pool_status(pool).mode is thin.Mode.READ_ONLY
        found = watch(driver.devices, 80, 90)
        assert found.severity is Severity.CRITICAL
        assert "the pool is read-only" in found.remarks
        with pytest.raises(FailedPrecondition, match=r"is read-only.*hpmapper pool repair"):
            driver.prepare(_LATE, [])
        with pytest.raises(FailedPrecondition, match=r"is read-only.*hpmapper pool repair"):
            driver.remove(_ONE)
        for number in made:
            driver.unmount(number)
        assert re.search("flag .* is cleared|was rebuilt", repair(driver.devices))
        driver.devices.backing.bring_up(driver.devices.device_set.block, first=False)
        grow(driver.devices, "", "32M", None)
        driver.attach()
        assert thin.pool_status(pool).mode is thin.Mode.WRITE
        assert watch(driver.devices, 80, 90).severity is Severity.OK
        driver.prepare(_LATE, [])
        assert driver.mount(_LATE, []).is_dir()
        for number in (*made, _LATE):
            driver.remove(number)
        with driver.devices.metadata() as (known, root):
            assert known.devices(root).keys() == {0}
