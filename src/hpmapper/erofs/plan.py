"""What the writer must know before the first byte: counts of everything, then a place for everything.

Inodes come directory by directory, siblings together in the order of their names, each with its small data
behind it: a cold find, stat or read of small files walks forward through few blocks. Nothing that fits in a block
crosses one, and blocks with room left stay open for a while for what comes next.

A tree that began as a map (`kept`) is written as an extension of it: what nobody touched stays where it is, a
directory that was touched keeps its number and is written over, and all that is new follows behind.

Errors carry a path, but nothing here keeps any: it is searched when something is wrong (`blame`).
"""

from __future__ import annotations

import stat
from collections import Counter
from typing import NamedTuple

from hpmapper.erofs import dirents
from hpmapper.erofs import format as fmt
from hpmapper.erofs.inodes import MAX_FILE_SIZE, MAX_TARGET
from hpmapper.erofs.kept import KeptInode
from hpmapper.erofs.reader import Map
from hpmapper.erofs.xattrs import OBJECT, OPAQUE, PLAIN, REDIRECT_ENTRY_SIZE, Use, XattrTable
from hpmapper.errors import InvalidArgument
from hpmapper.tree import Inode, walk

REG = stat.S_IFREG >> 12
DIR = stat.S_IFDIR >> 12
LNK = stat.S_IFLNK >> 12
CHR = stat.S_IFCHR >> 12
BLK = stat.S_IFBLK >> 12

_BLOCK = fmt.BLOCK
_U16 = 0xFFFF
_U32 = 0xFFFFFFFF
_COMPACT = fmt.COMPACT_INODE.size
_EXTENDED = fmt.EXTENDED_INODE.size
_FIRST_INODE = fmt.SUPERBLOCK_OFFSET + fmt.SUPERBLOCK.size
_OPEN_BLOCKS = 8
_BARE_OBJECT = Use((), OBJECT)
_BARE_OPAQUE = Use((), OPAQUE)


class Scan:
    """What must be known of the whole tree before anything can be placed.

    Attributes:
        base: the map that is extended, if one is.
        inodes: what is new, each once, directory by directory; the root first.
        touched: the directories of the map that may have changed.
        links: the link counts that are not 1, by inode.
        parents: each directory's parent.
        sizes: bytes of each directory's entries.
        uses: the xattrs of each of `inodes`, in their order.
        epoch: the most common mtime: the one that compact inodes have.
        xattrs: the bodies of xattrs, made from what recurs.
    """

    def __init__(self, root: Inode, base: Map | None = None) -> None:
        if root.children is None:
            raise InvalidArgument("the root of a map must be a directory")
        self.root = root
        self.base = base
        self.inodes: list[Inode] = []
        self.touched: list[KeptInode] = []
        self.links: dict[Inode, int] = {}
        self.parents = {root: root}
        self.sizes: dict[Inode, int] = {}
        self._descend()
        self.epoch = base.epoch if base else self._common_time()
        self.uses = list(map(use_of, self.inodes))
        self.xattrs = XattrTable(Counter(use for use in self.uses if use), base.shared_xattrs() if base else None)

    def _descend(self) -> None:
        seen: set[Inode] = set()
        self._visit(self.root, seen)
        stack = [self.root]
        while stack:
            directory = stack.pop()
            children = directory.entries()
            names = sorted(children)
            self._check_names(directory, names)
            self.sizes[directory] = dirents.size_of(names)
            below = []
            for name in names:
                child = children[name]
                if child.children is not None:
                    below.append(child)
                if child in seen:
                    self._link(name, child)
                else:
                    self._visit(child, seen)
            self.links[directory] = 2 + len(below)
            self.parents.update((child, directory) for child in below)
            stack.extend(child for child in reversed(below) if not is_untouched(child))

    def _visit(self, inode: Inode, seen: set[Inode]) -> None:
        if type(inode) is not KeptInode:
            seen.add(inode)
            self.inodes.append(inode)
        elif inode.found:
            self.touched.append(inode)

    def _common_time(self) -> int:
        times = Counter([inode.mtime_ns for inode in self.inodes])
        return min(times, key=lambda time: (-times[time], time))

    def _link(self, name: bytes, inode: Inode) -> None:
        if inode.children is not None:
            raise InvalidArgument(f"{show(name)}: one directory under two names")
        self.links[inode] = self.links.get(inode, 1) + 1

    def _check_names(self, directory: Inode, names: list[bytes]) -> None:
        joined = b"".join(names)  # one search of all is many times faster than one search of each
        suspects = b"/" in joined or b"\0" in joined or not directory.entries().keys().isdisjoint((b"", b".", b".."))
        if not suspects and max(map(len, names), default=1) <= fmt.NAME_MAX:
            return
        bad = next(name for name in names if not dirents.is_name(name))
        raise blame(self.root, directory, f"no file can have this name of {len(bad)} bytes: {show(bad[:300])}")


