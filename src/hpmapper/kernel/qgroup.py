"""btrfs's quota groups: simple quotas (Linux 6.7, commit 5cef0bd4b7b1) or full ones.

A group is named by level and number: 0/ID is a subvolume's own, those of higher levels count what their members do.
With simple quotas an extent counts for the subvolume that wrote it, for as long as it exists; a new subvolume joins the
groups of the one that it is made in. With full ones it counts for all that refer to it.
"""

from __future__ import annotations

import errno
import os
import struct
import uuid
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from hpmapper.kernel.syscall import AnyPath, ioctl, ior, iow, iowr, opened

_MAGIC = 0x94
_FS_INFO = ior(_MAGIC, 31, 1024)
_QUOTA_CTL = iowr(_MAGIC, 40, 16)
_QGROUP_ASSIGN = iow(_MAGIC, 41, 24)
_QGROUP_CREATE = iow(_MAGIC, 42, 16)
_QGROUP_LIMIT = ior(_MAGIC, 43, 48)

_TWO = struct.Struct("=QQ")
_THREE = struct.Struct("=QQQ")
_LIMIT = struct.Struct("=6Q")
_QUOTA_CTL_ENABLE_SIMPLE = 4
_LIMIT_MAX_EXCL = 1 << 1
_LEVEL_SHIFT = 48

_SYSFS = Path("/sys/fs/btrfs")


class Mode(StrEnum):
    """How a btrfs counts."""

    NONE = "disabled"
    FULL = "qgroup"
    SIMPLE = "squota"


class QgroupUsage(NamedTuple):
    """Bytes that a group's members have for themselves: on disk, and written but not yet there."""

    exclusive: int
    reserved: int


def qgroup(level: int, number: int) -> int:
    """A group's id, of which `level` is the part before the slash."""
    return level << _LEVEL_SHIFT | number


def mode(path: AnyPath) -> Mode:
    """How the btrfs that holds `path` counts at present; ENOTTY on another file system."""
    groups = _groups(path)
    try:
        return Mode((groups / "mode").read_text().strip())
    except FileNotFoundError:
        # The directory is there while quotas are on; its file "mode" came with simple quotas.
        return Mode.FULL if groups.exists() else Mode.NONE


def knows_simple() -> bool:
    """Whether this kernel has simple quotas, by what its btrfs says of itself."""
    return (_SYSFS / "features/simple_quota").exists()


def enable_simple(path: AnyPath) -> None:
    """Count from now on what is written, on the whole file system; older kernels cannot mount it any more.

    EINVAL: the kernel has no simple quotas. EEXIST: it counts in the full way.
    """
    with opened(path) as fd:
        ioctl(fd, _QUOTA_CTL, bytearray(_TWO.pack(_QUOTA_CTL_ENABLE_SIMPLE, 0)))


def create(path: AnyPath, group: int) -> None:
    """Make a group on the btrfs that holds `path`; one that is there is no error."""
    _ignoring(path, _QGROUP_CREATE, _TWO.pack(1, group), errno.EEXIST)


def remove(path: AnyPath, group: int) -> None:
    """Remove a group, which has no members any more; one that is not there is no error."""
    _ignoring(path, _QGROUP_CREATE, _TWO.pack(0, group), errno.ENOENT)


def join(path: AnyPath, member: int, group: int) -> None:
    """Let what `member` uses count for `group`, which is of a higher level; once is enough."""
    _ignoring(path, _QGROUP_ASSIGN, _THREE.pack(1, member, group), errno.EEXIST)


def leave(path: AnyPath, member: int, group: int) -> None:
    """Take it out again; a member that is none is no error."""
    _ignoring(path, _QGROUP_ASSIGN, _THREE.pack(0, member, group), errno.ENOENT)


def set_limit(path: AnyPath, group: int, size: int) -> None:
    """Let a group's members have `size` bytes for themselves, metadata included; beyond it is EDQUOT, for root too."""
    with opened(path) as fd:
        ioctl(fd, _QGROUP_LIMIT, bytearray(_LIMIT.pack(group, _LIMIT_MAX_EXCL, 0, size, 0, 0)))


def usage(path: AnyPath, group: int) -> QgroupUsage:
    """What a group's members use, in constant time; FileNotFoundError when there is no such group.

    Deleted extents count until the transaction ends, which takes up to 30 seconds or a sync.
    """
    directory = _group(path, group)
    exclusive, reserved = (int((directory / name).read_text()) for name in ("exclusive", "rsv_data"))
    return QgroupUsage(exclusive, reserved)


def limit(path: AnyPath, group: int) -> int:
    """The limit that `set_limit` gave a group, in bytes; 0: none, or no such group."""
    try:
        return int((_group(path, group) / "max_exclusive").read_text())
    except FileNotFoundError:
        return 0


def _group(path: AnyPath, group: int) -> Path:
    return _groups(path) / f"{group >> _LEVEL_SHIFT}_{group & (1 << _LEVEL_SHIFT) - 1}"


def _groups(path: AnyPath) -> Path:
    value = bytearray(1024)
    with opened(path) as fd:
        ioctl(fd, _FS_INFO, value, path=path)
    return _SYSFS / str(uuid.UUID(bytes=bytes(value[16:32]))) / "qgroups"


def _ignoring(path: AnyPath, request: int, argument: bytes, expected: int) -> None:
    try:
        with opened(os.fspath(path)) as fd:
            ioctl(fd, request, bytearray(argument))
    except OSError as error:
        if error.errno != expected:
            raise
