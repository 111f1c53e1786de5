"""The thin devices of one pool: made as copies of others, finished, recorded, deleted.

Below this stand `hpmapper.drivers.devicemapper.setup`, which brings the pool up, and
`hpmapper.drivers.devicemapper.active`, which makes devices appear and lets them go.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from hpmapper import faults
from hpmapper.drivers.devicemapper import basefs, thin
from hpmapper.drivers.devicemapper.active import Busy
from hpmapper.drivers.devicemapper.records import BASE, Record, Role, candidate
from hpmapper.drivers.devicemapper.setup import PoolSetup
from hpmapper.drivers.devicemapper.units import human_size
from hpmapper.errors import Corrupt, InvalidArgument, NoSpace, NotFound, Unsupported
from hpmapper.kernel import dm, fs, lock
from hpmapper.kernel.syscall import opened
from hpmapper.model import SnapshotId
from hpmapper.store.workspace import remove_tree

log = logging.getLogger(__name__)

_SMALLEST = 1 << 20


class Devices(PoolSetup):
    """See the module's text. For use by several threads and processes at once."""

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
        """Try again to delete what was in use before; returns how many devices are left to those who are at it."""
        return sum(self._is_open(record) or not self._dispose(record, wait=False) for record in self.records.buried())

    def _is_open(self, record: Record) -> bool:
        found = dm.find(self.name(record.number))
        return found is not None and found.opens > 0

    def _dispose(self, record: Record, *, wait: bool = True) -> bool:
        """Delete a buried device; False: it is still in use, or, without `wait`, somebody else deletes it just now."""
        grave = self.records.grave(record.device)
        try:
            with opened(grave, os.O_RDONLY | os.O_DIRECTORY) as fd, lock.exclusive(fd, timeout=None if wait else 0):
                return not grave.exists() or self._dispose_alone(record)
        except FileNotFoundError:
            return True  # somebody else was faster
        except BlockingIOError:
            return False

    def _dispose_alone(self, record: Record) -> bool:
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

    def settle(self, record: Record) -> None:
        """Have the file system on a device write everything to where it belongs, not to its log alone."""
        with lock.exclusive(self._place(record)), _suspended_if_active(self.name(record.number)):
            pass  # suspending freezes it

    def is_unwritten(self, record: Record) -> bool:
        """Whether nothing at all was written to a device since it was made: not even by mounting it.

        Raises:
            BlockingIOError: the metadata is being read by somebody else, who may take a while.
        """
        parent = self.origin(record.parent)
        with self.metadata(timeout=0) as (found, root):
            return found.is_unchanged(root, parent.device, record.device)

    def changed_blocks(self, record: Record) -> tuple[set[int], int]:
        """The blocks that a device has and its parent has not, and a block's size in bytes."""
        parent = self.origin(record.parent)
        with self.metadata() as (found, root):
            return found.changed(root, parent.device, record.device), root.block * dm.SECTOR


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
