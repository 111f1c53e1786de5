"""Size limits by ZFS's quotas (`hpmapper.drivers.limits.Limits`).

`quota`, as with Docker, not `refquota`: what a clone has of its parent does not count, as it does not with the other
drivers. Quotas need not be lifted, as they go with the dataset.
"""

from __future__ import annotations

import os
from pathlib import Path

from hpmapper.drivers.limits import check_size, note
from hpmapper.drivers.zfs.datasets import Datasets, Role, properties
from hpmapper.kernel import mount
from hpmapper.kernel.fscontext import MOUNT_ATTR_RDONLY
from hpmapper.model import SnapshotId, Usage


class Quotas:
    """The quota of each limited snapshot's dataset."""

    available = True

    def __init__(self, datasets: Datasets) -> None:
        self._datasets = datasets

    def check(self, size: int) -> None:
        check_size(size)

    def make(self, top: Path, snapshot: SnapshotId, size: int) -> None:
        self.check(size)
        self._datasets.limit(snapshot, size)
        note(top, size)

    def is_in_force(self, top: Path) -> bool:
        return int(properties(self._name(top), "quota")["quota"]) > 0

    def usage(self, top: Path) -> Usage:
        """Of what is on disk, after all that was written has been brought there; without a limit, too."""
        self._datasets.sync()
        name = self._name(top)
        found = properties(name, "used", "origin")
        inherited = _inodes(found["origin"]) if found["origin"] != "-" else 0
        return Usage(int(found["used"]), max(0, _inodes(name) - inherited))

    def lift(self, top: Path) -> None:
        """There is nothing to lift."""

    def _name(self, top: Path) -> str:
        return self._datasets.name(Role.SNAPSHOT, SnapshotId(int(top.name)))


def _inodes(name: str) -> int:
    """How many inodes a dataset has: ZFS counts them on disk."""
    with mount.detached("zfs", name, attributes=MOUNT_ATTR_RDONLY if "@" in name else 0) as top:
        status = os.statvfs(top)
        return status.f_files - status.f_ffree
