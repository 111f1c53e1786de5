"""Where a file's bytes lie on its device (FS_IOC_FIEMAP), and which of them other files share."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from hpmapper.kernel.syscall import ioctl, iowr

_HEADER = struct.Struct("=QQIIII")  # struct fiemap
_EXTENT = struct.Struct("=QQQ16xI12x")  # struct fiemap_extent
_FIEMAP = iowr("f", 11, _HEADER.size)

FIEMAP_FLAG_SYNC = 0x1

FIEMAP_EXTENT_LAST = 0x1
FIEMAP_EXTENT_UNKNOWN = 0x2
FIEMAP_EXTENT_DELALLOC = 0x4
FIEMAP_EXTENT_ENCODED = 0x8
FIEMAP_EXTENT_DATA_INLINE = 0x200
FIEMAP_EXTENT_UNWRITTEN = 0x800
FIEMAP_EXTENT_SHARED = 0x2000

_BATCH = 128
_END = 2**64 - 1


class Extent(NamedTuple):
    """Consecutive bytes of a file: at `logical` in the file, at `physical` on the device; flags FIEMAP_EXTENT_…"""

    logical: int
    physical: int
    length: int
    flags: int

    @property
    def end(self) -> int:
        return self.logical + self.length

    @property
    def shared(self) -> bool:
        """Whether another file (or another place in this one) refers to the same blocks."""
        return bool(self.flags & FIEMAP_EXTENT_SHARED)

    @property
    def placed(self) -> bool:
        """Whether `physical` means something: blocks are allocated, and not within metadata or compressed."""
        unplaced = FIEMAP_EXTENT_UNKNOWN | FIEMAP_EXTENT_DELALLOC | FIEMAP_EXTENT_ENCODED | FIEMAP_EXTENT_DATA_INLINE
        return not self.flags & unplaced


def extents(fd: int, start: int = 0, length: int = _END, *, sync: bool = False) -> Iterator[Extent]:
    """The extents of an open file that touch [start, start + length), in order; holes are left out.

    Args:
        sync: write the file's dirty pages first; otherwise bytes that have no place yet come as DELALLOC.
    """
    end = min(start + length, _END)
    while start < end:
        found = _batch(fd, start, end - start, FIEMAP_FLAG_SYNC if sync else 0)
        yield from found
        if not found or found[-1].flags & FIEMAP_EXTENT_LAST:
            return
        start = found[-1].end


def _batch(fd: int, start: int, length: int, flags: int) -> list[Extent]:
    buffer = bytearray(_HEADER.pack(start, length, flags, 0, _BATCH, 0)) + bytes(_EXTENT.size * _BATCH)
    ioctl(fd, _FIEMAP, buffer)
    mapped: int = _HEADER.unpack_from(buffer)[3]
    view = memoryview(buffer)[_HEADER.size : _HEADER.size + mapped * _EXTENT.size]
    return [Extent._make(values) for values in _EXTENT.iter_unpack(view)]
