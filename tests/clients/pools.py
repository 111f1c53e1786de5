"""A file system for many roots: made once, instead of a pool in a loop device for each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hpmapper.kernel import mount
from hpmapper.pool.base import GIB, PoolFs
from tests.filesystems import mounted

SIZE = 16 * GIB
"""Sparse: what is not written takes no space."""


@contextmanager
def xfs(directory: Path) -> Iterator[Path]:
    """A mounted XFS with reflink, its image in `directory`."""
    with _made(PoolFs.XFS, directory) as target:
        yield target


@contextmanager
def btrfs(directory: Path) -> Iterator[Path]:
    """A mounted btrfs, its image in `directory`."""
    with _made(PoolFs.BTRFS, directory) as target:
        yield target


@contextmanager
def _made(kind: PoolFs, directory: Path) -> Iterator[Path]:
    target = mounted(kind, directory, SIZE)
    try:
        yield target
    finally:
        for one in mount.mounts_below(target):
            mount.umount(one.target, lazy=True)
        (directory / f"{kind}.img").unlink()
        target.rmdir()
