"""The root file systems in a thin pool that somebody else made, read without a byte of it being changed.

The pool's files are attached to read-only loop devices, the pool is loaded read-only, and so are its devices. A file
system may have to replay its journal all the same, if its last user died: on each device lies a dm-snapshot that takes
such writes into a scratch file. Mounts are detached from the tree, and every device goes with its last user: should
this process be killed, the kernel takes all of it away.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import NamedTuple

from hpmapper.drivers.devicemapper import basefs, metadata, thin
from hpmapper.errors import Corrupt, FailedPrecondition, NotFound, Unsupported
from hpmapper.kernel import dm, fs, loop, mount
from hpmapper.kernel.fscontext import MOUNT_ATTR_RDONLY
from hpmapper.kernel.syscall import opened

_SCRATCH = 1 << 30
"""Bytes of the sparse file for journals; they are replayed within what they take themselves."""

_CHUNK = 8
"""Sectors."""

_CLEARING_SECONDS = 5
"""The kernel removes devices a moment after their last user has gone."""


class PoolPlace(NamedTuple):
    """Where a pool is: a device that is active, or what it is to be made of. Paths of files or block devices."""

    active: str = ""
    data: Path = Path()
    metadata: Path = Path()


class ThinRoots:
    """A pool, held until the block ends."""

    def __init__(self, place: PoolPlace, prefix: str) -> None:
        """`prefix` begins the names of what is made here; one process at a time may use it."""
        self._place = place
        self._prefix = prefix
        self._stack = ExitStack()
        self._pool = place.active
        self._numbers = count()

    def __enter__(self) -> ThinRoots:
        try:
            self._clear()
            if not self._pool:
                self._pool = self._load()
            else:
                self._require_pool()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _clear(self) -> None:
        """Remove what a process left that died before it could leave that to the kernel."""
        left = sorted((name for name in dm.devices() if name.startswith(self._prefix)), reverse=True)
        deadline = time.monotonic() + _CLEARING_SECONDS
        while left:
            left = [name for name in left if not _removed(name)]
            if left and time.monotonic() > deadline:
                raise FailedPrecondition(f"{left[0]} is in use: another process reads this pool")
            time.sleep(0.02 if left else 0)

    def _require_pool(self) -> None:
        if dm.find(self._pool) is None:
            raise NotFound(f"there is no thin pool {self._pool}", hint="activate it; for LVM: vgchange -ay")
        thin.pool_table(self._pool)

    def _load(self) -> str:
        data, meta = (self._device(path) for path in (self._place.data, self._place.metadata))
        with metadata.opened(self._place.metadata) as reader:
            block = reader.superblock().block
        if not block:
            raise Corrupt(f"{self._place.metadata} tells blocks of no size")
        length = fs.device_size(data) // dm.SECTOR // block * block
        table = thin.PoolTable(length, str(meta), str(data), block, 0, ("skip_block_zeroing", "read_only"))
        name = f"{self._prefix}-pool"
        try:
            self._activate(name, table.target())
        except OSError as error:
            raise Corrupt(
                f"the thin pool on {self._place.data} cannot be read: {error.strerror}",
                hint=f"thin_check {self._place.metadata}; the kernel's log has more",
            ) from error
        return name

    def _device(self, path: Path) -> Path:
        if path.is_block_device():
            return path
        return self._stack.enter_context(loop.attached(path, read_only=True))

    def _activate(self, name: str, target: dm.Target, *, stack: ExitStack | None = None) -> Path:
        """A read-only device that goes with its last user, which for now is this process."""
        device = dm.activate(name, [target], read_only=target.kind != "snapshot")
        return self._held(device.name, stack or self._stack)

    @staticmethod
    def _held(name: str, stack: ExitStack) -> Path:
        try:
            stack.enter_context(opened(dm.path(name)))
        finally:
            dm.remove(name, deferred=True)
        return dm.path(name)

    @contextmanager
    def root(self, device: int, size: int, directory: str) -> Iterator[Path]:
        """`directory` of the file system on a thin device of `size` bytes, read-only.

        Raises:
            Corrupt: there is no such device, or no such directory on it.
        """
        if size <= 0 or size % dm.SECTOR or not 0 <= device <= thin.MAX_DEVICE_ID:
            raise Corrupt(f"thin device {device} of {size} bytes cannot be")
        with ExitStack() as stack:
            top = stack.enter_context(self._mounted(device, size, stack))
            root = top / directory
            if not root.exists() or not stat.S_ISDIR(os.lstat(root).st_mode):
                raise Corrupt(f"thin device {device} has no directory {directory!r}")
            yield root

    @contextmanager
    def _mounted(self, device: int, size: int, stack: ExitStack) -> Iterator[Path]:
        name = f"{self._prefix}-{next(self._numbers)}"  # one that has just gone may still be there
        try:
            origin = self._activate(name, thin.thin_target(self._pool, device, size), stack=stack)
        except OSError as error:
            if error.errno in (errno.ENODATA, errno.EINVAL):
                raise Corrupt(f"the pool has no thin device {device}") from error
            raise
        path = self._writable(f"{name}-journal", origin, size, stack)
        with ExitStack() as mounted:
            try:
                kind = basefs.signature(path).kind
                options = basefs.mount_options(kind, {})
                detached = mount.detached(kind, path, options=options, attributes=MOUNT_ATTR_RDONLY)
                top = mounted.enter_context(detached)
            except (OSError, FailedPrecondition) as error:
                raise Corrupt(f"the file system on thin device {device} cannot be mounted: {error}") from error
            stack.pop_all().close()  # the mount has the devices now
            yield top

    def _writable(self, name: str, origin: Path, size: int, stack: ExitStack) -> Path:
        """The device as one that can be written to; what is written is forgotten."""
        with tempfile.TemporaryFile(prefix="hpmapper-") as scratch:
            os.truncate(scratch.fileno(), _SCRATCH)
            cow = stack.enter_context(loop.attached(f"/proc/self/fd/{scratch.fileno()}"))
            target = dm.Target(0, size // dm.SECTOR, "snapshot", f"{origin} {cow} N {_CHUNK}")
            try:
                return self._activate(name, target, stack=stack)
            except OSError as error:
                raise Unsupported(
                    f"a snapshot of {origin} cannot be made: {error.strerror}", hint="modprobe dm_snapshot"
                ) from error


def _removed(name: str) -> bool:
    try:
        return dm.remove(name)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
