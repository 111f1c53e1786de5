"""The thin devices of one pool that are active: block devices and mounts, and letting them go.

Whatever a process makes active it also lets go at once: a device that is marked for deferred removal stays as long as
its mount, and goes with it, however the process or the mount ends.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hpmapper.drivers.devicemapper import backing, basefs, metadata, thin
from hpmapper.drivers.devicemapper.holders import holders
from hpmapper.drivers.devicemapper.options import Options
from hpmapper.drivers.devicemapper.records import DeviceSet, Record, Records, Role
from hpmapper.errors import FailedPrecondition, NotFound
from hpmapper.kernel import dm, lock, mount
from hpmapper.kernel.fscontext import MOUNT_ATTR_NOATIME, MOUNT_ATTR_RDONLY
from hpmapper.model import SnapshotId

_ATTEMPTS = 100

BLOCK_MARK = "block"
"""A file in a/ID: the device was handed out as a block device."""


class Busy(FailedPrecondition):
    """Somebody has a device open."""


class ActiveDevices:
    """See the module's text."""

    def __init__(self, home: Path, options: Options) -> None:
        self.home = home
        self.options = options
        self.records = Records(home)
        self._prefix = ""
        self._set: DeviceSet | None = None
        self._backing: backing.AnyBacking | None = None

    # The pool.

    @property
    def prefix(self) -> str:
        """The beginning of all names: it says which directory they belong to, as Docker's do."""
        if not self._prefix:
            status = self.home.stat()
            self._prefix = f"hpmapper-{os.major(status.st_dev)}:{os.minor(status.st_dev)}-{status.st_ino}"
        return self._prefix

    @property
    def backing(self) -> backing.AnyBacking:
        """What the pool lies on."""
        if self._backing is None:
            self._backing = backing.of(self.device_set, self.home, self.prefix, self.options)
        return self._backing

    @property
    def pool(self) -> str:
        """The pool's name."""
        return self.backing.pool

    @property
    def device_set(self) -> DeviceSet:
        """The pool as it was set up."""
        if self._set is None:
            self._set = self.records.device_set()
        if self._set is None:
            raise NotFound(f"there is no thin pool in {self.home}", hint="hpmapper pool activate")
        return self._set

    @contextmanager
    def metadata(self, *, timeout: float | None = None) -> Iterator[tuple[metadata.Metadata, metadata.Superblock]]:
        """The pool's metadata as it is now, to be read; held for no longer than this lasts.

        Raises:
            BlockingIOError: somebody else has held it for `timeout` seconds (None: is waited for).
        """
        with lock.exclusive(self.home / "metadata.lock", timeout=timeout):
            thin_status = thin.pool_status(self.pool)
            if thin_status.held_root is not None:
                thin.release_metadata(self.pool)  # of a process that died: the lock was free
            thin.reserve_metadata(self.pool)
            try:
                held = thin.pool_status(self.pool).held_root
                assert held is not None
                with metadata.opened(backing.node(thin.pool_table(self.pool).metadata)) as found:
                    yield found, found.superblock(held)
            finally:
                thin.release_metadata(self.pool)

    # Devices and mounts.

    def name(self, number: SnapshotId) -> str:
        """The device-mapper name of a snapshot's or layer's device."""
        return f"{self.prefix}-{number}"

    def activate(self, record: Record) -> Path:
        """Make the block device of a snapshot or layer appear; it stays until it is let go."""
        return self._activate(self.name(record.number), record.device, record.size)

    def _activate(self, name: str, device: int, size: int) -> Path:
        target = thin.thin_target(self.pool, device, size)
        for _ in range(_ATTEMPTS):
            try:
                found = dm.find(name)
                if found is not None and not dm.table(name):
                    dm.remove(name)  # whoever made it died before it had a table; or it is going
                    found = None
                if found is None:
                    dm.activate(name, [target], uuid=f"HPMAPPER-{name}")
                else:
                    self._keep(found, target)
            except OSError as error:
                # ENXIO: it went while we looked. EBUSY: it came.
                if error.errno not in (errno.ENXIO, errno.EBUSY):
                    raise
                time.sleep(0.01)
            else:
                return dm.path(name)
        raise FailedPrecondition(f"device {name} comes and goes", hint="who else manages it?")

    def _keep(self, found: dm.Device, target: dm.Target) -> None:
        """Have an active device stay, with the size and in the state that it should have."""
        if found.removing:
            dm.cancel_removal(found.name)
        if found.suspended:  # whoever took a snapshot of it died meanwhile, for he had the lock that we have
            dm.resume(found.name)
        if dm.table(found.name)[0].length != target.length:
            dm.load(found.name, [target])
            dm.suspend(found.name)
            dm.resume(found.name)
        dm.make_node(found)

    @contextmanager
    def _active(self, name: str, device: int, size: int) -> Iterator[Path]:
        """A device for a while."""
        path = self._activate(name, device, size)
        try:
            yield path
        finally:
            self._deactivate(name)

    def let_go(self, name: str) -> None:
        """From now on the device lives as long as somebody has it open."""
        if self.options.deferred_removal:
            dm.remove(name, deferred=True)

    def _deactivate(self, name: str) -> None:
        """Remove a device that nobody uses any more.

        Raises:
            Busy: somebody does; says who.
        """
        for attempt in range(_ATTEMPTS):
            try:
                dm.remove(name)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                # udev's scans and an unmounting that is under way take moments; a mount may last for ever.
                if attempt % 20 == 2 and (users := holders(name)):
                    raise Busy(f"device {name} is busy: {users}", hint="stop what uses it") from error
                time.sleep(0.05)
            else:
                return
        raise Busy(f"device {name} is busy: nobody who has it open can be told", hint="see lsof")

    @contextmanager
    def mounted(self, record: Record, *, read_only: bool = False) -> Iterator[Path]:
        """A device's file system, mounted for this process alone for as long as this lasts."""
        name = self.name(record.number)
        with ExitStack() as stack:
            with lock.exclusive(self._place(record)):
                device = self.activate(record)
                try:
                    mounting = self._mounted_detached(device, self.device_set.base_fs, read_only=read_only)
                    top = stack.enter_context(mounting)
                finally:
                    self.let_go(name)
            yield top
        if not self.options.deferred_removal:
            self._deactivate(name)

    def _place(self, record: Record) -> Path:
        """The directory that is locked while a device is mounted."""
        places = (self.records.place(role, record.number) for role in (Role.LAYER, Role.SNAPSHOT))
        found = next((place for place in places if place.exists()), None)
        if found is None:
            raise NotFound(f"devmapper: Unknown device {record.number}")
        return found

    @contextmanager
    def _mounted_detached(self, device: Path, kind: str, *, read_only: bool = False) -> Iterator[Path]:
        attributes = MOUNT_ATTR_NOATIME | (MOUNT_ATTR_RDONLY if read_only else 0)
        with mount.detached(kind, device, options=self._mount_options(kind), attributes=attributes) as top:
            yield top

    def _mount_options(self, kind: str) -> dict[str, str | None]:
        return basefs.mount_options(kind, self.options.mount_options())

    def mount(self, record: Record, target: Path) -> None:
        """Mount a device at a place of its own, and let it go with that mount."""
        name, kind = self.name(record.number), self.device_set.base_fs
        device = self.activate(record)
        try:
            mount.filesystem(kind, device, target, options=self._mount_options(kind), attributes=MOUNT_ATTR_NOATIME)
            self._limit_retries(kind, name, target)
        finally:
            self.let_go(name)

    def _limit_retries(self, kind: str, name: str, target: Path) -> None:
        retries = self.options.xfs_nospace_max_retries
        found = dm.find(name)
        if kind != "xfs" or retries is None or found is None:
            return
        try:
            basefs.limit_retries(found.kernel_name, retries)
        except FailedPrecondition:
            mount.umount(target)
            raise

    # Handed out as they are.

    def as_block(self, record: Record) -> Path:
        """The block device of a snapshot, for whoever mounts it himself; it stays until `remove` or a reboot.

        Raises:
            Busy: it is mounted here.
        """
        name = self.name(record.number)
        active = dm.find(name)
        if active is not None and not (self._place(record) / BLOCK_MARK).exists():
            self._deactivate(name)
        (self._place(record) / BLOCK_MARK).touch()
        return self.activate(record)

    def require_no_block(self, record: Record) -> None:
        """Refuse to mount a device that was handed out as one: two mounts that do not know of each other ruin it.

        Raises:
            FailedPrecondition: it was.
        """
        if (self._place(record) / BLOCK_MARK).exists():
            raise FailedPrecondition(
                f"snapshot {record.number} is in use as a block device",
                hint="unmount it first: hpmapper container umount",
            )

    def end_block(self, number: SnapshotId) -> None:
        """Take a device back that was handed out; nothing to do is no error.

        Raises:
            Busy: somebody has it open.
        """
        mark = self.records.place(Role.SNAPSHOT, number) / BLOCK_MARK
        if mark.exists():
            self._deactivate(self.name(number))
            mark.unlink()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with lock.exclusive(self.home / "pool.lock"):
            yield
