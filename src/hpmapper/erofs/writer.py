"""A tree becomes an EROFS image: uncompressed, 4 KiB blocks, the same bytes for the same tree.

`plan.Scan` counts, `plan.Layout` places, and the emitter here writes everything by its place, so that the image
leaves as one stream: inodes with their small data, then directories' further blocks, then files' further blocks.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from itertools import islice
from typing import BinaryIO, cast

from hpmapper.erofs import dirents
from hpmapper.erofs import format as fmt
from hpmapper.erofs.hashes import crc32c
from hpmapper.erofs.inodes import MAX_ID, SECOND, encode_device
from hpmapper.erofs.plan import BLK, CHR, LNK, Layout, Scan, Shape, blame
from hpmapper.erofs.xattrs import body_count, redirect_entry
from hpmapper.errors import Corrupt, InvalidArgument
from hpmapper.model import ObjectDigest
from hpmapper.tree import Inode

_BLOCK = fmt.BLOCK
_PIECE = 1 << 20
_CHECKSUM_OFFSET = fmt.SUPERBLOCK_OFFSET + 4
_NULL_CHUNK = fmt.CHUNK_ENTRY.pack(fmt.NULL_BLOCK)
_DEVICES = (CHR, BLK)
_VOLUME_NAME = b"hpmapper"


def write_map(root: Inode, spool: BinaryIO, out: BinaryIO, *, uuid: bytes) -> int:
    """Write the image of the tree `root` to `out` and return its size in bytes.

    Data of a file whose `content` is a number is read from `spool` at that offset. `out` is only written to, in
    pieces of about 1 MiB. The tree must not change meanwhile.

    Raises:
        InvalidArgument: the tree says what EROFS cannot hold; names the path.
        Corrupt: the spool is shorter than the tree says.
    """
    layout = Layout(Scan(root))
    sink = _Sink(out)
    sink.write(bytes(fmt.SUPERBLOCK_OFFSET) + fmt.SUPERBLOCK.pack(*_superblock(layout, uuid)))
    _Emitter(layout, spool, sink).emit()
    return sink.finish()


def _superblock(layout: Layout, uuid: bytes) -> fmt.Superblock:
    if len(uuid) != 16:
        raise InvalidArgument(f"a uuid has 16 bytes, not {len(uuid)}")
    epoch, nsec = divmod(layout.scan.epoch, SECOND)
    return fmt.Superblock(
        feature_compat=fmt.COMPAT_SB_CHKSUM | fmt.COMPAT_MTIME | fmt.COMPAT_XATTR_FILTER,
        root_nid=layout.nids[layout.scan.root],
        inodes=len(layout.inodes),
        epoch=epoch,
        fixed_nsec=nsec,
        blocks=layout.image_blocks,
        xattr_block=layout.xattr_block if layout.scan.xattrs.area else 0,
        uuid=uuid,
        volume_name=_VOLUME_NAME,
        feature_incompat=fmt.INCOMPAT_CHUNKED_FILE if layout.has_chunks else 0,
    )


class _Sink:
    """The image as far as it is written. Keeps about 1 MiB back, and puts the checksum into the first block."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._parts: list[bytes] = []
        self._flushed = 0
        self.size = 0

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
        data = b"".join(self._parts)
        if not self._flushed:
            sealed = fmt.CHUNK_ENTRY.pack(crc32c(data[fmt.SUPERBLOCK_OFFSET : _BLOCK]))
            data = data[:_CHECKSUM_OFFSET] + sealed + data[_CHECKSUM_OFFSET + len(sealed) :]
        self._out.write(data)
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
        """Write all that follows the superblock."""
        inodes, nids = self._layout.inodes, self._layout.nids
        area_at = self._layout.xattr_block * _BLOCK
        before_area = bisect_left(inodes, area_at >> fmt.SLOT_BITS, key=nids.__getitem__)
        self._emit_inodes(0, before_area)
        self._sink.write_at(area_at, self._scan.xattrs.area)
        self._emit_inodes(before_area, len(inodes))
        for directory in self._layout.directories:
            self._emit_directory_blocks(directory)
        for inode in self._layout.files:
            self._emit_file_blocks(inode)

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
        head, layout, use, xattrs, size, chunks, tail, _ = shape
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
            record = fmt.COMPACT_INODE.pack(
                form, count, inode.mode, links, size, 0,
                place, number, inode.uid, inode.gid,
            )  # fmt: skip
        else:
            if inode.uid > MAX_ID or inode.gid > MAX_ID:
                raise InvalidArgument(f"owner {inode.uid}:{inode.gid} is out of range", hint=f"0 to {MAX_ID}")
            seconds, nsec = divmod(inode.mtime_ns, SECOND)
            record = fmt.EXTENDED_INODE.pack(
                form | fmt.EXTENDED, count, inode.mode, size,
                place, number, inode.uid, inode.gid,
                seconds, nsec, links,
            )  # fmt: skip
        if use:
            record += self._scan.xattrs.body(use)
        if layout == fmt.LAYOUT_CHUNK:
            redirect = redirect_entry(cast("ObjectDigest", inode.content))
            return record + redirect + _NULL_CHUNK * (chunks // len(_NULL_CHUNK))
        return record + self._tail(inode, tail) if tail else record

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
        shape = self._layout.shapes[directory]
        address = self._layout.blocks[directory] * _BLOCK
        for names in islice(dirents.split(directory.entries()), shape.blocks):
            self._sink.write_at(address, self._directory_block(directory, names))
            address += _BLOCK

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
