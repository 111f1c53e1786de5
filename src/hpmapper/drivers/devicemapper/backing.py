"""What a pool lies on: sparse files on loop devices, raw devices, or a pool that somebody else has made.

    loop     data and metadata in the driver's directory: for trying out
    raw      dm.datadev and dm.metadatadev
    given    dm.thinpooldev: somebody else makes and activates it
    lvm      dm.directlvm_device: made here by LVM's tools, and LVM's from then on

Where a pool lies is for life. The records keep it, so that no command needs to be told again.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

from hpmapper import faults
from hpmapper.drivers.devicemapper import lvm, thin
from hpmapper.drivers.devicemapper.options import Options
from hpmapper.drivers.devicemapper.records import DeviceSet
from hpmapper.drivers.devicemapper.units import human_size
from hpmapper.errors import FailedPrecondition, InvalidArgument, NotFound
from hpmapper.kernel import dm, fs, loop, sync

log = logging.getLogger(__name__)

LOW_WATER = 32768
"""Free data blocks at which a pool sends an event: Docker's number."""

LOOP_WARNING = (
    "Usage of loopback devices is strongly discouraged for production use. Please use `--storage-opt dm.thinpooldev` "
    "or direct-lvm (dm.directlvm_device)."
)


class Devices(NamedTuple):
    """A pool's two devices."""

    data: Path
    metadata: Path


class Backing(Protocol):
    """Where a pool comes from. `ours`: it was made here, so it is taken down with the driver."""

    pool: str
    ours: bool

    def bring_up(self, block: int, *, first: bool) -> None:
        """Make the pool's device appear; `first`: there has been nothing in it yet. `block` in bytes."""

    def files(self) -> Devices | None:
        """The backing files, if it has such."""

    def metadata(self) -> Path:
        """Where the metadata lies while the pool is not active."""


