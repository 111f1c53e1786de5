"""An EROFS image becomes inodes again: one path, or the whole tree.

The image may be damaged or hostile. Every offset and count is checked before it is used, and what a whole-tree read
may take is bounded by the image's size (`_Walk`), because the parts of a valid image never overlap. All else is
`Corrupt`, and the message names the inode.
"""

from __future__ import annotations

import os
import stat
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import BinaryIO, Self

from hpmapper.erofs import dirents
from hpmapper.erofs import format as fmt
from hpmapper.erofs.dirents import DOTS, Dirent, is_name
from hpmapper.erofs.hashes import crc32c
from hpmapper.erofs.image import FileImage, Image, MemoryImage
from hpmapper.erofs.inodes import SECOND, InodeReader, MapInode
from hpmapper.errors import Corrupt
from hpmapper.model import ObjectDigest

__all__ = ["Map", "MapInode"]

_BLOCK = fmt.BLOCK
_PIECE = 1 << 20


class Map:
    """A map, opened for reading; for one thread at a time.

    Attributes:
        superblock: as on disk.
    """

    def __init__(self, image: Image) -> None:
        self._image = image
        self.superblock = _superblock(image)
        self._inodes = InodeReader(image, self.superblock)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open the map at `path`; close it, or use it in a `with`."""
        image = FileImage(path)
        try:
            return cls(image)
        except BaseException:
            image.close()
            raise

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """A map in memory."""
        return cls(MemoryImage(data))

    def close(self) -> None:
        """Close the file."""
        self._image.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def size(self) -> int:
        """Bytes of the image."""
        return self.superblock.blocks * _BLOCK

    @property
    def epoch(self) -> int:
        """The mtime of compact inodes, in nanoseconds."""
        return self.superblock.epoch * SECOND + self.superblock.fixed_nsec

    @property
    def root(self) -> MapInode:
        """The root directory."""
        root = self.inode(self.superblock.root_nid)
        if not root.is_dir:
            raise self.corrupt("the root is no directory")
        return root

    def lookup(self, path: bytes) -> MapInode | None:
        """The inode at `path` (no leading slash; b"" is the root), or None. Follows no symlink, knows no "..".

        Reads only what a binary search touches.
        """
        inode = self.root
        for name in path.split(b"/") if path else ():
            nid = self._find(inode, name) if inode.is_dir and is_name(name) else None
            if nid is None:
                return None
            inode = self.inode(nid)
        return inode

    def names(self, directory: MapInode) -> list[bytes]:
        """The names in one directory, sorted; cheaper than `children`."""
        return [entry.name for entry in self.entries(directory) if entry.name not in DOTS]

    def children(self, directory: MapInode) -> dict[bytes, MapInode]:
        """The entries of one directory. Two names of one file are two objects here, unlike in `tree`."""
        return {entry.name: self.inode(entry.nid) for entry in self.entries(directory) if entry.name not in DOTS}

    def tree(self, spool: BinaryIO | None = None) -> MapInode:
        """The whole tree, with hard links shared again; checks all that can be checked without the objects.

        With `spool`, the data that lies in the map is written there, from its position on, and each `content` says
        where: such a tree can be given to `write_map` again.
        """
        walk = _Walk(self)
        for directory, name, inode, new in walk:
            directory.entries()[name] = inode
            if spool is not None and new and type(inode.content) is int:
                inode.content = self._copy(inode, spool)
        return walk.root

    def objects(self) -> Iterator[tuple[ObjectDigest, int]]:
        """Digest and size for each inode whose data is an object: a digest comes as often as inodes have it.

        Checks what `tree` checks, but keeps nothing.
        """
        for _, _, inode, new in _Walk(self):
            if new and isinstance(inode.content, bytes):
                yield inode.content, inode.size

    def read(self, inode: MapInode) -> bytes:
        """The data of a regular file that lies in the map."""
        return b"".join(self.pieces(inode))

    def pieces(self, inode: MapInode) -> Iterator[bytes]:
        """The same, at most 1 MiB at a time."""
        if inode.layout == fmt.LAYOUT_CHUNK:
            raise ValueError("an object's data is not in the map")
        start, whole = inode.block * _BLOCK, inode.length - inode.tail_size
        for offset in range(0, whole, _PIECE):
            yield self._image.read(start + offset, min(_PIECE, whole - offset))
        if inode.tail_size:
            yield self._image.read(inode.tail, inode.tail_size)

    def inode(self, nid: int) -> MapInode:
        """The inode with the number `nid`."""
        try:
            inode = self._inodes.read(nid)
        except Corrupt as error:
            raise self.corrupt(f"inode {nid}: {error.message}") from None
        if stat.S_ISLNK(inode.mode):
            inode.target = self.read(inode)
            if b"\0" in inode.target:
                raise self.corrupt(f"inode {nid}: its target has a NUL")
        return inode

    def entries(self, directory: MapInode) -> Iterator[Dirent]:
        """A directory's entries in order, the dots among them; raises for anything else."""
        directory.entries()
        last = b""
        for index in range(-(-directory.length // _BLOCK)):
            for entry in self._parsed(directory, index):
                if entry.name <= last:
                    raise self.corrupt(f"inode {directory.nid}: {entry.name!r} comes after {last!r}")
                last = entry.name
                yield entry

    def xattr_body(self, inode: MapInode) -> bytes:
        """The xattrs of an inode as they are stored."""
        return self._image.read(inode.body, inode.tail - inode.body)

    def shared_xattrs(self) -> dict[bytes, int]:
        """The ids of the shared xattrs by their stored form."""
        return self._inodes.xattrs.shared()

    def corrupt(self, what: str) -> Corrupt:
        """The error that says what is wrong with this map."""
        return Corrupt(f"{self._image.name}: {what}", hint="the map is damaged: fetch its layer again")

    def _parsed(self, directory: MapInode, index: int) -> list[Dirent]:
        try:
            return list(dirents.entries(self._block(directory, index)))
        except Corrupt as error:
            raise self.corrupt(f"inode {directory.nid}: block {index}: {error.message}") from None

    def _find(self, directory: MapInode, name: bytes) -> int | None:
        try:
            return self._search(directory, name)
        except Corrupt as error:
            raise self.corrupt(f"inode {directory.nid}: {error.message}") from None

    def _search(self, directory: MapInode, name: bytes) -> int | None:
        """Binary search: for the last block that begins with a name not after `name`, then in it."""
        blocks = range(-(-directory.length // _BLOCK))
        index = bisect_right(blocks, name, key=lambda at: dirents.entry(self._block(directory, at), 0).name) - 1
        if index < 0:
            return None
        block = self._block(directory, index)
        count = dirents.count(block)
        at = bisect_left(range(count), name, key=lambda at: dirents.entry(block, at).name)
        found = dirents.entry(block, at) if at < count else None
        return found.nid if found and found.name == name else None

    def _block(self, directory: MapInode, index: int) -> bytes:
        start = index * _BLOCK
        size = min(_BLOCK, directory.length - start)
        if size < _BLOCK and directory.tail_size:
            return self._image.read(directory.tail, size)
        return self._image.read(directory.block * _BLOCK + start, size)

    def _copy(self, inode: MapInode, spool: BinaryIO) -> int:
        offset = spool.tell()
        for piece in self.pieces(inode):
            spool.write(piece)
        return offset


class _Walk:
    """Visits every entry once, parents first: yields (directory, name, inode, whether the inode is new).

    Each inode's space in the map is summed up: parts of a valid map never overlap, so an image whose inodes claim
    more than there is was made to keep a reader busy.
    """

    def __init__(self, image: Map) -> None:
        self._map = image
        self.root = image.root
        self._seen = bytearray(image.size // fmt.SLOT)
        self._linked: dict[int, tuple[MapInode, int]] = {}
        self._extent = 0
        self._count = 0

    def __iter__(self) -> Iterator[tuple[MapInode, bytes, MapInode, bool]]:
        self._enter(self.root)
        stack = [(self.root, self.root.nid)]
        while stack:
            directory, parent = stack.pop()
            below = []
            dots = {}
            for entry in self._map.entries(directory):
                if entry.name in DOTS:
                    dots[entry.name] = entry.nid
                    continue
                inode, new = self._visit(directory, entry)
                if inode.is_dir:
                    below.append((inode, directory.nid))
                yield directory, entry.name, inode, new
            self._check_directory(directory, parent, dots, len(below))
            stack.extend(reversed(below))
        self._check_links()

    def _visit(self, directory: MapInode, entry: Dirent) -> tuple[MapInode, bool]:
        known = self._linked.get(entry.nid)
        inode = known[0] if known else self._map.inode(entry.nid)
        if fmt.FILE_TYPES[inode.mode >> 12] != entry.type:
            raise self._map.corrupt(f"inode {directory.nid}: {entry.name!r} has type {entry.type}, the file another")
        if known:
            self._linked[entry.nid] = inode, known[1] + 1
            return inode, False
        self._enter(inode)
        if inode.nlink > 1 and not inode.is_dir:
            self._linked[entry.nid] = inode, 1
        return inode, True

    def _enter(self, inode: MapInode) -> None:
        if inode.nid >= len(self._seen):
            raise self._map.corrupt(f"inode {inode.nid}: it lies beyond the image")
        if self._seen[inode.nid]:
            raise self._map.corrupt(f"inode {inode.nid}: it has more names than links")
        self._seen[inode.nid] = 1
        self._count += 1
        self._extent += inode.extent
        if self._extent > self._map.size:
            raise self._map.corrupt(f"inode {inode.nid}: it overlaps with others")

    def _check_directory(self, directory: MapInode, parent: int, dots: dict[bytes, int], below: int) -> None:
        if dots != {b".": directory.nid, b"..": parent}:
            raise self._map.corrupt(f"inode {directory.nid}: its dots are {dots}")
        if directory.nlink != 2 + below:
            raise self._map.corrupt(f"inode {directory.nid}: {directory.nlink} links, {below} subdirectories")

    def _check_links(self) -> None:
        for nid, (inode, names) in self._linked.items():
            if inode.nlink != names:
                raise self._map.corrupt(f"inode {nid}: {inode.nlink} links, {names} names")
        if self._count != self._map.superblock.inodes:
            raise self._map.corrupt(f"{self._map.superblock.inodes} inodes announced, {self._count} found")


def _superblock(image: Image) -> fmt.Superblock:
    try:
        first = image.read(0, _BLOCK)[fmt.SUPERBLOCK_OFFSET :]
        superblock = fmt.Superblock._make(fmt.SUPERBLOCK.unpack_from(first))
        _check_superblock(superblock, image.size)
    except Corrupt as error:
        raise Corrupt(f"{image.name}: no map that can be read: {error.message}") from None
    if crc32c(first[:4] + bytes(4) + first[8:]) != superblock.checksum:
        raise Corrupt(f"{image.name}: the superblock's checksum is wrong")
    return superblock


def _check_superblock(superblock: fmt.Superblock, size: int) -> None:
    """Raise Corrupt for what this reader cannot read."""
    if superblock.magic != fmt.MAGIC:
        raise Corrupt(f"magic {superblock.magic:#x}")
    if superblock.block_bits != fmt.BLOCK_BITS or superblock.directory_block_bits:
        raise Corrupt(f"block size 2**{superblock.block_bits}")
    if not superblock.feature_compat & fmt.COMPAT_SB_CHKSUM:
        raise Corrupt("no checksum")
    unknown = superblock.feature_incompat & ~fmt.INCOMPAT_KNOWN
    if unknown or superblock.ext_slots or superblock.extra_devices:
        raise Corrupt(f"features {unknown:#x} of a newer version")
    if superblock.blocks * _BLOCK > size:
        raise Corrupt(f"{superblock.blocks} blocks announced, the file has {size} bytes")
    if superblock.fixed_nsec >= SECOND:
        raise Corrupt(f"{superblock.fixed_nsec} nanoseconds")
