"""Where a driver keeps what can be cached."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol, runtime_checkable

from hpmapper.drivers.base import Chain, Driver
from hpmapper.errors import Unsupported
from hpmapper.kernel.mountinfo import mounts_below
from hpmapper.model import ObjectDigest, SnapshotId


@runtime_checkable
class Places(Protocol):
    """What the cache's functions ask of a driver beyond its contract (`hpmapper.drivers.base`).

    All paths are those of the pool or the driver's directory: a file asked through an overlay has no pages.
    """

    name: str
    scratch: Path
    one_disk: bool
    """Whether the same place on the disk (FIEMAP) is the same bytes in whichever file: not if each container has a
    device of its own."""

    def object_file(self, digest: ObjectDigest) -> str | None:
        """Where an object's data is; None for a driver without objects."""

    def map_files(self, chain: Chain) -> list[Path]:
        """The files that hold a chain's names and attributes, and the small files' data."""

    def map_mounts(self, chain: Chain) -> list[Path]:
        """Where these maps are mounted, as far as they are: inodes there cache what the maps' files cache as well."""

    def layer_files(self, layer: SnapshotId) -> Path | None:
        """The directory with a layer's files; None where files are objects, or there is none."""

    def own_files(self, snapshot: SnapshotId) -> Path:
        """The directory with what a container has for itself alone."""

    def root(self, snapshot: SnapshotId) -> Path:
        """The container's root directory: what its processes have for `/`."""

    def block_devices(self) -> list[Path]:
        """Block devices that hold all this and are not mounted themselves."""


def places(driver: Driver) -> Places:
    """The driver as one that tells its places.

    Raises:
        Unsupported: it does not (ZFS): the page cache has next to nothing of its data.
    """
    if isinstance(driver, Places):
        return driver
    raise Unsupported(
        f"the {driver.name} driver's page cache cannot be looked into",
        hint="its file system has a cache of its own, which the kernel knows nothing of",
    )


def own_devices(scratch: Path) -> list[Path]:
    """The block devices that a driver has mounted for itself; none where it shares somebody else's file system."""
    return [Path(one.source) for one in mounts_below(scratch.parent) if one.source.startswith("/dev/")]


def devices(driver: Driver) -> list[Path]:
    """The block devices below a driver's own mounts, and the files behind those that are loop devices.

    A file system's own metadata is cached through its device (not XFS's, which keeps it elsewhere). A loop device
    without direct I/O caches all that is read through it a second time, in its file.
    """
    found: dict[Path, None] = {}
    mounted = own_devices(driver.scratch)
    more = driver.block_devices() if isinstance(driver, Places) else []
    for device in (*mounted, *more):
        found[device] = None
        backing = _backing(device)
        if backing is not None:
            found[backing] = None
    return list(found)


def _backing(device: Path) -> Path | None:
    """The file behind a loop device, None if it is another device or the file is out of reach."""
    try:
        backing = Path("/sys/block", device.name, "loop/backing_file").read_text(errors="surrogateescape").rstrip("\n")
    except FileNotFoundError:
        return None
    return Path(backing) if os.path.isfile(backing) else None
