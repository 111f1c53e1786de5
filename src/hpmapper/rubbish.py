"""What nothing needs any more, and how it goes: removed snapshots, unused layers and objects, leftovers of crashes.

What is to go is marked or forgotten in the database first and then taken away, so that a crash in between leaves
rubbish, which the next `collect` or `reconcile` finds, and never a record of something that is not there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Container, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hpmapper import faults
from hpmapper.drivers.base import Driver
from hpmapper.errors import FailedPrecondition
from hpmapper.kernel import mountinfo
from hpmapper.meta import profiles, snapshots
from hpmapper.meta.db import Database
from hpmapper.model import ObjectDigest, SnapshotId
from hpmapper.store import workspace

log = logging.getLogger(__name__)

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

_TRANSACTION_SECONDS = 0.02
"""How long others may wait for one that forgets many layers."""


@dataclass(frozen=True, slots=True)
class Collected:
    """What `collect` removed; `waiting`: some was left, because it was in use or an ingest was running."""

    layers: int
    objects: int
    bytes: int
    waiting: bool


class Rubbish:
    """One root's."""

    def __init__(self, db: Database, driver: Driver) -> None:
        """Know where to look; nothing is done yet."""
        self._db = db
        self._driver = driver

    def free_removed(self) -> bool:
        """Free what was marked as removed; False: some of it is still in use."""
        return self.free(snapshots.removed(self._db))

    def free(self, gone: Sequence[SnapshotId]) -> bool:
        """Remove snapshots' storage, and then their rows; False: some are still in use, and stay.

        A sealed one's storage goes with its layer.
        """
        layers = {one for one in gone if snapshots.is_layer(self._db, one)}
        freed = layers.union(self._remove_storages([one for one in gone if one not in layers]))
        done = [one for one in gone if one in freed]
        if done:
            with self._db.transaction(durable=False) as transaction:
                for snapshot in done:
                    snapshots.forget(transaction, snapshot)
        return len(done) == len(gone)

    def collect(self, timeout: float = 60, *, thorough: bool = True) -> Collected:
        """Remove what was marked for it, the images' layers that no image has, and the objects that no layer needs.

        Runs beside everything else; only running ingests are waited for, `timeout` seconds, before objects are removed.

        `thorough`: walk all objects even if no layer went; then only what failed before has left any to remove.
        """
        free = self._driver.space().free
        self.free_removed()
        with self._db.transaction() as transaction:
            for holder in snapshots.lease_holders(self._db):
                if not self._is_alive(holder.partition("/")[0]):
                    snapshots.release(transaction, holder)
            snapshots.forget_unused_chains(transaction)
        faults.point("collect.chains-forgotten")
        gone = self._forget_layers()
        waiting = not self._remove_unknown()
        faults.point("collect.layers-removed")
        walk = thorough or gone > 0
        with self._db.transaction() as transaction:
            objects = snapshots.forget_unused_objects(transaction) if walk else 0
            snapshots.forget_unused_blobs(transaction)
            profiles.forget_unused(transaction)
        faults.point("collect.objects-forgotten")
        if walk and not self._sweep(timeout):
            waiting = True
        return Collected(gone, objects, max(0, self._driver.space().free - free), waiting)

    def _forget_layers(self) -> int:
        """Forget the layers that no snapshot uses; returns how many. Many share a transaction, and so a disk's wait."""
        unused, gone = snapshots.unused_layers(self._db), 0
        while unused:
            with self._db.transaction() as transaction:
                until = time.monotonic() + _TRANSACTION_SECONDS  # not before: others may have been waited for
                while unused and time.monotonic() < until:
                    gone += snapshots.forget_layer(transaction, unused.pop())
            faults.point("collect.layer-forgotten")
        return gone

    def reconcile(self) -> None:
        """Undo what dead processes left half done. Cheap when there is nothing; thorough once after each boot."""
        dead = [snapshot for snapshot, owner in snapshots.unfinished(self._db) if not self._is_alive(owner)]
        if dead:
            self.sweep_if_idle()  # while the rows still say that there is something to do
        for snapshot in dead:
            self.undo(snapshot)
        faults.point("reconcile.undone")
        workspace.sweep(self._driver.scratch)
        faults.point("reconcile.swept")
        boot = _BOOT_ID.read_text().strip()
        if self._db.setting("boot_id") != boot:
            self._restore_sealed()
            self._remove_unknown()
            if self.sweep_if_idle():
                self._db.set_setting("boot_id", boot)

    def _restore_sealed(self) -> None:
        """Empty layers are sealed without a sync, so power loss may have taken them: an empty one is made again."""
        for layer in snapshots.sealed_layers(self._db):
            user = snapshots.any_user(self._db, layer)
            if user is not None and not self._driver.has(layer):
                self._driver.prepare(layer, snapshots.layers_below(self._db, user.parent))

    def undo(self, snapshot: SnapshotId) -> None:
        """Take back a snapshot that somebody did not finish."""
        log.info("undoing unfinished snapshot %s", snapshot)
        self.free([snapshot])

    def _remove_unknown(self) -> bool:
        """Remove storage that no row names; False: some is still in use and stays until the next time."""
        stored = self._driver.stored()  # before the rows: whoever makes storage records the intent first
        known = snapshots.storage_ids(self._db)
        # The newest first: what others were made of may have to stay (ZFS).
        unknown = sorted((stored.snapshots - known.snapshots) | (stored.layers - known.layers), reverse=True)
        return len(self._remove_storages(unknown)) == len(unknown)

    def _remove_storages(self, gone: Sequence[SnapshotId]) -> list[SnapshotId]:
        """Remove all storage of these numbers; returns those that were not in use.

        All are unmounted first: whether one is in use is asked of the mount table, which then changes no more.
        """
        for one in gone:
            with suppress(FailedPrecondition):
                self._driver.unmount(one)
        with mountinfo.watched():
            return [one for one in gone if self._remove_storage(one)]

    def _remove_storage(self, snapshot: SnapshotId) -> bool:
        """Remove all storage of that number; False: it is in use."""
        try:
            self._driver.remove_layer(snapshot)
            faults.point("undo.layer-removed")
            self._driver.remove(snapshot)
        except FailedPrecondition as error:
            log.info("snapshot %s is left for later: %s", snapshot, error)
            return False
        faults.point("remove.removed")
        return True

    def is_at_work(self) -> bool:
        """Whether any process makes or removes a snapshot right now."""
        return any(self._is_alive(owner) for _, owner in snapshots.unfinished(self._db))

    def sweep_if_idle(self) -> bool:
        """Remove the objects that nothing names, unless an ingest runs: then it is left to the next who looks."""
        return self._sweep(timeout=0)

    def _sweep(self, timeout: float) -> bool:
        """Remove the objects that nothing names; False: an ingest still ran after `timeout` seconds."""
        try:
            self._driver.sweep_objects(self._known_objects, timeout)
        except BlockingIOError:
            return False
        return True

    def _is_alive(self, owner: str | None) -> bool:
        return owner is not None and workspace.is_alive(self._driver.scratch, owner)

    def _known_objects(self) -> Container[ObjectDigest]:
        return {digest for digest, _ in snapshots.objects(self._db)}
