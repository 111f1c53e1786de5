"""The btrfs driver: every layer and every container is a subvolume, a snapshot of what is below it.

    l/ID/diff, …    a layer with all below it; l/ID is a read-only subvolume    (hpmapper.drivers.directory)
    a/ID/diff       a container's root, or a sealed layer; a/ID is a subvolume
    a/ID/m          where the root is mounted: a bind, so that nobody takes it away from under a container
    a/ID/size       how much a limited one may keep                             (hpmapper.drivers.limits)

A first write copies nothing, and nothing is stacked: a lookup costs the same under any number of layers. But each
container has inodes of its own, so that the same data is cached once for each.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from hpmapper import faults
from hpmapper.drivers import directory
from hpmapper.drivers.base import Capabilities, Chain, ChainBelow, Ingested, MountSpec, Progress, Stored, bind_spec
from hpmapper.drivers.limits import Limits, limit_of, limits_of, require_in_force
from hpmapper.drivers.upper import numbers, unmount_path
from hpmapper.errors import FailedPrecondition, InvalidArgument
from hpmapper.kernel import btrfs, fs, lock, mount, qgroup, sync
from hpmapper.kernel.idmap import IdMapping
from hpmapper.layer.build import Below
from hpmapper.layer.compare import compare
from hpmapper.layer.diff import changes, write_tar
from hpmapper.layer.scan import scan, scan_pair
from hpmapper.layer.stream import Expected
from hpmapper.model import Change, SnapshotId, Space, Usage
from hpmapper.pool.base import Pool, PoolKind, format_size
from hpmapper.store.objects import IsObject
from hpmapper.store.workspace import discard, remove_tree, workspace
from hpmapper.tree import Inode
from hpmapper.tree import directory as new_directory


class BtrfsDriver(directory.DirectoryLayers):
    """See the module's text, and `hpmapper.drivers.base` for the contract."""

    name = "btrfs"
    capabilities = Capabilities(
        shares_layers=False,
        copies_extents=True,
        shares_cache=False,
        changes_from_upper=True,
        max_layers=1 << 20,
        mounts=True,
    )
    _limits: Limits

    def __init__(self, pool: Pool, *, min_space: int = 0) -> None:
        """Stand on a pool that is btrfs. `min_space`: the smallest size limit, in bytes (Docker's btrfs.min_space)."""
        self._pool = pool
        self._min_space = min_space
        self.home = pool.path
        self.scratch = self.home / "t"

    # Places.

    def _snapshot(self, snapshot: SnapshotId) -> Path:
        return self.home / "a" / str(snapshot)

    def _subvolume(self, layer: SnapshotId) -> Path:
        """Where a layer is, ingested or sealed."""
        made = self._layer(layer)
        return made if made.exists() else self._snapshot(layer)

    # The contract: see `hpmapper.drivers.base`.

    def attach(self) -> None:
        self._pool.attach()
        if fs.filesystem_name(self.home) != "btrfs":
            raise FailedPrecondition(
                f"the pool at {self.home} is {fs.filesystem_name(self.home)}, not btrfs",
                hint="hpmapper pool create --fs btrfs, or --directory on a btrfs",
            )
        for name in ("a", "l", "t"):
            (self.home / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        self._limits = limits_of(self.home, ours=self._pool.config.kind is not PoolKind.DIRECTORY)
        self.capabilities = dataclasses.replace(self.capabilities, size_limits=self._limits.available)

    def detach(self) -> None:
        if self._pool.is_attached() and (self.home / "a").exists():
            for entry in list(os.scandir(self.home / "a")):
                unmount_path(Path(entry.path) / "m")
            self._pool.detach()

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
        self._copy(chain, work / directory.LAYER)
        target = self._layer(layer)
        facts = directory.unpack(blob, self._below(chain), work, target, directory.Dialect.APPLIED, expect, progress)
        btrfs.set_read_only(target, True)  # a guard, nothing more: it need not survive a crash
        return facts

    def prepare(self, snapshot: SnapshotId, chain: Chain, *, read_only: bool = False, size: int | None = None) -> None:
        if size is not None:
            self._check_size(size)
        top = self._snapshot(snapshot)
        if not top.exists():
            with workspace(self.scratch) as work:
                self._copy(chain, work / "copy")
                faults.point("prepare.copied")
                (work / "copy").rename(top)
        if size is not None:
            self._limits.make(top, snapshot, size)
            faults.point("prepare.limited")
        (top / "m").mkdir(mode=0o700, exist_ok=True)  # the last: `has` looks for it

    def _check_size(self, size: int) -> None:
        self._limits.check(size)
        if size < self._min_space:
            raise InvalidArgument(
                f"a size limit of {format_size(size)} is too small",
                hint=f"the storage option btrfs.min_space asks for {format_size(self._min_space)} at least",
            )

    def has(self, snapshot: SnapshotId) -> bool:
        return self.root(snapshot).is_dir()

    def root(self, snapshot: SnapshotId) -> Path:
        return self._snapshot(snapshot) / "m"

    def own_files(self, snapshot: SnapshotId) -> Path:
        """The container's tree (`hpmapper.cache.places`)."""
        return self._snapshot(snapshot) / "diff"

    def layer_files(self, layer: SnapshotId) -> Path:
        """The layer's tree."""
        return self._subvolume(layer) / "diff"

    def seal(self, snapshot: SnapshotId) -> bool:
        top = self._snapshot(snapshot)
        if btrfs.nested(top, btrfs.subvolume(top).id):
            return False  # a snapshot of it would have empty directories for them
        sync.syncfs(top)
        return True

    def mount(self, snapshot: SnapshotId, chain: Chain, *, read_only: bool = False) -> Path:
        top, target = self._snapshot(snapshot), self.root(snapshot)
        with lock.exclusive(top):
            if not mount.is_mountpoint(target):
                require_in_force(self._limits, top)
                mount.bind(top / "diff", target, read_only=read_only)
        return target

    def handout(
        self, snapshot: SnapshotId, chain: Chain, *, read_only: bool = False, ids: IdMapping | None = None
    ) -> MountSpec:
        """A bind of the root itself, which is a directory like any other."""
        require_in_force(self._limits, self._snapshot(snapshot))
        return bind_spec(self._snapshot(snapshot) / "diff", read_only=read_only)

    def is_untouched(self, snapshot: SnapshotId) -> bool:
        return False

    def unmount(self, snapshot: SnapshotId) -> None:
        unmount_path(self.root(snapshot))

    def changes(self, snapshot: SnapshotId, chain: Chain) -> Iterator[Change]:
        return changes(self._changed(snapshot, chain), self._below(chain))

    def write_diff(self, snapshot: SnapshotId, chain: Chain, out: BinaryIO) -> None:
        write_tar(self._changed(snapshot, chain), directory.open_data(self._snapshot(snapshot) / "diff"), out)

    def _changed(self, snapshot: SnapshotId, chain: Chain) -> Inode:
        """What differs from the chain: found by the inodes that btrfs has changed since the snapshot was made."""
        after = self._snapshot(snapshot)
        if not chain:
            return compare(new_directory(), scan(os.fsencode(after / "diff"), overlay=False))
        before, made = self._subvolume(chain[0]), btrfs.subvolume(after)
        tops = os.fsencode(before / "diff"), os.fsencode(after / "diff")
        if made.source != btrfs.subvolume(before).uuid:  # copied by other means, such as a backup
            return compare(*(scan(top, overlay=False) for top in tops))
        changed, device = btrfs.changed_inodes(after, made.born), os.stat(after).st_dev

        def same(former: os.DirEntry[bytes], entry: os.DirEntry[bytes]) -> bool:
            if former.inode() != entry.inode() or entry.inode() in changed:
                return False
            # A subvolume made inside shows its own number here, which may be that of any inode.
            return not entry.is_dir(follow_symlinks=False) or entry.stat(follow_symlinks=False).st_dev == device

        return compare(*scan_pair(*tops, same))

    def remove(self, snapshot: SnapshotId) -> None:
        self.unmount(snapshot)
        faults.point("remove.unmounted")
        self._limits.lift(self._snapshot(snapshot))
        faults.point("remove.unlimited")
        discard(self._snapshot(snapshot), self.scratch)

    def remove_layer(self, layer: SnapshotId) -> None:
        if btrfs.is_subvolume(self._layer(layer)):
            btrfs.set_read_only(self._layer(layer), False)  # else it cannot be moved
        super().remove_layer(layer)
        self.remove(layer)

    def stored(self) -> Stored:
        return Stored(numbers(self.home / "a"), numbers(self.home / "l"))

    def usage(self, snapshot: SnapshotId) -> Usage:
        top = self._snapshot(snapshot)
        if limit_of(top) is not None:
            return self._limits.usage(top)
        made = btrfs.subvolume(top)
        return Usage(*btrfs.written_since(top, made.born if any(made.source) else 0))

    def space(self) -> Space:
        return self._pool.space()

    def status(self) -> dict[str, str]:
        return {**self._pool.facts(), "Quotas": str(qgroup.mode(self.home))}

    def check_layer(self, layer: SnapshotId, digest: bytes | None) -> Iterator[str]:
        path = self._subvolume(layer)
        yield from super().check_layer(layer, digest)
        if path.exists() and not btrfs.is_subvolume(path):
            yield f"{path} is not a subvolume"

    def _copy(self, chain: Chain, target: Path) -> None:
        """Make a subvolume with all that a chain shows in its `diff`, and nothing else."""
        if not chain:
            btrfs.create_subvolume(target)
            target.chmod(0o700)
            (target / "diff").mkdir()
            (target / "diff").chmod(0o755)
            return
        btrfs.snapshot(self._subvolume(chain[0]), target)
        for name in os.listdir(target):
            if name in ("superseded", "m"):
                remove_tree(target / name)
            elif name != "diff":
                (target / name).unlink()

    def _below(self, chain: Chain) -> Below:
        return directory.whole_root(self._subvolume(chain[0]) / "diff" if chain else None)
