"""The way: from a layer's tar to a mounted root, one transaction per operation.

    take_layers an image's layers: there already, or ingested from their blobs
    ingest      tar → the driver's storage → recorded as a committed snapshot
    prepare     a writable snapshot on top of one
    mount       its root file system, at a path
    commit      its changes as a tar, ingested again
    remove      marked, then taken away

Every operation is intent → act → record. What was recorded is there after any crash; what was only intended is undone
by `Rubbish.reconcile`, which runs whenever a root is opened. The engine knows names, drivers know storage.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

from hpmapper import faults, pace
from hpmapper.drivers.base import ChainBelow, Driver, Fresh, Ingested, MountSpec, Progress
from hpmapper.errors import FailedPrecondition, InvalidArgument, Unsupported
from hpmapper.kernel.idmap import IdMapping
from hpmapper.layer.stream import Digests, Expected
from hpmapper.meta import snapshots, totals
from hpmapper.meta.db import Database
from hpmapper.meta.snapshots import Layer, Snapshot
from hpmapper.model import Change, Kind, SnapshotId, Usage
from hpmapper.pipe import piped, stoppable
from hpmapper.pool.floor import Floor, check_floor
from hpmapper.rubbish import Rubbish
from hpmapper.store.workspace import Workspace

log = logging.getLogger(__name__)

_T = TypeVar("_T")

_READERS = min(4, os.cpu_count() or 1)
"""Layers of one image that are read at a time: decompression and digests leave Python's lock to the others."""

_ROOM_SECONDS = 0.2
"""How long an answer about free space holds: a container starts in half a millisecond, asking takes a tenth of it."""


@dataclass(frozen=True, slots=True)
class Taken:
    """A layer that an image brought: its snapshot, and what it cost (None: it was there, nothing was read)."""

    snapshot: Snapshot
    ingested: Ingested | None


class Recorded(NamedTuple):
    """A snapshot that is recorded, the layers below it, nearest first, and how many bytes it may keep."""

    snapshot: Snapshot
    below: list[SnapshotId]
    size: int | None = None


class Blob(NamedTuple):
    """A layer on offer: what it is promised to be, how its compressed bytes are read, who is told of them."""

    expect: Expected
    open: Callable[[], BinaryIO]
    progress: Progress | None = None


Parent = Callable[[], Snapshot | None]
"""Tells the snapshot below, waiting for it if need be."""

Also = Callable[[snapshots.Transaction, SnapshotId], object]
"""What a caller records together with a change of a snapshot: both happen or none."""