class _Made:
    """A pool whose devices are known here and whose table is ours."""

    ours = True

    def __init__(self, pool: str) -> None:
        self.pool = pool

    def _load(self, devices: Devices, block: int) -> None:
        length = fs.device_size(devices.data) // block * block // dm.SECTOR
        if not length:
            raise InvalidArgument(f"{devices.data} is smaller than one block of {human_size(block)}")
        table = thin.PoolTable(length, str(devices.metadata), str(devices.data), block // dm.SECTOR, LOW_WATER)
        try:
            dm.activate(self.pool, [table.target()], uuid=f"HPMAPPER-{self.pool}")
        except OSError as error:
            if error.errno == errno.EBUSY and dm.find(self.pool):
                return  # somebody else was faster
            raise FailedPrecondition(
                f"thin pool {self.pool} cannot be activated: {error.strerror}",
                hint="hpmapper pool check says whether its metadata is sound; the kernel's log has more",
            ) from error


class Loop(_Made):
    """Two sparse files."""

    def __init__(self, home: Path, pool: str, options: Options) -> None:
        super().__init__(pool)
        self._files = Devices(home / "data", home / "metadata")
        self._options = options

    def files(self) -> Devices:
        return self._files

    def metadata(self) -> Path:
        return self._files.metadata

    def bring_up(self, block: int, *, first: bool) -> None:
        log.warning(LOOP_WARNING)
        sizes = self._options.loopdatasize, self._options.loopmetadatasize
        for path, size in zip(self._files, sizes, strict=True):
            _sized(path, size, first=first)
        with self._attached() as devices:
            faults.point("dm.loops-attached")
            self._load(devices, block)

    @contextmanager
    def _attached(self) -> Iterator[Devices]:
        """Loop devices that live as long as this, or as the pool on them."""
        with ExitStack() as stack:
            data, metadata = (stack.enter_context(loop.held(path)) for path in self._files)
            yield Devices(data, metadata)

    def grow(self, data: int, metadata: int) -> None:
        """Let the files, and the pool on them, have at least these bytes; 0 leaves one as it is."""
        for path, size in zip(self._files, (data, metadata), strict=True):
            if size:
                present = path.stat().st_size
                if size < present:
                    raise InvalidArgument(f"devmapper: Can't shrink file {path}", hint=f"it has {human_size(present)}")
                os.truncate(path, size)
                sync.fdatasync(path)
        faults.point("dm.files-grown")
        for path in self._files:
            for one in loop.find(path):
                loop.set_capacity(one.path)
        reload(self.pool)


class Raw(_Made):
    """Two block devices of the operator's."""

    def __init__(self, pool: str, devices: Devices) -> None:
        super().__init__(pool)
        self._devices = devices

    def files(self) -> None:
        return None

    def metadata(self) -> Path:
        return self._devices.metadata

    def bring_up(self, block: int, *, first: bool) -> None:
        for path in self._devices:
            if not path.is_block_device():
                raise NotFound(f"{path} is no block device", hint="see dm.datadev and dm.metadatadev")
        if first:
            self._require_blank(self._devices.metadata)
        self._load(self._devices, block)

    @staticmethod
    def _require_blank(metadata: Path) -> None:
        """A pool is formatted by the kernel where the first block of its metadata is zero, and only there."""
        with metadata.open("rb") as file:
            if any(file.read(thin.METADATA_BLOCK)):
                raise FailedPrecondition(
                    f"{metadata} is not empty",
                    hint=f"if nothing on it is needed: dd if=/dev/zero of={metadata} bs=4096 count=1",
                )


class Given:
    """A pool that is made and activated by somebody else."""

    ours = False

    def __init__(self, pool: str) -> None:
        if dm.DIRECTORY / pool != Path(os.path.normpath(dm.DIRECTORY / pool)) or "/" in pool:
            raise InvalidArgument(f"dm.thinpooldev cannot be {pool!r}", hint="the name of a device in /dev/mapper")
        self.pool = pool

    def files(self) -> None:
        return None

    def metadata(self) -> Path:
        raise FailedPrecondition(
            f"thin pool {self.pool} is not active, and where its metadata lies is known to whoever made it",
            hint="hpmapper pool activate; for LVM: vgchange -ay",
        )

    def bring_up(self, block: int, *, first: bool) -> None:
        raise NotFound(
            f"devicemapper: Non existing device {self.pool}", hint="hpmapper pool activate; for LVM: vgchange -ay"
        )


class Lvm(Given):
    """A pool that LVM's tools made here, out of a device; LVM activates it after a reboot, or is told to."""

    def __init__(self, home: Path, options: Options) -> None:
        super().__init__(lvm.POOL)
        self._home = home
        self._options = options

    def bring_up(self, block: int, *, first: bool) -> None:
        if first:
            lvm.set_up(self._home, self._options.directlvm)
        lvm.activate()


AnyBacking = Loop | Raw | Given


def planned(options: Options, base_fs: str) -> DeviceSet:
    """What is to be set up, as the options say."""
    kind = "given" if options.thinpooldev else "raw" if options.datadev else "loop"
    return DeviceSet(
        kind="lvm" if options.directlvm.device else kind,
        block=options.blocksize,
        base_size=options.basesize,
        base_fs=base_fs,
        pool=options.thinpooldev,
        datadev=options.datadev,
        metadatadev=options.metadatadev,
    )


def of(known: DeviceSet, home: Path, prefix: str, options: Options) -> AnyBacking:
    """The backing of a pool as it was set up.

    Raises:
        FailedPrecondition: the options ask for another one.
    """
    _require_same(known, planned(options, known.base_fs), options, home)
    if known.kind == "lvm":
        return Lvm(home, options)
    if known.kind == "given":
        return Given(known.pool)
    if known.kind == "raw":
        return Raw(f"{prefix}-pool", Devices(Path(known.datadev), Path(known.metadatadev)))
    return Loop(home, f"{prefix}-pool", options)


def _require_same(known: DeviceSet, wanted: DeviceSet, options: Options, home: Path) -> None:
    if known.kind == "lvm":
        lvm.require_same(home, options.directlvm)
    if wanted.kind == "loop":
        return  # nobody said anything
    asked = (wanted.kind, wanted.pool, wanted.datadev, wanted.metadatadev)
    if asked != (known.kind, known.pool, known.datadev, known.metadatadev):
        where = {"given": known.pool, "raw": known.datadev, "lvm": lvm.POOL, "loop": "sparse files"}[known.kind]
        raise FailedPrecondition(
            f"this root was set up on {where}, not on {wanted.pool or wanted.datadev or options.directlvm.device}",
            hint="leave the options of the pool out: they are remembered; or name another --root",
        )


def reload(pool: str) -> thin.PoolStatus:
    """Let a pool fill its devices, which have grown; everything on it goes on.

    Raises:
        FailedPrecondition: it did not grow, though the kernel said nothing: its metadata needs a check.
    """
    table = thin.pool_table(pool)
    data = node(table.data)
    length = fs.device_size(data) // dm.SECTOR // table.block * table.block
    if length < table.length:
        raise FailedPrecondition(f"{data} is smaller than thin pool {pool} on it", hint="has it been replaced?")
    dm.load(pool, [table._replace(length=length).target()])
    # No flush: a pool that is full holds writes back until it has grown.
    dm.suspend(pool, flush=False, freeze=False)
    dm.resume(pool)
    status = thin.pool_status(pool)
    if status.data_total < length // table.block:
        raise FailedPrecondition(
            f"thin pool {pool} has not grown: its metadata needs a check first", hint="hpmapper pool repair"
        )
    return status


def node(number: str) -> Path:
    """The device node for "7:1", made where /dev has none."""
    major, minor = (int(part) for part in number.split(":"))
    path = Path("/dev", os.path.basename(os.readlink(f"/sys/dev/block/{number}")))
    if not path.exists():
        os.mknod(path, 0o060600, os.makedev(major, minor))
    return path


def _sized(path: Path, size: int, *, first: bool) -> None:
    """A sparse file of at least that size, made if this is the first time."""
    if not path.exists():
        if not first:
            raise FailedPrecondition(
                f"loopback file {path} is gone", hint="restore it from a backup, or begin anew: hpmapper pool rm"
            )
        path.touch(mode=0o600)
        if fs.filesystem_name(path) == "btrfs":
            fs.set_flags(path, fs.get_flags(path) | fs.FS_NOCOW_FL)
    elif first:
        os.truncate(path, 0)  # what an attempt left that was cut short
    present = path.stat().st_size
    if present < size:
        os.truncate(path, size)
        sync.fdatasync(path)
    elif present > size:
        log.warning("Can't shrink loopback file %s", path)
