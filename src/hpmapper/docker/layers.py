"""Docker's layers on top of a forest of snapshots.

Docker makes every layer alike, by an id and a parent, and then says by what it does which kind it is:

    image layer   Create, ApplyDiff                          committed as soon as its tar is in
    container     CreateReadWrite, Get, writes, Put, Diff    active
    init layer    CreateReadWrite, Get, writes, Put          active, until a container is made on top of it:
                                                             then what was written is committed as it lies there

One Docker layer is therefore one of two snapshots, and a third one while a committed layer is looked at:

    rw/ID     being written                ro/ID     complete                view/ID   mounted to be read

Semantics as in moby, daemon/graphdriver/driver.go (ProtoDriver and DiffDriver) and its overlay2 driver.
"""

from __future__ import annotations

import logging
import os
import stat
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO
from weakref import WeakValueDictionary

from hpmapper.errors import AlreadyExists, FailedPrecondition, NotFound, Unsupported
from hpmapper.forest import Forest
from hpmapper.kernel.mountinfo import is_mountpoint
from hpmapper.layer.stream import Expected
from hpmapper.meta import snapshots
from hpmapper.meta.snapshots import Snapshot
from hpmapper.model import Change, ChangeKind, Kind, SnapshotId, object_name
from hpmapper.pool.base import parse_size

log = logging.getLogger(__name__)

_INIT = "-init"
"""How the ids of the layers end that Docker writes a container's own few files into."""

_Write = Callable[[BinaryIO], None]


