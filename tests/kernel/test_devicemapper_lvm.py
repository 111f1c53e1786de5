"""Direct-lvm: from an empty disk to a pool and back, in a guest that has two; cut short at each step, and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hpmapper.drivers.devicemapper import DeviceMapperDriver, lvm, parse, thin
from hpmapper.drivers.devicemapper.admin import Severity, grow, watch
from hpmapper.errors import FailedPrecondition
from hpmapper.kernel import dm, dmudev
from hpmapper.model import SnapshotId
from hpmapper.pool.filesystem import signature
from tests.drivers import ingest_file
from tests.scenario import in_child

pytestmark = [pytest.mark.kernel, pytest.mark.guest("lvm", short=True), pytest.mark.timeout(1800)]

_ONE, _TWO = SnapshotId(1), SnapshotId(2)
_STEPS = (
    "lvm.intended", "lvm.volume-made", "lvm.group-made", "lvm.data-made", "lvm.metadata-made", "lvm.converted",
    "lvm.profile-written", "lvm.monitored", "dm.base-created", "dm.base-recorded",
)  # fmt: skip


def _disk(serial: str) -> Path:
    for entry in Path("/sys/block").glob("*/serial"):
        if entry.read_text().strip() == serial:
            return Path("/dev", entry.parent.name)
    raise FileNotFoundError(f"no disk with the serial number {serial}")


@pytest.fixture(params=["without udev", pytest.param("udev", marks=pytest.mark.guest("lvm"))])
def udev(request: pytest.FixtureRequest) -> Iterator[None]:
    """LVM's tools with udev and without: they make their links in different ways."""
    if request.param == "without udev":
        yield
        return
    with subprocess.Popen(["/usr/lib/systemd/systemd-udevd"], stderr=subprocess.DEVNULL) as udevd:
        while not dmudev.is_running():
            pass
        subprocess.run(["udevadm", "trigger", "--subsystem-match=block"], check=True)
        subprocess.run(["udevadm", "settle"], check=True)
        yield
        udevd.terminate()
    Path("/run/udev/control").unlink(missing_ok=True)


@pytest.fixture
def disks() -> Iterator[tuple[Path, Path]]:
    """Two empty disks, whatever the test leaves on them."""
    found = _disk("spare0"), _disk("spare1")
    yield found
    for name in sorted(dm.devices(), reverse=True):
        if name.startswith("hpmapper-") and not name.startswith("hpmapper-thinpool"):
            dm.remove(name)
    subprocess.run(["vgremove", "-f", "-y", lvm.GROUP], check=False, capture_output=True)
    for disk in found:
        subprocess.run(["wipefs", "-q", "-a", disk], check=True)


def _options(disk: Path, **more: str) -> list[tuple[str, str]]:
    values = {"directlvm_device": str(disk), "basesize": "512M"} | more
    return [(f"dm.{name}", value) for name, value in values.items()]


@contextmanager
def _attached(home: Path, options: list[tuple[str, str]]) -> Iterator[DeviceMapperDriver]:
    driver = DeviceMapperDriver(home, parse(options))
    driver.attach()
    try:
        yield driver
    finally:
        driver.detach()
        driver.devices.destroy()


def _lvs(columns: str, name: str) -> dict[str, str]:
    said = subprocess.run(
        ["lvs", "-a", "--reportformat", "json", "-o", columns, name], check=True, capture_output=True, text=True
    ).stdout
    row: dict[str, str] = json.loads(said)["report"][0]["lv"][0]
    return row


