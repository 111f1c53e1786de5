"""Which drivers tell the cache's functions their places."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpmapper.cache.places import Places
from hpmapper.drivers.registry import DRIVERS, Registered
from hpmapper.pool.base import PoolConfig, PoolFs, PoolKind


@pytest.mark.parametrize("registered", DRIVERS, ids=lambda one: one.name)
def test_every_driver_tells_its_places(registered: Registered, tmp_path: Path) -> None:
    """But for ZFS, which has a cache of its own (the ARC) that the kernel cannot be asked about file by file."""
    pool = PoolConfig(kind=PoolKind.LOOP, fs=registered.pool_fs or PoolFs.XFS)
    driver = registered.make(tmp_path, pool, {})
    assert isinstance(driver, Places) == (registered.name != "zfs")
