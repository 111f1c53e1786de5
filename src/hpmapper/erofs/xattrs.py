"""Extended attributes on disk: entries, the name filter, and which entries are worth sharing.

An inode's body is a header, the ids of shared entries, then its own entries. An entry that several inodes have
is kept once in the shared area when that is smaller; a redirect to an object never is: nearly all differ, and
beside its inode it costs overlayfs no second read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import lru_cache
from typing import NamedTuple

from hpmapper.erofs import format as fmt
from hpmapper.erofs import overlay
from hpmapper.erofs.hashes import xxh32
from hpmapper.erofs.image import Image
from hpmapper.errors import Corrupt, InvalidArgument
from hpmapper.model import ObjectDigest
from hpmapper.tree import Xattrs

_LINUX_NAME_MAX = 255


# Which xattrs of overlayfs an inode needs besides its own.
PLAIN, OBJECT, OPAQUE = range(3)


class Use(NamedTuple):
    """The xattrs of an inode, apart from the redirect: many inodes have the same."""

    xattrs: Xattrs
    kind: int


def split_name(name: bytes) -> tuple[int, bytes]:
    """A name's namespace number and the rest of it, as stored.

    Raises:
        InvalidArgument: EROFS cannot store it, or Linux not read it.
    """
    if len(name) > _LINUX_NAME_MAX or b"\0" in name:
        raise InvalidArgument(f"xattr name {name[:80]!r} is too long or has a NUL")
    for index, prefix in fmt.XATTR_NAMESPACES.items():
        if name.startswith(prefix) and (len(name) > len(prefix)) == prefix.endswith(b"."):
            return index, name[len(prefix) :]
    raise InvalidArgument(f"xattr {name!r} is in no namespace that EROFS has")


def encode_entry(name: bytes, value: bytes) -> bytes:
    """One entry, padded."""
    index, suffix = split_name(name)
    if len(value) > 0xFFFF or len(suffix) > 0xFF:
        raise InvalidArgument(f"xattr {name!r} has {len(value)} bytes", hint="at most 65535 bytes, named in 255")
    entry = fmt.XATTR_ENTRY.pack(len(suffix), index, len(value)) + suffix + value
    return entry + _pad(len(entry))


def redirect_entry(digest: ObjectDigest) -> bytes:
    """The entry of a redirect; what all have in common is made once."""
    if len(digest) != overlay.DIGEST_SIZE:
        raise InvalidArgument(f"{digest!r:.80} is not an object's digest")
    name = digest.hex().encode("ascii")
    return b"%b/%b/%b%b" % (_REDIRECT_HEAD, name[:2], name[2:], _REDIRECT_PAD)


def body_count(size: int) -> int:
    """The inode's field `xattr_count` for a body of `size` bytes."""
    return 1 + (size - fmt.XATTR_HEADER.size) // fmt.XATTR_ALIGN if size else 0


def _pad(size: int) -> bytes:
    return bytes(-size % fmt.XATTR_ALIGN)


_REDIRECT_SUFFIX = split_name(overlay.REDIRECT)[1]
_REDIRECT_HEAD = fmt.XATTR_ENTRY.pack(len(_REDIRECT_SUFFIX), 4, overlay.REDIRECT_SIZE) + _REDIRECT_SUFFIX
_REDIRECT_PAD = _pad(len(_REDIRECT_HEAD) + overlay.REDIRECT_SIZE)
REDIRECT_ENTRY_SIZE = len(_REDIRECT_HEAD) + overlay.REDIRECT_SIZE + len(_REDIRECT_PAD)


class XattrTable:
    """The bodies of all inodes of one image.

    Attributes:
        area: the shared entries, to lie at the start of a block.
    """

    def __init__(self, uses: Counter[Use], shared: Mapping[bytes, int] | None = None) -> None:
        """Choose what to share; or share what is `shared` already: ids by stored entry."""
        self._uses = uses
        self._bodies: dict[Use, bytes] = {}
        self._ids, self.area = _share(uses) if shared is None else (shared, b"")

    def body(self, use: Use) -> bytes:
        """The body without the redirect, which comes after it."""
        body = self._bodies.get(use)
        if body is None:
            body = self._encode(use)
            if self._uses[use] > 1:
                self._bodies[use] = body
        return body

    def _encode(self, use: Use) -> bytes:
        stored = _stored(use)
        if len({name for name, _ in stored}) < len(stored):
            raise InvalidArgument("it has one xattr twice")
        entries = [encode_entry(name, value) for name, value in stored]
        shared = [entry for entry in entries if entry in self._ids][: fmt.XATTR_MAX_SHARED]
        own = b"".join(entry for entry in entries if entry not in shared)
        ids = b"".join(fmt.XATTR_SHARED_ID.pack(self._ids[entry]) for entry in shared)
        names = [name for name, _ in stored] + [overlay.REDIRECT] * (use.kind == OBJECT)
        body = fmt.XATTR_HEADER.pack(filter_of(names), len(shared)) + ids + own
        if body_count(len(body) + REDIRECT_ENTRY_SIZE) > fmt.XATTR_MAX_COUNT:
            raise InvalidArgument(f"its xattrs take {len(body)} bytes", hint="at most 256 KiB for one file")
        return body


def _stored(use: Use) -> Xattrs:
    """All xattrs but the redirect, under their names on disk."""
    stored = overlay.escape(use.xattrs)
    if use.kind == OBJECT:
        stored += ((overlay.METACOPY, b""),)
    elif use.kind == OPAQUE:
        stored += ((overlay.OPAQUE, b"y"),)
    return tuple(sorted(stored))


