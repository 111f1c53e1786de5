"""One inode of an image, decoded and checked."""

from __future__ import annotations

import os
import stat
from struct import Struct
from typing import NamedTuple

from hpmapper.erofs import format as fmt
from hpmapper.erofs import overlay
from hpmapper.erofs.image import Image
from hpmapper.erofs.xattrs import XattrReader
from hpmapper.errors import Corrupt, InvalidArgument
from hpmapper.tree import Inode

MAX_FILE_SIZE = 1 << 60
MAX_TARGET = 4095  # Linux' PATH_MAX without its NUL
MAX_ID = 0xFFFFFFFE  # the one above means "unchanged" to chown
SECOND = 10**9

_FORM = Struct("<H")
_BLOCK = fmt.BLOCK


class MapInode(Inode):
    """An inode of a map.

    Attributes:
        content: an object's digest; or the inode's own number when the data lies in the map (see `Map.read`).
        children: filled by `Map.tree` only; for a directory from `Map.lookup` see `Map.children`.
        nid: its number in the map.
        nlink: its link count.
        layout: one of LAYOUT_*.
        length: bytes of its data: a file's, a directory's entries or a symlink's target.
        address: where it begins.
        block: where the whole blocks of this data begin.
        body: the address of its xattrs.
        tail: the address behind inode and xattrs, where the rest of the data is when the layout is inline.
        extent: bytes of the map that it takes, but for a regular file's data.
    """

    __slots__ = ("address", "block", "body", "extent", "layout", "length", "nid", "nlink", "tail")

    nid: int
    nlink: int
    layout: int
    length: int
    address: int
    block: int
    body: int
    tail: int
    extent: int

    @property
    def is_extended(self) -> bool:
        """Whether it has the larger form."""
        return self.body - self.address == fmt.EXTENDED_INODE.size

    @property
    def tail_size(self) -> int:
        """Bytes of data at `tail`."""
        return self.length % _BLOCK if self.layout == fmt.LAYOUT_INLINE else 0

    @property
    def data_blocks(self) -> int:
        """Blocks of data from `block` on."""
        return -(-(self.length - self.tail_size) // _BLOCK)


class _Head(NamedTuple):
    """What compact and extended inodes both say, and the address behind them."""

    layout: int
    xattr_count: int
    mode: int
    nlink: int
    size: int
    union: int
    uid: int
    gid: int
    mtime_ns: int
    end: int


class InodeReader:
    """Decodes the inodes of one image, all but the targets of symlinks.

    Attributes:
        xattrs: reads the image's xattrs.
    """

    def __init__(self, image: Image, superblock: fmt.Superblock) -> None:
        self._image = image
        self._superblock = superblock
        self.xattrs = XattrReader(image, superblock)

    def read(self, nid: int) -> MapInode:
        """The inode with this number.

        Raises:
            Corrupt: it is none, or it says what `write_map` would not write.
        """
        address = (self._superblock.meta_block << fmt.BLOCK_BITS) + (nid << fmt.SLOT_BITS)
        head = self._head(address)
        pairs, xattrs_size = self.xattrs.read(head.end, head.xattr_count)
        inode = _assemble(nid, head, overlay.meaning(pairs))
        inode.address, inode.body, inode.tail = address, head.end, head.end + xattrs_size
        inode.extent = inode.tail - address
        if type(inode.content) is bytes:
            self._check_chunks(inode)
        else:
            self._check_data(inode)
        return inode

    def _head(self, address: int) -> _Head:
        (form,) = _FORM.unpack(self._image.read(address, _FORM.size))
        if form & ~fmt.FORMAT_KNOWN:
            raise Corrupt(f"its format {form:#x} is unknown")
        layout = form >> fmt.LAYOUT_SHIFT
        if form & fmt.EXTENDED:
            return self._extended(address, layout)
        return self._compact(address, layout)

    def _compact(self, address: int, layout: int) -> _Head:
        inode = fmt.CompactInode._make(fmt.COMPACT_INODE.unpack(self._image.read(address, fmt.COMPACT_INODE.size)))
        time = (self._superblock.epoch + inode.mtime) * SECOND + self._superblock.fixed_nsec
        end = address + fmt.COMPACT_INODE.size
        return _Head(layout, *inode[1:5], inode.union, inode.uid, inode.gid, time, end)

    def _extended(self, address: int, layout: int) -> _Head:
        inode = fmt.ExtendedInode._make(fmt.EXTENDED_INODE.unpack(self._image.read(address, fmt.EXTENDED_INODE.size)))
        if inode.mtime_nsec >= SECOND:
            raise Corrupt(f"its time has {inode.mtime_nsec} nanoseconds")
        time = inode.mtime * SECOND + inode.mtime_nsec
        count, mode, size, union, _, uid, gid = inode[1:8]
        return _Head(layout, count, mode, inode.nlink, size, union, uid, gid, time, address + fmt.EXTENDED_INODE.size)

    def _check_chunks(self, inode: MapInode) -> None:
        """An object's file has a size and one hole per chunk, nothing else."""
        if inode.layout != fmt.LAYOUT_CHUNK or inode.block != fmt.CHUNK_MAX_BITS:
            raise Corrupt("it has both an object and data")
        size = -(-inode.length >> fmt.MAX_CHUNK_BITS) * fmt.CHUNK_ENTRY.size
        if self._image.read(inode.tail, size).strip(b"\xff"):
            raise Corrupt("it has both an object and chunks of data")
        inode.extent += size

    def _check_data(self, inode: MapInode) -> None:
        if inode.layout not in (fmt.LAYOUT_PLAIN, fmt.LAYOUT_INLINE):
            raise Corrupt(f"its data has layout {inode.layout}")
        tail = inode.tail_size
        if tail and (inode.tail % _BLOCK + tail > _BLOCK or inode.tail + tail > self._image.size):
            raise Corrupt(f"{tail} bytes behind it cross the end of their block or of the map")
        if inode.data_blocks and inode.block + inode.data_blocks > self._superblock.blocks:
            raise Corrupt(f"{inode.data_blocks} blocks from {inode.block} on are outside the map")
        if not stat.S_ISREG(inode.mode):
            inode.extent += inode.length


def _assemble(nid: int, head: _Head, meaning: overlay.Meaning) -> MapInode:
    kind = stat.S_IFMT(head.mode)
    _check(kind, head, meaning)
    inode = MapInode(head.mode, head.uid, head.gid, head.mtime_ns)
    inode.xattrs, inode.opaque, inode.content = meaning.xattrs, meaning.opaque, meaning.digest
    inode.nid, inode.nlink, inode.layout = nid, head.nlink, head.layout
    inode.length, inode.block = head.size, head.union
    if kind in (stat.S_IFREG, stat.S_IFLNK):
        inode.size = head.size
    if kind == stat.S_IFREG and head.size and meaning.digest is None:
        inode.content = nid
    if kind in (stat.S_IFCHR, stat.S_IFBLK):
        inode.rdev = decode_device(head.union)
    return inode


def _check(kind: int, head: _Head, meaning: overlay.Meaning) -> None:
    """Raise Corrupt when the parts do not fit together."""
    limits = {stat.S_IFREG: (0, MAX_FILE_SIZE), stat.S_IFDIR: (1, MAX_FILE_SIZE), stat.S_IFLNK: (1, MAX_TARGET)}
    least, most = limits.get(kind, (0, 0))
    if kind >> 12 not in fmt.FILE_TYPES or not least <= head.size <= most:
        raise Corrupt(f"mode {head.mode:#o} and {head.size} bytes cannot be")
    if max(head.uid, head.gid) > MAX_ID or not head.nlink:
        raise Corrupt(f"owner {head.uid}:{head.gid} or {head.nlink} links cannot be")
    if (meaning.digest and kind != stat.S_IFREG) or (meaning.opaque and kind != stat.S_IFDIR):
        raise Corrupt(f"mode {head.mode:#o} and its overlay xattrs do not fit")


def encode_device(rdev: int) -> int:
    """Linux' new_encode_dev(): 12 bits of major in the middle of 20 of minor."""
    major, minor = (os.major(rdev), os.minor(rdev)) if rdev >= 0 else (-1, -1)
    if major >> 12 or minor >> 20:
        raise InvalidArgument(f"device {major}:{minor} is out of range", hint="12 bits and 20 bits")
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12


def decode_device(number: int) -> int:
    """The inverse, as `os.makedev` numbers."""
    return os.makedev((number & 0xFFF00) >> 8, number & 0xFF | number >> 12 & 0xFFF00)
