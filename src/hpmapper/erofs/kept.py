"""A map as a tree that can be changed: what nobody touches stays a number.

`hpmapper.layer.merge` puts layers on such a tree, and `extend_map` writes what became of it behind a copy of the map.
Both read only the directories on the way to a change, however large the map is.
"""

from __future__ import annotations

from collections.abc import Iterator

from hpmapper.erofs import format as fmt
from hpmapper.erofs.dirents import DOTS, Dirent
from hpmapper.erofs.reader import Map, MapInode
from hpmapper.tree import Inode

_MODES = {kind: mode << 12 for mode, kind in fmt.FILE_TYPES.items()}


class KeptInode(Inode):
    """An inode of a map. Until `entries` is called, nothing is known of it but its type.

    Attributes:
        nid: its number in the map.
        found: as it is in the map; None until it was read.
        before: the numbers of its entries by name, as they are in the map; without the dots.
    """

    __slots__ = ("_map", "before", "found", "nid")

    def __init__(self, base: Map, nid: int, mode: int) -> None:
        super().__init__(mode, rdev=-1)  # no whiteout, whatever it is
        self._map = base
        self.nid = nid
        self.found: MapInode | None = None
        self.before: dict[bytes, int] = {}

    def entries(self) -> dict[bytes, Inode]:
        """A directory's children, which may be changed; read when first asked for."""
        children = super().entries()
        if self.found is None:
            self.found = self._read(children)
        return children

    def _read(self, children: dict[bytes, Inode]) -> MapInode:
        found = self._map.inode(self.nid)
        self.mode, self.uid, self.gid, self.mtime_ns = found.mode, found.uid, found.gid, found.mtime_ns
        self.xattrs, self.opaque = found.xattrs, found.opaque
        for entry in _entries(self._map, found):
            mode = _MODES.get(entry.type)
            if mode is None:
                raise self._map.corrupt(f"inode {self.nid}: {entry.name!r} has type {entry.type}")
            self.before[entry.name] = entry.nid
            children[entry.name] = KeptInode(self._map, entry.nid, mode)
        return found


def _entries(base: Map, directory: MapInode) -> list[Dirent]:
    """All but the dots.

    Raises:
        Corrupt: what the map calls a directory is none.
    """
    if not directory.is_dir:
        raise base.corrupt(f"inode {directory.nid}: it is no directory")
    return [entry for entry in base.entries(directory) if entry.name not in DOTS]


def kept_tree(base: Map) -> KeptInode:
    """The root of a map, to be changed.

    Raises:
        Corrupt: the map is damaged; so may anything that reads from the tree.
    """
    return KeptInode(base, base.root.nid, base.root.mode)


class Removed:
    """What of a map is not in a changed tree any more.

    Attributes:
        inodes: how many.
        size: bytes of the map that they took.
        links: the link counts of files that lost some of their names, by number.
    """

    def __init__(self, base: Map, touched: list[KeptInode]) -> None:
        self._map = base
        self.inodes = 0
        self.size = 0
        self.links: dict[int, int] = {}
        for nid in self._gone(touched):
            self._remove(nid)

    def _gone(self, touched: list[KeptInode]) -> Iterator[int]:
        """The numbers of all names that are gone, but for names below a directory that is gone."""
        for directory in touched:
            children = directory.entries()
            for name, nid in directory.before.items():
                child = children.get(name)
                if not (type(child) is KeptInode and child.nid == nid):
                    yield nid

    def _remove(self, nid: int) -> None:
        pending = [nid]
        while pending:
            inode = self._map.inode(pending.pop())
            if inode.is_dir:
                pending.extend(entry.nid for entry in _entries(self._map, inode))
            else:
                left = self.links.get(inode.nid, inode.nlink) - 1
                if left:
                    self.links[inode.nid] = left
                    continue
                self.links.pop(inode.nid, None)
            self.inodes += 1
            self.size += inode.extent + (inode.length if type(inode.content) is int else 0)
            if self.inodes > self._map.superblock.inodes:
                raise self._map.corrupt(f"inode {nid}: it has more below it than the map announces")
