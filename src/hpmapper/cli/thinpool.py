"""`hpmapper pool` for roots whose driver is devicemapper: what differs from pools that are one file system."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import click

from hpmapper.cli import output
from hpmapper.cli.state import State
from hpmapper.config import Config
from hpmapper.drivers.devicemapper import DeviceMapperDriver, admin
from hpmapper.drivers.devicemapper.devices import Devices
from hpmapper.errors import Corrupt
from hpmapper.kernel import dm
from hpmapper.pool.base import CheckReport
from hpmapper.root import driver_of


def find(config: Config) -> Devices | None:
    """The thin devices of the root, if it has such; nothing is activated.

    Raises:
        NotFound: there is no root.
    """
    driver = driver_of(config)
    return driver.devices if isinstance(driver, DeviceMapperDriver) else None


def status(state: State, devices: Devices) -> None:
    """Docker's fields, and whether the pool is active at all."""
    driver = DeviceMapperDriver(devices.home, devices.options)
    active = dm.find(devices.pool) is not None
    facts = {"kind": devices.device_set.kind, "attached": active, "status": driver.status()}
    shown = {"kind": devices.device_set.kind, "attached": output.yes(active), **driver.status()}
    output.show(state, facts, lambda: output.pairs(shown))


def grow(state: State, devices: Devices, data: str, metadata: str, device: Path | None) -> None:
    """Grow it, and show how large it is now."""
    grown = admin.grow(devices, data, metadata, device)
    size = grown.data_total * devices.device_set.block
    meta = grown.metadata_total * 4096
    output.show(
        state,
        {"data": size, "metadata": meta},
        lambda: f"data {output.size(size)}, metadata {output.size(meta)}",
    )


def watch(state: State, devices: Devices, warning: float, critical: float, interval: float, *, metrics: bool) -> int:
    """Judge it once, or every `interval` seconds; the last judgement is the exit status."""
    while True:
        found = admin.watch(devices, warning, critical)
        _tell(state, devices, found, metrics=metrics)
        if not interval:
            return int(found.severity)
        time.sleep(interval)


def _tell(state: State, devices: Devices, found: admin.Fill, *, metrics: bool) -> None:
    if metrics:
        click.echo(_metrics(devices.pool, found))
        return
    facts: dict[str, Any] = {"pool": devices.pool, **dataclasses.asdict(found), "severity": found.severity.name}
    output.show(state, facts, lambda: _plugin_line(devices.pool, found))


def _plugin_line(pool: str, found: admin.Fill) -> str:
    """As monitoring plugins print it: a sentence, a bar, and values for graphs."""
    text = f"{found.severity.name}: {pool} is {found.mode}, data {found.data:.1f}%, metadata {found.metadata:.1f}%"
    return "; ".join([text, *found.remarks]) + f" | data={found.data:.2f}% metadata={found.metadata:.2f}%"


def _metrics(pool: str, found: admin.Fill) -> str:
    """In Prometheus's text format: for the textfile collector of its node exporter."""
    rows = (
        ("hpmapper_thinpool_data_used_ratio", found.data / 100),
        ("hpmapper_thinpool_metadata_used_ratio", found.metadata / 100),
        ("hpmapper_thinpool_severity", int(found.severity)),
        ("hpmapper_thinpool_writable", int(found.mode == "rw")),
    )
    return "\n".join(f'# TYPE {name} gauge\n{name}{{pool="{pool}"}} {value:g}' for name, value in rows)


def check(state: State, devices: Devices) -> CheckReport:
    """thin_check, as far as the pool's state allows."""
    return admin.check(devices)


def repair(state: State, devices: Devices) -> None:
    """Repair it and bring it up again."""
    done = admin.repair(devices)
    devices.attach()
    output.show(state, {"done": done}, lambda: done)
    if admin.watch(devices, 101, 101).severity is admin.Severity.CRITICAL:
        raise Corrupt("the pool is still not fit for use", hint="hpmapper pool check; restore it from a backup")


def usage(state: State, devices: Devices) -> None:
    """What each device occupies."""
    rows = admin.usage(devices)
    facts = [row._asdict() for row in rows]
    columns = ("DEVICE", "OWNER", "MAPPED", "EXCLUSIVE", "CHANGED")
    cells = [
        [str(row.device), row.owner, output.size(row.mapped), output.size(row.exclusive), output.size(row.changed)]
        for row in rows
    ]
    output.show(state, facts, lambda: output.table(columns, cells))
