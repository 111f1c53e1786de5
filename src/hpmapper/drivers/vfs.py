"""The vfs driver: every layer and every container is a whole copy. It needs nothing of the kernel.

    l/ID/diff       a layer with all below it      (hpmapper.drivers.directory)
    a/ID/m          a snapshot: a copy of its parent's diff; or a sealed layer

Copies share extents where the file system can. A size limit counts the copy as well, but on btrfs not what it shares.
Works where mounting is forbidden.
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
from hpmapper.drivers.limits import limit_of, limits_of, require_default, require_in_force
from hpmapper.drivers.upper import disk_usage, numbers
from hpmapper.kernel import sync
from hpmapper.kernel.idmap import IdMapping
from hpmapper.layer.build import Below
from hpmapper.layer.compare import compare
from hpmapper.layer.diff import changes, write_tar
from hpmapper.layer.scan import scan
from hpmapper.layer.stream import Expected
from hpmapper.model import Change, SnapshotId, Space, Usage
from hpmapper.pool.tools import run_tool
from hpmapper.store.objects import IsObject
from hpmapper.store.workspace import discard, remove_tree
from hpmapper.tree import Inode
from hpmapper.tree import directory as new_directory


class VfsDriver(directory.DirectoryLayers):
    """See the module's text, and `hpmapper.drivers.base` for the contract."""

    name = "vfs"
    capabilities = Capabilities(
        shares_layers=False,
        copies_extents=False,
        shares_cache=False,
        changes_from_upper=False,
        max_layers=1 << 20,
        mounts=False,
    )

    def __init__(self, home: Path, default_size: int | None = None) -> None:
        """`default_size`: Docker's option size, how many bytes each container may keep for which nobody says."""
        self.home = home
        self._default_size = default_size
        self.scratch = home / "t"

    def _snapshot(self, snapshot: SnapshotId) -> Path:
        return self.home / "a" / str(snapshot)

    def attach(self) -> None:
        for name in ("a", "l", "t"):
            (self.home / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        self._limits = limits_of(self.home)
        require_default(self._limits, "size", self._default_size)
        self.capabilities = dataclasses.replace(
            self.capabilities, size_limits=self._limits.available, default_size=self._default_size
        )

    def detach(self) -> None:
        """Nothing is attached."""

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
        self._copy(chain, work / directory.CONTENTS)
        return directory.unpack(
            blob, self._below(chain), work, self._layer(layer), directory.Dialect.APPLIED, expect, progress
        )

    def prepare(self, snapshot: SnapshotId, chain: Chain, *, read_only: bool = False, size: int | None = None) -> None:
        top = self._snapshot(snapshot)
        if (top / "m").exists():
            return
        if size is not None:
            self._limits.make(top, snapshot, size)
            faults.point("prepare.limited")
        top.mkdir(mode=0o700, exist_ok=True)
        copy = top / "copying"
        if copy.exists():
            remove_tree(copy)
        self._copy(chain, copy)
        faults.point("prepare.copied")
        if chain:
            sync.syncfs(copy)  # what has its final name is whole, after power loss as well
        copy.rename(top / "m")

    def has(self, snapshot: SnapshotId) -> bool:
        return self.root(snapshot).is_dir()

    def root(self, snapshot: SnapshotId) -> Path:
        return self._snapshot(snapshot) / "m"

    def handout(
        self, snapshot: SnapshotId, chain: Chain, *, read_only: bool = False, ids: IdMapping | None = None
    ) -> MountSpec:
        return bind_spec(self.mount(snapshot, chain), read_only=read_only)

    def is_untouched(self, snapshot: SnapshotId) -> bool:
        return False

    def seal(self, snapshot: SnapshotId) -> bool:
        sync.syncfs(self._snapshot(snapshot))
        return True

    def mount(self, snapshot: SnapshotId, chain: Chain, *, read_only: bool = False) -> Path:
        require_in_force(self._limits, self._snapshot(snapshot))
        return self.root(snapshot)

    def unmount(self, snapshot: SnapshotId) -> None:
        """Nothing is mounted."""

    def changes(self, snapshot: SnapshotId, chain: Chain) -> Iterator[Change]:
        return changes(self._changed(snapshot, chain), self._below(chain))

    def write_diff(self, snapshot: SnapshotId, chain: Chain, out: BinaryIO) -> None:
        write_tar(self._changed(snapshot, chain), directory.open_data(self.root(snapshot)), out)

    def remove_layer(self, layer: SnapshotId) -> None:
        super().remove_layer(layer)
        self.remove(layer)

    def remove(self, snapshot: SnapshotId) -> None:
        self._limits.lift(self._snapshot(snapshot))
        discard(self._snapshot(snapshot), self.scratch)

    def stored(self) -> Stored:
        return Stored(numbers(self.home / "a"), numbers(self.home / "l"))

    def usage(self, snapshot: SnapshotId) -> Usage:
        top = self._snapshot(snapshot)
        return disk_usage(top / "m") if limit_of(top) is None else self._limits.usage(top)

    def own_files(self, snapshot: SnapshotId) -> Path:
        """The container's copy (`hpmapper.cache.places`)."""
        return self.root(snapshot)

    def space(self) -> Space:
        return Space.of(self.home)

    def _copy(self, chain: Chain, target: Path) -> None:
        target.mkdir(parents=True)
        if chain:
            run_tool(["cp", "-a", "--reflink=auto", f"{self._tree(chain[0])}/.", str(target)])
        else:
            target.chmod(0o755)

    def _tree(self, layer: SnapshotId) -> Path:
        made = self._layer(layer) / "diff"
        return made if made.is_dir() else self.root(layer)

    def _below(self, chain: Chain) -> Below:
        return directory.whole_root(self._tree(chain[0]) if chain else None)

    def _changed(self, snapshot: SnapshotId, chain: Chain) -> Inode:
        after = scan(os.fsencode(self._snapshot(snapshot) / "m"), overlay=False)
        before = scan(os.fsencode(self._tree(chain[0])), overlay=False) if chain else new_directory()
        return compare(before, after)
