"""The thin devices of one pool: made, activated, mounted, deleted; the base device that all are copies of.

Whatever a process makes active it also lets go at once: a device that is marked for deferred removal stays as long as
its mount, and goes with it, however the process or the mount ends. What is left to be said is in the records.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hpmapper import faults
from hpmapper.drivers.devicemapper import backing, basefs, lvm, metadata, thin
from hpmapper.drivers.devicemapper.holders import holders
from hpmapper.drivers.devicemapper.options import Options
from hpmapper.drivers.devicemapper.records import BASE, DeviceSet, Record, Records, Role, candidate
from hpmapper.drivers.devicemapper.units import human_size
from hpmapper.errors import Corrupt, FailedPrecondition, InvalidArgument, NoSpace, NotFound, Unsupported
from hpmapper.kernel import dm, fs, lock, mount
from hpmapper.kernel.fscontext import MOUNT_ATTR_NOATIME, MOUNT_ATTR_RDONLY
from hpmapper.model import SnapshotId
from hpmapper.store.workspace import remove_tree

log = logging.getLogger(__name__)

_ATTEMPTS = 100
_SMALLEST = 1 << 20

BLOCK_MARK = "block"
"""A file in a/ID: the device was handed out as a block device."""

CONTENTS = "layer/diff"
"""Where a device's file system has the root: beside it stands what the layer's tar is made again from."""


class Busy(FailedPrecondition):
    """Somebody has a device open."""


class Devices:
    """See the module's text. For use by several threads and processes at once."""

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

    def attach(self) -> None:
        """Make the pool usable, set up the first time; does nothing when all is there.

        Raises:
            FailedPrecondition: it is another pool than it was, or cannot be activated.
        """
        self.records.make_directories()
        if self._is_up():
            return
        with self._locked():
            if not self._is_up():
                self._bring_up()

    def _is_up(self) -> bool:
        """Whether the pool is active and has been looked at since."""
        if self._set is None:
            self._set = self.records.device_set()
        if self._set is None or not self._set.initialized:
            return False
        return dm.find(self.pool) is not None and self._seen.exists()

    @property
    def _seen(self) -> Path:
        """A mark that ends with the machine's run: that the pool was audited after it had come up."""
        return Path("/run/hpmapper-devicemapper", f"{self.prefix}-{self.pool}")

    def _bring_up(self) -> None:
        if self._set is None or (not self._set.initialized and self.options.names_a_pool):
            # The intent first: an attempt that was cut short, or refused, is known for one.
            self._set = backing.planned(self.options, basefs.choose(self.options.fs))
            self._backing = None
            self._refuse_used()
            self.records.remember(self._set)
            faults.point("dm.set-recorded")
        first = not self._set.initialized
        # A set-up by LVM that was cut short may have left a device of that name that is no pool yet.
        if dm.find(self.pool) is None or (first and self._set.kind == "lvm"):
            self.backing.bring_up(self._set.block, first=first)
        self._require_writable()
        if first:
            self._make_base()
        else:
            self._verify_base()
            self._audit()
        self._seen.parent.mkdir(mode=0o700, exist_ok=True)
        self._seen.touch()

    def _refuse_used(self) -> None:
        """Somebody else's pool is taken only when it is empty, and his.

        Raises:
            NotFound: it is not there. FailedPrecondition: it is in use.
        """
        if self.device_set.kind != "given":
            return
        status = thin.pool_status(self.pool)
        used = "that already has used data blocks" if status.data_used else ""
        used = used or ("with non-zero transaction ID" if status.transaction else "")
        if used:
            self._set = self._backing = None
            raise FailedPrecondition(
                f"devmapper: Unable to take ownership of thin-pool ({self.options.thinpooldev}) {used}",
                hint="name an empty pool",
            )

    def _require_writable(self) -> None:
        status = thin.pool_status(self.pool)
        if status.takes_messages:
            return
        what = "has failed" if status.mode is thin.Mode.FAIL else "is read-only"
        raise FailedPrecondition(
            f"thin pool {self.pool} {what}" + (": its metadata needs a check" if status.needs_check else ""),
            hint="hpmapper pool repair",
        )

    def detach(self) -> None:
        """Take the pool down, if it was made here; what is mounted must have been unmounted.

        Raises:
            FailedPrecondition: a device is in use.
        """
        if self.records.device_set() is None:
            return
        with self._locked():
            for name in sorted(dm.devices()):
                if name.startswith(f"{self.prefix}-") and name != self.pool:
                    self._deactivate(name)
            if self.backing.ours:
                self._deactivate(self.pool)
            self._seen.unlink(missing_ok=True)
            self._set = self._backing = None

    def destroy(self) -> None:
        """Give up a pool that lies elsewhere: LVM's is undone, another is left as empty as it was taken."""
        known = self.records.device_set()
        if known is None:
            return
        if known.kind == "lvm":
            lvm.tear_down(self.home)
        elif known.kind == "given" and dm.find(self.pool) is not None:
            for device in self.records.used_ids():
                thin.delete(self.pool, device)
            thin.set_transaction(self.pool, thin.pool_status(self.pool).transaction, 0)

    # The base device.

    def _make_base(self) -> None:
        planned = dataclasses.replace(self.device_set, block=thin.pool_table(self.pool).block * dm.SECTOR)
        self._deactivate(self._base_name)
        thin.delete(self.pool, BASE)
        thin.create(self.pool, BASE)
        faults.point("dm.base-created")
        with self._active(self._base_name, BASE, planned.base_size) as device:
            basefs.make(planned.base_fs, device, self.options.mkfsarg)
            with self._mounted_detached(device, planned.base_fs) as top:
                (top / CONTENTS).mkdir(parents=True)
                (top / CONTENTS).chmod(0o755)
            found = basefs.signature(device)
        present = thin.pool_status(self.pool).transaction
        if present != 1:  # else this was cut short before
            thin.set_transaction(self.pool, present, 1)
        self._set = dataclasses.replace(planned, base_uuid=found.uuid, initialized=True, transaction=1)
        self.records.remember(self._set)
        faults.point("dm.base-recorded")

    @property
    def _base_name(self) -> str:
        return f"{self.prefix}-base"

    def _verify_base(self) -> None:
        """Refuse a pool that is not the one that was here before."""
        known = self.device_set
        self._deactivate(self._base_name)
        with self._active(self._base_name, BASE, known.base_size) as device:
            found = basefs.signature(device)
        if found.uuid != known.base_uuid:
            raise FailedPrecondition(
                "devmapper: Base Device UUID and Filesystem verification failed: devmapper: Current Base Device "
                f"UUID:{found.uuid} does not match with stored UUID:{known.base_uuid}. Possibly using a different "
                "thin pool than last invocation",
                hint="name the pool that this root had before",
            )
        status = thin.pool_status(self.pool)
        if status.transaction < known.transaction:
            raise FailedPrecondition(
                f"thin pool {self.pool} is older than this root: transaction {status.transaction}, known is "
                f"{known.transaction}",
                hint="it was restored from a copy; layers made since then are lost: hpmapper fsck --repair",
            )
        self._grow_base()

    def _grow_base(self) -> None:
        """Follow a larger dm.basesize: layers made on the base from now on have it."""
        known, wanted = self.device_set, self.options.basesize
        if self.options.fs not in (None, known.base_fs):
            log.warning("dm.fs=%s is ignored: the base device has %s", self.options.fs, known.base_fs)
        if not self.options.basesize_given or wanted == known.base_size:
            return
        if wanted < known.base_size:
            raise InvalidArgument(
                f"devmapper: Base device size cannot be smaller than {human_size(known.base_size)}",
                hint="it cannot shrink: leave dm.basesize out, or begin anew with another --root",
            )
        with (
            self._active(self._base_name, BASE, wanted) as device,
            self._mounted_detached(device, known.base_fs) as top,
        ):
            basefs.grow(known.base_fs, top, wanted)
        faults.point("dm.base-grown")
        self._set = dataclasses.replace(known, base_size=wanted)
        self.records.remember(self._set)

    # What power loss left.

    def _audit(self) -> None:
        """Compare the records with the pool: after power loss either may know of devices that the other has lost."""
        with self.metadata() as (found, root):
            present = found.devices(root)
        known = self.records.used_ids()
        for device in present.keys() - known:
            log.warning("thin device %s has no record and is deleted", device)
            thin.delete(self.pool, device)
            faults.point("dm.orphan-deleted")
        for role, number, record in list(self.records.everything()):
            if record.device in present:
                continue
            if role is Role.SNAPSHOT:
                log.warning("snapshot %s was lost with the machine's power", number)
                remove_tree(self.records.place(role, number))
            else:
                log.error("layer %s has lost its thin device %s", number, record.device)
        self.delete_buried()

    @contextmanager
    def metadata(self) -> Iterator[tuple[metadata.Metadata, metadata.Superblock]]:
        """The pool's metadata as it is now, to be read; held for no longer than this lasts."""
        with lock.exclusive(self.home / "metadata.lock"):
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

    # Devices.

    def create(self, role: Role, number: SnapshotId, parent: SnapshotId | None, size: int | None = None) -> Record:
        """Make a device that is a copy of a layer's (or of the base), not yet finished in the records.

        One that is finished is left as it is; one that was cut short is made anew.

        Raises:
            NoSpace: less would be free than dm.min_free_space. InvalidArgument: smaller than its parent.
        """
        done = self.records.find(role, number)
        if done is not None:
            return done
        with self._locked():
            earlier = self.records.unfinished(role, number)
            if earlier is not None:
                self._delete(earlier)
            self._require_free()
            origin = self.origin(parent)
            if size is not None:
                _require_no_shrinking(size, origin.size)
            record = Record(number, self._free_id(number), size or origin.size, parent)
            self.records.begin(role, number, record)
            faults.point("dm.device-intended")
            self._snapshot(record, origin, parent)
            faults.point("dm.device-made")
        return record

    def origin(self, parent: SnapshotId | None) -> Record:
        """The device that one with this parent is a copy of."""
        if parent is None:
            return Record(SnapshotId(0), BASE, self.device_set.base_size)
        found = self.find(parent)
        if found is None:
            raise NotFound(f"devmapper: Unknown device {parent}", hint="hpmapper fsck")
        return found[1]

    def find(self, number: SnapshotId) -> tuple[Role, Record] | None:
        """The finished device of a layer, or of a snapshot that may stand for one."""
        for role in (Role.LAYER, Role.SNAPSHOT):
            record = self.records.find(role, number)
            if record is not None:
                return role, record
        return None

    def _free_id(self, number: int) -> int:
        device = candidate(number)
        # Ids are numbers of snapshots, which are never given twice, until they have counted to the pool's limit.
        taken = self.records.used_ids() if number > thin.MAX_DEVICE_ID else self.records.buried_ids()
        while device in taken:
            device = candidate(device + 1)
        return device

    def _snapshot(self, record: Record, origin: Record, parent: SnapshotId | None) -> None:
        name = self._base_name if parent is None else self.name(parent)
        with self._quiet(origin, parent, name):
            try:
                thin.snapshot(self.pool, record.device, origin.device)
            except OSError as error:
                if error.errno != errno.EEXIST:
                    raise
                # Nobody's: the records were asked, and this one is new.
                self._delete_unknown(record.device)
                thin.snapshot(self.pool, record.device, origin.device)

    @contextmanager
    def _quiet(self, origin: Record, parent: SnapshotId | None, name: str) -> Iterator[None]:
        """If a device is active, have it suspended with its file system frozen; and have nobody mount it meanwhile."""
        with ExitStack() as stack:
            if parent is not None:
                stack.enter_context(lock.exclusive(self._place(origin)))
            with _suspended_if_active(name):
                yield

    def _delete_unknown(self, device: int) -> None:
        if sum(known.device == device for _, _, known in self.records.everything()) > 1:
            raise Corrupt(f"thin device {device} has two owners", hint="hpmapper fsck")
        thin.delete(self.pool, device)

    def _require_free(self) -> None:
        """Docker's check before each snapshot."""
        percent = self.options.min_free_space
        if not percent:
            return
        status = thin.pool_status(self.pool, commit=False)
        for kind, more, total, free in (
            ("data", "free space in thin pool", status.data_total, status.data_free),
            ("metadata", "free metadata space in thin pool", status.metadata_total, status.metadata_free),
        ):
            least = max(1, total * percent // 100)
            if free < least:
                raise NoSpace(
                    f"devmapper: Thin Pool has {free} free {kind} blocks which is less than minimum required {least} "
                    f"free {kind} blocks. Create more {more} or use dm.min_free_space option to change behavior",
                    hint="remove containers and images, or hpmapper pool grow",
                )

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

    def finish(self, role: Role, number: SnapshotId, record: Record) -> None:
        """The device is complete. A layer's record is durable, and the pool from now on counts as younger."""
        if role is Role.LAYER:
            self._record_durably(role, number, record)
        else:
            self.records.finish(role, number, record)

    def _record_durably(self, role: Role, number: SnapshotId, record: Record) -> None:
        with self._locked():
            self._set = None  # another process may have counted on
            known = self.device_set
            present = thin.pool_status(self.pool, commit=False).transaction
            record = dataclasses.replace(record, transaction=present + 1)
            self.records.finish(role, number, record, durable=True)
            faults.point("dm.layer-recorded")
            thin.set_transaction(self.pool, present, present + 1)
            self._set = dataclasses.replace(known, transaction=present + 1)
            self.records.remember(self._set)

    def seal(self, number: SnapshotId) -> None:
        """A snapshot may stand for a layer from now on: its record is as durable as one."""
        record = self.records.find(Role.SNAPSHOT, number)
        if record is None:
            raise NotFound(f"devmapper: Unknown device {number}")
        if not record.transaction:
            self._record_durably(Role.SNAPSHOT, number, record)

    def fill(self, record: Record) -> None:
        """Let the file system on a new device that is larger than its parent fill it."""
        with self.mounted(record) as top:
            basefs.grow(self.device_set.base_fs, top, record.size)

    # Active devices and mounts.

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
        return next(place for place in places if place.exists())

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

    # Deletion.

    def remove(self, role: Role, number: SnapshotId) -> None:
        """Delete a device; one that somebody still has open is deleted later. What is not there is no error.

        Raises:
            Busy: it is in use, and deferred deletion is off. FailedPrecondition: the pool takes no messages.
        """
        record = self.records.find(role, number) or self.records.unfinished(role, number)
        if record is None:
            if self.records.place(role, number).exists():
                remove_tree(self.records.place(role, number))
            return
        if not self.options.deferred_deletion:
            self._deactivate(self.name(number))  # refuse before anything is changed
        with self._locked():
            self.records.bury(role, number, record)
        faults.point("dm.device-buried")
        self._dispose(record)

    def delete_buried(self) -> int:
        """Try again to delete what was in use before; returns how many devices still are."""
        return sum(self._is_open(record) or not self._dispose(record) for record in list(self.records.buried()))

    def _is_open(self, record: Record) -> bool:
        found = dm.find(self.name(record.number))
        return found is not None and found.opens > 0

    def _dispose(self, record: Record) -> bool:
        """Delete a buried device; False: it is still in use."""
        try:
            self._deactivate(self.name(record.number))
            if self.discards():
                self._discard(record)
            self._delete(record)
        except Busy as error:
            if not self.options.deferred_deletion:
                raise
            log.info("thin device %s is deleted later: %s", record.device, error)
            return False
        faults.point("dm.device-deleted")
        remove_tree(self.records.grave(record.device))
        return True

    def _delete(self, record: Record) -> None:
        self._deactivate(self.name(record.number))
        try:
            thin.delete(self.pool, record.device)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            raise Busy(f"thin device {record.device} is active under another name", hint="see dmsetup table") from error

    def discards(self) -> bool:
        """Whether what a device occupied goes back to what lies below the pool; Docker's rule."""
        asked = self.options.blkdiscard
        return asked if asked is not None else self.device_set.kind in ("loop", "lvm")

    def _discard(self, record: Record) -> None:
        """Give a device's own blocks back to what lies below: deleting alone returns them to the pool only."""
        if not record.size:
            return
        try:
            with self._active(self.name(record.number), record.device, record.size) as path:
                fs.discard(path, 0, record.size)
        except OSError as error:
            # ENODATA: it is deleted already, and only its record was left by a crash.
            if error.errno not in (errno.EOPNOTSUPP, errno.ENODATA):
                log.warning("thin device %s cannot be discarded: %s", record.device, error)

    # Facts.

    def changed_blocks(self, record: Record) -> tuple[set[int], int]:
        """The blocks that a device has and its parent has not, and a block's size in bytes."""
        parent = self.origin(record.parent)
        with self.metadata() as (found, root):
            return found.changed(root, parent.device, record.device), root.block * dm.SECTOR

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with lock.exclusive(self.home / "pool.lock"):
            yield


def _require_no_shrinking(size: int, present: int) -> None:
    if size < _SMALLEST:
        raise InvalidArgument(f"{size} bytes are no size for a container", hint="name a larger one")
    if size < present:
        raise Unsupported(
            f"devmapper: Container size cannot be smaller than {human_size(present)}",
            hint="that is the size of the image's file system, which cannot shrink: dm.basesize, when a root is made",
        )


@contextmanager
def _suspended_if_active(name: str) -> Iterator[None]:
    with _gone_is_fine():  # it may be let go by its last user at any time
        dm.suspend(name)
    try:
        yield
    finally:
        with _gone_is_fine():
            dm.resume(name)


@contextmanager
def _gone_is_fine() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
