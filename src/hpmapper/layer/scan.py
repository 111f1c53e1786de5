"""From a directory on disk to a tree: a container's upper directory, a layer's, or a plain root file system.

An overlay directory speaks overlayfs: 0/0 devices delete, `trusted.overlay.*` attributes are its own. (Kernel:
Documentation/filesystems/overlayfs.rst.) A plain one says what it is.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from typing import BinaryIO

from hpmapper.errors import InvalidArgument
from hpmapper.layer.acl import XFS_NAMES
from hpmapper.tree import Inode, Xattrs

OVERLAY = b"trusted.overlay."
ESCAPED = b"trusted.overlay.overlay."
OPAQUE = b"trusted.overlay.opaque"
METACOPY = b"trusted.overlay.metacopy"
REDIRECT = b"trusted.overlay.redirect"


def scan(top: bytes, *, overlay: bool, merged: bytes | None = None) -> Inode:
    """The tree of the directory `top`. Names of one file become entries of one inode; data is left where it is.

    With `merged`, the mount that an overlay upper belongs to, directories that were renamed as a whole (the
    upper has only a redirect for them: trap of `redirect_dir=on`) are read from there.

    Raises:
        InvalidArgument: it is deeper than a path can be long, which a container can make it.
    """
    try:
        return _scan(top, overlay, merged)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise InvalidArgument(f"the directories in {os.fsdecode(top)} are nested too deeply to be read") from None


def _scan(top: bytes, overlay: bool, merged: bytes | None) -> Inode:
    links: dict[tuple[int, int], Inode] = {}
    root = read_inode(top, overlay=overlay)
    stack = [(top, root, overlay)]
    while stack:
        path, here, dialect = stack.pop()
        children = here.entries()
        with os.scandir(path) as entries:
            for entry in entries:
                child = _linked(entry, dialect, links)
                children[entry.name] = child
                if child.is_dir:
                    moved = dialect and merged is not None and _has_redirect(entry.path)
                    child.opaque = child.opaque or moved
                    below = merged + entry.path[len(top) :] if moved and merged is not None else entry.path
                    stack.append((below, child, dialect and not moved))
    return root


def _linked(entry: os.DirEntry[bytes], overlay: bool, links: dict[tuple[int, int], Inode]) -> Inode:
    status = entry.stat(follow_symlinks=False)
    if status.st_nlink == 1 or stat.S_ISDIR(status.st_mode):
        return _from_status(entry.path, status, overlay)
    key = status.st_dev, status.st_ino
    inode = links.get(key)
    if inode is None:
        inode = links[key] = _from_status(entry.path, status, overlay)
    # A device 0/0 that overlayfs linked many times (it shares one whiteout) is as many deletions.
    return inode if not inode.is_whiteout else _from_status(entry.path, status, overlay)


def read_inode(path: bytes, *, overlay: bool) -> Inode:
    """The inode at `path`, a symlink not followed; its children, if any, not read."""
    return _from_status(path, os.lstat(path), overlay)


def _from_status(path: bytes, status: os.stat_result, overlay: bool) -> Inode:
    mode = status.st_mode
    inode = Inode(mode, status.st_uid, status.st_gid, status.st_mtime_ns)
    if stat.S_ISREG(mode):
        inode.size = status.st_size
    elif stat.S_ISLNK(mode):
        inode.target = os.readlink(path)
        inode.size = len(inode.target)
    elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        inode.rdev = status.st_rdev
    raw = _xattrs(path)
    if overlay and raw:
        inode.opaque = (OPAQUE, b"y") in raw
        raw = tuple(_without_overlay(raw))
    inode.xattrs = raw
    return inode


def _xattrs(path: bytes) -> Xattrs:
    names = [os.fsencode(name) for name in os.listxattr(path, follow_symlinks=False)]
    kept = sorted(name for name in names if name not in XFS_NAMES) if names else ()
    return tuple((name, os.getxattr(path, name, follow_symlinks=False)) for name in kept)


def _without_overlay(raw: Xattrs) -> Iterator[tuple[bytes, bytes]]:
    for name, value in raw:
        if name.startswith(ESCAPED):
            yield OVERLAY + name.removeprefix(ESCAPED), value
        elif not name.startswith(OVERLAY):
            yield name, value


def _has_redirect(path: bytes) -> bool:
    return os.fsdecode(REDIRECT) in os.listxattr(path, follow_symlinks=False)


class DirectoryView:
    """One layer that is a directory in overlayfs's dialect, for `merged.Merged`."""

    def __init__(self, top: bytes, *, overlay: bool = True) -> None:
        self._top = top
        self._overlay = overlay

    def lookup(self, path: bytes) -> Inode | None:
        try:
            return read_inode(self._top + b"/" + path, overlay=self._overlay)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def names(self, path: bytes) -> list[bytes]:
        return os.listdir(self._top + b"/" + path)

    def open(self, path: bytes) -> BinaryIO:
        return open(os.open(self._top + b"/" + path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb")
