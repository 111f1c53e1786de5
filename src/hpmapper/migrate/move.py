"""The way of a migration: committed snapshots, then images, then what can be written to; then all of it is verified.

Each thing is recorded in the target, under the name it has in the source, once it is whole and durable there. So a
migration that was cut short goes on with what is missing. What is only under way has the name "migrating-…", and is
begun anew.

Verifying reads everything again: each layer gives back the tar of its DiffID, each root file system is compared with
the source's, file by file.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Protocol

from hpmapper import faults
from hpmapper.engine import Engine
from hpmapper.errors import AlreadyExists, Corrupt, FailedPrecondition, HpmapperError, NoSpace, Unsupported
from hpmapper.forest import HIDDEN
from hpmapper.images import Images
from hpmapper.kernel import sync
from hpmapper.layer.stream import Expected
from hpmapper.meta import images, snapshots
from hpmapper.meta.snapshots import Snapshot, Transaction
from hpmapper.migrate.mirror import differences, mirror
from hpmapper.migrate.source import Contents, ImageItem, LayerItem, SnapshotItem, Source
from hpmapper.model import Kind, SnapshotId
from hpmapper.pool.base import format_size
from hpmapper.pool.floor import Floor, check_floor

log = logging.getLogger(__name__)

_UNFINISHED = "migrating-"
_TOLD_DIFFERENCES = 5
_CHUNK = 1 << 20


class Watcher(Protocol):
    """Told how a migration goes; the command line draws it."""

    def phase(self, name: str, total: int) -> None:
        """ "moving" or "verifying" begins; `total` bytes, about."""

    def item(self, name: str) -> None:
        """It is the turn of something."""

    def advance(self, count: int) -> None:
        """So many more bytes are done."""


@dataclass(frozen=True, slots=True)
class Moved:
    """What is in the target now, verified; `new`: how many of all that this run brought."""

    images: int
    containers: int
    snapshots: int
    new: int


class Migration:
    """One migration between an open source and an open target. Nobody else may change either meanwhile."""

    def __init__(self, source: Source, target: Engine, floor: Floor, watcher: Watcher, *, limits: bool = True) -> None:
        """`limits`: containers keep their size limits."""
        self._source = source
        self._target = target
        self._db = target.db
        self._floor = floor
        self._limits = limits
        self._watcher = watcher
        self._images = Images(target)
        self._placed: dict[str, Snapshot] = {}
        self._compared: set[str] = set()
        self._new = 0

    def run(self) -> Moved:
        """Move what is missing, then verify everything.

        Raises:
            FailedPrecondition: something in the source is in use. AlreadyExists: the target has other things under the
            same names. NoSpace: it does not all fit. Unsupported: the target cannot keep something; names it.
            Corrupt: something in the source is damaged, or came out damaged; names it. What was moved until then stays.
        """
        contents = self._source.contents()
        self._require_free_names(contents)
        self._require_limits(contents)
        self._require_room(contents)
        self._move(contents)
        self._verify(contents)
        faults.point("migrate.verified")
        containers = sum(item.container is not None for item in contents.snapshots)
        return Moved(len(contents.images), containers, len(contents.snapshots) - containers, self._new)

    def require_all_moved(self) -> None:
        """Raise FailedPrecondition if the source has got something new meanwhile."""
        now = self._source.contents()
        missing = [item.key for item in now.snapshots if self._find(item) is None]
        missing += [image.id for image in now.images if not images.images_by_prefix(self._db, image.id[7:])]
        if missing:
            raise FailedPrecondition(f"{self._source.name} has got {missing[0]!r} meanwhile", hint="migrate once more")

    # Before anything is changed.

    def _require_free_names(self, contents: Contents) -> None:
        for image in contents.images:
            for name in image.names:
                present = images.image_by_name(self._db, name)
                if present is not None and present.id != image.id:
                    raise AlreadyExists(
                        f"the target has another image {name}: {present.id[:19]}",
                        hint="remove or rename one of them, or name an empty root",
                    )
        present_containers = {row.name: row for row in images.containers(self._db)}
        for item in contents.snapshots:
            found = present_containers.get(item.container.name) if item.container else None
            if found is not None and item.container is not None and found.image != item.container.image:
                raise AlreadyExists(
                    f"the target has another container {found.name!r}",
                    hint="remove one of them, or name an empty root",
                )

    def _require_limits(self, contents: Contents) -> None:
        limited = [item for item in contents.snapshots if item.size_limit is not None and self._limits]
        if limited and not self._target.driver.capabilities.size_limits:
            raise Unsupported(
                f"{_name_of(limited[0])} has a size limit, which cannot be kept here",
                hint="hpmapper doctor says what size limits need; --without-limits drops them",
            )

    def _require_room(self, contents: Contents) -> None:
        """Refuse what plainly does not fit; layers that the target stores in less only make it fit better."""
        missing = [item for item in contents.snapshots if self._find(item) is None]
        layers = {layer.diff_id or layer.name: layer.size for item in missing for layer in _layers_of(item)}
        needed = sum(layers.values()) + sum(item.written for item in missing)
        try:
            check_floor(self._target.driver.space(), self._floor, needed)
        except NoSpace as error:
            raise NoSpace(
                f"what is to be moved does not fit: {error.message}",
                hint=f"some {format_size(needed)} are missing in the target; give it more room",
            ) from None

    # Moving.

    def _move(self, contents: Contents) -> None:
        committed = [item for item in contents.snapshots if item.layer is not None]
        others = [item for item in contents.snapshots if item.layer is None]
        layers = sum(layer.size for item in contents.snapshots for layer in _layers_of(item))
        self._watcher.phase("moving", layers + sum(item.written for item in others))
        with self._target.lease() as lease:
            for item in committed:
                self._watcher.item(_name_of(item))
                self._placed[item.key] = self._commit(item, lease)
            for image in contents.images:
                self._image(image)
            with self._db.transaction() as transaction:
                for digest, diff_id, size in contents.blobs:
                    snapshots.remember_blob(transaction, digest, diff_id, size)
            for item in others:
                self._watcher.item(_name_of(item))
                if self._find(item) is None:
                    self._writable(item)
                self._watcher.advance(item.written)

    def _commit(self, item: SnapshotItem, lease: str) -> Snapshot:
        """A committed snapshot: there already, or made of its layer."""
        layer = item.layer
        assert layer is not None
        found = self._find(item)
        if found is not None:
            self._watcher.advance(layer.size)
            with self._db.transaction() as transaction:
                self._require_same(item, found, transaction)
                snapshots.hold(transaction, lease, found.id)
            return found
        parent = self._placed[item.parent] if item.parent else None

        def record(transaction: Transaction, number: SnapshotId) -> None:
            row = snapshots.add(transaction, self._key(item), Kind.ACTIVE, parent)
            snapshots.committed(transaction, row.id, row.key, number, parent)
            self._note(transaction, row.id, item)
            if parent is not None and parent.key.startswith(HIDDEN):
                snapshots.rename(transaction, parent.id, f"{HIDDEN}{row.id}")
            snapshots.hold(transaction, lease, row.id)

        self._take(layer, snapshots.layers_below(self._db, parent.id if parent else None), record)
        self._new += 1
        faults.point("migrate.layer-recorded")
        return snapshots.get(self._db, self._key(item))

    def _take(
        self, layer: LayerItem, below: list[SnapshotId], record: Callable[[Transaction, SnapshotId], object]
    ) -> None:
        """A layer of the target with those contents, recorded; read from the source unless it is there already."""
        known = self._target.layer_for(layer.diff_id, below) if layer.diff_id else None
        if known is not None:
            with self._db.transaction() as transaction:
                record(transaction, known)
            self._watcher.advance(layer.size)
            return
        try:
            with layer.open() as tar:
                expected = Expected(diff_id=layer.diff_id or None)
                self._target.ingest_layer(below, tar, expected, record, self._watcher.advance)
        except HpmapperError as error:
            error.message = f"{layer.name} of {self._source.name}: {error.message}"
            raise

    def _image(self, image: ImageItem) -> None:
        top = self._placed[image.top] if image.top else None
        if top is not None:
            self._target.finish(top)
        layers = snapshots.layers_below(self._db, top.id if top else None)
        size = sum(snapshots.layer(self._db, layer).tar_size for layer in layers)
        with self._db.transaction() as transaction:
            images.add_image(transaction, image.id, image.config, top.id if top else None, size, image.created)
            for name in image.names:
                images.tag(transaction, name, image.id)
        faults.point("migrate.image-recorded")
        if image.profile:
            self._images.keep_profile(images.image(self._db, image.id), image.profile)

    def _writable(self, item: SnapshotItem) -> None:
        """An active snapshot or a view: made under another name, filled, compared, and then given its own."""
        unfinished = snapshots.find(self._db, _UNFINISHED + item.key)
        if unfinished is not None:
            self._target.remove(unfinished)
        parent = self._placed[item.parent] if item.parent else None
        size = item.size_limit if self._limits else None
        made = self._target.record(_UNFINISHED + item.key, parent, item.kind, size=size).snapshot
        try:
            self._finish(item, made)
        except BaseException:
            self._target.remove(made)
            raise
        self._new += 1
        faults.point("migrate.recorded")

    def _finish(self, item: SnapshotItem, made: Snapshot) -> None:
        if item.applied is not None:
            below = snapshots.layers_below(self._db, made.parent)
            self._take(item.applied, below, partial(_set_applied, made.id))
        faults.point("migrate.begun")
        if item.root is not None:
            self._fill(item, snapshots.by_id(self._db, made.id))
        with self._db.transaction() as transaction:
            snapshots.rename(transaction, made.id, item.key)
            self._note(transaction, made.id, item)
            if item.container is not None:
                one = item.container
                images.add_container(transaction, one.name, made.id, one.image, created=one.created)

    def _fill(self, item: SnapshotItem, made: Snapshot) -> None:
        with self._both(item, made) as (source, target):
            mirror(source, target)
            faults.point("migrate.copied")
            if next(differences(source, target), None) is not None:
                mirror(source, target, contents=True)  # a file whose time was set back after it was written to
            self._compare(item, source, target)
            sync.syncfs(target)
        self._compared.add(item.key)

    @contextmanager
    def _both(self, item: SnapshotItem, made: Snapshot) -> Iterator[tuple[Path, Path]]:
        """The root file systems of the source's and the target's snapshot."""
        assert item.root is not None
        try:
            with item.root() as source:
                yield source, self._target.mount(made)
        finally:
            self._target.unmount(made)

    def _note(self, transaction: Transaction, snapshot: SnapshotId, item: SnapshotItem) -> None:
        """What a snapshot has beside its contents."""
        snapshots.set_labels(transaction, snapshot, item.labels)
        snapshots.set_times(transaction, snapshot, item.created, item.updated)
        if item.chain_id is not None:
            snapshots.set_chain_id(transaction, snapshot, item.chain_id)

    # Names in the target.

    def _key(self, item: SnapshotItem) -> str:
        """A hidden snapshot is named by the number of the one on it, which is known once that is recorded."""
        return f"{HIDDEN}from {item.key}" if item.hidden_for is not None else item.key

    def _find(self, item: SnapshotItem) -> Snapshot | None:
        """What the target has of it."""
        if item.hidden_for is not None:
            above = snapshots.find(self._db, item.hidden_for)
            if above is not None and above.parent is not None:
                return snapshots.by_id(self._db, above.parent)
        return snapshots.find(self._db, self._key(item))

    def _require_same(self, item: SnapshotItem, found: Snapshot, transaction: Transaction) -> None:
        layer = item.layer
        if found.kind is not item.kind or found.layer is None or layer is None:
            raise AlreadyExists(f"the target has another snapshot {item.key!r}", hint="name an empty root")
        present = snapshots.diff_id(transaction, found.layer)
        if layer.diff_id and present and present != layer.diff_id:
            raise AlreadyExists(
                f"the target's snapshot {item.key!r} has another layer: {present}", hint="name an empty root"
            )

    # Verifying.

    def _verify(self, contents: Contents) -> None:
        committed = [(item, item.layer) for item in contents.snapshots if item.layer is not None]
        others = [item for item in contents.snapshots if item.root is not None and item.key not in self._compared]
        total = sum(layer.size for _, layer in committed) + sum(item.written for item in others)
        self._watcher.phase("verifying", total)
        read: set[SnapshotId] = set()
        for item, layer in committed:
            self._watcher.item(_name_of(item))
            self._verify_layer(item, layer, read)
        for item in others:
            self._watcher.item(_name_of(item))
            self._verify_written(item)
            self._watcher.advance(item.written)

    def _verify_layer(self, item: SnapshotItem, layer: LayerItem, read: set[SnapshotId]) -> None:
        found = self._find(item)
        if found is None or found.layer is None:
            raise Corrupt(f"snapshot {item.key!r} has vanished from the target", hint="migrate once more")
        if found.layer in read:
            self._watcher.advance(layer.size)
            return
        row = snapshots.layer(self._db, found.layer)
        wanted = layer.diff_id or self._digest_in_source(layer)
        digest = hashlib.sha256()
        for piece in self._target.driver.read_tar(found.layer):
            digest.update(piece)
            self._watcher.advance(len(piece))
        if f"sha256:{digest.hexdigest()}" != wanted or (row.diff_id and row.diff_id != wanted):
            raise Corrupt(
                f"{layer.name} of {self._source.name} came out otherwise: sha256:{digest.hexdigest()} for {wanted}",
                hint="hpmapper fsck says what is wrong with the target; the source is as it was",
            )
        read.add(found.layer)

    @staticmethod
    def _digest_in_source(layer: LayerItem) -> str:
        digest = hashlib.sha256()
        with layer.open() as tar:
            while piece := tar.read(_CHUNK):
                digest.update(piece)
        return f"sha256:{digest.hexdigest()}"

    def _verify_written(self, item: SnapshotItem) -> None:
        """What an earlier run has brought."""
        found = self._find(item)
        if found is None or found.kind is not item.kind:
            raise AlreadyExists(f"the target has another snapshot {item.key!r}", hint="name an empty root")
        with self._both(item, found) as (source, target):
            self._compare(item, source, target)

    def _compare(self, item: SnapshotItem, source: Path, target: Path) -> None:
        found = [str(one) for one in islice(differences(source, target), _TOLD_DIFFERENCES)]
        if found:
            raise Corrupt(
                f"{_name_of(item)} is not the same in the target: {'; '.join(found)}",
                hint="was it used there? Remove it from the target, and migrate once more",
            )


def _set_applied(snapshot: SnapshotId, transaction: Transaction, layer: SnapshotId) -> None:
    snapshots.set_applied(transaction, snapshot, layer)


def _layers_of(item: SnapshotItem) -> list[LayerItem]:
    return [layer for layer in (item.layer, item.applied) if layer is not None]


def _name_of(item: SnapshotItem) -> str:
    return f"container {item.container.name!r}" if item.container else f"snapshot {item.key!r}"