class Layers:
    """Docker's layers in one forest. For use by several threads."""

    def __init__(self, forest: Forest, clean_up: Callable[[], None]) -> None:
        """`clean_up` is called when layers may have become rubbish: Docker has no call of its own for that."""
        self._forest = forest
        self._clean_up = clean_up
        self._engine = forest.engine
        self._lock = threading.RLock()  # for the users' counts, and for what becomes a parent
        self._users: dict[str, int] = {}
        self._locks: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()

    # Making and removing.

    def create(
        self, layer: str, parent: str, options: Mapping[str, str], mount_label: str, *, writable: bool = False
    ) -> None:
        """Make a layer on top of `parent` ("": of nothing); `writable`: a container's, which has a default limit.

        Raises:
            AlreadyExists: the id is taken. NotFound: there is no such parent.
            Unsupported: an option other than size, a limit where there is none, or a mount label is asked for.
            InvalidArgument: a malformed id or size.
        """
        object_name(layer, "layer")
        unknown = options.keys() - {"size"}
        if unknown:
            raise Unsupported(
                f"layer {layer}: --storage-opt {min(unknown)} is not supported by the plugin",
                hint="leave it out; size is supported where the file system can limit it",
            )
        default = self._engine.driver.capabilities.default_size if writable else None
        size = parse_size(options["size"]) if "size" in options else default
        if mount_label:
            raise Unsupported(
                f"layer {layer}: SELinux mount labels are not supported by the plugin",
                hint="run dockerd without --selinux-enabled, or use Docker's containerd image store",
            )
        with self._lock:
            if self.exists(layer):
                raise AlreadyExists(f"layer {layer} exists already")
            below = _complete(parent) if parent else ""
            if parent:
                self._finish(parent)
            recorded = self._forest.prepare(_written(layer), below, {}, size=size)
            if size is not None:
                self._engine.make(recorded, finish=False)  # now: a limit that cannot be is refused here

    def remove(self, layer: str) -> None:
        """Remove a layer; one that is not there is no error. Its storage is freed later.

        Raises:
            FailedPrecondition: it has children.
        """
        with self._lock_of(layer), self._lock:
            self._users.pop(layer, None)
            for key in (_seen(layer), _written(layer), _complete(layer)):
                if self._find(key):
                    self._forest.remove(key)
        self._clean_up()

    def exists(self, layer: str) -> bool:
        """Whether there is a layer of that id."""
        return self._find(_written(layer)) is not None or self._find(_complete(layer)) is not None

    def apply(self, layer: str, parent: str, tar: BinaryIO) -> int:
        """Read a layer's tar, compressed or not, as its content; returns the tar's size in bytes. It is complete then.

        Raises:
            FailedPrecondition: it is complete already. Unsupported: it was written to before.
            Corrupt, InvalidArgument, NoSpace: as `Engine.ingest`; the layer stays empty.
        """
        with self._lock_of(layer):  # a call that broke off may not be at its end yet when Docker tries again
            snapshot = self._get(layer)
            if snapshot.kind is not Kind.ACTIVE:
                raise FailedPrecondition(f"layer {layer} is complete already")
            self._require_parent(layer, snapshot, parent)
            applied = self._forest.apply(snapshot, lambda: tar, Expected())
            self._finish(layer)
        return applied.tar_size

    def _lock_of(self, layer: str) -> threading.Lock:
        """A layer's own lock, there as long as somebody has it."""
        with self._lock:
            return self._locks.setdefault(layer, threading.Lock())

    def _finish(self, layer: str) -> None:
        """Commit a layer that is being written, if it is not complete yet."""
        with self._lock:
            if not self._find(_complete(layer)):
                self._get(layer)
                self._forest.commit(_complete(layer), _written(layer), {})

    # Mounting.

    def mount(self, layer: str) -> Path:
        """The path of a layer's root file system. Each call wants an `unmount`."""
        with self._lock:
            key = self._mounted_key(layer)
            users = self._users_of(layer, key)
            snapshot = self._forest.get(key)
            if not layer.endswith(_INIT):
                self._forest.begins(snapshot)
            path = self._engine.mount(snapshot)
            self._users[layer] = users + 1
        return path

    def unmount(self, layer: str) -> None:
        """The counterpart of `mount`; the last one takes the root away, unless somebody else still uses it."""
        with self._lock:
            key = _written(layer) if self._find(_written(layer)) else _seen(layer)
            if not self._find(key):
                return
            users = self._users_of(layer, key) - 1
            if users > 0:
                self._users[layer] = users
                return
            self._users.pop(layer, None)
            self._take_away(key)

    def unmount_all(self) -> None:
        """Docker ends: take away what nobody uses."""
        with self._lock:
            self._users.clear()
            for info in list(self._forest.walk()):
                if info.kind is not Kind.COMMITTED:
                    self._take_away(info.key)

    def _mounted_key(self, layer: str) -> str:
        if self._get(layer).kind is Kind.ACTIVE:
            return _written(layer)
        if not self._find(_seen(layer)):
            self._forest.prepare(_seen(layer), _complete(layer), {}, Kind.VIEW)
        return _seen(layer)

    def _users_of(self, layer: str, key: str) -> int:
        """How many use a root. What was mounted before this process began has one user that we have not seen."""
        if layer not in self._users:
            root = self._engine.driver.root(self._forest.get(key).id)
            self._users[layer] = int(is_mountpoint(root))
        return self._users[layer]

    def _take_away(self, key: str) -> None:
        snapshot = self._forest.get(key)
        try:
            self._engine.unmount(snapshot)
        except FailedPrecondition as error:
            log.info("%s stays mounted: %s", key, error)
            return
        if snapshot.kind is Kind.VIEW:
            self._forest.remove(key)

    # Differences.

    def diff(self, layer: str, parent: str) -> _Write:
        """What writes a layer's tar: for one that came as a tar, the same bytes again.

        Raises:
            NotFound: there is no such layer. Unsupported: `parent` is not the layer's.
        """
        snapshot = self._get(layer)
        self._require_parent(layer, snapshot, parent)
        driver = self._engine.driver
        number, below, is_tar = self._storage(snapshot)
        if is_tar:
            return lambda out: out.writelines(driver.read_tar(number))
        return lambda out: driver.write_diff(number, below, out)

    def changes(self, layer: str, parent: str) -> list[Change]:
        """What a layer that was written to changed of its parent, in path order.

        Raises:
            Unsupported: `parent` is not the layer's, or it came as a tar: nobody asks for that.
        """
        snapshot = self._get(layer)
        self._require_parent(layer, snapshot, parent)
        number, below, is_tar = self._storage(snapshot)
        if is_tar:
            raise Unsupported(f"layer {layer} is an image's", hint="changes are told of containers")
        return list(self._engine.driver.changes(number, below))

    def diff_size(self, layer: str, parent: str) -> int:
        """The bytes of the regular files in a layer; of one that came as a tar, the tar's.

        Raises as `changes`, but for a tar.
        """
        snapshot = self._get(layer)
        self._require_parent(layer, snapshot, parent)
        number, below, is_tar = self._storage(snapshot)
        if is_tar:
            return snapshots.layer(self._engine.db, number).tar_size
        if snapshot.kind is Kind.COMMITTED:
            return self._engine.usage(snapshot).size
        root = os.fsencode(self._engine.mount(snapshot))
        return _size_of_files(root, list(self._engine.driver.changes(number, below)))

    def _storage(self, snapshot: Snapshot) -> tuple[SnapshotId, list[SnapshotId], bool]:
        """The number of a layer's own storage, what is below it, and whether it came as a tar."""
        db = self._engine.db
        if snapshot.layer is None:
            return snapshot.id, self._engine.prepared(snapshot), False
        below = snapshots.layers_below(db, snapshot.parent)
        return snapshot.layer, below, not snapshots.layer(db, snapshot.layer).sealed

    # Telling.

    def status(self) -> list[tuple[str, str]]:
        """Facts for `docker info`."""
        driver = self._engine.driver
        return [("hpmapper driver", driver.name), *driver.status().items()]

    def metadata(self, layer: str) -> dict[str, str]:
        """Facts for `docker inspect`."""
        snapshot = self._get(layer)
        return {
            "Driver": self._engine.driver.name,
            "Snapshot": str(snapshot.id),
            "Kind": str(snapshot.kind),
            "MergedDir": os.fspath(self._engine.driver.root(snapshot.id)),
        }

    # Names.

    def _find(self, key: str) -> Snapshot | None:
        try:
            return self._forest.get(key)
        except NotFound:
            return None

    def _get(self, layer: str) -> Snapshot:
        found = self._find(_written(layer)) or self._find(_complete(layer))
        if found is None:
            raise NotFound(f"layer {layer} does not exist")
        return found

    def _require_parent(self, layer: str, snapshot: Snapshot, parent: str) -> None:
        key = _written(layer) if snapshot.kind is Kind.ACTIVE else _complete(layer)
        real = self._forest.stat(key).parent
        if real != (_complete(parent) if parent else ""):
            mine = f"layer {real.partition('/')[2]}" if real else "nothing"
            raise Unsupported(
                f"layer {layer} stands on {mine}, not on {parent or 'nothing'}", hint="only its own parent will do"
            )


def _written(layer: str) -> str:
    return f"rw/{layer}"


def _complete(layer: str) -> str:
    return f"ro/{layer}"


def _seen(layer: str) -> str:
    return f"view/{layer}"


def _size_of_files(root: bytes, changes: list[Change]) -> int:
    """Bytes of the regular files that were added or changed, each file once whatever its names."""
    seen: set[int] = set()
    total = 0
    for change in changes:
        if change.kind is ChangeKind.DELETED:
            continue
        try:
            facts = os.lstat(root + change.path)
        except FileNotFoundError:
            continue  # a container that runs has removed it meanwhile
        if stat.S_ISREG(facts.st_mode) and facts.st_ino not in seen:
            seen.add(facts.st_ino)
            total += facts.st_size
    return total
