"""The aufs driver: layers are directories in AUFS's own form, a container's root is a union of them (Docker's aufs).

    l/ID/diff, …    a layer                       (hpmapper.drivers.directory, hpmapper.layer.aufs)
    a/ID/u, m       a snapshot, or a sealed layer (hpmapper.drivers.upper); u is the branch that is written to

Copies up whole files. A container's writes to a file with several names, all below, reach one of its names only, until
`auplink` (package aufs-tools) joins them: it is run before a branch is read or its union unmounted, if it is installed.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import BinaryIO

from hpmapper.drivers import directory
from hpmapper.drivers.base import Capabilities, Chain, ChainBelow, Ingested, Progress
from hpmapper.drivers.upper import Stack, UpperDriver
from hpmapper.errors import FailedPrecondition, HpmapperError
from hpmapper.kernel import aufs, mount
from hpmapper.layer.aufs import BranchView, is_untouched, scan_branch
from hpmapper.layer.build import Below
from hpmapper.layer.compare import drop_untouched
from hpmapper.layer.merged import Later, Merged
from hpmapper.layer.stream import Expected
from hpmapper.model import SnapshotId
from hpmapper.pool.tools import run_tool
from hpmapper.store.objects import IsObject
from hpmapper.tree import Inode

log = logging.getLogger(__name__)

AUPLINK = "auplink"

_OPTIONS = ["dio"]
"""Files can be opened with O_DIRECT, as databases do."""

_TOPMOST_PERMISSIONS = "dirperm1"
"""A directory's permissions are those of its topmost branch, as a container that changed them expects. (Since 2013.)"""

_PSEUDO_LINKS = ".wh..wh.plnk"


class AufsDriver(directory.DirectoryLayers, UpperDriver):
    """See the module's text, and `hpmapper.drivers.base` for the contract."""

    name = "aufs"
    capabilities = Capabilities(
        shares_layers=False,
        copies_extents=False,
        shares_cache=True,
        changes_from_upper=True,
        max_layers=126,  # AUFS's usual 127 branches, with the one that is written to
        mounts=True,
        renames_directories=False,
    )

    def attach(self) -> None:
        if not aufs.is_known():
            raise FailedPrecondition(
                "this kernel has no AUFS: it is not in /proc/filesystems",
                hint="start a kernel that has it (no mainline kernel does), or export the images with another",
            )
        self._make_home()

    def detach(self) -> None:
        if self.home.exists():
            self._detach_snapshots()

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
        (work / directory.CONTENTS).mkdir(parents=True)
        with self._below(below) as merged:
            return directory.unpack(blob, merged, work, self._layer(layer), directory.Dialect.AUFS, expect, progress)

    def remove_layer(self, layer: SnapshotId) -> None:
        super().remove_layer(layer)
        self._remove_sealed(layer)

    def is_untouched(self, snapshot: SnapshotId) -> bool:
        return is_untouched(os.fsencode(self._snapshot(snapshot) / "u"))

    def seal(self, snapshot: SnapshotId) -> bool:
        self._join_links(snapshot)
        return super().seal(snapshot)

    def unmount(self, snapshot: SnapshotId) -> None:
        self._join_links(snapshot)
        super().unmount(snapshot)

    def status(self) -> dict[str, str]:
        there = shutil.which(AUPLINK) is not None
        return {**super().status(), "Auplink": "installed" if there else "not installed: apt install aufs-tools"}

    def layer_files(self, layer: SnapshotId) -> Path:
        """The layer's directory (`hpmapper.cache.places`)."""
        return Path(self._tree(layer))

    # What `UpperDriver` asks.

    def _mount(self, top: str, below: Stack, read_only: bool, layer: Callable[[str], str | int]) -> None:
        # Even a view has u, which carries the root's attributes.
        upper, lowers = (None, [f"{top}/u", *below.lowers]) if read_only else (f"{top}/u", below.lowers)
        try:
            aufs.mount(f"{top}/m", lowers=lowers, upper=upper, options=[*_OPTIONS, _TOPMOST_PERMISSIONS])
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            aufs.mount(f"{top}/m", lowers=lowers, upper=upper, options=_OPTIONS)

    def _changed(self, snapshot: SnapshotId, chain: Chain) -> Inode:
        self._join_links(snapshot)
        tree = scan_branch(os.fsencode(self._snapshot(snapshot) / "u"))
        with self._below(lambda: chain) as below:
            drop_untouched(tree, below)
        return tree

    def _is_lower(self, upper: str) -> bool:
        return aufs.is_branch(upper)

    def _stack(self, chain: Chain) -> Stack:
        return Stack([self._tree(layer) for layer in chain])

    def _tree(self, layer: SnapshotId) -> str:
        made = self._layer(layer) / "diff"
        return str(made if made.is_dir() else self._sealed(layer))

    def _below(self, chain: ChainBelow) -> AbstractContextManager[Below]:
        return nullcontext(Later(lambda: Merged([BranchView(os.fsencode(self._tree(one))) for one in chain()])))

    def _join_links(self, snapshot: SnapshotId) -> None:
        """Make AUFS's links across branches real ones, if there are any; they end with the mount."""
        links = self._snapshot(snapshot) / "u" / _PSEUDO_LINKS
        root = self.root(snapshot)
        if not (links.is_dir() and any(os.scandir(links)) and mount.is_mountpoint(root)):
            return
        try:
            run_tool([AUPLINK, root, "flush"])
        except HpmapperError as error:
            log.warning("hard links of snapshot %s may come apart: %s", snapshot, error)
