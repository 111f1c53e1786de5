"""The overlay driver: layers are directories, a container's root is an overlay mount of them (Docker's overlay2).

    l/ID/diff, …    a layer                       (hpmapper.drivers.directory)
    a/ID/u, w, m    a snapshot, or a sealed layer (hpmapper.drivers.upper)

Copies up by cloning extents where the file system can, else whole files. One layer's files are cached once, but the
same file in two layers twice.
"""

from __future__ import annotations

import dataclasses
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import BinaryIO

from hpmapper.drivers import directory
from hpmapper.drivers.base import Capabilities, Chain, ChainBelow, Ingested, MountSpec, Progress, bind_spec
from hpmapper.drivers.limits import require_default, require_in_force
from hpmapper.drivers.upper import Stack, UpperDriver
from hpmapper.kernel.fs import filesystem_name, knows_file_types
from hpmapper.kernel.idmap import IdMapping
from hpmapper.layer.build import Below
from hpmapper.layer.marks import USERXATTR
from hpmapper.layer.merged import Later, Merged
from hpmapper.layer.scan import DirectoryView
from hpmapper.layer.stream import Expected
from hpmapper.model import SnapshotId
from hpmapper.store.objects import IsObject

_LONGEST_OPTIONS = 4095
"""Bytes: mount(2) takes a page of options. What needs more is mounted here, and handed out as a bind."""

_PARAMETERS = Path("/sys/module/overlay/parameters")


def _not_by_default() -> list[str]:
    """Options against what this kernel does if nothing is said (CONFIG_OVERLAY_FS_METACOPY, …_REDIRECT_DIR, or root).

    With either, an upper is no layer that anybody can read (design trap 2). Where it is off anyway nothing is said:
    some engines refuse options that they do not know.
    """
    wanted = {"metacopy": "off", "redirect_dir": "nofollow"}
    return [f"{name}={value}" for name, value in wanted.items() if _is_on(_PARAMETERS / name)]


def _is_on(parameter: Path) -> bool:
    try:
        return parameter.read_text(encoding="ascii").strip() in ("Y", "1", "on")
    except FileNotFoundError:
        return False  # older than the feature, or not loaded yet and so at its default


class OverlayDriver(directory.DirectoryLayers, UpperDriver):
    """See the module's text, and `hpmapper.drivers.base` for the contract."""

    name = "overlay"
    capabilities = Capabilities(
        shares_layers=False,
        copies_extents=False,
        shares_cache=True,
        changes_from_upper=True,
        max_layers=499,
        mounts=True,
        maps_ids=True,
        renames_directories=False,
        keeps_links=False,
    )

    def __init__(self, home: Path, default_size: int | None = None) -> None:
        """`default_size`: Docker's overlay2.size, how many bytes each container may keep for which nobody says."""
        super().__init__(home)
        self._default_size = default_size
        self._handed = ["index=off"]
        self._trees: dict[SnapshotId, str] = {}  # where layers are, which never changes

    def attach(self) -> None:
        self._make_home()
        require_default(self._limits, "overlay2.size", self._default_size)
        self.capabilities = dataclasses.replace(self.capabilities, default_size=self._default_size)
        self._handed = ["index=off", *USERXATTR, *_not_by_default()]

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
            return directory.unpack(blob, merged, work, self._layer(layer), directory.Dialect.OVERLAY, expect, progress)

    def remove_layer(self, layer: SnapshotId) -> None:
        self._trees.pop(layer, None)
        super().remove_layer(layer)
        self._remove_sealed(layer)

    def handout(
        self, snapshot: SnapshotId, chain: Chain, *, read_only: bool = False, ids: IdMapping | None = None
    ) -> MountSpec:
        """The overlay itself: its layers are directories as any engine's own, so there is nothing to hide."""
        if ids:
            return super().handout(snapshot, chain, read_only=read_only, ids=ids)
        top = f"{self.home}/a/{snapshot}"
        require_in_force(self._limits, Path(top))
        lowers = [self._tree(layer) for layer in chain]
        if not lowers:
            return bind_spec(Path(f"{top}/u"), read_only=read_only)
        if read_only:
            options = [*self._handed, f"lowerdir={':'.join([f'{top}/u', *lowers])}"]
        else:
            layers = [f"workdir={top}/w", f"upperdir={top}/u", f"lowerdir={':'.join(lowers)}"]
            options = [*self._handed, *layers]
        if len(",".join(options)) > _LONGEST_OPTIONS:
            return super().handout(snapshot, chain, read_only=read_only)
        return MountSpec("overlay", "overlay", options)

    def status(self) -> dict[str, str]:
        """Docker's labels for its overlay2, and what is ours."""
        return {
            "Backing Filesystem": filesystem_name(self.home),
            "Supports d_type": str(knows_file_types(self.home)).lower(),
            "Using metacopy": "false",
            "Native Overlay Diff": "true",
            "userxattr": str(bool(USERXATTR)).lower(),
            **super().status(),
        }

    def layer_files(self, layer: SnapshotId) -> Path:
        """The layer's directory (`hpmapper.cache.places`)."""
        return Path(self._tree(layer))

    def _stack(self, chain: Chain) -> Stack:
        return Stack([self._tree(layer) for layer in chain])

    def _tree(self, layer: SnapshotId) -> str:
        tree = self._trees.get(layer)
        if tree is None:
            made = f"{self.home}/l/{layer}/diff"
            tree = self._trees[layer] = made if os.path.isdir(made) else str(self._sealed(layer))
        return tree

    def _below(self, chain: ChainBelow) -> AbstractContextManager[Below]:
        return nullcontext(Later(lambda: Merged([DirectoryView(os.fsencode(self._tree(one))) for one in chain()])))
