"""What operators do to a pool while containers run, or when it does not come up: one function for each procedure.

watch    how full it is, judged by thresholds        grow     files, devices and tables, in the right order
check    thin_check, also on a pool at work          repair   clear the flag, or rebuild the metadata beside it
usage    what each device alone occupies             trim     what containers deleted, back to what lies below
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from hpmapper import faults
from hpmapper.drivers.devicemapper import backing, lvm, thin
from hpmapper.drivers.devicemapper.devices import Devices
from hpmapper.drivers.devicemapper.units import parse_size
from hpmapper.drivers.upper import numbers
from hpmapper.errors import FailedPrecondition, InvalidArgument, NotFound, Unsupported
from hpmapper.kernel import dm, fs, mount, sync
from hpmapper.pool.base import CheckReport
from hpmapper.pool.tools import run_tool

_USEFUL_METADATA = 16 << 30
"""More metadata than this no pool uses (Linux: THIN_METADATA_MAX_SECTORS)."""


class Severity(IntEnum):
    """As monitoring plugins end (Nagios and those after it)."""

    OK = 0
    WARNING = 1
    CRITICAL = 2
    UNKNOWN = 3


@dataclass(frozen=True, slots=True)
class Fill:
    """How full a pool is, and how bad that is. Percentages of data and metadata blocks in use."""

    severity: Severity
    mode: str
    data: float
    metadata: float
    remarks: tuple[str, ...] = ()


class DeviceUsage(NamedTuple):
    """A thin device: whose it is, and bytes that it has mapped, that no other has, and that its parent has not."""

    device: int
    owner: str
    mapped: int
    exclusive: int
    changed: int


def watch(devices: Devices, warning: float, critical: float) -> Fill:
    """Look at the pool once.

    Args:
        warning, critical: percentages of data or metadata from which on it is that.
    """
    try:
        status = thin.pool_status(devices.pool)
    except (NotFound, OSError) as error:
        return Fill(Severity.UNKNOWN, "inactive", 0, 0, (str(error),))
    if status.mode is thin.Mode.FAIL:
        return Fill(Severity.CRITICAL, str(status.mode), 0, 0, ("the pool has failed: hpmapper pool repair",))
    data, meta = _percent(status.data_used, status.data_total), _percent(status.metadata_used, status.metadata_total)
    fullest = max(data, meta)
    severity = Severity.CRITICAL if fullest >= critical else Severity.WARNING if fullest >= warning else Severity.OK
    remarks = []
    if status.mode is not thin.Mode.WRITE:
        severity = Severity.CRITICAL
        remarks.append("the pool takes no new data" if status.takes_messages else "the pool is read-only")
    if status.needs_check:
        severity = Severity.CRITICAL
        remarks.append("its metadata needs a check: hpmapper pool repair")
    if devices.device_set.kind == "lvm" and not lvm.is_monitored():
        severity = max(severity, Severity.WARNING)
        remarks.append("LVM does not watch it, so it will not grow by itself: lvchange --monitor y")
    return Fill(severity, str(status.mode), data, meta, tuple(remarks))


def _percent(used: int, total: int) -> float:
    return 100 * used / total if total else 100.0


def grow(devices: Devices, data: str, meta: str, device: Path | None) -> thin.PoolStatus:
    """Make the pool larger, whatever it lies on; everything on it goes on meanwhile.

    Args:
        data, meta: the sizes to have ("200G"; for LVM also "+50G" or "+80%FREE"); "": as they are.
        device: for LVM, a block device to add to the volume group.

    Raises:
        InvalidArgument: smaller than now, or not for this kind of pool. FailedPrecondition: the kernel refused.
    """
    found = devices.backing
    if isinstance(found, backing.Lvm):
        lvm.grow(data, meta, device)
        return thin.pool_status(devices.pool)
    if device is not None:
        raise InvalidArgument("only a pool that LVM made takes another device", hint="name a size, or grow the device")
    if isinstance(found, backing.Loop):
        found.grow(parse_size(data) if data else 0, parse_size(meta) if meta else 0)
    elif data or meta:
        raise InvalidArgument("this pool has the size of its devices", hint="grow these, then ask without a size")
    elif isinstance(found, backing.Given):
        raise InvalidArgument("this pool is made by somebody else", hint="lvextend, if it is LVM's")
    return backing.reload(devices.pool)


def usage(devices: Devices) -> list[DeviceUsage]:
    """What each thin device occupies, with the names by which layers and snapshots are known here."""
    owners = {record.device: f"{role.name.lower()} {number}" for role, number, record in devices.records.everything()}
    parents = {record.device: record for _, _, record in devices.records.everything()}
    buried = devices.records.buried_ids()
    with devices.metadata() as (found, root):
        known, exclusive = found.devices(root), found.exclusive(root)
        changed = {
            device: len(found.changed(root, devices.origin(record.parent).device, device))
            for device, record in parents.items()
            if device in known
        }
    size = root.block * dm.SECTOR
    return [
        DeviceUsage(
            device,
            owners.get(device) or ("base" if device == 0 else "to be deleted" if device in buried else "nobody"),
            details.mapped * size,
            exclusive[device] * size,
            changed.get(device, 0) * size,
        )
        for device, details in sorted(known.items())
    ]


def trim(devices: Devices) -> int:
    """Give what containers that are mounted have deleted back to the pool, and to what lies below; the bytes."""
    freed = 0
    for number in numbers(devices.home / "a"):
        root = devices.home / "a" / str(number) / "m"
        if mount.is_mountpoint(root):
            try:
                freed += fs.trim(root)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EROFS):
                    raise
    return freed


def check(devices: Devices) -> CheckReport:
    """Read the pool's metadata with thin_check: of a pool at work the copy that is as it was at one moment."""
    if dm.find(devices.pool) is None:
        return _checked(["thin_check", _metadata_alone(devices)], "all metadata (thin_check)", "")
    with devices.metadata() as (_, _root):
        path = backing.node(thin.pool_table(devices.pool).metadata)
        rest = "space maps: hpmapper pool check with the pool detached"
        return _checked(["thin_check", "-m", path], "devices and mappings (thin_check -m)", rest)