class NoRoom(Exception):
    """A map cannot be extended by a tree: it must be written anew."""


class Packer:
    """Finds places for inodes: first fit over the few blocks opened last."""

    def __init__(self, start: int) -> None:
        """Place from the address `start` on."""
        self.end = -(-start // _BLOCK) * _BLOCK
        self._open = [(start, self.end - start)]

    def place(self, size: int) -> int:
        """The address for `size` bytes; what fits in a block never crosses one."""
        size = size + fmt.SLOT - 1 & -fmt.SLOT
        for index, (address, room) in enumerate(self._open):
            if size <= room:
                self._open[index] = address + size, room - size
                return address
        address = self.take_blocks(size) * _BLOCK
        self._open.append((address + size, self.end - address - size))
        if len(self._open) > _OPEN_BLOCKS:
            del self._open[0]
        return address

    def take_blocks(self, size: int) -> int:
        """The number of the first of as many new blocks as `size` bytes need."""
        first = self.end // _BLOCK
        self.end += -(-size // _BLOCK) * _BLOCK
        return first


class Shape(NamedTuple):
    """How one inode is stored.

    Attributes:
        head: bytes of the inode itself: compact or extended.
        layout: one of LAYOUT_*.
        use: its xattrs, if any.
        xattrs: bytes that these take.
        size: what stat shows.
        chunks: bytes of an object's chunk entries.
        tail: bytes of data right behind all that.
        blocks: data blocks elsewhere.
    """

    head: int
    layout: int
    use: Use | None
    xattrs: int
    size: int
    chunks: int
    tail: int
    blocks: int


class Layout:
    """Where everything lies.

    Attributes:
        inodes: in the order of their places.
        nids: their numbers.
        shapes: how each is stored.
        blocks: the first block of data that is not behind its inode.
        directories, files: the inodes with such data that is new, in the order of their blocks.
        has_chunks: whether any inode is chunk-based.
        xattr_block: where the shared xattrs are.
        image_blocks: the size of all.
        left: bytes of data of touched directories that lie elsewhere now.
    """

    def __init__(self, scan: Scan) -> None:
        """Place everything.

        Raises:
            InvalidArgument: something is not what EROFS can store.
            NoRoom: a touched directory needs more than the place it has.
        """
        self.scan = scan
        self.nids: dict[Inode, int] = {}
        self.shapes: dict[Inode, Shape] = {}
        self.blocks: dict[Inode, int] = {}
        self.directories: list[Inode] = []
        self.files: list[Inode] = []
        self.has_chunks = False
        self.left = 0
        if scan.base is None:
            packer = Packer(_FIRST_INODE)
            # The root comes before all else: the superblock has only 16 bits for its number.
            self._place(packer, 0, 1)
            self.xattr_block = packer.take_blocks(len(scan.xattrs.area))
            self._place(packer, 1, len(scan.inodes))
        else:
            packer = Packer(scan.base.size)
            self.xattr_block = scan.base.superblock.xattr_block
            self._place(packer, 0, len(scan.inodes))
            for directory in scan.touched:
                self._replace(directory)
        self.inodes = sorted(scan.inodes, key=self.nids.__getitem__)
        for inode in (*self.directories, *self.files):
            self.blocks[inode] = packer.take_blocks(self.shapes[inode].blocks * _BLOCK)
        self.image_blocks = packer.end // _BLOCK
        if self.image_blocks > _U32:
            raise InvalidArgument("the map would be larger than 16 TiB", hint="keep large files as objects")

    def _place(self, packer: Packer, start: int, end: int) -> None:
        nids, shapes, uses = self.nids, self.shapes, self.scan.uses
        for inode, use in zip(self.scan.inodes[start:end], uses[start:end], strict=True):
            try:
                shape = self._shape(inode, use)
            except InvalidArgument as error:
                raise blame(self.scan.root, inode, str(error)) from None
            shapes[inode] = shape
            head, layout, _, xattrs, _, chunks, tail, blocks = shape
            nids[inode] = packer.place(head + xattrs + chunks + tail) >> fmt.SLOT_BITS
            if layout == fmt.LAYOUT_CHUNK:
                self.has_chunks = True
            if blocks:
                (self.files if inode.children is None else self.directories).append(inode)

    def _replace(self, directory: KeptInode) -> None:
        """Let a touched directory stay where it is; its entries, too, if they take the same room."""
        self.nids[directory] = directory.nid
        self.nids.update((child, child.nid) for child in directory.entries().values() if type(child) is KeptInode)
        found = directory.found
        assert found is not None, "it was touched"
        size, xattrs = self.scan.sizes[directory], len(touched_body(self.scan, directory))
        same_names = directory.before.keys() == directory.entries().keys()
        if found.is_extended and found.body + xattrs == found.tail and same_names:
            shape = Shape(_EXTENDED, found.layout, None, xattrs, size, 0, found.tail_size, found.data_blocks)
            self.blocks[directory] = found.block
        elif found.address + _EXTENDED + xattrs <= _slots_end(found.tail + found.tail_size):
            shape = Shape(_EXTENDED, fmt.LAYOUT_PLAIN, None, xattrs, size, 0, 0, -(-size >> fmt.BLOCK_BITS))
            self.directories.append(directory)
            self.left += found.length
        else:
            raise NoRoom
        self.shapes[directory] = shape

    def _shape(self, inode: Inode, use: Use | None) -> Shape:
        """How to store `inode`.

        Raises:
            InvalidArgument: it is not what EROFS can store.
        """
        scan = self.scan
        xattrs = len(scan.xattrs.body(use)) if use else 0
        size = self._size(inode)
        compact = (
            inode.mtime_ns == scan.epoch
            and inode.uid <= _U16
            and inode.gid <= _U16
            and size <= _U32
            and scan.links.get(inode, 1) <= _U16
        )
        head = _COMPACT if compact else _EXTENDED
        if use and use.kind == OBJECT:
            chunks = -(-size >> fmt.MAX_CHUNK_BITS) * fmt.CHUNK_ENTRY.size
            return Shape(head, fmt.LAYOUT_CHUNK, use, xattrs + REDIRECT_ENTRY_SIZE, size, chunks, 0, 0)
        tail = size & _BLOCK - 1
        if tail and head + xattrs + tail <= _BLOCK:
            return Shape(head, fmt.LAYOUT_INLINE, use, xattrs, size, 0, tail, size >> fmt.BLOCK_BITS)
        return Shape(head, fmt.LAYOUT_PLAIN, use, xattrs, size, 0, 0, -(-size >> fmt.BLOCK_BITS))

    def _size(self, inode: Inode) -> int:
        kind = inode.mode >> 12
        if kind == REG:
            return _checked_file_size(inode)
        if inode.content is not None or kind not in fmt.FILE_TYPES:
            raise InvalidArgument(f"mode {inode.mode:#o} and content {inode.content!r:.80} do not fit")
        if kind == DIR:
            return self.scan.sizes[inode]
        if kind == LNK:
            return _checked_target_size(inode)
        return 0


def is_untouched(inode: Inode) -> bool:
    """Whether it stays as it is in the map that is extended."""
    return type(inode) is KeptInode and inode.found is None


def touched_body(scan: Scan, directory: KeptInode) -> bytes:
    """The xattrs of a touched directory: as they are in the map, if they are the same."""
    found = directory.found
    if found is not None and scan.base is not None and directory.xattrs == found.xattrs:
        return scan.base.xattr_body(found)
    use = use_of(directory)
    return scan.xattrs.body(use) if use else b""


def _slots_end(address: int) -> int:
    return -(-address // fmt.SLOT) * fmt.SLOT


def use_of(inode: Inode) -> Use | None:
    """What xattrs `inode` needs on disk."""
    if type(inode.content) is bytes:
        return Use(inode.xattrs, OBJECT) if inode.xattrs else _BARE_OBJECT
    if inode.opaque and inode.children is not None:
        return Use(inode.xattrs, OPAQUE) if inode.xattrs else _BARE_OPAQUE
    return Use(inode.xattrs, PLAIN) if inode.xattrs else None


def blame(root: Inode, culprit: Inode, why: str) -> InvalidArgument:
    """The error that says which path is wrong."""
    path = next(path for path, inode in walk(root) if inode is culprit)
    return InvalidArgument(f"/{show(path)}: {why}")


def show(name: bytes) -> str:
    """A name or path for people, whatever bytes it has."""
    return name.decode("utf-8", "backslashreplace")


def _checked_file_size(inode: Inode) -> int:
    if not 0 <= inode.size <= MAX_FILE_SIZE:
        raise InvalidArgument(f"a file of {inode.size} bytes", hint="at most 2**60")
    if inode.size and inode.content is None:
        raise InvalidArgument(f"a file of {inode.size} bytes, but without data")
    return inode.size


def _checked_target_size(inode: Inode) -> int:
    if not 0 < len(inode.target) <= MAX_TARGET or b"\0" in inode.target:
        raise InvalidArgument(f"a symlink's target of {len(inode.target)} bytes", hint=f"1 to {MAX_TARGET}, no NUL")
    return len(inode.target)
