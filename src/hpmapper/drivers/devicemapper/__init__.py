"""Storage on device-mapper's thin provisioning: see `hpmapper.drivers.devicemapper.driver`."""

from __future__ import annotations

from hpmapper.drivers.base import Driver
from hpmapper.drivers.devicemapper.driver import DeviceMapperDriver
from hpmapper.drivers.devicemapper.options import NAMES, REPEATABLE, Options, parse

__all__ = ["NAMES", "REPEATABLE", "DeviceMapperDriver", "Options", "destroy", "parse"]


def destroy(driver: Driver) -> None:
    """Give a pool that lies outside the driver's directory back to whoever owns it."""
    assert isinstance(driver, DeviceMapperDriver)
    driver.devices.destroy()
