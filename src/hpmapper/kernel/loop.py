"""Loop devices: a file as a block device (include/uapi/linux/loop.h).

Loop devices belong to the whole machine, not to a mount namespace: one that is not detached stays. Hence `attached`,
which leaves it to the kernel (LO_FLAGS_AUTOCLEAR) to free the device with its last user, whatever happens to us.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from hpmapper.kernel.syscall import AnyPath, ioctl, opened

_LOOP_CLR_FD = 0x4C01
_LOOP_GET_STATUS64 = 0x4C05
_LOOP_SET_CAPACITY = 0x4C07
_LOOP_SET_DIRECT_IO = 0x4C08
_LOOP_CONFIGURE = 0x4C0A  # Linux 5.8, commit 3448914e8cc5
_LOOP_CTL_GET_FREE = 0x4C82

LO_FLAGS_READ_ONLY = 1
LO_FLAGS_AUTOCLEAR = 4
LO_FLAGS_DIRECT_IO = 16

_MAJOR = 7
_CONTROL_RDEV = os.makedev(10, 237)
_INFO = struct.Struct("=5Q4I64s64s32s2Q")  # struct loop_info64
_CONFIG = struct.Struct(f"=II{_INFO.size}s64x")  # struct loop_config
_ATTEMPTS = 64
_FREE = (errno.ENXIO, errno.ENOENT, errno.ENODEV)  # what a device that stands on nothing answers


class LoopStatus(NamedTuple):
    """What a loop device stands on. `device` and `inode` are the backing file's st_dev and st_ino."""

    path: Path
    device: int
    inode: int
    offset: int
    size_limit: int
    flags: int

    @property
    def read_only(self) -> bool:
        return bool(self.flags & LO_FLAGS_READ_ONLY)

    @property
    def direct_io(self) -> bool:
        return bool(self.flags & LO_FLAGS_DIRECT_IO)

    @property
    def autoclear(self) -> bool:
        return bool(self.flags & LO_FLAGS_AUTOCLEAR)


@contextmanager
def attached(
    backing: AnyPath, *, read_only: bool = False, direct_io: bool = True, block_size: int = 0
) -> Iterator[Path]:
    """A loop device over `backing` that lives as long as this block or a mount made of it, whichever is longer.

    Args:
        direct_io: bypass the backing file's page cache, so that data is not cached twice. The kernel falls back to
            buffered without a word where the file system cannot: see `status(...).direct_io`.
        block_size: the device's logical block size; 0 is the kernel's choice (512, or what direct I/O needs).
    """
    fd, device = _configure(backing, _flags(read_only, direct_io, True), block_size)
    try:
        yield device
    finally:
        os.close(fd)


@contextmanager
def held(backing: AnyPath, *, block_size: int = 0) -> Iterator[Path]:
    """The writable loop device over `backing` that there is, else a new one; it lives as `attached` says.

    A second device over the same file would have a cache of its own: two mounts would ruin each other. The one found
    may be on its way out, kept by nobody but a program that looks at every device: hence held open.
    """
    for one in find(backing):
        if not one.read_only and (fd := _open_bound(one)) is not None:
            try:
                yield one.path
            finally:
                os.close(fd)
            return
    with attached(backing, block_size=block_size) as device:
        yield device


def attach(
    backing: AnyPath,
    *,
    read_only: bool = False,
    direct_io: bool = True,
    autoclear: bool = False,
    block_size: int = 0,
) -> Path:
    """A loop device over `backing` that stays until `detach` (with `autoclear`: only while something has it open)."""
    fd, device = _configure(backing, _flags(read_only, direct_io, autoclear), block_size)
    os.close(fd)
    return device


def detach(device: AnyPath) -> None:
    """Free the device; when it is in use, as soon as its last user is gone. A free device is no error."""
    with opened(device) as fd:
        try:
            ioctl(fd, _LOOP_CLR_FD, path=device)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise


def set_capacity(device: AnyPath) -> None:
    """Let the device follow the size of its backing file, also while it is mounted."""
    with opened(device) as fd:
        ioctl(fd, _LOOP_SET_CAPACITY, path=device)


