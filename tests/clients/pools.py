"""A file system for many roots: made once, instead of a pool in a loop device for each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hpmapper.kernel import loop, mount
from hpmapper.kernel.fscontext import MOUNT_ATTR_NOATIME
from hpmapper.pool import filesystem
from hpmapper.pool.base import GIB, PoolFs

SIZE = 16 * GIB
"""Sparse: what is not written takes no space."""


@contextmanager
def xfs(directory: Path) -> Iterator[Path]:
    """A mounted XFS with reflink, its image in `directory`."""
    image, target = directory / "xfs.img", directory / "xfs"
    target.mkdir()
    image.touch()
    os.truncate(image, SIZE)
    filesystem.make(PoolFs.XFS, image, "6ba7b810-9dad-11d1-80b4-00c04fd430c8")
    with loop.attached(image, block_size=4096) as device:
        # nouuid: several test processes may have such a file system mounted at once.
        mount.filesystem("xfs", device, target, options={"nouuid": None}, attributes=MOUNT_ATTR_NOATIME)
    try:
        yield target
    finally:
        for one in mount.mounts_below(target):
            mount.umount(one.target, lazy=True)
        image.unlink()
