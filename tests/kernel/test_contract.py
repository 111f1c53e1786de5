"""Our drivers under the suite that every driver must pass: hpmapper.testing.contract."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hpmapper.drivers.base import Driver
from hpmapper.drivers.btrfs import BtrfsDriver
from hpmapper.drivers.hpmapper import HpmapperDriver
from hpmapper.drivers.overlay import OverlayDriver
from hpmapper.drivers.vfs import VfsDriver
from hpmapper.kernel import loop, mount, qgroup
from hpmapper.pool.base import MIB, Pool, PoolConfig, PoolFs, PoolKind
from hpmapper.pool.directory import DirectoryPool
from hpmapper.pool.loop import LoopPool
from hpmapper.pool.tools import run_tool
from hpmapper.testing import contract

pytestmark = [pytest.mark.kernel]

Factory = Callable[[Path], Driver]

_SIZE = 1024 * MIB


def _on_pool(make_driver: Callable[[Pool], Driver], fs: PoolFs) -> Callable[[Path], Iterator[Driver]]:
    def make(directory: Path) -> Iterator[Driver]:
        pool = LoopPool(directory, PoolConfig(kind=PoolKind.LOOP, fs=fs, size=_SIZE))
        pool.create()
        driver = make_driver(pool)
        driver.attach()
        yield driver
        driver.detach()
        pool.destroy()

    return make


def _on(fstype: str, make: Factory, *mkfs: str, **options: None) -> Callable[[Path], Iterator[Driver]]:
    """A driver in a directory of a file system that is there already."""

    def on_it(directory: Path) -> Iterator[Driver]:
        image, target = directory / "image", directory / "place"
        target.mkdir()
        image.touch()
        os.truncate(image, _SIZE)
        run_tool([*mkfs, image])
        with loop.attached(image, block_size=4096) as device:
            mount.filesystem(fstype, device, target, options=options)
        if fstype == "btrfs":
            qgroup.enable_simple(target)
        yield make(target / "data")
        mount.umount(target)
        image.unlink()

    return on_it


_XFS = ("mkfs.xfs", "-q", "-s", "size=4096", "-m", "reflink=1")
_BTRFS = ("mkfs.btrfs", "-q")
_EXT4 = ("mkfs.ext4", "-q", "-b", "4096", "-O", "quota,project", "-E", "quotatype=prjquota")


def _on_host(make: Factory) -> Callable[[Path], Iterator[Driver]]:
    def on_host(directory: Path) -> Iterator[Driver]:
        yield make(directory / "data")

    return on_host


def _btrfs_in(place: Path) -> Driver:
    pool = DirectoryPool(place.parent, PoolConfig(kind=PoolKind.DIRECTORY, directory=place))
    pool.create()
    return BtrfsDriver(pool)


DRIVERS = {
    "hpmapper-xfs": _on_pool(HpmapperDriver, PoolFs.XFS),
    "hpmapper-btrfs": _on_pool(HpmapperDriver, PoolFs.BTRFS),
    "btrfs": _on_pool(BtrfsDriver, PoolFs.BTRFS),
    "btrfs-directory": _on("btrfs", _btrfs_in, *_BTRFS),
    "overlay-xfs": _on("xfs", OverlayDriver, *_XFS),
    "overlay-host": _on_host(OverlayDriver),
    "vfs-xfs": _on("xfs", VfsDriver, *_XFS),
}

LIMITED = {
    "hpmapper-btrfs": _on_pool(HpmapperDriver, PoolFs.BTRFS),
    "btrfs": _on_pool(BtrfsDriver, PoolFs.BTRFS),
    "btrfs-directory": _on("btrfs", _btrfs_in, *_BTRFS),
    "overlay-btrfs": _on("btrfs", OverlayDriver, *_BTRFS),
    "vfs-btrfs": _on("btrfs", VfsDriver, *_BTRFS),
}
"""On file systems with quotas switched on."""

LIMITED_BY_PROJECT = {
    "hpmapper-xfs": _on_pool(HpmapperDriver, PoolFs.XFS),
    "overlay-xfs": _on("xfs", OverlayDriver, *_XFS, prjquota=None),
    "vfs-xfs": _on("xfs", VfsDriver, *_XFS, prjquota=None),
    "overlay-ext4": _on("ext4", OverlayDriver, *_EXT4, prjquota=None),
    "vfs-ext4": _on("ext4", VfsDriver, *_EXT4, prjquota=None),
}
"""The same with project quota, which many hosts' kernels do not have."""


@pytest.fixture(scope="module", params=DRIVERS)
def driver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """A driver with nothing in it, used by all cases in turn."""
    with contextmanager(DRIVERS[request.param])(tmp_path_factory.mktemp(request.param)) as made:
        yield made


@pytest.fixture(
    scope="module",
    params=[
        *LIMITED,
        *(
            pytest.param(name, marks=pytest.mark.guest("quota", short=name == "hpmapper-xfs"))
            for name in LIMITED_BY_PROJECT
        ),
    ],
)
def limited(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """A driver that must be able to limit sizes."""
    if request.param in LIMITED and not qgroup.knows_simple():
        pytest.skip("this kernel's btrfs has no simple quotas: Linux 6.7 or newer")
    make = {**LIMITED, **LIMITED_BY_PROJECT}[request.param]
    with contextmanager(make)(tmp_path_factory.mktemp(request.param)) as made:
        made.attach()
        assert made.capabilities.size_limits
        yield made


@pytest.mark.parametrize("case", contract.CASES, ids=contract.name_of)
def test_contract(driver: Driver, case: contract.Case, tmp_path: Path) -> None:
    with contract.subject(driver, tmp_path) as subject:
        case(subject)


@pytest.mark.parametrize("case", contract.LIMITS, ids=contract.name_of)
def test_limits(limited: Driver, case: contract.Case, tmp_path: Path) -> None:
    with contract.subject(limited, tmp_path) as subject:
        case(subject)
