"""Project quota of XFS and ext4: quotactl_fd(2), Linux 5.14. Which project a directory belongs to: `fs.set_project`."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from typing import NamedTuple

from hpmapper.kernel.syscall import NR_QUOTACTL_FD, AnyPath, Argument, opened, syscall

_PRJQUOTA = 2
_Q_XGETQUOTA = 0x5803
_Q_XSETQLIM = 0x5804
_Q_XGETQSTATV = 0x5808
_FS_QSTATV = struct.Struct("=bxHI")
_FS_QSTATV_SIZE = 256
_FS_QUOTA_PDQ_ACCT = 1 << 4
_FS_QUOTA_PDQ_ENFD = 1 << 5

_FS_DISK_QUOTA = struct.Struct("=bbHI6Q56x")  # struct fs_disk_quota, include/uapi/linux/dqblk_xfs.h
_FS_DQUOT_VERSION = 1
_FS_PROJ_QUOTA = 1 << 1
_FS_DQ_BHARD = 1 << 3
_BASIC_BLOCK = 512


class QuotaState(NamedTuple):
    """Whether a file system counts what projects use, and whether it holds them to their limits."""

    accounting: bool
    enforcing: bool


class ProjectQuota(NamedTuple):
    """What a project may use (bytes; 0: without limit) and uses (bytes, inodes)."""

    limit: int
    size: int
    inodes: int


def project_quota_state(path: AnyPath) -> QuotaState:
    """The state of project quota on the file system that holds `path`; ENOSYS or ESRCH where there is none."""
    buffer = ctypes.create_string_buffer(_FS_QSTATV_SIZE)
    buffer.raw = bytes([1]) + bytes(_FS_QSTATV_SIZE - 1)  # FS_QSTATV_VERSION1
    _quotactl(path, _Q_XGETQSTATV, 0, buffer)
    flags: int = _FS_QSTATV.unpack_from(buffer.raw)[1]
    return QuotaState(bool(flags & _FS_QUOTA_PDQ_ACCT), bool(flags & _FS_QUOTA_PDQ_ENFD))


def project_quota(path: AnyPath, project: int) -> ProjectQuota:
    """Limit and use of a project on the file system that holds `path`, in constant time; zeros for an unknown one.

    Reflinked extents count in full for every file that has them (XFS).
    """
    buffer = ctypes.create_string_buffer(_FS_DISK_QUOTA.size)
    try:
        _quotactl(path, _Q_XGETQUOTA, project, buffer)
    except FileNotFoundError:
        return ProjectQuota(0, 0, 0)
    except OSError as error:
        if error.errno != errno.ESRCH:
            raise
        return ProjectQuota(0, 0, 0)  # nobody has used it yet (ext4)
    _, _, _, _, limit, _, _, _, blocks, inodes = _FS_DISK_QUOTA.unpack(buffer.raw)
    return ProjectQuota(limit * _BASIC_BLOCK, blocks * _BASIC_BLOCK, inodes)


def set_project_limit(path: AnyPath, project: int, size: int) -> None:
    """Let a project use `size` bytes, rounded up to a block, of the file system that holds `path`; 0: without limit.

    Whoever writes beyond it gets ENOSPC from XFS and EDQUOT from ext4. ext4 lets a process with CAP_SYS_RESOURCE pass
    (fs/quota/dquot.c, ignore_hardlimit); a write through overlayfs never has that capability (ovl_fill_super).
    """
    blocks = -(-size // _BASIC_BLOCK)
    record = _FS_DISK_QUOTA.pack(_FS_DQUOT_VERSION, _FS_PROJ_QUOTA, _FS_DQ_BHARD, project, blocks, 0, 0, 0, 0, 0)
    buffer = ctypes.create_string_buffer(record, len(record))
    _quotactl(path, _Q_XSETQLIM, project, buffer)


def _quotactl(path: AnyPath, command: int, project: int, argument: Argument) -> None:
    with opened(os.fsdecode(path)) as fd:
        syscall(NR_QUOTACTL_FD, fd, command << 8 | _PRJQUOTA, project, argument, path=path)
