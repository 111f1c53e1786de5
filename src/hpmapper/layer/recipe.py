"""How to make a layer's tar again, byte for byte, without keeping the tar.

Its headers, padding and small files are kept literally, compressed; the data of a stored file is a reference into
the store. (Docker calls its form of this tar-split.) File: MAGIC, then one zstd stream of records,
each beginning with a letter; integers are little endian:

    L  u32 length, bytes                               these bytes
    R  u8 length, reference, u64 offset, u64 length    bytes of the stored file `reference`
    E                                                  the end
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterator
from typing import BinaryIO

from hpmapper.errors import Corrupt

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MAGIC = b"hpmapper-tar-1\n\0"
_LITERAL = struct.Struct("<cI")
_RANGE = struct.Struct("<QQ")
_BUFFER = 1 << 20
_BATCH = 1000
_MAX_OFFSET = 2**63 - 1  # off_t
_LEVEL = 1  # headers shrink 20-fold at any level; level 1 costs a tenth of level 9


class RecipeWriter:
    """Writes a recipe to `out`, in the tar's order."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._compressor = zstd.ZstdCompressor(level=_LEVEL)
        self._records: list[bytes] = []  # a compressor's call costs more than a small record's compression
        self._literals: list[bytes] = []
        self._pending = 0
        out.write(MAGIC)

    def literal(self, data: bytes) -> None:
        """The tar goes on with `data`."""
        self._literals.append(data)
        self._pending += len(data)
        if self._pending >= _BUFFER:
            self._end_literal()
            self._compress()

    def reference(self, name: bytes, offset: int, length: int) -> None:
        """The tar goes on with `length` bytes, from `offset`, of the stored file `name`."""
        self._end_literal()
        self._records.append(b"R" + bytes((len(name),)) + name + _RANGE.pack(offset, length))
        if len(self._records) >= _BATCH:
            self._compress()

    def close(self) -> None:
        """End the recipe; `out` stays open."""
        self._end_literal()
        self._records.append(b"E")
        self._compress()
        self._out.write(self._compressor.flush())

    def _end_literal(self) -> None:
        if self._literals:
            self._records += (_LITERAL.pack(b"L", self._pending), *self._literals)
            self._literals, self._pending = [], 0

    def _compress(self) -> None:
        self._out.write(self._compressor.compress(b"".join(self._records)))
        self._records = []


def replay(recipe: BinaryIO, open_stored: Callable[[bytes], BinaryIO]) -> Iterator[bytes]:
    """Yield the tar's bytes. `open_stored` opens the stored file of a reference.

    Raises:
        Corrupt: the recipe is damaged, or a stored file is shorter than it was.
    """
    if recipe.read(len(MAGIC)) != MAGIC:
        raise Corrupt("not a layer's recipe", hint="run hpmapper fsck")
    try:
        with zstd.ZstdFile(recipe) as records:
            while (letter := _exactly(records, 1)) != b"E":
                yield from _record(letter, records, open_stored)
    except (zstd.ZstdError, EOFError) as error:
        raise Corrupt(f"a layer's recipe is damaged: {error}", hint="run hpmapper fsck") from error


def _record(letter: bytes, records: zstd.ZstdFile, open_stored: Callable[[bytes], BinaryIO]) -> Iterator[bytes]:
    if letter == b"L":
        (length,) = struct.unpack("<I", _exactly(records, 4))
        yield from _pieces(records, length)
    elif letter == b"R":
        name = _exactly(records, _exactly(records, 1)[0])
        offset, length = _RANGE.unpack(_exactly(records, _RANGE.size))
        if max(offset, length) > _MAX_OFFSET:
            raise Corrupt("a layer's recipe names a range that no file has", hint="run hpmapper fsck")
        with open_stored(name) as stored:
            stored.seek(offset)
            yield from _pieces(stored, length)
    else:
        raise Corrupt(f"a layer's recipe has an unknown record {letter!r}", hint="run hpmapper fsck")


def _pieces(source: BinaryIO | zstd.ZstdFile, length: int) -> Iterator[bytes]:
    while length:
        data = source.read(min(length, _BUFFER))
        if not data:
            raise Corrupt("a layer's recipe or a file it names is too short", hint="run hpmapper fsck")
        length -= len(data)
        yield data


def _exactly(source: zstd.ZstdFile, length: int) -> bytes:
    return b"".join(_pieces(source, length))