def test_from_an_empty_disk_and_back(tmp_path: Path, disks: tuple[Path, Path], udev: None) -> None:
    with _attached(tmp_path / "d", _options(disks[0], thinp_autoextend_threshold="70")) as driver:
        assert driver.status()["Pool Name"] == "hpmapper-thinpool"
        assert driver.status()["Pool Blocksize"] == "524.3kB"
        assert "Data loop file" not in driver.status()
        pool = _lvs("profile,zero,chunk_size,whenfull", "hpmapper/thinpool")
        assert pool["lv_profile"] == "hpmapper-thinpool"
        assert pool["lv_when_full"] == "error"
        profile = Path("/etc/lvm/profile/hpmapper-thinpool.profile").read_text()
        assert "thin_pool_autoextend_threshold=70" in profile
        assert "thin_pool_autoextend_percent=20" in profile
        assert lvm.is_monitored()
        assert json.loads((driver.home / "setup-config.json").read_text()) == {
            "Device": str(disks[0]), "ThinpPercent": 0, "ThinpMetaPercent": 0, "AutoExtendPercent": 0,
            "AutoExtendThreshold": 70,
        }  # fmt: skip
        ingest_file(driver, _ONE, b"one")
        driver.prepare(_TWO, [_ONE])
        assert (driver.mount(_TWO, [_ONE]) / "f").read_text() == "one"
        assert watch(driver.devices, 80, 90).severity is Severity.OK
        before = thin.pool_status(driver.devices.pool)
        grown = grow(driver.devices, "", "", disks[1])
        assert grown.data_total > 1.8 * before.data_total
        assert (driver.mount(_TWO, [_ONE]) / "f").read_text() == "one", "it went on meanwhile"
        driver.unmount(_TWO)
        driver.devices.detach()
        subprocess.run(["vgchange", "-an", lvm.GROUP], check=True, capture_output=True)
        assert dm.find(lvm.POOL) is None
        again = DeviceMapperDriver(tmp_path / "d", parse([]))
        again.attach()
        assert (again.mount(_TWO, [_ONE]) / "f").read_text() == "one"
        again.remove(_TWO)
        changed = DeviceMapperDriver(tmp_path / "d", parse(_options(disks[0], thinp_autoextend_threshold="60")))
        with pytest.raises(FailedPrecondition, match="changing direct-lvm config is not supported"):
            changed.attach()
    assert subprocess.run(["vgs", lvm.GROUP], check=False, capture_output=True).returncode == 5
    assert subprocess.run(["pvs", disks[0]], check=False, capture_output=True).returncode == 5


def test_what_is_on_the_disk_is_kept(tmp_path: Path, disks: tuple[Path, Path]) -> None:
    subprocess.run(["mkfs.ext4", "-q", disks[0]], check=True)
    refused = DeviceMapperDriver(tmp_path / "d", parse(_options(disks[0])))
    with pytest.raises(FailedPrecondition, match=r"has a filesystem already, use dm\.directlvm_device_force=true"):
        refused.attach()
    found = subprocess.run(["blkid", "-p", disks[0]], check=True, capture_output=True, text=True).stdout
    assert "ext4" in found
    with _attached(tmp_path / "d", _options(disks[0], directlvm_device_force="true")) as driver:
        ingest_file(driver, _ONE, b"one")
    subprocess.run(["pvcreate", "-y", disks[0]], check=True, capture_output=True)
    subprocess.run(["vgcreate", "-y", "theirs", disks[0]], check=True, capture_output=True)
    try:
        with pytest.raises(FailedPrecondition, match='is already part of a volume group "theirs"'):
            DeviceMapperDriver(tmp_path / "e", parse(_options(disks[0]))).attach()
    finally:
        subprocess.run(["vgremove", "-f", "theirs"], check=True, capture_output=True)


def test_cut_short_at_each_step(tmp_path: Path, disks: tuple[Path, Path]) -> None:
    """Each attempt goes one step further than the one before and dies; the last one finishes."""
    home = tmp_path / "d"

    def attach() -> None:
        DeviceMapperDriver(home, parse(_options(disks[0]))).attach()

    for step in _STEPS:
        assert in_child(attach, f"{step}:1") == -signal.SIGKILL, step
    with _attached(home, _options(disks[0])) as driver:
        ingest_file(driver, _ONE, b"one")
        with driver.devices.metadata() as (found, root):
            assert found.devices(root).keys() == {0, 1}


@pytest.mark.guest("lvm")
@pytest.mark.parametrize("step", ["lvm.intended", "lvm.volume-made", "lvm.data-made", "lvm.converted"])
def test_undone_after_it_was_cut_short(tmp_path: Path, disks: tuple[Path, Path], step: str) -> None:
    """`pool rm` of a set-up that died leaves the disk as empty as it was."""
    driver = DeviceMapperDriver(tmp_path / "d", parse(_options(disks[0])))
    assert in_child(driver.attach, f"{step}:1") == -signal.SIGKILL
    driver.devices.destroy()
    for command in (["vgs", lvm.GROUP], ["pvs", str(disks[0])]):
        assert subprocess.run(command, check=False, capture_output=True).returncode == 5
    assert signature(disks[0]) is None


def test_it_grows_by_itself(tmp_path: Path, disks: tuple[Path, Path]) -> None:
    """dmeventd extends the pool when it is fuller than the threshold of our profile."""
    options = _options(
        disks[0],
        thinp_percent="5",
        thinp_metapercent="1",
        thinp_autoextend_threshold="50",
        thinp_autoextend_percent="50",
    )
    with _attached(tmp_path / "d", options) as driver:
        before = thin.pool_status(driver.devices.pool).data_total
        driver.prepare(_ONE, [])
        root = driver.mount(_ONE, [])
        for number in range(50):
            (root / f"f{number}").write_bytes(os.urandom(6 << 20))
            os.sync()
            if thin.pool_status(driver.devices.pool).data_total > before:
                break
        assert thin.pool_status(driver.devices.pool).data_total > before
        driver.remove(_ONE)
