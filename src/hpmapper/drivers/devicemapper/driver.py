"""The devicemapper driver: layers and containers are thin devices, each a snapshot of the one below.

    <home>/data, metadata      loop mode: the pool's sparse files
    <home>/a/ID/device, m, fs  a snapshot: its record, its root, a place to mount by the way
    <home>/l/ID/device         a layer
    <home>/d/DEVICE            to be deleted       <home>/deviceset   the pool as it was set up

On each device lies a file system with `layer/diff`, the root, and beside it what the layer's tar is made again from
(hpmapper.drivers.directory). A container sees only the root: what is handed out is a bind mount of it.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager
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
from hpmapper.drivers.devicemapper import backing, info, thin, written
from hpmapper.drivers.devicemapper.devices import Devices
from hpmapper.drivers.devicemapper.options import Options
from hpmapper.drivers.devicemapper.records import Record, Role
from hpmapper.drivers.directory import CONTENTS, LAYER
from hpmapper.drivers.upper import numbers, unmount_path
from hpmapper.errors import Corrupt, HpmapperError, NoSpace, NotFound
from hpmapper.kernel import fiemap, fs, lock, mount, sync
from hpmapper.kernel.idmap import IdMapping
from hpmapper.layer.compare import compare
from hpmapper.layer.diff import changes, write_tar
from hpmapper.layer.scan import scan, scan_pair
from hpmapper.layer.stream import Expected
from hpmapper.model import Change, ObjectDigest, SnapshotId, Space, Usage
from hpmapper.store.objects import IsObject
from hpmapper.tree import Inode, walk
from hpmapper.tree import directory as new_directory

log = logging.getLogger(__name__)


class BlockDevice(NamedTuple):
    """A root as a block device: its file system, what it has to be mounted with, and where in it the root is."""

    path: Path
    filesystem: str
    options: str
    root: str


class DeviceMapperDriver(directory.DirectoryLayers):
    """See the module's text, and `hpmapper.drivers.base` for the contract."""

    name = "devicemapper"
    capabilities = Capabilities(
        shares_layers=False,
        copies_extents=True,
        shares_cache=False,
        changes_from_upper=False,
        max_layers=1 << 20,
        mounts=True,
    )
    one_disk = False

    def __init__(self, home: Path, options: Options) -> None:
        self.home = home
        self.scratch = home / "t"
        self.devices = Devices(home, options)
        self._records = self.devices.records

    # The pool.

    def attach(self) -> None:
        self.devices.attach()
        self._delete_buried()

    def _delete_buried(self) -> None:
        """Try again what was in use when it was removed: now and then, whatever else is done."""
        if self._records.buried_ids():
            try:
                self.devices.delete_buried()
            except (HpmapperError, OSError) as error:
                log.warning("devices to be deleted are left for later: %s", error)

    def detach(self) -> None:
        if not self.home.exists():
            return
        for snapshot in numbers(self.home / "a"):
            self.unmount(snapshot)
        self.devices.detach()

    def space(self) -> Space:
        return info.space(self.devices)

    def status(self) -> dict[str, str]:
        return info.fields(self.devices)

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
        try:
            record = self.devices.create(Role.LAYER, layer, chain[0] if chain else None)
            with self.devices.mounted(record) as top:
                directory.drop_recipe(top / LAYER)
                # The root is still the parent's until the whole tar has been read.
                view = directory.whole_root(top / CONTENTS if chain else None)
                ingested = directory.fill(blob, view, top, layer, directory.Dialect.APPLIED, expect, progress)
            faults.point("ingest.unmounted")
            self.devices.finish(Role.LAYER, layer, record)
        except BaseException as error:
            self.devices.remove(Role.LAYER, layer)
            raise self._explained(error) from error
        faults.point("ingest.layer-renamed")
        return ingested

    def _explained(self, error: BaseException) -> BaseException:
        """A full file system is one of two things, and which one it is says what to do."""
        if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EIO):
            return error
        status = thin.pool_status(self.devices.pool)
        if status.mode is not thin.Mode.WRITE or not status.data_free:
            return NoSpace("the thin pool is full", hint="hpmapper pool grow, or remove images")
        if error.errno == errno.ENOSPC:
            return NoSpace("the layer is larger than the base device", hint="begin anew with a larger dm.basesize")
        return error

    def read_tar(self, layer: SnapshotId) -> Iterator[bytes]:
        with self.devices.mounted(self._layer_record(layer), read_only=True) as top:
            yield from directory.read_tar(top / LAYER)

    def remove_layer(self, layer: SnapshotId) -> None:
        self.devices.remove(Role.LAYER, layer)
        self.remove(layer)

    def check_layer(self, layer: SnapshotId, digest: bytes | None) -> Iterator[str]:
        try:
            with self.devices.mounted(self._layer_record(layer), read_only=True) as top:
                yield from directory.check(top / LAYER)
        except (NotFound, Corrupt, OSError) as error:
            yield str(error)

    def check_derived(self, *, repair: bool) -> Iterator[Problem]:
        status = thin.pool_status(self.devices.pool)
        if status.needs_check or not status.takes_messages:
            yield Problem(f"thin pool {self.devices.pool}", "its metadata needs a check: hpmapper pool repair")

    def _layer_record(self, layer: SnapshotId) -> Record:
        record = self._records.find(Role.LAYER, layer)
        if record is None:
            raise NotFound(f"devmapper: Unknown device {layer}", hint="run hpmapper fsck")
        return record

    # Snapshots.

    def prepare(self, snapshot: SnapshotId, chain: Chain, *, read_only: bool = False, size: int | None = None) -> None:
        """A size is that of the whole file system, as with Docker: it is not smaller than the image's."""
        if self.has(snapshot):
            return
        record = self.devices.create(Role.SNAPSHOT, snapshot, chain[0] if chain else None, size)
        if size is not None:
            self.devices.fill(record)
        self.devices.finish(Role.SNAPSHOT, snapshot, record)

    def has(self, snapshot: SnapshotId) -> bool:
        return self._records.find(Role.SNAPSHOT, snapshot) is not None

    def root(self, snapshot: SnapshotId) -> Path:
        return self._records.place(Role.SNAPSHOT, snapshot) / "m"

    def seal(self, snapshot: SnapshotId) -> bool:
        if mount.is_mountpoint(self.root(snapshot)):
            sync.syncfs(self.root(snapshot))
        self.devices.seal(snapshot)
        return True

    def mount(self, snapshot: SnapshotId, chain: Chain, *, read_only: bool = False) -> Path:
        root = self.root(snapshot)
        with lock.exclusive(root.parent):
            if not mount.is_mountpoint(root):
                self._mount(self._snapshot_record(snapshot), root, read_only)
        return root

    def as_block(self, snapshot: SnapshotId) -> BlockDevice:
        """A snapshot's block device, for virtual machines that mount it themselves; `unmount` takes it back.

        Raises:
            FailedPrecondition: its root is mounted.
        """
        with lock.exclusive(self.root(snapshot).parent):
            path = self.devices.as_block(self._snapshot_record(snapshot))
        kind = self.devices.device_set.base_fs
        return BlockDevice(path, kind, "nouuid" if kind == "xfs" else "", CONTENTS)

    def _mount(self, record: Record, root: Path, read_only: bool) -> None:
        self.devices.require_no_block(record)
        whole = root.parent / "fs"
        for path in (root, whole):
            path.mkdir(mode=0o700, exist_ok=True)
        if not mount.is_mountpoint(whole):  # it is when this was cut short
            self.devices.mount(record, whole)
        faults.point("mount.whole")
        try:
            mount.bind(whole / CONTENTS, root, read_only=read_only)
        finally:
            mount.umount(whole)

    def handout(
        self, snapshot: SnapshotId, chain: Chain, *, read_only: bool = False, ids: IdMapping | None = None
    ) -> MountSpec:
        return bind_spec(self.mount(snapshot, chain, read_only=read_only), read_only=read_only)

    def is_untouched(self, snapshot: SnapshotId) -> bool:
        """It is plain until it is mounted, which writes to it."""
        if self.root(snapshot).exists():
            return False
        try:
            return self.devices.is_unwritten(self._snapshot_record(snapshot))
        except (HpmapperError, OSError):  # the pool cannot say, or somebody else reads its metadata just now
            return False

    def unmount(self, snapshot: SnapshotId) -> None:
        root = self.root(snapshot)
        unmount_path(root)
        unmount_path(root.parent / "fs")
        self.devices.end_block(snapshot)

    def remove(self, snapshot: SnapshotId) -> None:
        self.unmount(snapshot)
        faults.point("remove.unmounted")
        self.devices.remove(Role.SNAPSHOT, snapshot)
        self._delete_buried()

    def sweep_objects(self, known: Callable[[], Container[ObjectDigest]], timeout: float) -> int:
        """There are no objects; what waits for its deletion is looked at."""
        self._delete_buried()
        return 0

    def stored(self) -> Stored:
        return Stored(numbers(self.home / "a"), numbers(self.home / "l"))

    def stored_objects(self) -> set[ObjectDigest]:
        return set()

    # For the cache (`hpmapper.cache.places`).

    def own_files(self, snapshot: SnapshotId) -> Path:
        """The container's whole root: its device holds the image as well, and no other reads it there."""
        return self.root(snapshot)

    def layer_files(self, layer: SnapshotId) -> None:
        """None: a layer is mounted only while it is made or copied."""

    def block_devices(self) -> list[Path]:
        """The pool's own two."""
        try:
            table = thin.pool_table(self.devices.pool)
        except (HpmapperError, OSError):
            return []
        return [backing.node(table.data), backing.node(table.metadata)]

    def _snapshot_record(self, snapshot: SnapshotId) -> Record:
        record = self._records.find(Role.SNAPSHOT, snapshot)
        if record is None:
            raise NotFound(f"devmapper: Unknown device {snapshot}")
        return record

    # What a snapshot changed.

    def changes(self, snapshot: SnapshotId, chain: Chain) -> Iterator[Change]:
        record = self._snapshot_record(snapshot)
        with self._trees(record) as (before, after):
            yield from changes(self._changed(record, before, after), directory.whole_root(before))

    def write_diff(self, snapshot: SnapshotId, chain: Chain, out: BinaryIO) -> None:
        record = self._snapshot_record(snapshot)
        with self._trees(record) as (before, after):
            write_tar(self._changed(record, before, after), directory.open_data(after), out)

    def usage(self, snapshot: SnapshotId) -> Usage:
        record = self._snapshot_record(snapshot)
        with self._trees(record) as (before, after):
            tree = self._changed(record, before, after)
            blocks, size = self.devices.changed_blocks(record)
            seen = {inode: path for path, inode in walk(tree) if not inode.is_whiteout}
            files = (after / os.fsdecode(path) for inode, path in seen.items() if stat.S_ISREG(inode.mode))
            return Usage(sum(_bytes_in(file, blocks, size) for file in files), len(seen))

    def _changed(self, record: Record, before: Path | None, after: Path) -> Inode:
        """What differs between the two trees, as far as it has been written when this begins."""
        if before is None:
            return compare(new_directory(), scan(os.fsencode(after), overlay=False))
        is_written = self._written(record, after)
        tops = os.fsencode(before), os.fsencode(after)
        return compare(*scan_pair(*tops, lambda former, entry: written.same(former, entry, is_written)))

    def _written(self, record: Record, after: Path) -> written.IsWritten:
        self.devices.settle(record)
        if self.devices.device_set.base_fs != "xfs":
            return written.anywhere
        try:
            blocks, size = self.devices.changed_blocks(record)
        except (HpmapperError, OSError) as error:
            log.info("the pool does not say what was written to snapshot %s: %s", record.number, error)
            return written.anywhere
        return written.in_blocks(fs.xfs_geometry(after), blocks, size)

    @contextmanager
    def _trees(self, record: Record) -> Iterator[tuple[Path | None, Path]]:
        """The roots of a snapshot's parent (None: an empty one) and of the snapshot, to be read."""
        with ExitStack() as stack:
            before = None
            if record.parent is not None:
                found = self.devices.find(record.parent)
                if found is None:
                    raise NotFound(f"devmapper: Unknown device {record.parent}", hint="run hpmapper fsck")
                before = stack.enter_context(self._tree(*found))
            yield before, stack.enter_context(self._tree(Role.SNAPSHOT, record))

    @contextmanager
    def _tree(self, role: Role, record: Record) -> Iterator[Path]:
        root = self.root(record.number)
        if role is Role.SNAPSHOT and mount.is_mountpoint(root):
            yield root
            return
        with self.devices.mounted(record, read_only=role is Role.LAYER) as top:
            yield top / CONTENTS


def _bytes_in(file: Path, blocks: set[int], size: int) -> int:
    """How many of a file's bytes lie in these blocks of its device."""
    with file.open("rb") as data:
        return sum(_overlap(extent, blocks, size) for extent in fiemap.extents(data.fileno()))


def _overlap(extent: fiemap.Extent, blocks: set[int], size: int) -> int:
    end = extent.physical + extent.length
    touched = range(extent.physical // size, -(-end // size))
    return sum(
        min(end, (block + 1) * size) - max(extent.physical, block * size) for block in touched if block in blocks
    )
