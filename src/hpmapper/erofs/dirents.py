"""A directory's blocks: records first, then the names, in ascending order through the whole directory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from hpmapper.erofs import format as fmt
from hpmapper.errors import Corrupt

DOTS = (b".", b"..")

_SIZE = fmt.DIRENT.size


class Dirent(NamedTuple):
    """One entry. `type` as in fmt.FILE_TYPES."""

    name: bytes
    nid: int
    type: int


def is_name(name: bytes) -> bool:
    """Whether a directory may have an entry `name` (besides the dots)."""
    return 0 < len(name) <= fmt.NAME_MAX and b"/" not in name and b"\0" not in name and name not in DOTS


def size_of(names: list[bytes]) -> int:
    """Bytes of a directory that has these sorted names besides the dots."""
    whole = sum(map(len, names)) + len("...") + (len(names) + 2) * _SIZE
    if whole <= fmt.BLOCK:
        return whole
    *full, last = split(names)
    return len(full) * fmt.BLOCK + sum(map(len, last)) + len(last) * _SIZE


def split(names: Iterable[bytes]) -> Iterator[list[bytes]]:
    """All names of a directory, the dots among them, in order and by block."""
    block: list[bytes] = []
    used = 0
    for name in sorted((*names, *DOTS)):
        used += len(name) + _SIZE
        if used > fmt.BLOCK:
            yield block
            block = []
            used = len(name) + _SIZE
        block.append(name)
    yield block


def count(block: bytes) -> int:
    """How many entries a block has.

    Raises:
        Corrupt: its first record says what cannot be.
    """
    names = fmt.DIRENT.unpack_from(block)[1] if len(block) >= _SIZE else 0
    if not _SIZE <= names <= len(block) or names % _SIZE:
        raise Corrupt(f"a directory block of {len(block)} bytes has its names at {names}")
    return int(names) // _SIZE


def entry(block: bytes, index: int) -> Dirent:
    """The entry at `index`, which is less than `count(block)`.

    Raises:
        Corrupt: it has no proper name.
    """
    nid, start, kind = fmt.DIRENT.unpack_from(block, index * _SIZE)
    if index + 1 < count(block):
        end = fmt.DIRENT.unpack_from(block, (index + 1) * _SIZE)[1]
        name = block[start:end] if end <= len(block) else b""
    else:
        name = block[start:].partition(b"\0")[0]  # the last name of a block may end before the block does
    if not is_name(name) and name not in DOTS:
        raise Corrupt(f"entry {index} of a directory block has the name {name[:80]!r}")
    return Dirent(name, nid, kind)


def entries(block: bytes) -> Iterator[Dirent]:
    """All entries of a block."""
    return (entry(block, index) for index in range(count(block)))
