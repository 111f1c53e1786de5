"""The on-disk metadata of a thin pool, read: which devices there are, and which blocks each has.

Linux: drivers/md/dm-thin-metadata.c, drivers/md/persistent-data/. Trees are copied on write, so two devices that have
much in common share whole subtrees: what differs is found by looking at what is not shared, whatever their sizes.

Never trusted: a block whose checksum or number is wrong is `Corrupt`, and no walk is longer than the metadata.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from hpmapper.erofs.hashes import crc32c
from hpmapper.errors import Corrupt

BLOCK = 4096
_MAGIC = 27022010
_SUPERBLOCK_SALT, _NODE_SALT = 160774, 121107
_INTERNAL, _LEAF = 1, 2

_SUPERBLOCK = struct.Struct("<IIQ16sQIIQQ128s128sQQIIQ")  # struct thin_disk_superblock, up to metadata_nr_blocks
_NODE = struct.Struct("<IIQIIII")  # struct node_header
_DETAILS = struct.Struct("<QQII")  # struct disk_device_details
_NEEDS_CHECK = 1


class Superblock(NamedTuple):
    """The root of all. `held_root`: the block of the copy held for user space, 0 for none; `block`: data's, sectors."""

    needs_check: bool
    transaction: int
    held_root: int
    mappings: int
    details: int
    block: int
    metadata_blocks: int


class Details(NamedTuple):
    """What the pool notes of a device: blocks mapped, and by which transaction it was made."""

    mapped: int
    transaction: int
    created: int
    snapshotted: int


