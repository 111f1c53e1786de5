"""File systems as such: their kind, inode flags, projects, trimming, growing, and opening below a root."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from typing import NamedTuple

from hpmapper.kernel.syscall import (
    AT_FDCWD,
    NR_GETDENTS64,
    NR_OPENAT2,
    NR_STATFS,
    AnyPath,
    io,
    ioctl,
    ior,
    iow,
    iowr,
    opened,
    syscall,
)

_FS_IOC_GETFLAGS = ior("f", 1, 8)
_FS_IOC_SETFLAGS = iow("f", 2, 8)
_FS_IOC_FSGETXATTR = ior("X", 31, 28)
_FS_IOC_FSSETXATTR = iow("X", 32, 28)
_FITRIM = iowr("X", 121, 24)
_XFS_IOC_FSGROWFSDATA = iow("X", 110, 16)
_XFS_IOC_FSGEOMETRY_V4 = ior("X", 124, 112)
_EXT4_IOC_RESIZE_FS = iow("f", 16, 8)
_BLKDISCARD = io(0x12, 119)
_BTRFS_IOC_RESIZE = iow(0x94, 3, 4096)

_FSXATTR = struct.Struct("=5I8s")
_TRIM = struct.Struct("=QQQ")
_XFS_GEOMETRY = struct.Struct("=8I4Q16s2IiI4I")
_XFS_GROW = struct.Struct("=QI4x")
_BTRFS_RESIZE = struct.Struct("=q4088s")
_DIRENT = struct.Struct("=16xHB")  # the fixed part of struct linux_dirent64
_DIRENTS = 4096
_DT_UNKNOWN = 0
_OPEN_HOW = struct.Struct("=QQQ")

FS_IMMUTABLE_FL = 0x10
FS_NOCOW_FL = 0x800000
FS_XFLAG_PROJINHERIT = 0x200
_XFS_FLAG_REFLINK = 1 << 20

_MAGIC = {
    0xEF53: "ext4",
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0x01021994: "tmpfs",
    0x794C7630: "overlay",
    0xE0F5E1E2: "erofs",
    0x65735546: "fuse",
    0x6969: "nfs",
    0x2FC12FC1: "zfs",
    0xF2F52010: "f2fs",
    0xCA451A4E: "bcachefs",
    0x73717368: "squashfs",
    0x858458F6: "ramfs",
    0x27E0EB: "cgroup",
    0x63677270: "cgroup2",
    0x9FA0: "proc",
}


def filesystem_name(path: AnyPath) -> str:
    """The kind of file system that holds `path`: "xfs", "ext4", …, or its magic number in hexadecimal."""
    magic = filesystem_magic(path)
    return _MAGIC.get(magic, f"{magic:#x}")


def filesystem_magic(path: AnyPath) -> int:
    """f_type of statfs(2), which os.statvfs leaves out."""
    buffer = ctypes.create_string_buffer(120)
    syscall(NR_STATFS, os.fsencode(path), buffer, path=path)
    return int.from_bytes(buffer.raw[:4], "little")


def get_flags(path: AnyPath | int) -> int:
    """The inode flags that chattr(1) shows (FS_IMMUTABLE_FL, …)."""
    with opened(path, os.O_RDONLY | os.O_NONBLOCK) as fd:
        value = bytearray(8)
        ioctl(fd, _FS_IOC_GETFLAGS, value)
    return int.from_bytes(value[:4], "little")


def set_flags(path: AnyPath | int, flags: int) -> None:
    """Replace the inode flags."""
    with opened(path, os.O_RDONLY | os.O_NONBLOCK) as fd:
        ioctl(fd, _FS_IOC_SETFLAGS, bytearray(flags.to_bytes(8, "little")))


class FsXattr(NamedTuple):
    """struct fsxattr: extended flags, extent size hints (bytes), and the project that quota counts for."""

    xflags: int
    extsize: int = 0
    nextents: int = 0
    projid: int = 0
    cowextsize: int = 0


def get_fsxattr(path: AnyPath | int) -> FsXattr:
    """Project id and extent size hints of a file or directory."""
    with opened(path, os.O_RDONLY | os.O_NONBLOCK) as fd:
        value = bytearray(_FSXATTR.size)
        ioctl(fd, _FS_IOC_FSGETXATTR, value)
    return FsXattr(*_FSXATTR.unpack(value)[:5])


def set_fsxattr(path: AnyPath | int, value: FsXattr) -> None:
    """Set project id and extent size hints (`nextents` is ignored)."""
    with opened(path, os.O_RDONLY | os.O_NONBLOCK) as fd:
        ioctl(fd, _FS_IOC_FSSETXATTR, bytearray(_FSXATTR.pack(*value, bytes(8))))


def set_project(directory: AnyPath | int, project: int) -> None:
    """Count the directory and all that is made in it from now on for `project`."""
    with opened(directory) as fd:
        old = get_fsxattr(fd)
        set_fsxattr(fd, old._replace(xflags=old.xflags | FS_XFLAG_PROJINHERIT, projid=project))


def trim(path: AnyPath, minimum: int = 0) -> int:
    """Give the free space of the file system mounted at `path` back to its device; returns the bytes (FITRIM)."""
    request = bytearray(_TRIM.pack(0, 2**64 - 1, minimum))
    with opened(path) as fd:
        ioctl(fd, _FITRIM, request)
    trimmed: int = _TRIM.unpack(request)[1]
    return trimmed


class XfsGeometry(NamedTuple):
    """The parts of struct xfs_fsop_geom that are used here. `group_blocks`: blocks of an allocation group."""

    block_size: int
    group_blocks: int
    inode_size: int
    data_blocks: int
    uuid: bytes
    reflink: bool
    imaxpct: int

    @property
    def size(self) -> int:
        return self.block_size * self.data_blocks

    def inode_offset(self, number: int) -> int:
        """Where on the device an inode lies, in bytes (Linux: XFS_INO_TO_AGNO and its kin in libxfs/xfs_format.h)."""
        in_block = (self.block_size // self.inode_size).bit_length() - 1
        in_group = (self.group_blocks - 1).bit_length()
        group, rest = divmod(number, 1 << in_block + in_group)
        block, index = divmod(rest, 1 << in_block)
        return (group * self.group_blocks + block) * self.block_size + index * self.inode_size


def xfs_geometry(path: AnyPath) -> XfsGeometry:
    """The layout of the XFS that holds `path`; ENOTTY when it is another file system."""
    buffer = bytearray(_XFS_GEOMETRY.size)
    with opened(path) as fd:
        ioctl(fd, _XFS_IOC_FSGEOMETRY_V4, buffer)
    block, _, group, _, _, _, inode, imaxpct, blocks, _, _, _, uuid, _, _, _, flags, *_ = _XFS_GEOMETRY.unpack(buffer)
    return XfsGeometry(block, group, inode, blocks, uuid, bool(flags & _XFS_FLAG_REFLINK), imaxpct)


def xfs_grow(path: AnyPath, size: int) -> None:
    """Grow the mounted XFS to `size` bytes, which its device must have (xfs_growfs(8) does no more)."""
    geometry = xfs_geometry(path)
    with opened(path) as fd:
        request = _XFS_GROW.pack(size // geometry.block_size, geometry.imaxpct)
        ioctl(fd, _XFS_IOC_FSGROWFSDATA, bytearray(request))


def btrfs_grow(path: AnyPath) -> None:
    """Grow the mounted single-device btrfs to its device's end."""
    with opened(path) as fd:
        ioctl(fd, _BTRFS_IOC_RESIZE, bytearray(_BTRFS_RESIZE.pack(0, b"1:max")))


