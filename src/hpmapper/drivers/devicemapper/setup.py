"""Bringing a pool up: set up the first time, verified and compared with the records each time; and taking it down.

The base device is made here, too: an empty file system that all others are copies of.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from hpmapper import faults
from hpmapper.drivers.devicemapper import backing, basefs, lvm, thin
from hpmapper.drivers.devicemapper.active import ActiveDevices
from hpmapper.drivers.devicemapper.records import BASE, Role
from hpmapper.drivers.devicemapper.units import human_size
from hpmapper.drivers.directory import CONTENTS
from hpmapper.errors import FailedPrecondition, InvalidArgument
from hpmapper.kernel import dm
from hpmapper.store.workspace import remove_tree

log = logging.getLogger(__name__)


class PoolSetup(ActiveDevices):
    """See the module's text."""

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
