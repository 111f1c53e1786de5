"""What `info` shows of a pool: Docker's fields, with Docker's labels, in Docker's order."""

from __future__ import annotations

from hpmapper.drivers.devicemapper import backing, thin
from hpmapper.drivers.devicemapper.devices import Devices
from hpmapper.drivers.devicemapper.units import human_size
from hpmapper.errors import HpmapperError
from hpmapper.kernel import dm
from hpmapper.model import Space


def fields(devices: Devices) -> dict[str, str]:
    """Docker's fields (17.11 to 24), then what it did not show: the pool's mode, which says why writes fail."""
    known = devices.device_set
    status = _status(devices.pool)
    block, free = known.block, _data_free(devices, status)
    files = devices.backing.files()
    floor = status.data_total * devices.options.min_free_space // 100 * block
    data, metadata = _device_names(devices.pool)
    shown = {
        "Pool Name": devices.pool,
        "Pool Blocksize": human_size(block),
        "Base Device Size": human_size(known.base_size),
        "Backing Filesystem": known.base_fs,
        "Udev Sync Supported": "true",  # waited for where it runs, and done without where not
        "Data file": data,
        "Metadata file": metadata,
        "Data loop file": str(files.data) if files else "",
        "Metadata loop file": str(files.metadata) if files else "",
        "Data Space Used": human_size(status.data_used * block),
        "Data Space Total": human_size(status.data_total * block),
        "Data Space Available": human_size(free),
        "Metadata Space Used": human_size(status.metadata_used * thin.METADATA_BLOCK),
        "Metadata Space Total": human_size(status.metadata_total * thin.METADATA_BLOCK),
        "Metadata Space Available": human_size(_metadata_free(devices, status)),
        "Thin Pool Minimum Free Space": human_size(floor),
        "Deferred Removal Enabled": _yes(devices.options.deferred_removal),
        "Deferred Deletion Enabled": _yes(devices.options.deferred_deletion),
        "Deferred Deleted Device Count": str(len(devices.records.buried_ids())),
        "Library Version": "none: ioctl {}.{}.{}".format(*dm.version()),
    }
    shown["Pool Mode"] = str(status.mode) + (", needs a check" if status.needs_check else "")
    return {label: value for label, value in shown.items() if value}


def space(devices: Devices) -> Space:
    """The pool's data: total, and free for new blocks."""
    status = thin.pool_status(devices.pool, commit=False)
    block = devices.device_set.block
    free = _data_free(devices, status)
    return Space(status.data_used * block + free, free)


def _status(pool: str) -> thin.PoolStatus:
    """All zeros where the pool does not answer: `info` is what one asks then."""
    try:
        return thin.pool_status(pool)
    except (HpmapperError, OSError):
        return thin.PoolStatus(thin.Mode.FAIL)


def _data_free(devices: Devices, status: thin.PoolStatus) -> int:
    """Free bytes; of a sparse file not more than the file system below it has left for it."""
    free = status.data_free * devices.device_set.block
    files = devices.backing.files()
    return min(free, Space.of(files.data).free) if files else free


def _metadata_free(devices: Devices, status: thin.PoolStatus) -> int:
    free = status.metadata_free * thin.METADATA_BLOCK
    files = devices.backing.files()
    return min(free, Space.of(files.metadata).free) if files else free


def _device_names(pool: str) -> tuple[str, str]:
    """The pool's two devices. Those of a pool that somebody else made are his business: Docker left them out."""
    try:
        table = thin.pool_table(pool)
    except (HpmapperError, OSError):
        return "", ""
    found = backing.node(table.data), backing.node(table.metadata)
    if not all(path.name.startswith("loop") for path in found):
        return "", ""
    return str(found[0]), str(found[1])


def _yes(value: bool) -> str:
    return str(value).lower()