def ext4_grow(path: AnyPath, size: int) -> None:
    """Grow the mounted ext4 to `size` bytes, which its device must have (resize2fs(8) does no more while mounted)."""
    block = os.statvfs(path).f_bsize
    with opened(path) as fd:
        ioctl(fd, _EXT4_IOC_RESIZE_FS, bytearray((size // block).to_bytes(8, "little")))


def discard(path: AnyPath, offset: int, length: int) -> None:
    """Tell a block device that a range holds nothing any more; EOPNOTSUPP when it does not care."""
    with opened(path, os.O_RDWR) as fd:
        ioctl(fd, _BLKDISCARD, bytearray(struct.pack("=QQ", offset, length)), path=path)


def knows_file_types(directory: AnyPath) -> bool:
    """Whether readdir says what kind of file each entry is (d_type), without which overlayfs shows its whiteouts.

    The directory must have an entry. XFS made with ftype=0 (before 2015, or on purpose) does not.
    """
    buffer = ctypes.create_string_buffer(_DIRENTS)
    with opened(directory, os.O_RDONLY | os.O_DIRECTORY) as fd:
        used = syscall(NR_GETDENTS64, fd, buffer, _DIRENTS, path=directory)
    offset, kinds = 0, set()
    while offset < used:
        length, kind = _DIRENT.unpack_from(buffer.raw, offset)
        kinds.add(kind)
        offset += length
    return _DT_UNKNOWN not in kinds


def device_size(path: AnyPath) -> int:
    """Bytes of a block device or a file."""
    with opened(path) as fd:
        return os.lseek(fd, 0, os.SEEK_END)


RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10
RESOLVE_CACHED = 0x20


def openat2(directory: int, path: AnyPath, flags: int, mode: int = 0, *, resolve: int = RESOLVE_IN_ROOT) -> int:
    """Open `path` as if `directory` were the root, so that no symlink or ".." leads out; the caller closes the fd.

    (Linux 5.6, commit fddb5d430ad9.) EAGAIN means that a rename raced with the walk: ask again.
    """
    creates = flags & os.O_CREAT or flags & os.O_TMPFILE == os.O_TMPFILE
    how = ctypes.create_string_buffer(
        _OPEN_HOW.pack(flags | os.O_CLOEXEC, mode if creates else 0, resolve), _OPEN_HOW.size
    )
    return syscall(NR_OPENAT2, directory, os.fsencode(path), how, _OPEN_HOW.size, path=path)


def open_in_root(root: AnyPath, path: AnyPath, flags: int = os.O_RDONLY, mode: int = 0) -> int:
    """`openat2` below the directory `root`; the caller closes the fd."""
    with opened(root, os.O_PATH | os.O_DIRECTORY) as directory:
        return openat2(directory, path, flags, mode)


def open_known(path: AnyPath, flags: int) -> int | None:
    """Open a file if the kernel has its name in memory, else None; the caller closes the fd.

    (Linux 5.12, commit 99668f618062; before as open(2).) A file that the kernel has forgotten has nothing cached, but
    for a rare moment: to find that out no disk need be asked.
    """
    try:
        return openat2(AT_FDCWD, path, flags, resolve=RESOLVE_CACHED)
    except OSError as error:
        if error.errno == errno.EAGAIN:
            return None
        if error.errno not in (errno.ENOSYS, errno.EINVAL, errno.EPERM):  # EPERM: of a filter that does not know it
            raise
    return os.open(path, flags | os.O_CLOEXEC)