class Metadata:
    """A metadata device or file, open for reading."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._page = mmap.mmap(-1, BLOCK)  # aligned, as direct I/O wants it
        self._limit = os.lseek(fd, 0, os.SEEK_END) // BLOCK

    def superblock(self, block: int = 0) -> Superblock:
        """The superblock, or the copy of it that a metadata snapshot is."""
        data = self._read(block, _SUPERBLOCK_SALT)
        _, flags, _, _, magic, version, _, transaction, held, _, _, mappings, details, size, _, blocks = (
            _SUPERBLOCK.unpack_from(data)
        )
        if magic != _MAGIC or version not in (1, 2):
            raise Corrupt(f"block {block} of the pool's metadata is no superblock", hint="hpmapper pool check")
        return Superblock(bool(flags & _NEEDS_CHECK), transaction, held, mappings, details, size, blocks)

    def devices(self, root: Superblock) -> dict[int, Details]:
        """The thin devices, by their ids."""
        return {device: Details(*_DETAILS.unpack(value)) for device, value in self._walk(root.details)}

    def mapped(self, root: Superblock, device: int) -> dict[int, int]:
        """The data block behind each mapped block of a device."""
        return self._blocks(self._device_root(root, device))

    def changed(self, root: Superblock, before: int, after: int) -> set[int]:
        """The blocks of device `after` that are not the ones of `before`: written since one was made of the other.

        What is read is what the two do not share, and the inner nodes above it.
        """
        old, new = self._device_root(root, before), self._device_root(root, after)
        if old == new:
            return set()
        shared = self._nodes(old) & self._nodes(new)
        known = self._blocks(old, without=shared)
        return {block for block, data in self._blocks(new, without=shared).items() if known.get(block) != data}

    def is_unchanged(self, root: Superblock, before: int, after: int) -> bool:
        """Whether nothing at all was written to `after` since it was made of `before`: they are one tree."""
        return self._device_root(root, before) == self._device_root(root, after)

    def exclusive(self, root: Superblock) -> dict[int, int]:
        """Of each device's blocks, how many no other has: what deleting it gives back. By id, in blocks.

        A leaf that several devices share is read once, and holds nothing that one has alone.
        """
        tops = {device: self._device_root(root, device) for device in self.devices(root)}
        leaves = {device: self._leaves(top) for device, top in tops.items()}
        users = Counter(leaf for found in leaves.values() for leaf in found)
        owners: Counter[int] = Counter()
        for leaf, count in users.items():
            for block in self._data_blocks(leaf):
                owners[block] += count
        return {
            device: sum(owners[block] == 1 for leaf in found if users[leaf] == 1 for block in self._data_blocks(leaf))
            for device, found in leaves.items()
        }

    def _data_blocks(self, leaf: int) -> Iterator[int]:
        return map(_data_block, self._node(leaf)[2])

    def _blocks(self, tree: int, without: set[int] | None = None) -> dict[int, int]:
        return {block: _data_block(value) for block, value in self._walk(tree, without=without)}

    def _device_root(self, root: Superblock, device: int) -> int:
        for found, value in self._walk(root.mappings, only=device):
            if found == device:
                return int.from_bytes(value, "little")
        raise Corrupt(f"the pool's metadata has no thin device {device}", hint="hpmapper fsck")

    def _walk(
        self, tree: int, *, only: int | None = None, without: set[int] | None = None
    ) -> Iterator[tuple[int, bytes]]:
        """The keys and values of a tree, in order; `only` the leaf that may have this key, `without` these subtrees."""
        pending = [tree]
        seen = 0
        while pending:
            block = pending.pop()
            if without and block in without:
                continue
            seen += 1
            if seen > self._limit:
                raise Corrupt("the pool's metadata has a tree that runs in a circle", hint="hpmapper pool check")
            flags, keys, values = self._node(block)
            if flags == _LEAF:
                yield from zip(keys, values, strict=True)
                continue
            children = [int.from_bytes(value, "little") for value in values]
            if only is not None:
                at = sum(key <= only for key in keys) - 1
                children = children[at : at + 1] if at >= 0 else []
            pending.extend(reversed(children))

    def _nodes(self, tree: int) -> set[int]:
        """The blocks that a tree consists of."""
        return {block for level in self._levels(tree) for block in level}

    def _leaves(self, tree: int) -> list[int]:
        """The blocks that are a tree's leaves."""
        return list(self._levels(tree))[-1]

    def _levels(self, tree: int) -> Iterator[list[int]]:
        """A tree's blocks, level by level. All leaves are equally deep; they are not read, but for one."""
        level, seen = [tree], {tree}
        yield level
        while self._node(level[0])[0] == _INTERNAL:
            level = [int.from_bytes(value, "little") for block in level for value in self._inner(block)]
            if not level or not seen.isdisjoint(level) or len(seen) > self._limit:
                raise Corrupt("the pool's metadata has a tree that runs in a circle", hint="hpmapper pool check")
            seen.update(level)
            yield level

    def _inner(self, block: int) -> list[bytes]:
        flags, _, values = self._node(block)
        if flags != _INTERNAL:
            raise Corrupt(f"block {block} of the pool's metadata is no inner node", hint="hpmapper pool check")
        return values

    def _node(self, block: int) -> tuple[int, tuple[int, ...], list[bytes]]:
        data = self._read(block, _NODE_SALT)
        _, flags, _, entries, room, size, _ = _NODE.unpack_from(data)
        if flags not in (_INTERNAL, _LEAF) or entries > room or _NODE.size + room * (8 + size) > BLOCK:
            raise Corrupt(f"block {block} of the pool's metadata is no tree node", hint="hpmapper pool check")
        keys = struct.unpack_from(f"<{entries}Q", data, _NODE.size)
        start = _NODE.size + 8 * room
        return flags, keys, [data[start + at * size : start + (at + 1) * size] for at in range(entries)]

    def _read(self, block: int, salt: int) -> bytes:
        if block >= self._limit or os.preadv(self._fd, [self._page], block * BLOCK) != BLOCK:
            raise Corrupt(f"block {block} lies beyond the pool's metadata", hint="hpmapper pool check")
        data = self._page[:]
        checksum, _, number = struct.unpack_from("<IIQ", data)
        if crc32c(data[4:]) ^ salt != checksum or number != block:
            raise Corrupt(f"block {block} of the pool's metadata is damaged", hint="hpmapper pool check")
        return data


def _data_block(value: bytes) -> int:
    return int.from_bytes(value, "little") >> 24  # the rest is the time of the mapping


@contextmanager
def opened(path: Path) -> Iterator[Metadata]:
    """Metadata of a device or file, past the page cache: the kernel writes it past the page cache, too."""
    flags = os.O_RDONLY | os.O_CLOEXEC
    try:
        fd = os.open(path, flags | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fd = os.open(path, flags)  # a file where there is no direct I/O
    try:
        yield Metadata(fd)
    finally:
        os.close(fd)
