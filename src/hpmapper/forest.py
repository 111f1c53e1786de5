"""The forest of named snapshots that a container engine keeps: containerd's terms on top of `Engine`.

    prepare, view   a place to write, or to look, on top of a committed snapshot
    mounts          where its root file system is
    apply           a layer's blob read straight into it (the fast path: no directory in between)
    commit          what was written or applied becomes a committed snapshot, under a name
    remove          gone from the forest; its storage follows later (`Caretaker`)

Each owner ("containerd", "docker") has a forest of its own: keys are kept with the owner's name before them, so that
they collide neither with another's nor with the images' chain IDs. Semantics as in containerd's
core/snapshots/snapshotter.go and its reference implementation, core/snapshots/storage/bolt.go.

Everything that containerd does inside its own database's write transaction (prepare, commit, update, remove) takes one
transaction here and no heavy work (design trap 5).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import BinaryIO, ParamSpec, Protocol, TypeVar, cast

from hpmapper import faults
from hpmapper.drivers.base import MountSpec, Progress
from hpmapper.engine import Engine, Recorded, chain_id, note_known
from hpmapper.errors import (
    AlreadyExists,
    FailedPrecondition,
    HpmapperError,
    InvalidArgument,
    NotFound,
    Unsupported,
)
from hpmapper.kernel.idmap import IdMapping
from hpmapper.labels import TARGET_LABEL, Labels, check_labels, id_mapping, size_limit
from hpmapper.layer.stream import Expected
from hpmapper.meta import snapshots
from hpmapper.meta.snapshots import Layer, Snapshot, Transaction
from hpmapper.model import Kind, SnapshotId, Usage

MAX_KEY = 32768
"""Bytes of a key, as in containerd's own database (bbolt)."""

_NUMBER = re.compile(r"[0-9]{1,18}")

HIDDEN = "applied:"
"""How the keys begin of committed snapshots that hold an applied layer below what was written on top of it."""

_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Info:
    """What the forest knows of a snapshot. `parent`: its key, "" for none. Times in nanoseconds since 1970."""

    key: str
    parent: str
    kind: Kind
    created: int
    updated: int
    labels: Labels


@dataclass(frozen=True, slots=True)
class Applied:
    """What is in a layer's blob: the tar's digest and size in bytes. `read`: False if that was known before."""

    diff_id: str
    tar_size: int
    read: bool


class Watcher(Protocol):
    """Whoever does the work that a forest leaves for later."""

    def unpacking(self, snapshot: Snapshot) -> None: ...
    def applying(self, snapshot: Snapshot) -> None: ...
    def committed(self, snapshot: Snapshot, parent: Snapshot | None) -> None: ...
    def removed(self, snapshot: Snapshot) -> None: ...


class Starts(Protocol):
    """Whoever wants to know that a container is about to start. Told on the way of a call: it must be quick."""

    def starting(self, snapshot: Snapshot, *, mounted: bool) -> None: ...


def _told_outside(method: Callable[_P, _T]) -> Callable[_P, _T]:
    """A method of `Forest` whose errors name snapshots as the owner does, without what the database has before it."""

    @wraps(method)
    def told(*arguments: _P.args, **named: _P.kwargs) -> _T:
        try:
            return method(*arguments, **named)
        except HpmapperError as error:
            forest = cast(Forest, arguments[0])
            error.message = error.message.replace(forest.prefix, "")
            raise

    return told


