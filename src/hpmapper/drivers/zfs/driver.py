"""The zfs driver: each layer and each container is a dataset, a clone of the one below.

    <home>/dataset     the dataset that all the others lie in, and this root's id
    <home>/l/ID        empty: a sign to whoever looks for layers here
    <home>/a/ID/fs     a container's dataset, mounted as a whole: beside its root, ZFS's .zfs is in it
    <home>/a/ID/m      its root: a bind of fs/layer/diff
    <home>/a/ID/size   how much a limited one may keep                 (hpmapper.drivers.limits)

In a dataset lies `layer/diff`, the root, and beside it what a layer's tar is made again from
(hpmapper.drivers.directory). A clone copies nothing, and ZFS's own cache (ARC) holds one copy for all clones; but what
is mapped into memory, as programs are, the page cache holds once for each container.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from hpmapper import faults
from hpmapper.drivers import directory
from hpmapper.drivers.base import (
    Capabilities,
    Chain,
    ChainBelow,
    Ingested,
    MountSpec,
    Problem,
    Progress,
    Stored,
    bind_spec,
)
from hpmapper.drivers.directory import CONTENTS, LAYER
from hpmapper.drivers.limits import require_in_force
from hpmapper.drivers.upper import numbers, unmount_path
from hpmapper.drivers.zfs import datasets
from hpmapper.drivers.zfs.datasets import Datasets, Role
from hpmapper.drivers.zfs.diff import suspects
from hpmapper.drivers.zfs.limits import Quotas
from hpmapper.errors import Corrupt, FailedPrecondition, NotFound, Unsupported
from hpmapper.kernel import lock, mount, sync
from hpmapper.kernel.fs import filesystem_name
from hpmapper.kernel.fscontext import MOUNT_ATTR_RDONLY
from hpmapper.kernel.idmap import IdMapping
from hpmapper.layer.compare import compare
from hpmapper.layer.diff import changes, write_tar
from hpmapper.layer.scan import scan, scan_pair
from hpmapper.layer.stream import Expected
from hpmapper.model import Change, SnapshotId, Space, Usage
from hpmapper.pool.base import format_size
from hpmapper.pool.tools import none_starts
from hpmapper.store.objects import IsObject
from hpmapper.store.workspace import discard
from hpmapper.tree import Inode
from hpmapper.tree import directory as new_directory

FSNAME = "zfs.fsname"

_RECORD = "dataset"


class _Trees(NamedTuple):
    """What is compared: the roots of the layer below (None: nothing is) and of a snapshot, and their names in ZFS.

    `whole` is where the snapshot is mounted as a whole, `place` a directory that the layer may be mounted at.
    """

    before: Path | None
    after: Path
    whole: Path
    place: Path
    origin: str
    dataset: str


class ZfsDriver(directory.DirectoryLayers):
    """See the module's text, and `hpmapper.drivers.base` for the contract."""

    name = "zfs"
    capabilities = Capabilities(
        shares_layers=False,
        copies_extents=True,
        shares_cache=False,
        changes_from_upper=True,
        max_layers=1 << 20,
        mounts=True,
        size_limits=True,
    )

    def __init__(self, home: Path, fsname: str | None = None) -> None:
        """`fsname`: the dataset for all others; None: the one used before, else the one that `home` lies on."""
        self.home = home
        self.scratch = home / "t"
        self._fsname = datasets.check_name(fsname) if fsname is not None else None

    def _snapshot(self, snapshot: SnapshotId) -> Path:
        return self.home / "a" / str(snapshot)

    # The dataset.

    def dataset(self) -> str:
        """The name of the dataset that all others lie in.

        Raises:
            FailedPrecondition: another was used before. Unsupported: none is named, and `home` does not lie on ZFS.
        """
        known = self._known()
        if known is None:
            return self._fsname or dataset_of(self.home)
        if self._fsname not in (None, known[0]):
            raise FailedPrecondition(
                f"the data of this root is in the dataset {known[0]}, not {self._fsname}",
                hint=f"leave out {FSNAME}, or name another --root",
            )
        return known[0]

    def attach(self) -> None:
        self._datasets = Datasets(self.dataset())
        known, owner = self._known(), self._owner()
        if owner is not None and (known is None or owner != known[1]):
            raise FailedPrecondition(
                f"the dataset {self._datasets.fsname} belongs to another root",
                hint=f"name another one in {FSNAME}; if that root is gone, destroy what is in it, and "
                f"zfs inherit {datasets.OWNER} {self._datasets.fsname}",
            )
        for name in ("a", "l", "t"):
            (self.home / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        known = known or self._remember(self._datasets.fsname)
        faults.point("zfs.dataset-recorded")
        if owner is None:
            self._datasets.own(known[1])
        self._limits = Quotas(self._datasets)

    def _owner(self) -> str | None:
        try:
            return self._datasets.owner()
        except NotFound:
            datasets.require(self._datasets.fsname)  # which says whether it is the pool that is missing
            raise

    def _known(self) -> tuple[str, str] | None:
        """The name of the dataset and this root's id, as they were written down."""
        path = self.home / _RECORD
        try:
            found = json.loads(path.read_text(encoding="ascii"))
            return datasets.check_name(found["fsname"]), str(found["id"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise Corrupt(f"{path} is damaged: {error}", hint="it names the dataset: see zfs list") from None

    def _remember(self, fsname: str) -> tuple[str, str]:
        made = {"fsname": fsname, "id": secrets.token_hex(16)}
        new = self.home / f"{_RECORD}.new"
        with new.open("w", encoding="ascii") as file:
            file.write(json.dumps(made))
            file.flush()
            os.fsync(file.fileno())
        new.rename(self.home / _RECORD)
        sync.fdatasync(self.home)
        return made["fsname"], made["id"]

    def detach(self) -> None:
        if self.home.exists():
            for snapshot in numbers(self.home / "a") if (self.home / "a").exists() else ():
                self.unmount(snapshot)

    def destroy(self) -> None:
        """Destroy all datasets, and give up the one that they lie in."""
        known = self._known()
        if known is not None and datasets.exists(known[0]):
            Datasets(known[0]).disown(known[1])

    def space(self) -> Space:
        found = datasets.properties(self._datasets.fsname, "used", "available")
        free = int(found["available"])
        return Space(int(found["used"]) + free, free)

    def status(self) -> dict[str, str]:
        """Docker's fields."""
        found = datasets.properties(self._datasets.fsname, "used", "available", "quota", "compression")
        return {
            "Zpool": self._datasets.pool,
            "Zpool Health": datasets.health(self._datasets.pool),
            "Parent Dataset": self._datasets.fsname,
            "Space Used By Parent": format_size(int(found["used"])),
            "Space Available": format_size(int(found["available"])),
            "Parent Quota": format_size(int(found["quota"])) if int(found["quota"]) else "no",
            "Compression": found["compression"],
        }

    # Layers.

    def ingest(
        self,
        layer: SnapshotId,
        below: ChainBelow,
        blob: BinaryIO,
        work: Path,
        expect: Expected,
        progress: Progress | None,
        is_object: IsObject,
    ) -> Ingested:
        chain = below()
        origin = self._origin(chain)
        name = self._datasets.name(Role.LAYER, layer)
        try:
            self._datasets.make(Role.LAYER, layer, origin)
            faults.point("zfs.dataset-made")
            with mount.detached("zfs", name) as top:
                _make_root(top)
                directory.drop_recipe(top / LAYER)
                if _is_sealed(origin):
                    (top / LAYER / directory.LOST_LINKS).touch()  # who knows what a container did with them
                # The root is still the parent's until the whole tar has been read.
                view = directory.whole_root(top / CONTENTS if chain else None)
                ingested = directory.fill(blob, view, top, layer, directory.Dialect.APPLIED, expect, progress)
            self._datasets.finish(Role.LAYER, layer)
            self._layer(layer).mkdir(mode=0o700, exist_ok=True)
        except BaseException:
            self._datasets.remove(Role.LAYER, layer)
            raise
        faults.point("ingest.layer-renamed")
        return ingested

    def _origin(self, chain: Chain) -> str:
        """What a dataset on top of a chain is a clone of; "" if of nothing."""
        return self._datasets.complete(self._datasets.find(chain[0]), chain[0]) if chain else ""

    def read_tar(self, layer: SnapshotId) -> Iterator[bytes]:
        with self._layer_mounted(layer) as top:
            yield from directory.read_tar(top / LAYER)

    def check_layer(self, layer: SnapshotId, digest: bytes | None) -> Iterator[str]:
        try:
            with self._layer_mounted(layer) as top:
                yield from directory.check(top / LAYER)
        except (NotFound, OSError) as error:
            yield str(error)

    def _layer_mounted(self, layer: SnapshotId) -> AbstractContextManager[Path]:
        name = self._datasets.complete(Role.LAYER, layer)
        if not datasets.exists(name):
            raise NotFound(f"layer {layer} has no dataset {name}", hint="run hpmapper fsck")
        return mount.detached("zfs", name, attributes=MOUNT_ATTR_RDONLY)

    def remove_layer(self, layer: SnapshotId) -> None:
        self._datasets.remove(Role.LAYER, layer)
        faults.point("zfs.layer-destroyed")
        with suppress(FileNotFoundError):
            self._layer(layer).rmdir()
        if self._snapshot(layer).exists():  # a sealed one
            self.remove(layer)

    def check_derived(self, *, repair: bool) -> Iterator[Problem]:
        pool = self._datasets.pool
        health = datasets.health(pool)
        if health != "ONLINE":
            yield Problem(f"ZFS pool {pool}", f"is {health}: zpool status {pool} says why")

    # Snapshots.

    def prepare(self, snapshot: SnapshotId, chain: Chain, *, read_only: bool = False, size: int | None = None) -> None:
        if size is not None:
            self._limits.check(size)
        top = self._snapshot(snapshot)
        if not self.has(snapshot):
            for path in (top, top / "fs"):
                path.mkdir(mode=0o700, exist_ok=True)
            self._datasets.make(Role.SNAPSHOT, snapshot, self._origin(chain))
            faults.point("zfs.dataset-made")
            if not chain:
                with mount.detached("zfs", self._datasets.name(Role.SNAPSHOT, snapshot)) as whole:
                    _make_root(whole)
        if size is not None:
            self._limits.make(top, snapshot, size)
            faults.point("prepare.limited")
        (top / "m").mkdir(mode=0o700, exist_ok=True)  # the last: `has` looks for it

    def has(self, snapshot: SnapshotId) -> bool:
        root = self.root(snapshot)
        # Both: a power cut may take the one and leave the other, as they lie on different file systems.
        return root.is_dir() and (mount.is_mountpoint(root) or self._datasets.has(Role.SNAPSHOT, snapshot))

    def root(self, snapshot: SnapshotId) -> Path:
        return self._snapshot(snapshot) / "m"

    def seal(self, snapshot: SnapshotId) -> bool:
        with mount.detached("zfs", self._datasets.name(Role.SNAPSHOT, snapshot)) as whole:
            sync.syncfs(whole)  # what is mapped into memory, whoever has it mounted where, is not yet ZFS's
        self._datasets.finish(Role.SNAPSHOT, snapshot)
        return True

    def mount(self, snapshot: SnapshotId, chain: Chain, *, read_only: bool = False) -> Path:
        top, root = self._snapshot(snapshot), self.root(snapshot)
        with lock.exclusive(top):
            if not mount.is_mountpoint(root):
                require_in_force(self._limits, top)
                self._mount_whole(snapshot)
                faults.point("mount.whole")
                mount.bind(top / "fs" / CONTENTS, root, read_only=read_only)
        return root

    def _mount_whole(self, snapshot: SnapshotId) -> Path:
        whole = self._snapshot(snapshot) / "fs"
        if not mount.is_mountpoint(whole):
            mount.filesystem("zfs", self._datasets.name(Role.SNAPSHOT, snapshot), whole)
        return whole

    def handout(
        self, snapshot: SnapshotId, chain: Chain, *, read_only: bool = False, ids: IdMapping | None = None
    ) -> MountSpec:
        return bind_spec(self.mount(snapshot, chain, read_only=read_only), read_only=read_only)

    def is_untouched(self, snapshot: SnapshotId) -> bool:
        return False

    def unmount(self, snapshot: SnapshotId) -> None:
        with none_starts():
            for name in ("m", "fs"):
                unmount_path(self._snapshot(snapshot) / name)

    def remove(self, snapshot: SnapshotId) -> None:
        self.unmount(snapshot)
        faults.point("remove.unmounted")
        self._datasets.remove(Role.SNAPSHOT, snapshot)
        faults.point("zfs.dataset-destroyed")
        discard(self._snapshot(snapshot), self.scratch)

    def stored(self) -> Stored:
        found = self._datasets.numbers()
        return Stored(found[Role.SNAPSHOT] | numbers(self.home / "a"), found[Role.LAYER])

    def usage(self, snapshot: SnapshotId) -> Usage:
        return self._limits.usage(self._snapshot(snapshot))

    # What a snapshot changed.

    def changes(self, snapshot: SnapshotId, chain: Chain) -> Iterator[Change]:
        with self._trees(snapshot, chain) as trees:
            yield from changes(_changed(trees), directory.whole_root(trees.before))

    def write_diff(self, snapshot: SnapshotId, chain: Chain, out: BinaryIO) -> None:
        with self._trees(snapshot, chain) as trees:
            write_tar(_changed(trees), directory.open_data(trees.after), out)

    @contextmanager
    def _trees(self, snapshot: SnapshotId, chain: Chain) -> Iterator[_Trees]:
        name, origin = self._datasets.name(Role.SNAPSHOT, snapshot), self._origin(chain)
        with self._whole(snapshot) as whole:
            sync.syncfs(whole)  # what is mapped into memory is not yet ZFS's
            if not origin:
                yield _Trees(None, whole / CONTENTS, whole, whole, origin, name)
                return
            place = self._layer(chain[0])
            place.mkdir(mode=0o700, exist_ok=True)
            with mount.detached("zfs", origin, attributes=MOUNT_ATTR_RDONLY) as before:
                yield _Trees(before / CONTENTS, whole / CONTENTS, whole, place, origin, name)

    @contextmanager
    def _whole(self, snapshot: SnapshotId) -> Iterator[Path]:
        """A snapshot's dataset, mounted as a whole where `zfs diff` finds it; not only for this, if its root is."""
        top = self._snapshot(snapshot)
        with lock.exclusive(top):
            whole = self._mount_whole(snapshot)
        try:
            yield whole
        finally:
            with lock.exclusive(top), suppress(FailedPrecondition):  # another such reader is left
                if not mount.is_mountpoint(self.root(snapshot)):
                    with none_starts():
                        unmount_path(whole)


def dataset_of(path: Path) -> str:
    """The dataset that a directory lies on, or will.

    Raises:
        Unsupported: it does not lie on ZFS.
    """
    place = next(one for one in (path, *path.absolute().parents) if one.is_dir())
    device = os.stat(place).st_dev
    found = [one.source for one in mount.mounts() if one.fstype == "zfs" and one.device == device]
    if not found:
        raise Unsupported(
            f"no dataset is named, and {place} lies on {filesystem_name(place)}",
            hint=f"name one: {FSNAME}=POOL/DATASET; zfs create -o mountpoint=none POOL/DATASET makes one",
        )
    return datasets.check_name(found[0])


def require(root: Path, options: Mapping[str, str]) -> None:
    """Refuse a root for which there is no dataset; says what is missing.

    Raises:
        Unsupported: programs, pool or dataset. InvalidArgument: the option is no name of one. FailedPrecondition: it is
        not the one that was used before.
    """
    datasets.require(ZfsDriver(root / ZfsDriver.name, options.get(FSNAME)).dataset())


def _make_root(whole: Path) -> None:
    for path, mode in ((whole / LAYER, 0o700), (whole / CONTENTS, 0o755)):
        if not path.exists():
            path.mkdir()
            path.chmod(mode)


def _is_sealed(origin: str) -> bool:
    return origin.rpartition("/")[2].startswith(Role.SNAPSHOT)


_Same = Callable[["os.DirEntry[bytes]", "os.DirEntry[bytes]"], bool]


def _changed(trees: _Trees) -> Inode:
    after = os.fsencode(trees.after)
    if trees.before is None:
        return compare(new_directory(), scan(after, overlay=False))
    return compare(*scan_pair(os.fsencode(trees.before), after, _asked(trees, trees.before) or _has_same_change_time))


def _asked(trees: _Trees, before: Path) -> _Same | None:
    """What `zfs diff` says of equality, if it can be believed."""
    if _is_sealed(trees.origin) or (before.parent / directory.LOST_LINKS).exists():
        return None
    after = os.fsencode(trees.after)
    found = suspects(trees.origin, trees.dataset, trees.whole, trees.place, CONTENTS.encode())
    # A file with several names is told by one of them.
    if found is None or any(_has_links(top + b"/" + path) for top in (os.fsencode(before), after) for path in found):
        return None

    def same(former: os.DirEntry[bytes], entry: os.DirEntry[bytes]) -> bool:
        return former.inode() == entry.inode() and entry.path[len(after) + 1 :] not in found

    return same


def _has_links(path: bytes) -> bool:
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode)


def _has_same_change_time(former: os.DirEntry[bytes], entry: os.DirEntry[bytes]) -> bool:
    """Whether a clone's file is its origin's: nobody can set this time. A directory's tells nothing of those below."""
    if former.inode() != entry.inode() or entry.is_dir(follow_symlinks=False):
        return False
    times = [one.stat(follow_symlinks=False).st_ctime_ns for one in (former, entry)]
    return times[0] == times[1]