def set_direct_io(device: AnyPath, on: bool) -> None:
    """Switch direct I/O; EINVAL when the backing file system cannot."""
    with opened(device) as fd:
        ioctl(fd, _LOOP_SET_DIRECT_IO, int(on), path=device)


def status(device: AnyPath) -> LoopStatus | None:
    """What the device stands on; None when it is free (or was never there)."""
    try:
        with opened(device) as fd:
            info = bytearray(_INFO.size)
            ioctl(fd, _LOOP_GET_STATUS64, info, path=device)
    except OSError as error:
        if error.errno in _FREE:
            return None
        raise
    dev, inode, _, offset, limit, _, _, _, flags, *_ = _INFO.unpack(info)
    return LoopStatus(Path(os.fsdecode(device)), dev, inode, offset, limit, flags)


def find(backing: AnyPath) -> list[LoopStatus]:
    """The loop devices over this file, told by device and inode: names change and are cut at 64 bytes."""
    wanted = os.stat(backing)
    found = (status(device) for device in attached_devices())
    return [one for one in found if one and (one.device, one.inode) == (wanted.st_dev, wanted.st_ino)]


def attached_devices() -> list[Path]:
    """The loop devices in use on this machine, with their nodes made where /dev lacks them."""
    numbers = sorted(int(entry.parent.name[4:]) for entry in Path("/sys/block").glob("loop*/loop"))
    return [_node(number) for number in numbers]


def _open_bound(found: LoopStatus) -> int | None:
    """An fd that keeps the device as it was found (the caller closes it); None when it is not that any more."""
    try:
        fd = os.open(found.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _FREE:
            return None
        raise
    now = status(found.path)
    if now and (now.device, now.inode) == (found.device, found.inode):
        return fd
    os.close(fd)
    return None


def _flags(read_only: bool, direct_io: bool, autoclear: bool) -> int:
    return (
        (LO_FLAGS_READ_ONLY if read_only else 0)
        | (LO_FLAGS_DIRECT_IO if direct_io else 0)
        | (LO_FLAGS_AUTOCLEAR if autoclear else 0)
    )


def _configure(backing: AnyPath, flags: int, block_size: int) -> tuple[int, Path]:
    """An open fd of the configured device (the caller closes it), and its path."""
    with opened(backing, os.O_RDONLY if flags & LO_FLAGS_READ_ONLY else os.O_RDWR) as backing_fd:
        name = os.fsencode(os.path.realpath(backing))[:63]
        info = _INFO.pack(0, 0, 0, 0, 0, 0, 0, 0, flags, name, b"", b"", 0, 0)
        config = _CONFIG.pack(backing_fd, block_size, info)
        for attempt in range(_ATTEMPTS):
            device = _node(_free_number())
            fd = _try_configure(device, config, flags)
            if fd is not None:
                return fd, device
            time.sleep(0.001 * attempt)
    why = "every free loop device was taken by somebody else first"
    raise OSError(errno.EBUSY, why, os.fsdecode(backing))


def _try_configure(device: Path, config: bytes, flags: int) -> int | None:
    """Configure the device; None when another process got it between asking for a free one and here."""
    mode = os.O_RDONLY if flags & LO_FLAGS_READ_ONLY else os.O_RDWR
    fd = os.open(device, mode | os.O_CLOEXEC)
    try:
        ioctl(fd, _LOOP_CONFIGURE, bytearray(config), path=device)
    except OSError as error:
        os.close(fd)
        if error.errno == errno.EBUSY:
            return None
        raise
    return fd


def _free_number() -> int:
    control = Path("/dev/loop-control")
    _make_node(control, stat.S_IFCHR, _CONTROL_RDEV)
    with opened(control, os.O_RDWR) as fd:
        return ioctl(fd, _LOOP_CTL_GET_FREE, path=control)


def _node(number: int) -> Path:
    path = Path(f"/dev/loop{number}")
    _make_node(path, stat.S_IFBLK, os.makedev(_MAJOR, number))
    return path


def _make_node(path: Path, kind: int, rdev: int) -> None:
    """Containers have a /dev of their own, which knows nothing of devices that the kernel adds later."""
    if path.exists():
        return
    try:
        os.mknod(path, kind | 0o600, rdev)
    except FileExistsError:
        pass
