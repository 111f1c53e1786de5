"""Tar headers to entries: ustar, GNU and pax (POSIX.1-2001), with their sparse files, in one forward pass.

Parses and nothing else: what a name may mean is the builder's business. Written for speed, since a layer has tens of
thousands of headers: one struct call splits a header, and the usual case takes no branch twice.
"""

from __future__ import annotations

import binascii
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol
from urllib.parse import unquote_to_bytes
from zlib import adler32

from hpmapper.errors import Corrupt, InvalidArgument
from hpmapper.files import Segments
from hpmapper.layer.acl import acl_from_text
from hpmapper.tree import Xattrs

BLOCK = 512
_ZERO = bytes(BLOCK)
_FIELDS = struct.Struct("100s8s8s8s12s12s8sc100s8s32s32s8s8s155s12x")
_NUL = b"\0"
_ADLER_BASE = 65521

MAX_EXTENDED = 8 << 20
"""Bytes of one pax or GNU long-name record; a real one has kilobytes (an xattr may have 64 KiB)."""

MAX_SPARSE_SIZE = 16 << 40
"""Bytes of a sparse file: its holes must be digested too, so a size is a promise of work."""

MAX_SPARSE_SEGMENTS = 1 << 20


class Source(Protocol):
    """Where the headers come from; every byte read is also kept for the layer's recipe."""

    def read(self, size: int) -> bytes: ...
    def read_or_end(self, size: int) -> bytes: ...


@dataclass(slots=True)
class Entry:
    """One member. Its data (`stored` bytes, then padding to 512) must be read before the next entry is asked for.

    Attributes:
        type: the type flag: b"0" file, b"1" hard link, b"2" symlink, b"3" char, b"4" block, b"5" directory, b"6" fifo.
        size: the file's length once sparse ranges are expanded.
        stored: bytes of data in the tar.
        segments: a sparse file's data ranges, else None.
    """

    name: bytes
    type: bytes
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int
    stored: int
    link: bytes
    major: int
    minor: int
    xattrs: Xattrs
    segments: Segments | None


def read_entries(source: Source) -> Iterator[Entry]:
    """Yield the members of a tar until its end-of-archive block (or the end of the bytes).

    Raises:
        Corrupt: a damaged header.
        InvalidArgument: a member nobody could unpack: an unknown format, an absurd size.
    """
    pending: dict[bytes, bytes] = {}  # pax and GNU records for the next member
    defaults: dict[bytes, bytes] = {}  # pax global records
    while (header := source.read_or_end(BLOCK)) and header != _ZERO:
        fields = _FIELDS.unpack(header)
        _verify_checksum(header, fields[6])
        kind = fields[7]
        if kind in _EXTENSIONS:
            data = _extended(source, _number(fields[4]))
            _EXTENSIONS[kind](data, defaults if kind == b"g" else pending)
            continue
        records = {**defaults, **pending} if defaults else pending
        yield _entry(source, header, fields, records)
        pending = {}


def _verify_checksum(header: bytes, field: bytes) -> None:
    # The checksum field itself counts as eight spaces. The low half of an Adler-32 is the sum modulo 65521, which only
    # a header of mostly bytes above 127 reaches, and is had in a twentieth of the time of sum().
    stated = _number(field)
    if ((adler32(header) & 0xFFFF) - (adler32(field) & 0xFFFF) + 256) % _ADLER_BASE == stated:
        return
    # Some old writers summed signed bytes.
    total = sum(header) - sum(field) + 256
    if total != stated and total - 256 * sum(byte > 127 for byte in header) != stated:
        raise Corrupt("the layer's tar has a header with a wrong checksum", hint="fetch it again")


