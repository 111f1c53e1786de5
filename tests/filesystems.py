"""File systems for tests, in files of the test's own."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from hpmapper.kernel import loop, mount
from hpmapper.kernel.fscontext import MOUNT_ATTR_NOATIME
from hpmapper.pool import filesystem
from hpmapper.pool.base import PoolFs


def mounted(kind: PoolFs, directory: Path, size: int) -> Path:
    """Make a file system as pools have it, of `size` bytes (sparse), in DIRECTORY/KIND.img; mount it at DIRECTORY/KIND.

    The loop device goes with the mount, which is the caller's to take away.
    """
    image, target = directory / f"{kind}.img", directory / kind
    target.mkdir()
    image.touch()
    os.truncate(image, size)
    filesystem.make(kind, image, str(uuid.uuid4()))
    # nouuid: several test processes may have one such XFS mounted at once, cloned or not.
    options: mount.Options = {"nouuid": None} if kind is PoolFs.XFS else {}
    with loop.attached(image, block_size=4096) as device:
        mount.filesystem(kind, device, target, options=options, attributes=MOUNT_ATTR_NOATIME)
    return target
