"""A chain of layers flattened to one tree: what overlayfs would show, decided once instead of at every lookup."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from typing import BinaryIO

from hpmapper.layer.marks import IMPLIED_ROOT
from hpmapper.tree import Inode, directory


def merge(layers: Iterable[Inode], onto: Inode | None = None) -> Inode:
    """Flatten layers, the lowest first, into a tree without whiteouts or opaque directories, and return it.

    With `onto`, that is what it grows from: a tree made so before, with whatever its directories' `entries` do.
    Consumes the layers: the result holds their inodes. Hard links stay links.
    """
    root = directory(0o755) if onto is None else onto
    for layer in layers:
        _apply(root, layer)
    return root


def _apply(root: Inode, layer: Inode) -> None:
    pending = [(root, layer)]
    while pending:
        below, above = pending.pop()
        entries = below.entries()  # before the attributes: a directory of a map reads both now
        if above is not layer or (IMPLIED_ROOT, b"y") not in layer.xattrs:
            _copy_attributes(above, below)
        for name, child in above.entries().items():
            if child.is_whiteout:
                entries.pop(name, None)
            elif child.is_dir:
                pending.append((_directory(entries, name, child), child))
            else:
                entries[name] = child


def _directory(entries: dict[bytes, Inode], name: bytes, above: Inode) -> Inode:
    """The directory that `above` is merged into: the one there, or a new one where it hides what is there."""
    below = entries.get(name)
    if below is None or not below.is_dir or above.opaque:
        below = entries[name] = directory()
    return below


def _copy_attributes(source: Inode, target: Inode) -> None:
    target.mode, target.uid, target.gid = source.mode, source.uid, source.gid
    target.mtime_ns, target.xattrs = source.mtime_ns, source.xattrs


def _move(tree: Inode, distance: int) -> None:
    """Let all small files' data lie `distance` bytes further on."""
    moved = set()
    pending = [tree]
    while pending:
        for child in pending.pop().entries().values():
            if child.children is not None:
                pending.append(child)
            elif type(child.content) is int and child not in moved:
                moved.add(child)  # once, however many names it has
                child.content += distance


class Spools(io.RawIOBase):
    """Several layers' spools as one: the high bits of an offset say which."""

    _SHIFT = 48  # no spool has more than 256 TiB

    def __init__(self) -> None:
        self._spools: list[BinaryIO] = []
        self._current: BinaryIO | None = None

    def add(self, tree: Inode, spool: BinaryIO) -> Inode:
        """Take in a layer's spool; lets its tree point into this one."""
        base = len(self._spools) << self._SHIFT
        self._spools.append(spool)
        spool.flush()
        if base:
            _move(tree, base)
        return tree

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._current = self._spools[offset >> self._SHIFT]
        return self._current.seek(offset & ((1 << self._SHIFT) - 1), whence)

    def read(self, size: int = -1) -> bytes:
        assert self._current is not None, "seek first"
        return self._current.read(size)