def _number(field: bytes) -> int:
    """An octal field, or GNU's base-256 form for what octal cannot hold (tar(5))."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
        # 0xff begins a negative number in two's complement.
        return value - (1 << (8 * len(field) - 1)) if field[0] & 0x40 else value
    try:
        return int(field.rstrip(b" \0") or b"0", 8)  # the usual form
    except ValueError:
        text = field.split(_NUL, 1)[0].strip()
    try:
        return int(text, 8) if text else 0
    except ValueError:
        raise Corrupt(f"the layer's tar has a number that is none: {field!r}", hint="fetch it again") from None


_common_number = lru_cache(1024)(_number)
"""For fields that are alike in most headers."""


def _extended(source: Source, size: int) -> bytes:
    if not 0 <= size <= MAX_EXTENDED:
        raise InvalidArgument(f"a tar header record of {size} bytes", hint=f"at most {MAX_EXTENDED} are taken")
    data = source.read(size + -size % BLOCK)
    return data[:size]


def _pax_records(data: bytes, into: dict[bytes, bytes]) -> None:
    """Split "LENGTH KEY=VALUE\\n" records; values may hold any byte, newlines and NULs too."""
    sparse: list[bytes] = []
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 21)
        length = int(data[at:space]) if space > at and data[at:space].isdigit() else 0
        end = at + length
        equals = data.find(b"=", space, end)
        if length < 5 or end > len(data) or data[end - 1] != 10 or equals <= space + 1:
            raise Corrupt("the layer's tar has a damaged pax record", hint="fetch it again")
        key, value = data[space + 1 : equals], data[equals + 1 : end - 1]
        if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
            sparse.append(value)  # format 0.0 repeats these keys, so a mapping would lose all but the last
        into[key] = value
        at = end
    if sparse:
        into[b"GNU.sparse.map"] = b",".join(sparse)


def _gnu_name(data: bytes, into: dict[bytes, bytes]) -> None:
    into[b"path"] = data.split(_NUL, 1)[0]


def _gnu_link(data: bytes, into: dict[bytes, bytes]) -> None:
    into[b"linkpath"] = data.split(_NUL, 1)[0]


_EXTENSIONS = {b"x": _pax_records, b"g": _pax_records, b"X": _pax_records, b"L": _gnu_name, b"K": _gnu_link}
_TYPES = frozenset((b"0", b"1", b"2", b"3", b"4", b"5", b"6"))
_SPARSE_MARKS = frozenset((b"GNU.sparse.major", b"GNU.sparse.map", b"GNU.sparse.size"))
_AS_FILE = frozenset((b"\0", b"7", b"S"))  # pre-POSIX files, contiguous files, GNU's old sparse form


def _entry(source: Source, header: bytes, fields: tuple[bytes, ...], records: dict[bytes, bytes]) -> Entry:
    (name, mode, uid, gid, size, mtime, _, kind, link, magic, _, _, major, minor, prefix) = fields
    name = name.split(_NUL, 1)[0]
    if magic == b"ustar\x0000" and prefix[0]:
        name = prefix.split(_NUL, 1)[0] + b"/" + name
    flag = b"0" if kind in _AS_FILE else kind
    if flag not in _TYPES:
        raise InvalidArgument(f"tar member {name!r} has the unknown type {kind!r}", hint="only files of Unix are taken")
    stored = _number(size)
    entry = Entry(
        name,
        b"5" if flag == b"0" and name.endswith(b"/") else flag,
        _common_number(mode) & 0o7777,
        _common_number(uid),
        _common_number(gid),
        _common_number(mtime) * 1_000_000_000,
        stored,
        stored,
        link.split(_NUL, 1)[0],
        _number(major) if flag in b"34" else 0,
        _number(minor) if flag in b"34" else 0,
        (),
        None,
    )
    if records:
        _apply_records(entry, records)
    if entry.type != b"0":
        entry.size = entry.stored = 0  # links and the like carry no data, whatever the field says (POSIX)
    elif kind == b"S":
        _old_gnu_sparse(source, header, entry)
    elif records and not _SPARSE_MARKS.isdisjoint(records):
        _pax_sparse(source, entry, records)
    if entry.size < 0 or entry.stored < 0:
        raise Corrupt(f"tar member {entry.name!r} has a negative size", hint="fetch it again")
    return entry


def _apply_records(entry: Entry, records: dict[bytes, bytes]) -> None:
    xattrs: dict[bytes, bytes] = {}
    for key, value in records.items():
        if key.startswith(b"SCHILY.xattr."):
            xattrs[key[13:]] = value
        elif key.startswith(b"LIBARCHIVE.xattr."):
            xattrs.setdefault(unquote_to_bytes(key[17:]), _base64(value))
        elif not value:
            continue  # POSIX: it takes back what was said before, so the header's own field counts
        elif key in _ACLS:
            xattrs.setdefault(_ACLS[key], acl_from_text(value))
        elif key == b"path":
            entry.name = value
            if entry.type == b"0" and value.endswith(b"/"):
                entry.type = b"5"
        elif key == b"linkpath":
            entry.link = value
        elif key == b"size":
            entry.size = entry.stored = _decimal(value)
        elif key == b"uid":
            entry.uid = _decimal(value)
        elif key == b"gid":
            entry.gid = _decimal(value)
        elif key == b"mtime":
            entry.mtime_ns = _nanoseconds(value)
    if xattrs:
        entry.xattrs = tuple(sorted(xattrs.items()))


_ACLS = {
    b"SCHILY.acl.access": b"system.posix_acl_access",
    b"SCHILY.acl.default": b"system.posix_acl_default",
}


def _decimal(value: bytes) -> int:
    if not value.isdigit() or len(value) > 20:
        raise Corrupt(f"the layer's tar has a pax number that is none: {value[:40]!r}", hint="fetch it again")
    return int(value)


def _nanoseconds(value: bytes) -> int:
    """Decimal seconds, perhaps negative, perhaps with a fraction; digits beyond nanoseconds are cut off."""
    whole, _, fraction = value.removeprefix(b"-").partition(b".")
    nanoseconds = _decimal(whole or b"0") * 1_000_000_000 + _decimal(fraction[:9].ljust(9, b"0"))
    return -nanoseconds if value.startswith(b"-") else nanoseconds


def _base64(value: bytes) -> bytes:
    try:
        return binascii.a2b_base64(value + b"=" * (-len(value) % 4))
    except binascii.Error as error:
        raise Corrupt(f"the layer's tar has a damaged extended attribute: {error}", hint="fetch it again") from None


def _old_gnu_sparse(source: Source, header: bytes, entry: Entry) -> None:
    """GNU's own sparse form: four ranges in the header, 21 in each extension block (tar(5), "Sparse tar archives")."""
    pairs = [header[386 + 24 * i : 410 + 24 * i] for i in range(4)]
    extended, entry.size = header[482], _number(header[483:495])
    while extended:
        block = source.read(BLOCK)
        pairs += [block[24 * i : 24 * (i + 1)] for i in range(21)]
        extended = block[504]
        if len(pairs) > MAX_SPARSE_SEGMENTS:
            break
    entry.segments = _segments(entry, [_number(half) for pair in pairs if pair[0] for half in (pair[:12], pair[12:])])