class Engine:
    """One root's snapshots. For use by several threads, and by several processes on one root.

    Attributes:
        rubbish: what nothing needs any more.
    """

    def __init__(self, db: Database, driver: Driver, floor: Floor) -> None:
        """Take over a root whose driver is attached. Call `rubbish.reconcile` before anything else."""
        self.db = db
        self.driver = driver
        self.rubbish = Rubbish(db, driver)
        self._floor = floor
        self._session: Workspace | None = None
        self._session_lock = threading.Lock()
        self._leases = count()
        self._room_seen = float("-inf")

    def close(self) -> None:
        """End the session; nothing is unmounted."""
        self._end_session()
        self.db.close()

    def detach(self) -> None:
        """Give up devices and mounts until the root is opened again.

        Raises:
            FailedPrecondition: a container is in use.
        """
        self._end_session()
        self.driver.detach()

    def _end_session(self) -> None:
        if self._session:
            self._session.close()
            self._session = None

    # Layers in.

    @pace.ingesting()
    def take_layers(self, blobs: Sequence[Blob], lease: str | None = None) -> list[Taken]:
        """The committed snapshots of an image's layers, the lowest first; only what nothing has yet is read.

        These are all: what the image's containers would wait for is made ready as well. Several layers are read at a
        time, each recorded once the one below it is.

        Raises as `ingest`, for the lowest layer that failed.
        """
        self._require_room(len(blobs))
        stop = threading.Event()
        taken: list[Future[Taken]] = []
        with ThreadPoolExecutor(_READERS, "take-layer") as readers:
            try:
                key: str | None = None
                for blob in blobs:
                    parent = partial(_snapshot_of, taken[-1]) if taken else _nothing
                    known = blob.expect.diff_id is not None and (key is not None or not taken)
                    key = chain_id(key, blob.expect.diff_id) if known and blob.expect.diff_id else None
                    taken.append(readers.submit(self._take, key, parent, blob, lease, stop))
                wait(taken, return_when=FIRST_EXCEPTION)
            finally:
                stop.set()  # what still reads for an image that failed, or that nobody waits for, ends now
        done = [future.result() for future in taken if not future.exception()]
        fresh = {one.ingested.layer: one.ingested.fresh for one in done if one.ingested and one.ingested.fresh}
        try:
            layers = [future.result() for future in taken]
            if layers:
                self.finish(layers[-1].snapshot, fresh)
            return [_let_go(one) for one in layers]
        finally:
            for one in done:
                _let_go(one)

    def take_layer(self, parent: Snapshot | None, blob: Blob, lease: str | None = None) -> Taken:
        """The committed snapshot of one layer on top of `parent`; see `take_layers`."""
        key = chain_id(parent.key if parent else None, blob.expect.diff_id) if blob.expect.diff_id else None
        return _let_go(self._take(key, lambda: parent, blob, lease, threading.Event()))

    def _take(self, key: str | None, parent: Parent, blob: Blob, lease: str | None, stop: threading.Event) -> Taken:
        known = self._known_layer(key, parent, blob.expect.diff_id, lease) if key and blob.expect.diff_id else None
        if known:
            return Taken(known, None)
        with blob.open() as data:
            return self._ingest(parent, stoppable(data, stop), blob.expect, lease, blob.progress)

    def finish(self, top: Snapshot, fresh: Mapping[SnapshotId, Fresh] | None = None) -> None:
        """An image's layers are complete: make ready what its containers would wait for."""
        self.driver.finish(self._chain(top), fresh or {})

    @contextmanager
    def lease(self) -> Iterator[str]:
        """Keep the layers taken meanwhile from being collected: until an image that has them is recorded."""
        holder = f"{self._workspace().token}/{next(self._leases)}"
        try:
            yield holder
        finally:
            with self.db.transaction(durable=False) as transaction:
                snapshots.release(transaction, holder)

    def ingest(
        self,
        parent: Snapshot | None,
        blob: BinaryIO,
        expect: Expected,
        lease: str | None = None,
        progress: Progress | None = None,
    ) -> Taken:
        """Read a layer into a committed snapshot on top of `parent`; its key is its chain ID (OCI image spec).

        Raises:
            Corrupt: the blob is damaged or not what `expect` says. InvalidArgument: it is hostile.
            NoSpace: the pool is too full. In each case nothing of it is left.
        """
        self._require_room(len(self._chain(parent)) + 1)
        return _let_go(self._ingest(lambda: parent, blob, expect, lease, progress))

    def _ingest(
        self, parent: Parent, blob: BinaryIO, expect: Expected, lease: str | None, progress: Progress | None
    ) -> Taken:
        with self._stored(lambda: self._chain(parent()), blob, expect, progress) as facts:
            found = self._record(parent(), facts.layer, facts, lease)
        return Taken(found, facts)

    @contextmanager
    def _stored(
        self, below: ChainBelow, blob: BinaryIO, expect: Expected, progress: Progress | None
    ) -> Iterator[Ingested]:
        """A layer's storage, made; the body records it. If anything fails it is taken back, with its objects."""
        is_object = partial(snapshots.is_object, self.db)
        try:
            with self._workspace().directory() as work, self.driver.pin():
                key = f"ingest-{work.parent.name}-{work.name}"
                with self._making(key, Kind.COMMITTED, None, self.driver.remove_layer) as number:
                    facts = self.driver.ingest(number, below, blob, work, expect, progress, is_object)
                    faults.point("ingest.stored")
                    yield facts
        except BaseException:
            self.rubbish.sweep_if_idle()
            raise

    def rebuild(self, layer: Layer) -> None:
        """Make a layer's storage again from its own tar, and let everything that has the layer use the new one.

        Raises:
            Corrupt: the tar cannot be made either. The old storage stays as it is.
        """
        row = snapshots.any_user(self.db, layer.id)
        parent = snapshots.by_id(self.db, row.parent) if row and row.parent is not None else None
        with piped(lambda out: out.writelines(self.driver.read_tar(layer.id))) as tar:
            with self.db.transaction() as transaction:
                snapshots.mark_damaged(transaction, layer.id)  # so that the new one is taken for its healing
            self.ingest(parent, tar, Expected(diff_id=layer.diff_id))

    def ingest_layer(
        self,
        below: list[SnapshotId],
        blob: BinaryIO,
        expect: Expected,
        record: Callable[[snapshots.Transaction, SnapshotId], object],
        progress: Progress | None = None,
    ) -> Digests:
        """Read a layer that no snapshot has yet; `record` is told its number in the transaction that makes it exist.

        Raises as `ingest`.
        """
        self._require_room(len(below) + 1)
        with self._stored(lambda: below, blob, expect, progress) as facts:
            try:
                with self.db.transaction() as transaction:
                    snapshots.add_layer(transaction, _layer_row(facts), facts.objects)
                    _note_read(transaction, facts)
                    snapshots.remember_blob(
                        transaction, facts.digests.blob_digest, facts.digests.diff_id, facts.digests.tar_size
                    )
                    record(transaction, facts.layer)
                    snapshots.forget(transaction, facts.layer)
            finally:
                _close_fresh(facts)
            faults.point("ingest.recorded")
        return facts.digests

    def layer_for(self, diff_id: str, below: list[SnapshotId]) -> SnapshotId | None:
        """A layer with that tar which is right above the chain `below`, if there is one."""
        if self.driver.capabilities.shares_layers and (unbound := snapshots.unbound_layer(self.db, diff_id)):
            return unbound
        for user in snapshots.users_of_diff_id(self.db, diff_id):
            if snapshots.layers_below(self.db, user.parent) == below:
                return user.layer
        return None

    def ingest_written(self, snapshot: Snapshot, record: Callable[[snapshots.Transaction, SnapshotId], object]) -> None:
        """Read what was written to a snapshot into a layer on top of what is below it.

        Sealed layers below are read first: those that stay so are the topmost of a chain.

        Raises:
            InvalidArgument: it holds something that no layer's tar can hold, or a sealed layer below it does.
        """
        self.ingest_sealed(snapshot)
        below = self.prepared(snapshot)
        with piped(lambda out: self.driver.write_diff(snapshot.id, below, out)) as tar:
            self.ingest_layer(below, tar, Expected(), record)

    def ingest_sealed(self, snapshot: Snapshot) -> None:
        """Turn the sealed layers below a snapshot into the driver's own form, if it has one, the lowest first."""
        if self.driver.capabilities.keeps_sealed:
            return
        for layer in reversed(snapshots.layers_below(self.db, snapshot.parent)):
            if snapshots.layer(self.db, layer).sealed:
                self.ingest_sealed_layer(layer)

    def ingest_sealed_layer(self, layer: SnapshotId) -> None:
        """Turn a sealed layer, whose lower ones are not, into the driver's own form.

        What is mounted keeps the old one, which is collected once nothing has it any more.

        Raises:
            InvalidArgument: it holds something that no layer's tar can hold, or one below it does. It stays as it is.
        """
        user = snapshots.any_user(self.db, layer)
        if user is None:
            return
        below = snapshots.layers_below(self.db, user.parent)
        if below and snapshots.layer(self.db, below[0]).sealed:  # sealed ones are the topmost of their chain
            raise InvalidArgument(f"layer {below[0]}, on which it lies, is as it was written, too")
        with piped(lambda out: self.driver.write_diff(layer, below, out)) as tar:
            self.ingest_layer(
                below, tar, Expected(), lambda transaction, new: snapshots.replace_layer(transaction, layer, new)
            )

    def _known_layer(self, key: str, parent: Parent, diff_id: str, lease: str | None) -> Snapshot | None:
        """The snapshot of that chain ID, if there is one or a layer that can stand for it; waits for no other."""
        adoptable = self.driver.capabilities.shares_layers and snapshots.unbound_layer(self.db, diff_id) is not None
        below = parent() if adoptable else None
        with self.db.transaction() as transaction:
            found = snapshots.find(transaction, key)
            if found and snapshots.is_damaged(transaction, found):
                return None
            snapshot = found.id if found else self._adopt(transaction, key, below, diff_id) if adoptable else None
            if snapshot is not None and lease:
                snapshots.hold(transaction, lease, snapshot)
            if snapshot is not None:
                note_known(transaction, snapshots.by_id(transaction, snapshot).layer)
        return snapshots.by_id(self.db, snapshot) if snapshot is not None else None

    def _adopt(
        self, transaction: snapshots.Transaction, key: str, parent: Snapshot | None, diff_id: str
    ) -> SnapshotId | None:
        """Let a layer that came with another chain stand on `parent` too, if there still is one."""
        layer = snapshots.unbound_layer(transaction, diff_id)
        if layer is None:
            return None
        snapshot = snapshots.begin(transaction, key, Kind.COMMITTED, parent, self._workspace().token)
        snapshots.committed(transaction, snapshot, key, layer, parent)
        return snapshot

    def _record(self, parent: Snapshot | None, snapshot: SnapshotId, facts: Ingested, lease: str | None) -> Snapshot:
        """Make an ingested layer exist; or take the one that somebody else finished first, healing it if need be."""
        key = chain_id(parent.key if parent else None, facts.digests.diff_id)
        layer = _layer_row(facts)
        with self.db.transaction() as transaction:
            winner = snapshots.find(transaction, key)
            superfluous = winner is not None and not snapshots.is_damaged(transaction, winner)
            if not superfluous:
                snapshots.add_layer(transaction, layer, facts.objects)
            _note_read(transaction, facts, kept=not superfluous)
            if winner is None:
                snapshots.committed(transaction, snapshot, key, snapshot, parent)
            elif winner.layer is not None and not superfluous:
                snapshots.replace_layer(transaction, winner.layer, snapshot)
                snapshots.forget(transaction, snapshot)
            if lease:
                snapshots.hold(transaction, lease, winner.id if winner else snapshot)
        faults.point("ingest.recorded")
        if superfluous:
            self.rubbish.undo(snapshot)
        return snapshots.get(self.db, key)

    # Snapshots.

    def prepare(
        self,
        key: str,
        parent: Snapshot | None,
        kind: Kind = Kind.ACTIVE,
        *,
        size: int | None = None,
        also: Also | None = None,
        undo: Also | None = None,
    ) -> Snapshot:
        """Make an active snapshot, or a view, of `parent`; it may keep `size` bytes (None: without limit).

        `also` is recorded in the same transaction, and taken back by `undo` should making the storage fail.

        Raises:
            AlreadyExists: the key is taken. NoSpace: no room. Unsupported: no limit is possible here.
            InvalidArgument: the parent is not committed, or the limit is too small.
        """
        # Not durable: power loss may take back a container that nobody can have written to for long.
        recorded = self.record(key, parent, kind, also, size=size, durable=False)
        self.make(recorded, undo)
        return recorded.snapshot

    def record(
        self,
        key: str,
        parent: Snapshot | None,
        kind: Kind = Kind.ACTIVE,
        also: Also | None = None,
        *,
        size: int | None = None,
        durable: bool = True,
    ) -> Recorded:
        """Record an active snapshot or a view. Its storage is made by `make`, or else by whoever asks for it first.

        Raises as `prepare`.
        """
        below = self._chain(parent)
        self._require_room(len(below))
        with self.db.transaction(durable=durable) as transaction:
            snapshot = snapshots.add(transaction, key, kind, parent)
            if size is not None:
                snapshots.set_size_limit(transaction, snapshot.id, size)
            if also:
                also(transaction, snapshot.id)
        faults.point("prepare.recorded")
        return Recorded(snapshot, below, size)

    def make(self, recorded: Recorded, undo: Also | None = None, *, finish: bool = True) -> None:
        """Make a recorded snapshot's storage, or take back the record.

        Without `finish` it does not wait for the image to be made ready for quick starts.
        """
        snapshot, below, size = recorded
        try:
            if finish:
                self.driver.finish(below, {})
            self.driver.prepare(snapshot.id, below, read_only=snapshot.kind is Kind.VIEW, size=size)
        except BaseException:
            self.unmake(snapshot, undo)
            raise
        faults.point("prepare.prepared")

    def unmake(self, snapshot: Snapshot, undo: Also | None = None) -> None:
        """Take back a snapshot that was just made, or could not be."""
        self.driver.remove(snapshot.id)
        with self.db.transaction(durable=False) as transaction:
            if undo:
                undo(transaction, snapshot.id)
            snapshots.forget(transaction, snapshot.id)

    def mount(self, snapshot: Snapshot) -> Path:
        """The path of an active snapshot's or a view's root file system, mounted now if it was not."""
        read_only = snapshot.kind is Kind.VIEW
        return self._on_present_layers(
            snapshot, self.prepared(snapshot), lambda below: self.driver.mount(snapshot.id, below, read_only=read_only)
        )

    def _on_present_layers(
        self, snapshot: Snapshot, below: list[SnapshotId], mount: Callable[[list[SnapshotId]], _T]
    ) -> _T:
        """Mount on the layers below, which somebody may be replacing by others of the same contents.

        Layers are removed only once they are replaced and no mount has them: so a mount that still finds them to be
        the snapshot's after it was made is seen by whoever removes them. (Where sealed layers are kept, only fsck
        replaces any.)
        """
        if self.driver.capabilities.keeps_sealed:
            return mount(below)
        while True:
            try:
                made = mount(below)
            except OSError:
                made = None
                now = self.below(snapshot)
                if now == below:
                    raise
            else:
                now = self.below(snapshot)
            if made is not None and now == below:
                return made
            self.driver.unmount(snapshot.id)
            below = now

    def prepared(self, snapshot: Snapshot) -> list[SnapshotId]:
        """See to it that an active snapshot's or a view's storage is there; returns the layers below it."""
        self._require_uncommitted(snapshot)
        below = self.below(snapshot)
        if not self.driver.has(snapshot.id):
            size = snapshots.size_limit(self.db, snapshot.id)
            self.driver.prepare(snapshot.id, below, read_only=snapshot.kind is Kind.VIEW, size=size)
        return below

    def below(self, snapshot: Snapshot) -> list[SnapshotId]:
        """The layers below an active snapshot's or a view's own storage, nearest first."""
        parents = snapshots.layers_below(self.db, snapshot.parent)
        return parents if snapshot.applied is None else [snapshot.applied, *parents]

    def handout(
        self, snapshot: Snapshot, below: list[SnapshotId] | None = None, *, ids: IdMapping | None = None
    ) -> MountSpec:
        """What an engine is to mount to get an active snapshot's or a view's root file system.

        `below`: the layers below it, if its storage is known to be there. `ids`: whose owners it is to show.

        Raises:
            Unsupported: ids are to be mapped, which the driver or the kernel cannot.
        """
        if below is None:
            below = self.prepared(snapshot)
        read_only = snapshot.kind is Kind.VIEW
        if ids is None:
            return self._on_present_layers(
                snapshot, below, lambda chain: self.driver.handout(snapshot.id, chain, read_only=read_only)
            )
        if not self.driver.capabilities.maps_ids:
            raise Unsupported(
                f"the {self.driver.name} driver cannot map the ids of user namespaces",
                hint="use the driver hpmapper or overlay, or take remap-ids out of containerd's configuration",
            )
        try:
            return self._on_present_layers(
                snapshot, below, lambda chain: self.driver.handout(snapshot.id, chain, read_only=read_only, ids=ids)
            )
        except OSError as error:
            raise Unsupported(
                f"this kernel cannot map the ids of snapshot {snapshot.key!r}: {error.strerror}",
                hint="hpmapper doctor says what idmapped mounts need",
            ) from error

    def unmount(self, snapshot: Snapshot) -> None:
        """Take the root file system away until the next `mount`.

        Raises:
            FailedPrecondition: it is in use.
        """
        self._require_uncommitted(snapshot)
        self.driver.unmount(snapshot.id)

    def changes(self, snapshot: Snapshot) -> Iterator[Change]:
        """What an active snapshot changed of its parent, in path order."""
        return self.driver.changes(snapshot.id, self.prepared(snapshot))

    def commit(self, snapshot: Snapshot, lease: str | None = None) -> Taken:
        """Make a committed snapshot of an active one's changes; the active one stays as it is.

        Raises:
            InvalidArgument: it has changed something that no layer can hold. NoSpace: the pool is too full.
        """
        below = self.prepared(snapshot)
        parent = snapshots.by_id(self.db, snapshot.parent) if snapshot.parent is not None else None
        with piped(lambda out: self.driver.write_diff(snapshot.id, below, out)) as tar:
            return self.ingest(parent, tar, Expected(), lease)

    def read_tar(self, snapshot: Snapshot) -> Iterator[bytes]:
        """Yield the tar that a committed snapshot's layer was made from."""
        if snapshot.layer is None:
            raise FailedPrecondition(f"snapshot {snapshot.key!r} is not committed")
        return self.driver.read_tar(snapshot.layer)

    def usage(self, snapshot: Snapshot) -> Usage:
        """What a snapshot alone occupies; for a committed one, what it added when it came."""
        if snapshot.layer is None:
            return self.driver.usage(snapshot.id) if self.driver.has(snapshot.id) else Usage(0, 0)
        layer = snapshots.layer(self.db, snapshot.layer)
        return Usage(layer.size, layer.inodes) if layer.size >= 0 else self._counted(layer)

    def _counted(self, layer: Layer) -> Usage:
        """What a sealed layer occupies, counted when first asked: sealing has to be quick."""
        usage = self.driver.usage(layer.id)
        with self.db.transaction(durable=False) as transaction:
            snapshots.set_usage(transaction, layer.id, usage.size, usage.inodes)
        return usage

    def remove(self, snapshot: Snapshot, also: Also | None = None) -> None:
        """Remove a snapshot of any kind; `also` is recorded in the same transaction (what else goes with it).

        A committed one's layer stays until it is collected.

        Raises:
            FailedPrecondition: it has children, an image or a container has it, or it is mounted and in use.
        """
        if snapshot.kind is not Kind.COMMITTED:
            self.driver.unmount(snapshot.id)  # in use: refuse before anything is changed
        with self.db.transaction() as transaction:
            if also:
                also(transaction, snapshot.id)
            snapshots.begin_removal(transaction, snapshot, self._workspace().token)
        faults.point("remove.intended")
        self._finish_removal(snapshot.id)

    def _finish_removal(self, snapshot: SnapshotId) -> None:
        if not snapshots.is_layer(self.db, snapshot):  # a sealed one's storage goes with its layer
            self.driver.remove(snapshot)
        faults.point("remove.removed")
        with self.db.transaction(durable=False) as transaction:
            snapshots.forget(transaction, snapshot)

    # Common steps.

    @contextmanager
    def _making(
        self, key: str, kind: Kind, parent: Snapshot | None, undo: Callable[[SnapshotId], None]
    ) -> Iterator[SnapshotId]:
        """Record the intent to make a snapshot; if the body fails, take back what it did."""
        # The intent need not be durable: power loss ends in the thorough reconciliation.
        with self.db.transaction(durable=False) as transaction:
            snapshot = snapshots.begin(transaction, key, kind, parent, self._workspace().token)
        faults.point("intent.recorded")
        try:
            yield snapshot
        except BaseException:
            undo(snapshot)
            with self.db.transaction(durable=False) as transaction:
                snapshots.forget(transaction, snapshot)
            raise

    def _workspace(self) -> Workspace:
        with self._session_lock:
            if self._session is None:
                self._session = Workspace(self.driver.scratch)
            return self._session

    def _chain(self, parent: Snapshot | None) -> list[SnapshotId]:
        if parent is not None and parent.kind is not Kind.COMMITTED:
            raise InvalidArgument(f"parent {parent.key!r} is not committed")
        return snapshots.layers_below(self.db, parent.id if parent else None)

    def _require_room(self, layers: int) -> None:
        now = time.monotonic()
        if now - self._room_seen > _ROOM_SECONDS:
            check_floor(self.driver.space(), self._floor)
            self._room_seen = now
        limit = self.driver.capabilities.max_layers
        if layers > limit:
            raise InvalidArgument(
                f"the {self.driver.name} driver stacks at most {limit} layers", hint="squash the image's layers"
            )

    @staticmethod
    def _require_uncommitted(snapshot: Snapshot) -> None:
        if snapshot.kind is Kind.COMMITTED:
            raise FailedPrecondition(f"snapshot {snapshot.key!r} is committed", hint="prepare one on top of it")


