"""Storage on device-mapper's thin provisioning: see `hpmapper.drivers.devicemapper.driver`."""

from __future__ import annotations

from hpmapper.drivers.devicemapper.driver import DeviceMapperDriver
from hpmapper.drivers.devicemapper.options import NAMES, REPEATABLE, Options, parse

__all__ = ["NAMES", "REPEATABLE", "DeviceMapperDriver", "Options", "parse"]
