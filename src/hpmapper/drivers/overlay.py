"""The overlay driver: layers are directories, a container's root is an overlay mount of them (Docker's overlay2).

    l/ID/diff, …    a layer                       (hpmapper.drivers.directory)
    a/ID/u, w, m    a snapshot                    (hpmapper.drivers.upper)

Copies up by cloning extents where the file system can, else whole files. One layer's files are cached once, but the
same file in two layers twice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import BinaryIO

from hpmapper.drivers import directory
from hpmapper.drivers.base import Capabilities, Chain, ChainBelow, Fresh, Ingested, Problem, Progress
from hpmapper.drivers.upper import UpperDriver
from hpmapper.kernel.clone import can_clone
from hpmapper.kernel.fs import filesystem_name
from hpmapper.layer.build import Below
from hpmapper.layer.merged import Later, Merged
from hpmapper.layer.scan import DirectoryView
from hpmapper.layer.stream import Expected
from hpmapper.model import ObjectDigest, SnapshotId
from hpmapper.store.workspace import discard


class OverlayDriver(UpperDriver):
    """See the module's text, and `hpmapper.drivers.base` for the contract."""

    name = "overlay"
    capabilities = Capabilities(
        shares_layers=False,
        copies_extents=False,
        shares_cache=True,
        changes_from_upper=True,
        max_layers=499,
        mounts=True,
    )

    def attach(self) -> None:
        self._make_home()

    def detach(self) -> None:
        if self.home.exists():
            self._detach_snapshots()

    def pin(self) -> AbstractContextManager[object]:
        return nullcontext()

    def ingest(
        self,
        layer: SnapshotId,
        below: ChainBelow,
        blob: BinaryIO,
        work: Path,
        expect: Expected,
        progress: Progress | None,
    ) -> Ingested:
        (work / "layer" / "diff").mkdir(parents=True)
        with self._below(below) as merged:
            return directory.unpack(blob, merged, work, self._layer(layer), directory.Dialect.OVERLAY, expect, progress)

    def finish(self, chain: Chain, fresh: Mapping[SnapshotId, Fresh]) -> None:
        """Every layer is ready as it is."""

    def read_tar(self, layer: SnapshotId) -> Iterator[bytes]:
        return directory.read_tar(self._layer(layer))

    def remove_layer(self, layer: SnapshotId) -> None:
        discard(self._layer(layer), self.scratch)

    def sweep_objects(self, known: Callable[[], Container[ObjectDigest]], timeout: float) -> int:
        return 0

    def status(self) -> dict[str, str]:
        return {
            "Backing Filesystem": filesystem_name(self.home),
            "Copies Extents": str(can_clone(self.home)).lower(),
        }

    def check_layer(self, layer: SnapshotId, digest: bytes | None) -> Iterator[str]:
        return directory.check(self._layer(layer))

    def check_derived(self, *, repair: bool) -> Iterator[Problem]:
        return iter(())

    def check_object(self, digest: ObjectDigest, size: int) -> str | None:
        return "is not expected with this driver"

    def _lowers(self, chain: Chain) -> list[str]:
        return [f"{self.home}/l/{layer}/diff" for layer in chain]

    def _data(self) -> None:
        return None

    def _below(self, chain: ChainBelow) -> AbstractContextManager[Below]:
        return nullcontext(Later(lambda: Merged([DirectoryView(os.fsencode(path)) for path in self._lowers(chain())])))
