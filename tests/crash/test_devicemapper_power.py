"""Loss of power: the files below a pool as they are at every step, brought up as after a boot.

A copy of the backing files is what the disk holds at that instant: what the file systems on the thin devices had not
yet written is missing. The records of containers, which nobody syncs, are once all there and once all gone.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from hpmapper import faults
from hpmapper.drivers.devicemapper import DeviceMapperDriver, parse
from hpmapper.model import SnapshotId
from hpmapper.testing.tars import member, tar
from tests.drivers import ingest
from tests.kernel.test_devicemapper import attached

pytestmark = [pytest.mark.kernel, pytest.mark.guest("dm"), pytest.mark.timeout(2000)]

_TARS = {
    SnapshotId(1): tar(member(b"f", b"one" * 50_000), member(b"g", b"g")),
    SnapshotId(2): tar(member(b"f", b"two" * 50_000)),
}


class Disk:
    """Copies of what is below the pool, taken at every fault point, and which layers were promised by then."""

    def __init__(self, home: Path, copies: Path) -> None:
        self._home = home
        self._copies = copies
        self.promised: set[SnapshotId] = set()
        self.taken: list[tuple[str, Path, set[SnapshotId]]] = []

    def take(self, point: str) -> None:
        copy = self._copies / f"{len(self.taken)}"
        subprocess.run(["cp", "-a", "--sparse=always", self._home, copy], check=True)
        self.taken.append((point, copy, set(self.promised)))


def _work(driver: DeviceMapperDriver, disk: Disk) -> None:
    """Everything that changes a pool, once."""
    one, two, three, four = (SnapshotId(number) for number in (1, 2, 3, 4))
    chains: dict[SnapshotId, list[SnapshotId]] = {one: [], two: [one]}
    for layer, below in chains.items():
        ingest(driver, layer, _TARS[layer], *below)
        disk.promised.add(layer)
    driver.prepare(three, [two, one])
    (driver.mount(three, [two, one]) / "written").write_bytes(b"w" * 100_000)
    driver.unmount(three)
    driver.prepare(four, [three, two, one])
    driver.remove(four)
    driver.remove(three)
    disk.promised.discard(two)
    driver.remove_layer(two)


def _verify(copy: Path, promised: set[SnapshotId], point: str) -> None:
    driver = DeviceMapperDriver(copy, parse([]))
    driver.attach()
    try:
        with driver.devices.metadata() as (found, root):
            # A layer whose making was cut short may have a record already; the engine has it removed.
            assert found.devices(root).keys() <= driver.devices.records.used_ids()
        for layer in promised:
            assert b"".join(driver.read_tar(layer)) == _TARS[layer], f"layer {layer} after {point}"
        for snapshot in driver.stored().snapshots:
            if driver.has(snapshot):
                assert (driver.mount(snapshot, []) / "f").exists()
            driver.remove(snapshot)
        for layer in driver.stored().layers:
            driver.remove_layer(layer)
        with driver.devices.metadata() as (found, root):
            assert found.devices(root).keys() == {0}, f"after {point}"
    finally:
        driver.detach()


def test_power_is_lost_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "copies").mkdir()
    disk = Disk(tmp_path / "d", tmp_path / "copies")
    with (
        attached(tmp_path / "d", loopdatasize="1G", loopmetadatasize="8M", basesize="320M") as driver,
        monkeypatch.context() as patched,
    ):
        patched.setattr(faults, "point", disk.take)
        _work(driver, disk)
    points = [point for point, _, _ in disk.taken]
    assert {"dm.device-made", "dm.layer-recorded", "dm.device-buried", "dm.device-deleted"} <= set(points)
    for point, copy, promised in disk.taken:
        if any((copy / "a").iterdir()):
            without = copy.with_name(f"{copy.name}-without")
            subprocess.run(["cp", "-a", "--sparse=always", copy, without], check=True)
            shutil.rmtree(without / "a")
            (without / "a").mkdir()
            _verify(without, promised, f"{point}, without the records of containers")
            shutil.rmtree(without)
        _verify(copy, promised, point)
        shutil.rmtree(copy)
    print(f"\npower lost at {len(points)} steps: {' '.join(points)}")
