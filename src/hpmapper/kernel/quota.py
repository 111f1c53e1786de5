"""Project quota: quotactl_fd(2), Linux 5.14."""

from __future__ import annotations

import ctypes
import os
import struct
from typing import NamedTuple

from hpmapper.kernel.syscall import NR_QUOTACTL_FD, AnyPath, opened, syscall

_PRJQUOTA = 2
_Q_XGETQSTATV = 0x5808
_FS_QSTATV = struct.Struct("=bxHI")
_FS_QSTATV_SIZE = 256
_FS_QUOTA_PDQ_ACCT = 1 << 4
_FS_QUOTA_PDQ_ENFD = 1 << 5


class QuotaState(NamedTuple):
    """Whether a file system counts what projects use, and whether it holds them to their limits."""

    accounting: bool
    enforcing: bool


def project_quota_state(path: AnyPath) -> QuotaState:
    """The state of project quota on the file system that holds `path`; ENOSYS or ESRCH where there is none."""
    buffer = ctypes.create_string_buffer(_FS_QSTATV_SIZE)
    buffer.raw = bytes([1]) + bytes(_FS_QSTATV_SIZE - 1)  # FS_QSTATV_VERSION1
    command = _Q_XGETQSTATV << 8 | _PRJQUOTA
    with opened(os.fsdecode(path)) as fd:
        syscall(NR_QUOTACTL_FD, fd, command, 0, buffer, path=path)
    flags: int = _FS_QSTATV.unpack_from(buffer.raw)[1]
    return QuotaState(bool(flags & _FS_QUOTA_PDQ_ACCT), bool(flags & _FS_QUOTA_PDQ_ENFD))
