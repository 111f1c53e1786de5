"""The devicemapper driver on a pool of two sparse files, under the suite that every driver passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hpmapper.drivers.devicemapper import DeviceMapperDriver, parse
from hpmapper.testing import contract

pytestmark = [pytest.mark.kernel, pytest.mark.guest("dm", short=True)]

SMALL = {"dm.basesize": "512M", "dm.loopdatasize": "4G", "dm.loopmetadatasize": "64M"}


@contextmanager
def attached(home: Path, **more: str) -> Iterator[DeviceMapperDriver]:
    """A driver with nothing in it, whose pool goes with this."""
    options = SMALL | {f"dm.{name}": value for name, value in more.items()}
    driver = DeviceMapperDriver(home, parse(options.items()))
    driver.attach()
    try:
        yield driver
    finally:
        driver.detach()


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceMapperDriver]:
    """One pool for all cases."""
    with attached(tmp_path_factory.mktemp("dm") / "data") as made:
        yield made


@pytest.mark.parametrize("case", contract.CASES, ids=contract.name_of)
def test_contract(driver: DeviceMapperDriver, case: contract.Case, tmp_path: Path) -> None:
    with contract.subject(driver, tmp_path) as subject:
        case(subject)