def chain_id(parent: str | None, diff_id: str) -> str:
    """The name of a layer on top of others (OCI image spec, config.md, "Layer ChainID")."""
    if parent is None:
        return diff_id
    return "sha256:" + hashlib.sha256(f"{parent} {diff_id}".encode("ascii")).hexdigest()


def _note_read(transaction: snapshots.Transaction, facts: Ingested, *, kept: bool = True) -> None:
    """Count a layer that was read; one that is not kept was here already, which nobody could know before."""
    written = facts.size if kept else 0
    totals.add(transaction, layers_read=1, bytes_written=written, bytes_not_written=facts.deduplicated)


def note_known(transaction: snapshots.Transaction, layer: SnapshotId | None) -> None:
    """Count a layer that was here already, and so was not read again."""
    if layer is not None:
        totals.add(transaction, layers_known=1, bytes_not_unpacked=snapshots.tar_size(transaction, layer))


def _nothing() -> None:
    """The parent of the lowest layer."""


def _snapshot_of(taken: Future[Taken]) -> Snapshot:
    return taken.result().snapshot


def _let_go(taken: Taken) -> Taken:
    """Close what was kept of a layer for `finish`; the answer is without it."""
    if taken.ingested is None:
        return taken
    _close_fresh(taken.ingested)
    return replace(taken, ingested=replace(taken.ingested, fresh=None))


def _close_fresh(ingested: Ingested) -> None:
    if ingested.fresh:
        ingested.fresh.spool.close()


def _layer_row(facts: Ingested) -> Layer:
    digests = facts.digests
    return Layer(
        facts.layer,
        digests.diff_id,
        facts.bound,
        facts.digest,
        digests.tar_size,
        facts.size,
        facts.inodes,
        damaged=False,
    )