def _checked(command: list[str | Path], checked: str, unchecked: str) -> CheckReport:
    answer = run_tool(command, accept=range(256))
    said = tuple(line.strip() for line in (answer.stdout + answer.stderr).splitlines() if line.strip())
    return CheckReport(answer.code == 0, checked, unchecked, () if answer.code == 0 else said)


def repair(devices: Devices) -> str:
    """Bring a pool back that needs a check or has failed; it is taken down for that. Returns what was done.

    Raises:
        FailedPrecondition: a container is in use. Unsupported: thin-provisioning-tools are missing.
    """
    found = devices.backing
    if isinstance(found, backing.Lvm):
        devices.detach()
        lvm.repair()
        return "LVM has repaired the metadata (lvconvert --repair)"
    if isinstance(found, backing.Given):
        raise InvalidArgument("this pool is made by somebody else", hint="lvconvert --repair, if it is LVM's")
    devices.detach()
    path = _metadata_alone(devices)
    if run_tool(["thin_check", "-q", path], accept=range(256)).code == 0:
        run_tool(["thin_check", "-q", "--clear-needs-check-flag", path])
        return "the metadata is sound; the flag that asked for a check is cleared"
    return _rebuild(found)


def _rebuild(found: backing.Loop | backing.Raw) -> str:
    """thin_repair reads what it can and writes it anew, elsewhere; the damaged original is kept."""
    if not isinstance(found, backing.Loop):
        raise Unsupported(
            "the metadata is damaged", hint="thin_repair -i METADATA -o SPARE, then name SPARE as dm.metadatadev"
        )
    damaged = found.files().metadata
    mended = damaged.with_name("metadata.repaired")
    with mended.open("wb") as file:  # twice as large: it may be that it was full
        os.truncate(file.fileno(), max(damaged.stat().st_size, min(2 * damaged.stat().st_size, _USEFUL_METADATA)))
    mended.chmod(0o600)
    run_tool(["thin_repair", "-i", damaged, "-o", mended])
    sync.fdatasync(mended)
    faults.point("dm.metadata-repaired")
    kept = damaged.with_name("metadata.damaged")
    damaged.rename(kept)
    mended.rename(damaged)
    sync.fdatasync(damaged.parent)
    return f"the metadata was rebuilt (thin_repair); the damaged one is {kept}"


def _metadata_alone(devices: Devices) -> Path:
    """The metadata of a pool that is not active, as a file or device."""
    if dm.find(devices.pool) is not None:
        raise FailedPrecondition(f"thin pool {devices.pool} is active", hint="hpmapper pool detach")
    return devices.backing.metadata()
