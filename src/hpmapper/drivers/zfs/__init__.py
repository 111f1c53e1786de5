"""Storage on ZFS: see `hpmapper.drivers.zfs.driver`."""

from __future__ import annotations

from hpmapper.drivers.base import Driver
from hpmapper.drivers.zfs.driver import FSNAME, ZfsDriver, require

__all__ = ["FSNAME", "ZfsDriver", "destroy", "require"]


def destroy(driver: Driver) -> None:
    """Destroy the datasets, which lie outside the driver's directory."""
    assert isinstance(driver, ZfsDriver)
    driver.destroy()
