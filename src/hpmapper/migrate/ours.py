"""A root of hpmapper as a source: read through its engine, written to by nobody."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

from hpmapper.engine import Engine
from hpmapper.errors import FailedPrecondition
from hpmapper.forest import HIDDEN
from hpmapper.kernel import mountinfo
from hpmapper.meta import images, profiles, snapshots
from hpmapper.meta.snapshots import Snapshot
from hpmapper.migrate.source import ContainerItem, Contents, ImageItem, LayerItem, SnapshotItem
from hpmapper.model import Kind, SnapshotId
from hpmapper.pipe import piped


class Ours:
    """See the module's text, and `hpmapper.migrate.source.Source`."""

    def __init__(self, engine: Engine, root: Path) -> None:
        self._engine = engine
        self._db = engine.db
        self.name = f"the root at {root}"

    def contents(self) -> Contents:
        containers = {
            row.snapshot: ContainerItem(row.name, row.image, row.created) for row in images.containers(self._db)
        }
        found = {one.id: one for one in snapshots.walk(self._db)}
        items = [self._snapshot(found[number], found, containers) for number in _parents_first(found)]
        return Contents(items, self._images(found), list(snapshots.blobs(self._db)))

    def _images(self, found: dict[SnapshotId, Snapshot]) -> list[ImageItem]:
        items = []
        for row in images.images(self._db):
            profile = profiles.find(self._db, row.id)
            top = found[row.top].key if row.top is not None else None
            items.append(ImageItem(row.id, row.config, top, row.created, row.names, profile[0] if profile else b""))
        return items

    def _snapshot(
        self, one: Snapshot, found: dict[SnapshotId, Snapshot], containers: dict[SnapshotId, ContainerItem]
    ) -> SnapshotItem:
        is_written = one.kind is Kind.ACTIVE and self._engine.driver.has(one.id)
        if is_written:
            self._require_unused(one)
        hidden_for = SnapshotId(int(one.key.removeprefix(HIDDEN))) if one.key.startswith(HIDDEN) else None
        return SnapshotItem(
            key=one.key,
            kind=one.kind,
            parent=found[one.parent].key if one.parent is not None else None,
            created=one.created,
            updated=one.updated,
            layer=self._layer(one, one.layer, one.parent) if one.layer is not None else None,
            applied=self._layer(one, one.applied, one.parent) if one.applied is not None else None,
            hidden_for=found[hidden_for].key if hidden_for is not None else None,
            chain_id=None if one.key.startswith("sha256:") else snapshots.chain_id_of(self._db, one),
            labels=snapshots.labels(self._db, one.id),
            size_limit=snapshots.size_limit(self._db, one.id),
            container=containers.get(one.id),
            root=partial(self._root, one) if is_written else None,
            written=self._engine.usage(one).size if is_written else 0,
        )

    def _layer(self, one: Snapshot, number: SnapshotId, parent: SnapshotId | None) -> LayerItem:
        row = snapshots.layer(self._db, number)
        name = f"layer {number} of snapshot {one.key!r}"
        if not row.sealed:
            return LayerItem(name, row.diff_id, row.tar_size, self._tar(number))
        below = snapshots.layers_below(self._db, parent)
        write = partial(self._engine.driver.write_diff, number, below)
        return LayerItem(name, "", self._engine.usage(one).size, lambda: piped(write))

    def _tar(self, number: SnapshotId) -> Callable[[], AbstractContextManager[BinaryIO]]:
        return lambda: piped(lambda out: out.writelines(self._engine.driver.read_tar(number)))

    @contextmanager
    def _root(self, one: Snapshot) -> Iterator[Path]:
        """Its root file system, which nobody can write to through this mount."""
        driver = self._engine.driver
        driver.unmount(one.id)
        try:
            yield driver.mount(one.id, self._engine.below(one), read_only=True)
        finally:
            driver.unmount(one.id)

    def _require_unused(self, one: Snapshot) -> None:
        """Unmount what nobody has open; what an engine has mounted elsewhere is in use as well.

        That is looked at first: without our own mount the next daemon would make another one of the same upper.

        Raises:
            FailedPrecondition: it is in use.
        """
        driver = self._engine.driver
        elsewhere = _mounted_elsewhere(driver.root(one.id).parent)
        if elsewhere is not None:
            raise FailedPrecondition(
                f"snapshot {one.key!r} is in use: it is mounted at {elsewhere}",
                hint="stop its container, whoever runs it",
            )
        try:
            driver.unmount(one.id)
        except FailedPrecondition as error:
            raise FailedPrecondition(f"snapshot {one.key!r} is in use: {error.message}", hint=error.hint) from None


def _mounted_elsewhere(place: Path) -> str | None:
    """Where a snapshot's root is bound, or its upper is an overlay's, for somebody else."""
    top = os.path.realpath(place)
    mounts = mountinfo.mounts()
    holders = [one for one in mounts if top.startswith(one.target.rstrip("/") + "/")]
    holder = max(holders, key=lambda one: len(one.target))  # of two at one place the later one is seen
    roots = (f"/a/{place.name}/m", f"/a/{place.name}/diff")
    own = {(one.device, one.root) for one in mounts if one.target == f"{top}/m"}
    for one in mounts:
        if one.target.startswith(f"{top}/"):
            continue
        is_bound = (one.fstype, one.source) == (holder.fstype, holder.source) and one.root.endswith(roots)
        if is_bound or one.upper == f"{top}/u" or (one.device, one.root) in own:
            return one.target
    return None


def _parents_first(found: dict[SnapshotId, Snapshot]) -> Iterator[SnapshotId]:
    """All snapshots, each after its parent: numbers do not tell, since a snapshot may be given a parent later."""
    done: set[SnapshotId] = set()
    for number in found:
        way: list[SnapshotId] = []
        at: SnapshotId | None = number
        while at is not None and at not in done:
            way.append(at)
            at = found[at].parent
        for one in reversed(way):
            done.add(one)
            yield one
