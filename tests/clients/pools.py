"""A file system for many roots: made once, instead of a pool in a loop device for each."""

from __future__ import annotations

import os
import uuid
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
    # nouuid: several test processes may have such a file system mounted at once.
    with _made(PoolFs.XFS, directory, {"nouuid": None}) as target:
        yield target


@contextmanager
def btrfs(directory: Path) -> Iterator[Path]:
    """A mounted btrfs, its image in `directory`."""
    with _made(PoolFs.BTRFS, directory, {}) as target:
        yield target


@contextmanager
def _made(kind: PoolFs, directory: Path, options: mount.Options) -> Iterator[Path]:
    image, target = directory / f"{kind}.img", directory / kind
    target.mkdir()
    image.touch()
    os.truncate(image, SIZE)
    filesystem.make(kind, image, str(uuid.uuid4()))
    with loop.attached(image, block_size=4096) as device:
        mount.filesystem(kind, device, target, options=options, attributes=MOUNT_ATTR_NOATIME)
    try:
        yield target
    finally:
        for one in mount.mounts_below(target):
            mount.umount(one.target, lazy=True)
        image.unlink()
