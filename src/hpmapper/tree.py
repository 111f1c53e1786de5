"""The noun passed from stage to stage: a layer's files as inodes in memory.

A tree holds what one layer says, not the merged view: whiteouts are inodes too. Two names of one file (hard
links) are two entries holding the *same* `Inode` object. File data is not here: an inode's `content` says where it is.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator

from hpmapper.model import ObjectDigest

Xattrs = tuple[tuple[bytes, bytes], ...]
"""(name, value) pairs sorted by name, exactly as the tar or the file system gave them."""


class Inode:
    """One file of any type.

    Attributes:
        mode: file type and permission bits, as `st_mode`.
        uid, gid: 0 to 2**32 - 2.
        mtime_ns: nanoseconds since 1970, may be negative.
        size: bytes of data (regular files) or of the target (symlinks); 0 for the rest.
        rdev: `os.makedev` number of a character or block device. A character device 0 is a whiteout.
        xattrs: see `Xattrs`.
        content: of a regular file with data: an object's digest (bytes) when the data is an object of the
            store, or an offset (int) into the layer's spool when it is to lie in the map. None when size is 0.
        target: a symlink's target; b"" for the rest.
        children: a directory's entries by name; None for the rest.
        opaque: a directory that hides what lower layers have under its path.
    """

    __slots__ = ("children", "content", "gid", "mode", "mtime_ns", "opaque", "rdev", "size", "target", "uid", "xattrs")

    def __init__(
        self,
        mode: int,
        uid: int = 0,
        gid: int = 0,
        mtime_ns: int = 0,
        *,
        size: int = 0,
        rdev: int = 0,
        xattrs: Xattrs = (),
        content: ObjectDigest | int | None = None,
        target: bytes = b"",
        opaque: bool = False,
    ) -> None:
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.mtime_ns = mtime_ns
        self.size = size
        self.rdev = rdev
        self.xattrs = xattrs
        self.content = content
        self.target = target
        self.opaque = opaque
        self.children: dict[bytes, Inode] | None = {} if stat.S_ISDIR(mode) else None

    @property
    def is_dir(self) -> bool:
        return self.children is not None

    @property
    def is_whiteout(self) -> bool:
        """Whether it deletes the lower layers' file of its name (overlayfs: a 0/0 character device)."""
        return self.rdev == 0 and stat.S_ISCHR(self.mode)

    def entries(self) -> dict[bytes, Inode]:
        """A directory's children; raises for anything else."""
        if self.children is None:
            raise NotADirectoryError
        return self.children


def whiteout() -> Inode:
    """A new whiteout; its times are 0, as every tool writes them."""
    return Inode(stat.S_IFCHR, 0, 0, 0, rdev=0)


def directory(mode: int = 0o755, uid: int = 0, gid: int = 0, mtime_ns: int = 0) -> Inode:
    """A new empty directory."""
    return Inode(stat.S_IFDIR | mode, uid, gid, mtime_ns)


def walk(root: Inode, path: bytes = b"") -> Iterator[tuple[bytes, Inode]]:
    """Yield (path, inode) for `root` and all below, parents first, names in byte order.

    Paths have no leading slash; the root's is b"". Iterative: a hostile tar may nest deeper than Python recurses.
    """
    stack = [(path, root)]
    while stack:
        here, inode = stack.pop()
        yield here, inode
        if inode.children:
            prefix = here + b"/" if here else b""
            stack.extend((prefix + name, child) for name, child in sorted(inode.children.items(), reverse=True))
