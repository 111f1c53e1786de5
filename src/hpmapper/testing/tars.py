"""Tars made by hand, header by header: honest ones in every format, and others that no tool would write.

Independent of the product's own reader and writer, and of `tarfile`, which cannot write most of this.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

BLOCK = 512
END = bytes(2 * BLOCK)

FILE, LINK, SYMLINK, CHAR, BLOCKDEV, DIR, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"

Segments = Sequence[tuple[int, bytes]]
"""A sparse file's data: (offset, bytes)."""


def header(
    name: bytes,
    kind: bytes = FILE,
    *,
    size: int = 0,
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    mtime: int = 1_600_000_000,
    link: bytes = b"",
    major: int = 0,
    minor: int = 0,
    prefix: bytes = b"",
    magic: bytes = b"ustar\x0000",
    fields: Mapping[int, bytes] | None = None,
) -> bytes:
    """One header block. `fields`: bytes to put at offsets before the checksum is made, whatever they ruin."""
    block = bytearray(BLOCK)
    for at, value in (
        (0, name[:100]),
        (100, b"%07o\0" % mode),
        (108, number(uid, 8)),
        (116, number(gid, 8)),
        (124, number(size, 12)),
        (136, number(mtime, 12)),
        (156, kind),
        (157, link[:100]),
        (257, magic),
        (329, number(major, 8)),
        (337, number(minor, 8)),
        (345, prefix),
        *(fields or {}).items(),
    ):
        block[at : at + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def number(value: int, width: int) -> bytes:
    """An octal field, or GNU's base-256 form where octal has no room (tar(5))."""
    if 0 <= value < 8 ** (width - 1):
        return b"%0*o\0" % (width - 1, value)
    mask = 0x80 if value >= 0 else 0
    raw = bytearray(value.to_bytes(width, "big", signed=True))
    raw[0] |= mask
    return bytes(raw)


def padded(data: bytes) -> bytes:
    """Data up to the next block."""
    return data + bytes(-len(data) % BLOCK)


def member(
    name: bytes,
    data: bytes = b"",
    kind: bytes = FILE,
    *,
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    mtime: int = 1_600_000_000,
    link: bytes = b"",
    major: int = 0,
    minor: int = 0,
) -> bytes:
    """A whole member with a short name."""
    head = header(
        name,
        kind,
        size=len(data),
        mode=mode,
        uid=uid,
        gid=gid,
        mtime=mtime,
        link=link,
        major=major,
        minor=minor,
    )
    return head + padded(data)


def folder(name: bytes, mode: int = 0o755) -> bytes:
    """A directory's member."""
    return member(name, kind=DIR, mode=mode)


def tar(*members: bytes) -> bytes:
    """A whole archive."""
    return b"".join(members) + END


def pax(records: Mapping[bytes, bytes] | Sequence[tuple[bytes, bytes]], kind: bytes = b"x") -> bytes:
    """A pax header with its records, for the member that follows."""
    pairs = list(records.items()) if isinstance(records, Mapping) else records
    data = b"".join(_record(key, value) for key, value in pairs)
    return header(b"PaxHeaders/0", kind, size=len(data)) + padded(data)


def _record(key: bytes, value: bytes) -> bytes:
    bare = len(key) + len(value) + 3  # a space, an equals sign, a newline
    length = bare + len(str(bare))
    length = bare + len(str(length))
    return b"%d %b=%b\n" % (length, key, value)


def gnu_long(kind: bytes, name: bytes) -> bytes:
    """GNU's long name (kind b"L") or long link (b"K") for the member that follows."""
    return header(b"././@LongLink", kind, size=len(name) + 1, magic=b"ustar  \0") + padded(name + b"\0")


def sparse_old_gnu(name: bytes, size: int, segments: Segments) -> bytes:
    """GNU's oldest sparse form: four ranges in the header, 21 more in each block that follows it."""
    pairs = [number(at, 12) + number(len(data), 12) for at, data in segments]
    fields = {386: b"".join(pairs[:4]), 482: bytes((len(pairs) > 4,)), 483: number(size, 12)}
    stored = b"".join(data for _, data in segments)
    more = pairs[4:]
    blocks = b""
    while more:
        now, more = more[:21], more[21:]
        blocks += b"".join(now).ljust(504, b"\0") + bytes((bool(more),)) + bytes(7)
    return header(name, b"S", size=len(stored), magic=b"ustar  \0", fields=fields) + blocks + padded(stored)


def sparse_pax_00(name: bytes, size: int, segments: Segments) -> bytes:
    """Pax sparse format 0.0: the map as repeated records."""
    records = [(b"GNU.sparse.size", b"%d" % size), (b"GNU.sparse.numblocks", b"%d" % len(segments))]
    for at, data in segments:
        records += [(b"GNU.sparse.offset", b"%d" % at), (b"GNU.sparse.numbytes", b"%d" % len(data))]
    return pax(records) + member(name, b"".join(data for _, data in segments))


def sparse_pax_01(name: bytes, size: int, segments: Segments) -> bytes:
    """Pax sparse format 0.1: the map as one record."""
    ranges = b",".join(b"%d,%d" % (at, len(data)) for at, data in segments)
    records = {
        b"GNU.sparse.size": b"%d" % size,
        b"GNU.sparse.numblocks": b"%d" % len(segments),
        b"GNU.sparse.map": ranges,
        b"GNU.sparse.name": name,
    }
    return pax(records) + member(b"GNUSparseFile.0/" + name[:80], b"".join(data for _, data in segments))


def sparse_pax_10(name: bytes, size: int, segments: Segments) -> bytes:
    """Pax sparse format 1.0: the map before the data."""
    lines = [b"%d\n" % len(segments), *(b"%d\n%d\n" % (at, len(data)) for at, data in segments)]
    records = {
        b"GNU.sparse.major": b"1",
        b"GNU.sparse.minor": b"0",
        b"GNU.sparse.name": name,
        b"GNU.sparse.realsize": b"%d" % size,
    }
    data = padded(b"".join(lines)) + b"".join(data for _, data in segments)
    return pax(records) + member(b"GNUSparseFile.0/" + name[:80], data)


def zstd_packed(data: bytes) -> bytes:
    """One zstd frame with a checksum."""
    return zstd.compress(data, options={zstd.CompressionParameter.checksum_flag: 1})


def filled(size: int, segments: Segments) -> bytes:
    """What a sparse file reads as."""
    whole = bytearray(size)
    for at, data in segments:
        whole[at : at + len(data)] = data
    return bytes(whole)