def _pax_sparse(source: Source, entry: Entry, records: dict[bytes, bytes]) -> None:
    """Sparse formats 0.0, 0.1 (map in the header) and 1.0 (map before the data)."""
    entry.name = records.get(b"GNU.sparse.name", entry.name)
    entry.size = _decimal(records.get(b"GNU.sparse.realsize") or records.get(b"GNU.sparse.size") or b"")
    if records.get(b"GNU.sparse.major") == b"1":
        entry.segments = _segments(entry, _map_before_data(source, entry))
    else:
        numbers = records.get(b"GNU.sparse.map", b"")
        entry.segments = _segments(entry, [_decimal(n) for n in numbers.split(b",") if n])


def _map_before_data(source: Source, entry: Entry) -> list[int]:
    """Format 1.0: decimal lines, the count of ranges first, padded to a block; they count as stored data."""
    text, lines, wanted = b"", [b""], 1
    while len(lines) <= wanted:
        text = lines[-1] + _map_block(source, entry)
        lines[-1:] = text.split(b"\n")
        wanted = 1 + 2 * _decimal(lines[0]) if len(lines) > 1 else 1
        if wanted > 2 * MAX_SPARSE_SEGMENTS:
            break
    return [_decimal(line) for line in lines[1:wanted]]


def _map_block(source: Source, entry: Entry) -> bytes:
    if entry.stored < BLOCK:
        raise Corrupt(f"sparse tar member {entry.name!r} ends inside its map", hint="fetch it again")
    entry.stored -= BLOCK
    return source.read(BLOCK)


def _segments(entry: Entry, numbers: list[int]) -> Segments:
    segments = list(zip(numbers[::2], numbers[1::2], strict=False))
    if len(segments) > MAX_SPARSE_SEGMENTS or not 0 <= entry.size <= MAX_SPARSE_SIZE:
        raise InvalidArgument(
            f"sparse tar member {entry.name!r} is too large",
            hint=f"at most {MAX_SPARSE_SIZE >> 40} TiB in {MAX_SPARSE_SEGMENTS} ranges are taken",
        )
    end = 0
    for offset, length in segments:
        if offset < end or length < 0:
            raise Corrupt(f"sparse tar member {entry.name!r} has overlapping ranges", hint="fetch it again")
        end = offset + length
    if end > entry.size or sum(length for _, length in segments) != entry.stored:
        raise Corrupt(f"sparse tar member {entry.name!r} has a map that does not fit its data", hint="fetch it again")
    return [segment for segment in segments if segment[1]]