class Forest:
    """One owner's snapshots. For use by several threads."""

    def __init__(
        self, engine: Engine, owner: str, watcher: Watcher | None = None, starts: Starts | None = None
    ) -> None:
        """`watcher` is told what there is to be done later, `starts` which containers begin."""
        self.engine = engine
        self._db = engine.db
        self.prefix = f"{owner}:"
        self._watcher = watcher
        self._starts = starts

    # Looking.

    def stat(self, key: str) -> Info:
        """What is known of one snapshot; NotFound if there is none."""
        snapshot = self.get(key)
        return self._info(snapshot, snapshots.labels(self._db, snapshot.id))

    def walk(self) -> Iterator[Info]:
        """Yield every snapshot of the owner, as at one moment."""
        with self._db.reading():
            labels = snapshots.all_labels(self._db)
            found = list(snapshots.walk_prefix(self._db, self.prefix))
            keys = {one.id: self._outer(one.key) for one in found}
            parents = [self._parent_key(one) if one.parent not in keys else keys[one.parent] for one in found]
        for one, parent in zip(found, parents, strict=True):
            yield self._named(one, parent, labels.get(one.id, {}))

    def get(self, key: str) -> Snapshot:
        """The snapshot of that key; NotFound if there is none."""
        found = snapshots.find(self._db, self._inner(key))
        if found is None:
            raise NotFound(f"snapshot {key!r} does not exist")
        return found

    def usage(self, key: str) -> Usage:
        """What a snapshot alone occupies; for a committed one, what it added when it came."""
        snapshot = self.get(key)
        return Usage(0, 0) if snapshot.kind is Kind.VIEW else self.engine.usage(snapshot)

    @_told_outside
    def mounts(self, key: str) -> MountSpec:
        """What is to be mounted to get at an active snapshot or a view; made now if it is not there (after a reboot).

        Raises:
            FailedPrecondition: it is committed.
        """
        snapshot = self.get(key)
        labels = snapshots.labels(self._db, snapshot.id)
        if TARGET_LABEL not in labels:
            self.begins(snapshot)
        return self.engine.handout(snapshot, ids=id_mapping(labels))

    def begins(self, snapshot: Snapshot, *, mounted: bool = True) -> None:
        """A container may be about to start on a snapshot: it was made, or (`mounted`) its root is asked for."""
        if self._starts and snapshot.kind is Kind.ACTIVE and snapshot.parent is not None:
            self._starts.starting(snapshot, mounted=mounted)

    # Growing.

    @_told_outside
    def prepare(
        self, key: str, parent: str, labels: Labels, kind: Kind = Kind.ACTIVE, *, size: int | None = None
    ) -> Recorded:
        """Record an active snapshot or a view of `parent` ("": of nothing); `first_mounts` makes its storage.

        An active one may keep `size` bytes; None: what `MAX_SIZE_LABEL` says, else without limit. Whether a limit is
        possible turns out when the storage is made.

        Raises:
            AlreadyExists: the key is taken; or what was to be unpacked into it (`TARGET_LABEL`) is there already, and
                has become a committed snapshot on `parent` with these labels.
            NotFound, InvalidArgument: there is no such parent, it is not committed, a key or label is malformed.
            NoSpace: the pool is too full.
        """
        inner = self._checked(key)
        check_labels(labels)
        id_mapping(labels)  # malformed: refused before anything is recorded
        below = self.get(parent) if parent else None
        if kind is Kind.ACTIVE and TARGET_LABEL in labels and self._bring_known(key, below, labels):
            raise AlreadyExists(f"snapshot {labels[TARGET_LABEL]!r} is here already")

        def label(transaction: Transaction, snapshot: SnapshotId) -> None:
            snapshots.add_labels(transaction, snapshot, labels)

        limit = size or (size_limit(labels) if kind is Kind.ACTIVE else None)
        recorded = self.engine.record(inner, below, kind, label, size=limit)
        if TARGET_LABEL not in labels:
            self._db.afterwards(lambda: self.begins(recorded.snapshot, mounted=False))
        elif watcher := self._watcher:
            self._db.afterwards(lambda: watcher.unpacking(recorded.snapshot))
        return recorded

    @_told_outside
    def first_mounts(self, recorded: Recorded) -> MountSpec:
        """What is to be mounted of a snapshot that was just recorded; it is taken back if that cannot be made."""
        self.engine.make(recorded, finish=False)
        try:
            return self.engine.handout(recorded.snapshot, recorded.below, ids=self._ids(recorded.snapshot))
        except BaseException:
            self.engine.unmake(recorded.snapshot)
            raise

    def _ids(self, snapshot: Snapshot) -> IdMapping | None:
        """What the labels say of the owners that a snapshot is to show."""
        return id_mapping(snapshots.labels(self._db, snapshot.id))

    def update(self, key: str, change: Callable[[Labels], Labels]) -> Info:
        """Let `change` make new labels of a snapshot's labels."""
        with self._db.transaction() as transaction:
            found = snapshots.find(transaction, self._inner(key))
            if found is None:
                raise NotFound(f"snapshot {key!r} does not exist")
            new = change(snapshots.labels(transaction, found.id))
            check_labels(new)
            snapshots.set_labels(transaction, found.id, new)
            snapshots.touch(transaction, found.id)
        return self.stat(key)

    @_told_outside
    def commit(self, name: str, key: str, labels: Labels, parent: str = "", *, quick: bool = False) -> bool:
        """Make a committed snapshot of an active one, under a name; what was written or applied is its layer.

        `parent`: stand on this one, if the active snapshot stood on none (containerd's "rebase"). With `quick` nothing
        happens, and the answer is False, if something has to be made durable first.

        Raises:
            AlreadyExists: the name is taken. NotFound: there is no such key or parent.
            FailedPrecondition: it is not active. InvalidArgument: it has another parent; a name or label is malformed.
        """
        inner = self._checked(name)
        check_labels(labels)
        active = snapshots.find(self._db, self._inner(key))
        if active is None or active.kind is not Kind.ACTIVE:
            raise self._not_committable(name, key, active)
        below = self._parent_at_commit(active, parent)

        def settle(transaction: Transaction, written: SnapshotId | None) -> None:
            self._require_unchanged(transaction, active)
            if written == active.id:
                snapshots.add_layer(transaction, _sealed_layer(active.id), {})
            self._settle(transaction, active, inner, below, written)
            snapshots.set_labels(transaction, active.id, labels)

        is_there = self.engine.driver.has(active.id)
        if active.applied is None and is_there and self.engine.driver.is_untouched(active.id):
            self._record_commit(settle, active.id)  # an empty layer needs no making durable
        elif active.applied is not None and not is_there:
            self._record_commit(settle, None)
        elif quick:
            return False
        else:  # also what was mounted after a layer was applied: attributes of its root alone may have been changed
            self._commit_written(active, settle)
        faults.point("forest.committed")
        if watcher := self._watcher:
            self._db.afterwards(lambda: watcher.committed(active, below))
        return True

    def _require_unchanged(self, transaction: Transaction, active: Snapshot) -> None:
        """Somebody else may have removed or committed it, or applied a layer to it, since it was looked at."""
        now = snapshots.find(transaction, active.key)
        if now is None or now.id != active.id:
            raise NotFound(f"snapshot {self._outer(active.key)!r} was removed or committed meanwhile")
        if now.applied != active.applied:
            raise FailedPrecondition(f"a layer was applied to {self._outer(active.key)!r} meanwhile", hint="try again")

    def _not_committable(self, name: str, key: str, active: Snapshot | None) -> HpmapperError:
        if snapshots.find(self._db, self._inner(name)):
            return AlreadyExists(f"snapshot {name!r} exists already")
        if active is None:
            return NotFound(f"snapshot {key!r} does not exist")
        return FailedPrecondition(f"snapshot {key!r} is not active but {active.kind}")

    def _commit_written(self, active: Snapshot, settle: Callable[[Transaction, SnapshotId | None], None]) -> None:
        """What was written becomes a layer, as it lies there if it can."""
        self.engine.prepared(active)
        if self.engine.driver.seal(active.id):
            self._record_commit(settle, active.id)
        else:
            self.engine.ingest_written(active, settle)

    def _record_commit(
        self, settle: Callable[[Transaction, SnapshotId | None], None], written: SnapshotId | None
    ) -> None:
        with self._db.transaction() as transaction:
            settle(transaction, written)

    def _parent_at_commit(self, active: Snapshot, parent: str) -> Snapshot | None:
        below = snapshots.by_id(self._db, active.parent) if active.parent is not None else None
        if not parent:
            return below
        wanted = self.get(parent)
        if below is not None and below.id != wanted.id:
            raise InvalidArgument(f"the snapshot has the parent {self._outer(below.key)!r}, not {parent!r}")
        if wanted.kind is not Kind.COMMITTED:
            raise FailedPrecondition(f"parent {parent!r} is not committed")
        if below is None and not self._is_movable(active.applied):
            raise FailedPrecondition(
                f"the layer cannot be moved onto {parent!r}: it was read without what lies below it",
                hint="prepare it on its parent; containerd does without the capability rebase",
            )
        return wanted

    def _is_movable(self, applied: SnapshotId | None) -> bool:
        """Whether a layer that was read on top of nothing is the same on top of something."""
        if applied is None or not self.engine.driver.capabilities.shares_layers:
            return False
        return not snapshots.layer(self._db, applied).bound

    def _settle(
        self,
        transaction: Transaction,
        active: Snapshot,
        inner: str,
        below: Snapshot | None,
        written: SnapshotId | None,
    ) -> None:
        """Commit an active snapshot: what was applied, what was written, or, with a snapshot that none sees, both."""
        applied = active.applied
        if applied is not None:
            snapshots.forget_applied(transaction, active.id)
        if applied is not None and written is not None:
            hidden = snapshots.add(transaction, f"{HIDDEN}{active.id}", Kind.ACTIVE, below)
            snapshots.committed(transaction, hidden.id, hidden.key, applied, below)
            below = snapshots.by_id(transaction, hidden.id)
        layer = written if written is not None else applied
        assert layer is not None
        snapshots.committed(transaction, active.id, inner, layer, below)
        if layer != active.id:  # what lies as it was written has no digest
            self._note_chain(transaction, active.id, layer, below)

    def _note_chain(
        self, transaction: Transaction, snapshot: SnapshotId, layer: SnapshotId, below: Snapshot | None
    ) -> None:
        """Record the chain ID of a committed snapshot, if all of its layers came as tars whose digests are known."""
        diff_id = snapshots.diff_id(transaction, layer)
        lower = snapshots.chain_id_of(transaction, below) if below else None
        if diff_id and (below is None or lower is not None):
            snapshots.set_chain_id(transaction, snapshot, chain_id(lower, diff_id))

    @_told_outside
    def remove(self, key: str) -> None:
        """Remove a snapshot of any kind from the forest; what it occupied is freed later.

        Raises:
            NotFound: there is none. FailedPrecondition: it has children.
        """
        snapshot = self.get(key)
        with self._db.transaction() as transaction:
            snapshots.begin_removal(transaction, snapshot, None)
            if snapshot.kind is Kind.COMMITTED:
                snapshots.forget_hidden(transaction, f"{HIDDEN}{snapshot.id}")
            elif snapshot.applied is not None:
                snapshots.forget_applied(transaction, snapshot.id)
        faults.point("forest.removed")
        if watcher := self._watcher:
            self._db.afterwards(lambda: watcher.removed(snapshot))

    # The fast path.

    def at(self, path: Path) -> Snapshot | None:
        """The owner's active snapshot or view whose root, or upper, is at `path`, if it is one of ours."""
        numbers = [part for part in path.parts if _NUMBER.fullmatch(part)]
        snapshot = SnapshotId(int(numbers[-1])) if numbers else None
        if snapshot is None or self.engine.driver.root(snapshot).parent != path.parent:
            return None
        try:
            found = snapshots.by_id(self._db, snapshot)
        except NotFound:
            return None
        mine = found.key.startswith(self.prefix) and found.kind is not Kind.COMMITTED
        return found if mine else None

    def key_of(self, snapshot: Snapshot) -> str:
        """The key by which the owner knows a snapshot."""
        return self._outer(snapshot.key)

    def labels(self, snapshot: Snapshot) -> Labels:
        """A snapshot's labels."""
        return snapshots.labels(self._db, snapshot.id)

    def differences(self, left: Path | None, right: Path) -> Callable[[BinaryIO], None]:
        """What writes the layer tar that leads from the root mounted at `left` (None: nothing) to that at `right`.

        Right is an active snapshot and left a view of its parent; or right is a view of a committed snapshot and left
        one of that one's parent: only what is in between is read.

        Raises:
            Unsupported: they are something else.
        """
        new = self.at(right)
        old = self.at(left) if left else None
        if new is None or (left and old is None) or (old and not self._is_bare(old)):
            raise Unsupported("these mounts are not hpmapper's, or not one on top of the other")
        base = old.parent if old else None
        if new.kind is Kind.ACTIVE and new.parent == base and new.applied is None:
            below = self.engine.prepared(new)
            return lambda out: self.engine.driver.write_diff(new.id, below, out)
        top = snapshots.by_id(self._db, new.parent) if new.parent is not None else None
        if top is None or top.layer is None or top.parent != base or not self._is_bare(new):
            raise Unsupported("these mounts are not one on top of the other")
        layer, below = top.layer, snapshots.layers_below(self._db, top.parent)
        if snapshots.layer(self._db, layer).sealed:
            return lambda out: self.engine.driver.write_diff(layer, below, out)
        return lambda out: out.writelines(self.engine.driver.read_tar(layer))

    def _is_bare(self, snapshot: Snapshot) -> bool:
        """Whether a snapshot shows its parent and nothing else."""
        return snapshot.applied is None and self._is_untouched(snapshot)

    @_told_outside
    def apply(
        self, snapshot: Snapshot, open_blob: Callable[[], BinaryIO], expect: Expected, progress: Progress | None = None
    ) -> Applied:
        """Read a layer's blob as what an active snapshot holds. A layer that is here already is not read.

        Raises:
            Unsupported: something was written or applied to it before, or it is in use: it takes a differ that writes
                through a mount.
            Corrupt, InvalidArgument, NoSpace: as `Engine.ingest`. The snapshot stays as it was.
        """
        if snapshot.kind is not Kind.ACTIVE or not self._is_bare(snapshot):
            raise Unsupported(f"snapshot {self._outer(snapshot.key)!r} is a view, or was written to before")
        if self._watcher:
            self._watcher.applying(snapshot)
        self._ingest_below(snapshot)
        self._drop_storage(snapshot)
        try:
            return self._apply(snapshot, open_blob, expect, progress)
        except BaseException:
            self.engine.prepared(snapshot)  # as it was
            raise

    def _apply(
        self, snapshot: Snapshot, open_blob: Callable[[], BinaryIO], expect: Expected, progress: Progress | None
    ) -> Applied:
        below = snapshots.layers_below(self._db, snapshot.parent)
        known = snapshots.known_blob(self._db, expect.digest) if expect.digest else None
        if known:
            layer = self.engine.layer_for(known[0], below)
            if layer is not None and self._take_known(snapshot, layer):
                return Applied(*known, read=False)

        def record(transaction: Transaction, layer: SnapshotId) -> None:
            snapshots.set_applied(transaction, snapshot.id, layer)

        with open_blob() as blob:
            facts = self.engine.ingest_layer(below, blob, expect, record, progress)
        faults.point("forest.applied")
        return Applied(facts.diff_id, facts.tar_size, read=True)

    def _ingest_below(self, snapshot: Snapshot) -> None:
        try:
            self.engine.ingest_sealed(snapshot)
        except InvalidArgument as error:
            raise Unsupported(f"what lies below {self._outer(snapshot.key)!r} stays a directory: {error}") from error

    def _is_untouched(self, snapshot: Snapshot) -> bool:
        """Whether nothing was written to a snapshot, but perhaps attributes of its root."""
        driver = self.engine.driver
        if not driver.has(snapshot.id) or driver.is_untouched(snapshot.id):
            return True
        return next(self.engine.changes(snapshot), None) is None

    def _take_known(self, snapshot: Snapshot, layer: SnapshotId) -> bool:
        """Let a layer that is here be what a snapshot holds; False: it has just gone."""
        try:
            with self._db.transaction() as transaction:
                snapshots.set_applied(transaction, snapshot.id, layer)
                note_known(transaction, layer)
        except NotFound:
            return False
        faults.point("forest.applied")
        return True

    def _drop_storage(self, snapshot: Snapshot) -> None:
        """What is mounted will not show the applied layer: whoever asks for the mount then gets a new one.

        Before, not after: a crash in between must not leave the old one.
        """
        try:
            self.engine.driver.remove(snapshot.id)
        except FailedPrecondition as error:
            raise Unsupported(f"snapshot {self._outer(snapshot.key)!r} is in use: {error}") from error
        faults.point("forest.dropped")

    def _bring_known(self, key: str, parent: Snapshot | None, labels: Labels) -> bool:
        """Commit the layer that containerd wants to unpack on `parent`, if it is here: nothing is fetched or read then.

        containerd calls that a remote snapshot, and finds it by its label and parent.
        """
        target = labels[TARGET_LABEL]
        candidates = snapshots.with_chain_id(self._db, target)
        if not candidates:
            return False
        if any(self._stands_for(one, target, parent) for one in candidates):
            return True
        below = snapshots.layers_below(self._db, parent.id) if parent else []
        # The same layers may be kept another way: then they are of no use here.
        usable = (one.layer for one in candidates if snapshots.layers_below(self._db, one.parent) == below)
        layer = next(usable, None)
        if layer is not None:
            self._commit_known(f"{key} {target}", parent, layer, labels)
        return layer is not None

    def _stands_for(self, known: Snapshot, target: str, parent: Snapshot | None) -> bool:
        """Whether containerd will find a committed snapshot when it looks for `target` on `parent`."""
        mine = known.key.startswith(self.prefix) and known.parent == (parent.id if parent else None)
        return mine and snapshots.labels(self._db, known.id).get(TARGET_LABEL) == target

    def _commit_known(self, name: str, parent: Snapshot | None, layer: SnapshotId, labels: Labels) -> None:
        with self._db.transaction() as transaction:
            snapshot = snapshots.add(transaction, self._checked(name), Kind.ACTIVE, parent)
            snapshots.committed(transaction, snapshot.id, snapshot.key, layer, parent)
            snapshots.set_labels(transaction, snapshot.id, labels)
            self._note_chain(transaction, snapshot.id, layer, parent)
            note_known(transaction, layer)

    # Names.

    def _inner(self, key: str) -> str:
        return self.prefix + key

    def _outer(self, key: str) -> str:
        return key.removeprefix(self.prefix)

    def _checked(self, key: str) -> str:
        if not key or len(key.encode()) > MAX_KEY:
            raise InvalidArgument(f"a snapshot's key has 1 to {MAX_KEY} bytes, not {len(key.encode())}")
        return self._inner(key)

    def _info(self, snapshot: Snapshot, labels: Labels) -> Info:
        return self._named(snapshot, self._parent_key(snapshot), labels)

    def _named(self, snapshot: Snapshot, parent: str, labels: Labels) -> Info:
        key = self._outer(snapshot.key)
        return Info(key, parent, snapshot.kind, snapshot.created, snapshot.updated, labels)

    def _parent_key(self, snapshot: Snapshot) -> str:
        """The key of the nearest snapshot below that the owner sees, "" for none."""
        parent = snapshot.parent
        while parent is not None:
            row = snapshots.by_id(self._db, parent)
            if not row.key.startswith(HIDDEN):
                return self._outer(row.key)
            parent = row.parent
        return ""


def _sealed_layer(snapshot: SnapshotId) -> Layer:
    return Layer(snapshot, "", bound=True, digest=None, tar_size=0, size=-1, inodes=0, damaged=False, sealed=True)
