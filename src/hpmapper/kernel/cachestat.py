"""How much of a file is in the page cache: cachestat(2), Linux 6.5, commit cf264e1329fb."""

from __future__ import annotations

import ctypes
import struct
from typing import NamedTuple

from hpmapper.kernel.syscall import NR_CACHESTAT, AnyPath, opened, syscall

_RANGE = struct.Struct("=QQ")
_CACHESTAT = struct.Struct("=5Q")


class CacheStat(NamedTuple):
    """Pages (of the machine's page size): cached, of these dirty and under write-back, and evicted, of these lately."""

    cached: int
    dirty: int
    writeback: int
    evicted: int
    recently_evicted: int


def cachestat(path: AnyPath | int, offset: int = 0, length: int = 0) -> CacheStat:
    """Count the cached pages of a range of a file (length 0: to its end), or of a whole block device.

    Ask the file in the pool, not one in an overlay: an overlay's inode has no pages of its own and answers 0 (as a
    directory does). EPERM: the caller neither owns the file nor has it open for writing.
    """
    span = ctypes.create_string_buffer(_RANGE.pack(offset, length), _RANGE.size)
    answer = ctypes.create_string_buffer(_CACHESTAT.size)
    with opened(path) as fd:
        syscall(NR_CACHESTAT, fd, span, answer, 0, path=fd)
    return CacheStat._make(_CACHESTAT.unpack(answer.raw))
