"""Our drivers under the suite that every driver must pass: hpmapper.testing.contract."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hpmapper.drivers.base import Driver
from hpmapper.drivers.hpmapper import HpmapperDriver
from hpmapper.drivers.overlay import OverlayDriver
from hpmapper.drivers.vfs import VfsDriver
from hpmapper.kernel import loop, mount
from hpmapper.pool import filesystem
from hpmapper.pool.base import MIB, PoolConfig, PoolFs, PoolKind
from hpmapper.pool.loop import LoopPool
from hpmapper.testing import contract

pytestmark = [pytest.mark.kernel]

Factory = Callable[[Path], Driver]

_SIZE = 1024 * MIB


def _hpmapper(fs: PoolFs) -> Callable[[Path], Iterator[Driver]]:
    def make(directory: Path) -> Iterator[Driver]:
        pool = LoopPool(directory, PoolConfig(kind=PoolKind.LOOP, fs=fs, size=_SIZE))
        pool.create()
        driver = HpmapperDriver(pool)
        driver.attach()
        yield driver
        driver.detach()
        pool.destroy()

    return make


def _on_xfs(make: Factory) -> Callable[[Path], Iterator[Driver]]:
    def on_xfs(directory: Path) -> Iterator[Driver]:
        image, target = directory / "xfs.img", directory / "xfs"
        target.mkdir()
        image.touch()
        os.truncate(image, _SIZE)
        filesystem.make(PoolFs.XFS, image, "6ba7b811-9dad-11d1-80b4-00c04fd430c8")
        with loop.attached(image, block_size=4096) as device:
            mount.filesystem("xfs", device, target, options={"nouuid": None})
        yield make(target / "data")
        mount.umount(target)
        image.unlink()

    return on_xfs


def _on_host(make: Factory) -> Callable[[Path], Iterator[Driver]]:
    def on_host(directory: Path) -> Iterator[Driver]:
        yield make(directory / "data")

    return on_host


DRIVERS = {
    "hpmapper-xfs": _hpmapper(PoolFs.XFS),
    "hpmapper-btrfs": _hpmapper(PoolFs.BTRFS),
    "overlay-xfs": _on_xfs(OverlayDriver),
    "overlay-host": _on_host(OverlayDriver),
    "vfs-xfs": _on_xfs(VfsDriver),
}


@pytest.fixture(scope="module", params=DRIVERS)
def driver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """A driver with nothing in it, used by all cases in turn."""
    with contextmanager(DRIVERS[request.param])(tmp_path_factory.mktemp(request.param)) as made:
        yield made


@pytest.mark.parametrize("case", contract.CASES, ids=contract.name_of)
def test_contract(driver: Driver, case: contract.Case, tmp_path: Path) -> None:
    try:
        with contract.subject(driver, tmp_path) as subject:
            case(subject)
    except contract.NotApplicable as reason:
        pytest.skip(str(reason))
