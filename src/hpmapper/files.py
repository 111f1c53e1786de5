"""Writing a file's data as it streams by, holes included."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

Pieces = Iterable[bytes | memoryview]
"""Consecutive data of one file."""

Segments = Sequence[tuple[int, int]]
"""Data ranges of a sparse file: (offset, length) in bytes, ascending, not overlapping."""

UNCACHED_FROM = 128 << 10
"""Bytes from which on a write leaves the page cache again as soon as it is on the disk.

A start reads a fraction of what an image brings, and what a node runs needs the memory more. Of smaller files all but
the cost of the disk write is small, and it would be paid file by file (docs/measurements.md).
"""

_RWF_DONTCACHE = 0x80  # include/uapi/linux/fs.h, since Linux 6.14
_AT_POSITION = -1  # pwritev2(2)

_ZEROS = bytes(1 << 20)


def write_data(fd: int, data: bytes | memoryview) -> None:
    """Write all of `data` at the file's position."""
    view = memoryview(data)
    write = _write_uncached if len(view) >= UNCACHED_FROM else os.write
    while view:
        view = view[write(fd, view) :]


def _write_uncached(fd: int, data: memoryview) -> int:
    try:
        return os.pwritev(fd, [data], _AT_POSITION, _RWF_DONTCACHE)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return os.write(fd, data)  # an older kernel, or a file system that cannot


def write_file(
    fd: int,
    pieces: Pieces,
    size: int,
    segments: Segments | None = None,
    see: Callable[[bytes | memoryview], object] | None = None,
) -> None:
    """Write a file of `size` bytes to the empty file `fd`; the pieces fill the segments, the rest stays holes.

    `see` is shown the file's contents from beginning to end, zeros of holes too: a digest's `update`.
    """
    if segments is None:
        for piece in pieces:
            if see:
                see(piece)
            write_data(fd, piece)
        return
    end = 0
    source = _cut(pieces, [length for _, length in segments])
    for (offset, length), parts in zip(segments, source, strict=True):
        if see:
            _show_zeros(see, offset - end)
        os.lseek(fd, offset, os.SEEK_SET)
        for part in parts:
            if see:
                see(part)
            write_data(fd, part)
        end = offset + length
    if see:
        _show_zeros(see, size - end)
    os.ftruncate(fd, size)


def _cut(pieces: Pieces, lengths: Iterable[int]) -> Iterator[Iterator[memoryview]]:
    """Yield, for each length, its parts of the pieces. Each must be used up before the next is asked for."""
    stream = iter(pieces)
    rest = memoryview(b"")

    def take(length: int) -> Iterator[memoryview]:
        nonlocal rest
        while length:
            rest = rest or memoryview(next(stream))
            part, rest = rest[:length], rest[length:]
            length -= len(part)
            yield part

    return map(take, lengths)


def _show_zeros(see: Callable[[bytes | memoryview], object], length: int) -> None:
    while length > 0:
        see(memoryview(_ZEROS)[:length])
        length -= len(_ZEROS)
