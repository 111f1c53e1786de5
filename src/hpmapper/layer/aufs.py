"""AUFS's form of a layer, a directory (Linux's aufs: include/uapi/linux/aufs_type.h), to a tree and path by path.

    .wh.NAME         NAME is deleted           .wh..wh..opq   the directory hides those below it
    .wh..wh.NAME     AUFS's own bookkeeping: .wh..wh.aufs (which the deletions are hard links of), .wh..wh.plnk (hard
                     links across branches), .wh..wh.orph (directories that are removed while in use), and files that
                     are just being renamed. No part of a layer.

Layer tars took their words for deletions from here, so that no name of a layer can begin with ".wh.".
"""

from __future__ import annotations

import os
from typing import BinaryIO

from hpmapper.layer.build import OPAQUE_MARKER, WHITEOUT_META, WHITEOUT_PREFIX
from hpmapper.layer.scan import DirectoryView, scan
from hpmapper.tree import Inode, whiteout

MAX_NAME = 242
"""Bytes of a name that AUFS shows: it wants room for two prefixes and a suffix of its own in the 255 below it."""


def scan_branch(top: bytes) -> Inode:
    """The tree of the directory `top`: what a layer or a container's own branch says; raises as `scan`."""
    root = scan(top, overlay=False)
    pending = [root]
    while pending:
        here = pending.pop()
        _translate(here)
        pending.extend(child for child in here.entries().values() if child.is_dir)
    return root


def _translate(here: Inode) -> None:
    """Turn the names that mean something into what they mean."""
    children = here.entries()
    for name in [name for name in children if name.startswith(WHITEOUT_PREFIX)]:
        del children[name]
        if name == OPAQUE_MARKER:
            here.opaque = True
        elif not name.startswith(WHITEOUT_META):
            children[name.removeprefix(WHITEOUT_PREFIX)] = whiteout()


def is_untouched(top: bytes) -> bool:
    """Whether a branch has nothing at its top level but AUFS's own."""
    return all(name.startswith(WHITEOUT_META) and name != OPAQUE_MARKER for name in os.listdir(top))


class BranchView:
    """One layer in AUFS's form (`merged.LayerView`)."""

    def __init__(self, top: bytes) -> None:
        self._top = top
        self._plain = DirectoryView(top, overlay=False)

    def lookup(self, path: bytes) -> Inode | None:
        above, slash, name = path.rpartition(b"/")
        if name.startswith(WHITEOUT_PREFIX):
            return None
        if path and self._has(above + slash + WHITEOUT_PREFIX + name):
            return whiteout()
        inode = self._plain.lookup(path)
        if inode is not None and inode.is_dir:
            inode.opaque = self._has(path + b"/" + OPAQUE_MARKER)
        return inode

    def names(self, path: bytes) -> list[bytes]:
        found = (name for name in self._plain.names(path) if not name.startswith(WHITEOUT_META))
        return sorted({name.removeprefix(WHITEOUT_PREFIX) for name in found})

    def open(self, path: bytes) -> BinaryIO:
        return self._plain.open(path)

    def _has(self, path: bytes) -> bool:
        return os.path.lexists(self._top + b"/" + path)
