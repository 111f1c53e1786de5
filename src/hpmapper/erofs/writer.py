"""A tree becomes an EROFS image: uncompressed, 4 KiB blocks, the same bytes for the same tree.

`plan.Scan` counts, `plan.Layout` places, and the emitter here writes everything by its place, in one stream: inodes
with their small data, then directories' further blocks, then files' further blocks. The superblock comes last.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Iterator
from itertools import islice
from typing import BinaryIO, cast

from hpmapper.erofs import dirents
from hpmapper.erofs import format as fmt
from hpmapper.erofs.hashes import crc32c
from hpmapper.erofs.inodes import MAX_ID, SECOND, encode_device
from hpmapper.erofs.kept import KeptInode, Removed
from hpmapper.erofs.plan import BLK, CHR, LNK, Layout, Scan, Shape, blame, touched_body
from hpmapper.erofs.reader import Map, MapInode
from hpmapper.erofs.xattrs import body_count, redirect_entry
from hpmapper.errors import Corrupt, InvalidArgument
from hpmapper.model import ObjectDigest
from hpmapper.tree import Inode

_BLOCK = fmt.BLOCK
_PIECE = 1 << 20
_NULL_CHUNK = fmt.CHUNK_ENTRY.pack(fmt.NULL_BLOCK)
_COMPACT_LINKS, _EXTENDED_LINKS = 6, 44  # where an inode has its link count
_DEVICES = (CHR, BLK)
_VOLUME_NAME = b"hpmapper"


def write_map(root: Inode, spool: BinaryIO, out: BinaryIO, *, uuid: bytes) -> int:
    """Write the image of the tree `root` to `out` and return its size in bytes.

    Data of a file whose `content` is a number is read from `spool` at that offset. `out` is written from its
    beginning, in pieces of about 1 MiB. The tree must not change meanwhile.

    Raises:
        InvalidArgument: the tree says what EROFS cannot hold; names the path.
        Corrupt: the spool is shorter than the tree says.
    """
    layout = Layout(Scan(root))
    sink = _Sink(out)
    _Emitter(layout, spool, sink).emit()
    size = sink.finish()
    _seal(out, _superblock(layout, uuid))
    return size


def _seal(out: BinaryIO, superblock: fmt.Superblock) -> None:
    """Write the superblock, whose checksum covers all of the first block behind it."""
    out.seek(fmt.SUPERBLOCK_OFFSET + fmt.SUPERBLOCK.size)
    inodes = out.read(_BLOCK - out.tell())
    checksum = crc32c(fmt.SUPERBLOCK.pack(*superblock) + inodes)
    out.seek(fmt.SUPERBLOCK_OFFSET)
    out.write(fmt.SUPERBLOCK.pack(*superblock._replace(checksum=checksum)))


def extend_map(root: KeptInode, base: Map, spool: BinaryIO, out: BinaryIO, *, uuid: bytes) -> tuple[int, int]:
    """Make of `out`, a copy of the map `base`, the image of the tree `root`, which began as `kept_tree(base)`.

    Returns its size in bytes, and how many of them nothing refers to any more but did in `base`. Takes as long as what
    is new and the directories that it lies in, whatever the size of the map. `spool` as in `write_map`.

    Raises as `write_map`, and:
        NoRoom: the map must be written anew.
        Corrupt: `base` is damaged.
    """
    layout = Layout(Scan(root, base))
    removed = Removed(base, layout.scan.touched)
    out.seek(base.size)
    sink = _Sink(out, base.size)
    emitter = _Emitter(layout, spool, sink)
    emitter.emit()
    size = sink.finish()
    emitter.overwrite(out)
    for nid, links in removed.links.items():
        _overwrite_links(out, base.inode(nid), links)
    _seal(out, _extended_superblock(layout, base, removed, uuid))
    return size, removed.size + layout.left


def _extended_superblock(layout: Layout, base: Map, removed: Removed, uuid: bytes) -> fmt.Superblock:
    return base.superblock._replace(
        checksum=0,
        inodes=base.superblock.inodes + len(layout.inodes) - removed.inodes,
        blocks=layout.image_blocks,
        uuid=_checked_uuid(uuid),
        feature_incompat=base.superblock.feature_incompat | (fmt.INCOMPAT_CHUNKED_FILE if layout.has_chunks else 0),
    )


def _checked_uuid(uuid: bytes) -> bytes:
    if len(uuid) != 16:
        raise InvalidArgument(f"a uuid has 16 bytes, not {len(uuid)}")
    return uuid


def _overwrite_links(out: BinaryIO, inode: MapInode, links: int) -> None:
    out.seek(inode.address + (_EXTENDED_LINKS if inode.is_extended else _COMPACT_LINKS))
    out.write(links.to_bytes(4 if inode.is_extended else 2, "little"))


def _superblock(layout: Layout, uuid: bytes) -> fmt.Superblock:
    epoch, nsec = divmod(layout.scan.epoch, SECOND)
    return fmt.Superblock(
        feature_compat=fmt.COMPAT_SB_CHKSUM | fmt.COMPAT_MTIME | fmt.COMPAT_XATTR_FILTER,
        root_nid=layout.nids[layout.scan.root],
        inodes=len(layout.inodes),
        epoch=epoch,
        fixed_nsec=nsec,
        blocks=layout.image_blocks,
        xattr_block=layout.xattr_block if layout.scan.xattrs.area else 0,
        uuid=_checked_uuid(uuid),
        volume_name=_VOLUME_NAME,
        feature_incompat=fmt.INCOMPAT_CHUNKED_FILE if layout.has_chunks else 0,
    )


class _Sink:
    """The image as far as it is written; keeps about 1 MiB back."""

    def __init__(self, out: BinaryIO, start: int = 0) -> None:
        """Write to `out`, which is at the address `start`."""
        self._out = out
        self._parts: list[bytes] = []
        self._flushed = start
        self.size = start

    def write(self, data: bytes) -> None:
        """Add `data` right behind what there is."""
        self._parts.append(data)
        self.size += len(data)
        if self.size - self._flushed >= _PIECE:
            self._flush()

    def write_at(self, address: int, data: bytes) -> None:
        """Add `data` at `address`, and zeros up to there."""
        if address > self.size:
            self._parts.append(bytes(address - self.size))
            self.size = address
        self.write(data)

    def finish(self) -> int:
        """Fill the last block; return the image's size."""
        self.write_at(-(-self.size // _BLOCK) * _BLOCK, b"")
        self._flush()
        return self.size

    def _flush(self) -> None:
        self._out.write(b"".join(self._parts))
        self._flushed = self.size
        self._parts.clear()


class _Emitter:
    """Turns inodes into bytes; everything it needs has been found out."""

    def __init__(self, layout: Layout, spool: BinaryIO, sink: _Sink) -> None:
        self._layout = layout
        self._scan = layout.scan
        self._spool = spool
        self._sink = sink

    def emit(self) -> None:
        """Write all that is new but the superblock."""
        inodes, nids = self._layout.inodes, self._layout.nids
        area, area_at = self._scan.xattrs.area, self._layout.xattr_block * _BLOCK
        before_area = bisect_left(inodes, area_at >> fmt.SLOT_BITS, key=nids.__getitem__) if area else 0
        self._emit_inodes(0, before_area)
        if area:
            self._sink.write_at(area_at, area)
        self._emit_inodes(before_area, len(inodes))
        for directory in self._layout.directories:
            self._emit_directory_blocks(directory)
        for inode in self._layout.files:
            self._emit_file_blocks(inode)

    def overwrite(self, out: BinaryIO) -> None:
        """Write the touched directories over what they were."""
        moved = set(self._layout.directories)
        for directory in self._scan.touched:
            shape = self._layout.shapes[directory]
            out.seek(directory.nid << fmt.SLOT_BITS)
            try:
                head = self._head(directory, shape, directory.nid)
            except InvalidArgument as error:
                raise blame(self._scan.root, directory, str(error)) from None
            tail = self._tail(directory, shape.tail) if shape.tail else b""
            out.write(head + touched_body(self._scan, directory) + tail)
            if directory not in moved and shape.blocks:
                out.seek(self._layout.blocks[directory] * _BLOCK)
                out.writelines(self._directory_blocks(directory))

    def _emit_inodes(self, start: int, end: int) -> None:
        nids, shapes, sink = self._layout.nids, self._layout.shapes, self._sink
        for number, inode in enumerate(islice(self._layout.inodes, start, end), start + 1):
            try:
                record = self._record(inode, shapes[inode], number)
            except struct.error as error:
                raise blame(self._scan.root, inode, f"a number is out of range: {error}") from None
            except InvalidArgument as error:
                raise blame(self._scan.root, inode, str(error)) from None
            sink.write_at(nids[inode] << fmt.SLOT_BITS, record)

    def _record(self, inode: Inode, shape: Shape, number: int) -> bytes:
        """An inode and all that comes right behind it."""
        record = self._head(inode, shape, number)
        if shape.use:
            record += self._scan.xattrs.body(shape.use)
        if shape.layout == fmt.LAYOUT_CHUNK:
            redirect = redirect_entry(cast("ObjectDigest", inode.content))
            return record + redirect + _NULL_CHUNK * (shape.chunks // len(_NULL_CHUNK))
        return record + self._tail(inode, shape.tail) if shape.tail else record

    def _head(self, inode: Inode, shape: Shape, number: int) -> bytes:
        """The inode itself."""
        head, layout, _, xattrs, size, _, _, _ = shape
        form = layout << fmt.LAYOUT_SHIFT
        count = body_count(xattrs)
        links = self._scan.links.get(inode, 1)
        if layout == fmt.LAYOUT_CHUNK:
            place = fmt.CHUNK_MAX_BITS
        elif size:
            place = self._layout.blocks.get(inode, fmt.NULL_BLOCK)
        else:
            place = encode_device(inode.rdev) if inode.mode >> 12 in _DEVICES else 0
        if head == fmt.COMPACT_INODE.size:
            return fmt.COMPACT_INODE.pack(
                form, count, inode.mode, links, size, 0,
                place, number, inode.uid, inode.gid,
            )  # fmt: skip
        if inode.uid > MAX_ID or inode.gid > MAX_ID:
            raise InvalidArgument(f"owner {inode.uid}:{inode.gid} is out of range", hint=f"0 to {MAX_ID}")
        seconds, nsec = divmod(inode.mtime_ns, SECOND)
        return fmt.EXTENDED_INODE.pack(
            form | fmt.EXTENDED, count, inode.mode, size,
            place, number, inode.uid, inode.gid,
            seconds, nsec, links,
        )  # fmt: skip

    def _tail(self, inode: Inode, size: int) -> bytes:
        if inode.children is not None:
            return self._last_directory_block(inode)
        if inode.mode >> 12 == LNK:
            return inode.target
        return self._read(cast("int", inode.content) + inode.size - size, size)

    def _last_directory_block(self, directory: Inode) -> bytes:
        *_, last = dirents.split(directory.entries())
        return self._directory_block(directory, last)

    def _directory_block(self, directory: Inode, names: list[bytes]) -> bytes:
        children, nids = directory.entries(), self._layout.nids
        dots = {b".": directory, b"..": self._scan.parents[directory]}
        pack, types = fmt.DIRENT.pack, fmt.FILE_TYPES
        records = []
        offset = len(names) * fmt.DIRENT.size
        for name in names:
            child = children.get(name) or dots[name]
            records.append(pack(nids[child], offset, types[child.mode >> 12]))
            offset += len(name)
        return b"".join(records + names)

    def _emit_directory_blocks(self, directory: Inode) -> None:
        address = self._layout.blocks[directory] * _BLOCK
        for block in self._directory_blocks(directory):
            self._sink.write_at(address, block)
            address += _BLOCK

    def _directory_blocks(self, directory: Inode) -> Iterator[bytes]:
        """Its blocks that are not behind its inode; the last may be shorter than a block, the others are not.

        A directory's block is filled up with zeros.
        """
        for names in islice(dirents.split(directory.entries()), self._layout.shapes[directory].blocks):
            yield self._directory_block(directory, names).ljust(_BLOCK, b"\0")

    def _emit_file_blocks(self, inode: Inode) -> None:
        self._sink.write_at(self._layout.blocks[inode] * _BLOCK, b"")
        if inode.mode >> 12 == LNK:
            self._sink.write(inode.target)
            return
        start = cast("int", inode.content)
        end = start + inode.size - self._layout.shapes[inode].tail
        for offset in range(start, end, _PIECE):
            self._sink.write(self._read(offset, min(_PIECE, end - offset)))

    def _read(self, offset: int, size: int) -> bytes:
        self._spool.seek(offset)
        data = self._spool.read(size)
        if len(data) != size:
            raise Corrupt(f"the spool ends {size - len(data)} bytes short of offset {offset + size}")
        return data
