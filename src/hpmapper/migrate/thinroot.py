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
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import NamedTuple

from hpmapper.drivers.devicemapper import basefs, metadata, thin
from hpmapper.errors import Corrupt, FailedPrecondition, NotFound, Unsupported
from hpmapper.kernel import dm, fs, loop, mount
from hpmapper.kernel.fscontext import MOUNT_ATTR_RDONLY
from hpmapper.kernel.syscall import AnyPath, opened

_SCRATCH = 1 << 30
"""Bytes of the sparse file for journals; they are replayed within what they take themselves."""

_CHUNK = 8
"""Sectors."""

_SECTOR = 512

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
        self._pool = ""
        self._numbers = count()

    def __enter__(self) -> ThinRoots:
        try:
            self._clear()
            self._pool = self._found() if self._place.active else self._load()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _clear(self) -> None:
        """Remove what a process left that died before it could leave that to the kernel."""
        left = sorted((name for name in dm.devices() if name.startswith(f"{self._prefix}-")), reverse=True)
        deadline = time.monotonic() + _CLEARING_SECONDS
        while left:
            left = [name for name in left if not _removed(name)]
            if left and time.monotonic() > deadline:
                raise FailedPrecondition(f"{left[0]} is in use: another process reads this pool")
            time.sleep(0.02 if left else 0)

    def _found(self) -> str:
        """The number of a pool that is active, as tables have it."""
        found = dm.find(self._place.active)
        if found is None:
            raise NotFound(f"there is no thin pool {self._place.active}", hint="activate it; for LVM: vgchange -ay")
        thin.pool_table(self._place.active)
        return found.dev

    def _load(self) -> str:
        data, meta = (self._device(path) for path in (self._place.data, self._place.metadata))
        with metadata.opened(self._place.metadata) as reader:
            block = reader.superblock().block
        if not block:
            raise Corrupt(f"{self._place.metadata} tells blocks of no size")
        length = fs.device_size(data) // dm.SECTOR // block * block
        table = thin.PoolTable(length, str(meta), str(data), block, 0, ("skip_block_zeroing", "read_only"))
        try:
            return self._held(f"{self._prefix}-pool", table.target(), self._stack)
        except OSError as error:
            raise Corrupt(
                f"the thin pool on {self._place.data} cannot be read: {error.strerror}",
                hint=f"thin_check {self._place.metadata}; the kernel's log has more",
            ) from error

    def _device(self, path: Path) -> Path:
        if path.is_block_device():
            return path
        return self._stack.enter_context(_loop(path, read_only=True))

    @staticmethod
    def _held(name: str, target: dm.Target, stack: ExitStack) -> str:
        """A read-only device that goes with its last user, for now `stack`; its number, as tables have it."""
        # The kernel wants pools in tables that are not read-only; what keeps one from writing is its own option.
        device = dm.activate(name, [target], read_only=target.kind != "thin-pool")
        try:
            stack.enter_context(opened(dm.path(name)))
        finally:
            dm.remove(name, deferred=True)
        return device.dev

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
        sectors = size // dm.SECTOR
        try:
            origin = self._held(name, dm.Target(0, sectors, "thin", f"{self._pool} {device}"), stack)
        except OSError as error:
            if error.errno in (errno.ENODATA, errno.EINVAL):
                raise Corrupt(f"the pool has no thin device {device}") from error
            raise
        with ExitStack() as mounted:
            with self._writable(f"{name}-journal", origin, sectors, stack) as path:
                top = mounted.enter_context(_mounted(path, device))
            stack.pop_all().close()  # the mount has the devices now
            yield top

    @contextmanager
    def _writable(self, name: str, origin: str, sectors: int, stack: ExitStack) -> Iterator[Path]:
        """A device that can be written to; what is written is forgotten. It goes with its last user after this."""
        with tempfile.TemporaryFile(prefix="hpmapper-") as scratch:
            os.truncate(scratch.fileno(), _SCRATCH)
            cow = stack.enter_context(_loop(f"/proc/self/fd/{scratch.fileno()}"))
            try:
                dm.activate(name, [dm.Target(0, sectors, "snapshot", f"{origin} {cow} N {_CHUNK}")])
            except OSError as error:
                raise Unsupported(
                    f"a snapshot to replay a journal in cannot be made: {error.strerror}", hint="modprobe dm_snapshot"
                ) from error
        try:
            yield dm.path(name)
        finally:
            dm.remove(name, deferred=True)


@contextmanager
def _mounted(path: Path, device: int) -> Iterator[Path]:
    with ExitStack() as stack:
        try:
            kind = basefs.signature(path).kind
            options = basefs.mount_options(kind, {})
            top = stack.enter_context(mount.detached(kind, path, options=options, attributes=MOUNT_ATTR_RDONLY))
        except (OSError, FailedPrecondition) as error:
            raise Corrupt(f"the file system on thin device {device} cannot be mounted: {error}") from error
        yield top


def _loop(path: AnyPath, *, read_only: bool = False) -> AbstractContextManager[Path]:
    # Blocks as Docker's loop devices had: with larger ones a file system of such sectors is refused.
    return loop.attached(path, read_only=read_only, direct_io=False, block_size=_SECTOR)


def _removed(name: str) -> bool:
    try:
        return dm.remove(name)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