def _share(uses: Counter[Use]) -> tuple[dict[bytes, int], bytes]:
    """Choose the entries to share: their ids, and the area that holds them."""
    counts: Counter[tuple[bytes, bytes]] = Counter()
    for use, count in uses.items():
        for pair in _stored(use):
            counts[pair] += count
    ids: dict[bytes, int] = {}
    area = bytearray()
    for pair in sorted(pair for pair, count in counts.items() if count > 1):
        entry = _entry_if_valid(*pair)
        if counts[pair] * (len(entry) - fmt.XATTR_SHARED_ID.size) > len(entry):
            ids[entry] = len(area) // fmt.XATTR_ALIGN
            area += entry
    return ids, bytes(area)


def _entry_if_valid(name: bytes, value: bytes) -> bytes:
    try:
        return encode_entry(name, value)
    except InvalidArgument:
        return b""  # raised again where the inode is at hand, so that the message can have its path


class XattrReader:
    """Reads bodies of one image.

    Shared entries are kept once read; a hostile image's may overlap, so together they must not be more than it.
    """

    def __init__(self, image: Image, superblock: fmt.Superblock) -> None:
        self._image = image
        self._area = superblock.xattr_block << fmt.BLOCK_BITS
        self._filtered = (
            bool(superblock.feature_compat & fmt.COMPAT_XATTR_FILTER) and not superblock.xattr_filter_reserved
        )
        self._known: dict[int, tuple[bytes, bytes]] = {}
        self._known_size = 0

    def read(self, address: int, count: int) -> tuple[list[tuple[bytes, bytes]], int]:
        """The xattrs of an inode with `xattr_count` = `count`, and the bytes they take behind it.

        Raises:
            Corrupt: they are not well-formed.
        """
        if not count:
            return [], 0
        body = self._image.read(address, fmt.XATTR_HEADER.size + (count - 1) * fmt.XATTR_ALIGN)
        stored_filter, shared = fmt.XATTR_HEADER.unpack_from(body)
        at = fmt.XATTR_HEADER.size + shared * fmt.XATTR_SHARED_ID.size
        if at > len(body) or count == 1:
            raise Corrupt(f"{shared} shared xattrs in {len(body)} bytes")
        ids = fmt.XATTR_SHARED_ID.iter_unpack(body[fmt.XATTR_HEADER.size : at])
        pairs = [self._shared(number) for (number,) in ids]
        while at < len(body):
            name, value, size = _decode_entry(body[at:])
            pairs.append((name, value))
            at += size
        self._check(pairs, stored_filter)
        return pairs, len(body)

    def shared(self) -> dict[bytes, int]:
        """The ids of the shared entries, by entry."""
        ids: dict[bytes, int] = {}
        at = self._area
        with suppress(Corrupt):  # where they end is not said: zeros follow or an inode, and neither is an entry
            while self._area:
                entry = encode_entry(*self._read_shared(at))
                ids[entry] = (at - self._area) // fmt.XATTR_ALIGN
                at += len(entry)
        return ids

    def _check(self, pairs: list[tuple[bytes, bytes]], stored_filter: int) -> None:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            raise Corrupt("it has one xattr twice")
        # A wrong filter hides xattrs from the kernel: an object's file would read as zeros.
        if self._filtered and stored_filter != filter_of(names):
            raise Corrupt(f"the xattr filter {stored_filter:#x} does not fit the xattrs {names}")

    def _shared(self, number: int) -> tuple[bytes, bytes]:
        pair = self._known.get(number)
        if pair is None:
            pair = self._known[number] = self._read_shared(self._area + number * fmt.XATTR_ALIGN)
            self._known_size += len(pair[0]) + len(pair[1])
            if self._known_size > self._image.size:
                raise Corrupt("shared xattrs overlap")
        return pair

    def _read_shared(self, address: int) -> tuple[bytes, bytes]:
        length, _, value_size = fmt.XATTR_ENTRY.unpack(self._image.read(address, fmt.XATTR_ENTRY.size))
        name, value, _ = _decode_entry(self._image.read(address, fmt.XATTR_ENTRY.size + length + value_size))
        return name, value


def filter_of(names: Iterable[bytes]) -> int:
    """The filter of an inode with xattrs of these names: the bit of each is *cleared* (Linux 6.6)."""
    result = fmt.XATTR_FILTER_NONE
    for name in names:
        result &= ~_filter_bit(name)
    return result


@lru_cache(4096)  # images name what they like: a long-lived process must not keep all of it
def _filter_bit(name: bytes) -> int:
    index, suffix = split_name(name)
    return 1 << (xxh32(suffix, fmt.XATTR_FILTER_SEED + index) & 31)


def _decode_entry(data: bytes) -> tuple[bytes, bytes, int]:
    """Name and value of the entry at the start of `data`, and its bytes with the padding."""
    length, index, value_size = fmt.XATTR_ENTRY.unpack_from(data) if len(data) >= fmt.XATTR_ENTRY.size else (0, 0, 0)
    start = fmt.XATTR_ENTRY.size + length
    prefix = fmt.XATTR_NAMESPACES.get(index)
    if prefix is None or start + value_size > len(data):
        raise Corrupt(f"an xattr of namespace {index} with {length} + {value_size} bytes")
    name = prefix + data[fmt.XATTR_ENTRY.size : start]
    try:
        split_name(name)
    except InvalidArgument as error:
        raise Corrupt(error.message) from None
    return name, data[start : start + value_size], start + value_size + len(_pad(start + value_size))
