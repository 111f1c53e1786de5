"""A driver under an engine, with the verbs in which cases are written."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import BinaryIO, TypeVar

from hpmapper.drivers.base import Driver
from hpmapper.engine import Engine
from hpmapper.kernel import mount
from hpmapper.layer.stream import Expected
from hpmapper.meta import snapshots
from hpmapper.meta.db import Database
from hpmapper.meta.snapshots import Snapshot
from hpmapper.model import Kind, SnapshotId
from hpmapper.pool.floor import Floor
from hpmapper.store.workspace import remove_tree
from hpmapper.testing.tars import folder, member, tar
from hpmapper.testing.trees import Operation, apply, assert_same

_E = TypeVar("_E", bound=Exception)


class Subject:
    """What a case works on.

    Attributes:
        directory: an empty one on the host, for models and the like.
    """

    def __init__(self, engine: Engine, directory: Path) -> None:
        self.engine = engine
        self.driver: Driver = engine.driver
        self.directory = directory
        self._numbers = count()

    def model(self) -> Path:
        """A new plain directory with the root attributes of an empty snapshot."""
        path = self.directory / f"model-{next(self._numbers)}"
        path.mkdir()
        path.chmod(0o755)
        return path

    def layer(self, blob: bytes | BinaryIO, parent: Snapshot | None = None) -> Snapshot:
        """Bring in a layer, of which nothing is known beforehand."""
        stream = io.BytesIO(blob) if isinstance(blob, bytes) else blob
        return self.engine.ingest(parent, stream, Expected()).snapshot

    def open_chain(self) -> list[SnapshotId]:
        """A chain of one layer that has a directory "open", to which anybody may write, with 2 MiB of letters "old"."""
        letters = member(b"open/old", b"o" * (2 << 20), mode=0o666)
        base = self.layer(tar(folder(b"open/", 0o777), letters))
        assert base.layer is not None
        return [base.layer]

    def container(self, parent: Snapshot | None, *, view: bool = False) -> Snapshot:
        """A new active snapshot, or a view."""
        return self.engine.prepare(f"case-{next(self._numbers)}", parent, Kind.VIEW if view else Kind.ACTIVE)

    def root(self, snapshot: Snapshot) -> Path:
        """Its root file system, mounted."""
        return self.engine.mount(snapshot)

    def opened(self, parent: Snapshot | None) -> tuple[Snapshot, Path]:
        """A new active snapshot and its root."""
        made = self.container(parent)
        return made, self.root(made)

    def commit(self, snapshot: Snapshot) -> Snapshot:
        """Make a committed snapshot of an active one's changes; making it twice gives the same."""
        taken = self.engine.commit(snapshot)
        again = self.engine.commit(snapshot)
        assert again.snapshot == taken.snapshot, "the same changes gave two different tars"
        return taken.snapshot

    def image(self, *steps: Iterable[Operation]) -> Snapshot:
        """A committed snapshot, a layer for each list of operations."""
        parent: Snapshot | None = None
        for step in steps:
            container, root = self.opened(parent)
            apply(step, root)
            parent = self.commit(container)
            self.engine.remove(container)
        assert parent is not None, "an image has a layer"
        return parent

    def assert_shows(self, committed: Snapshot, expected: Path) -> None:
        """Fail unless a new container of a committed snapshot shows the same as a directory."""
        container, root = self.opened(committed)
        assert_same(root, expected)
        self.engine.remove(container)

    def changes(self, snapshot: Snapshot) -> list[str]:
        """The changes as Docker prints them: "C /etc"."""
        return [f"{change.kind} {os.fsdecode(change.path)}" for change in self.engine.changes(snapshot)]

    def diff(self, snapshot: Snapshot) -> bytes:
        """A snapshot's changes as a layer tar."""
        out = io.BytesIO()
        self.driver.write_diff(snapshot.id, self.engine.below(snapshot), out)
        return out.getvalue()

    def size(self, committed: Snapshot) -> int:
        """The recorded bytes of a committed snapshot's tar."""
        assert committed.layer is not None
        return snapshots.layer(self.engine.db, committed.layer).tar_size

    def diff_id(self, committed: Snapshot) -> str:
        """The recorded sha256 of a committed snapshot's tar."""
        assert committed.layer is not None
        return snapshots.layer(self.engine.db, committed.layer).diff_id

    def assert_whole(self, committed: Snapshot) -> None:
        """Fail unless a committed snapshot's tar can be read back under its digest."""
        hasher = hashlib.sha256()
        for piece in self.engine.read_tar(committed):
            hasher.update(piece)
        assert f"sha256:{hasher.hexdigest()}" == self.diff_id(committed), f"{committed.key} lost its tar"

    def remove_everything(self) -> None:
        """Remove all snapshots, children first, and all that then is unused."""
        for snapshot in reversed(list(snapshots.walk(self.engine.db))):
            if snapshot.kind is not Kind.COMMITTED:
                self.engine.remove(snapshot)
        for snapshot in reversed(list(snapshots.walk(self.engine.db))):
            self.engine.remove(snapshot)
        self.engine.rubbish.collect()

    def assert_nothing_left(self) -> None:
        """Fail unless the driver's storage is as empty as at first."""
        stored = self.driver.stored()
        assert not stored.snapshots, f"snapshots left: {sorted(stored.snapshots)}"
        assert not stored.layers, f"layers left: {sorted(stored.layers)}"
        objects = self.driver.stored_objects()
        assert not objects, f"objects left: {len(objects)}"
        workspaces = [path for path in self.driver.scratch.iterdir() if list(path.iterdir())]
        assert not workspaces, f"unfinished things left: {workspaces}"


def refused(error: type[_E] | tuple[type[_E], ...], attempt: Callable[[], object]) -> _E:
    """Fail unless `attempt` raises `error`; returns it."""
    try:
        attempt()
    except error as raised:
        return raised
    raise AssertionError(f"not refused with {error}")


@contextmanager
def subject(driver: Driver, directory: Path) -> Iterator[Subject]:
    """A driver with nothing in it, under an engine whose database lies in `directory`; checks what is left at the end.

    The driver may be used again afterwards. Its storage stays attached.
    """
    driver.attach()
    mounted = {one.target for one in mount.mounts()}
    work = directory / "contract"
    work.mkdir()
    engine = Engine(Database(work / "contract.db"), driver, Floor())
    engine.rubbish.reconcile()
    try:
        under_test = Subject(engine, work)
        yield under_test
        under_test.remove_everything()
        under_test.assert_nothing_left()
        left = [one.target for one in mount.mounts() if one.target not in mounted]
        assert not left, f"mounts left: {left}"
    except BaseException:
        _give_up(driver, mounted)
        raise
    finally:
        engine.close()
        remove_tree(work)


def _give_up(driver: Driver, mounted: set[str]) -> None:
    """After a failure: leave nothing for the next case to trip over."""
    for one in reversed(mount.mounts()):
        if one.target not in mounted:
            mount.umount(one.target, lazy=True)
    stored = driver.stored()
    for snapshot in stored.snapshots:
        driver.remove(snapshot)
    for layer in sorted(stored.layers, reverse=True):
        driver.remove_layer(layer)
    driver.sweep_objects(set, timeout=10)


Case = Callable[[Subject], None]
