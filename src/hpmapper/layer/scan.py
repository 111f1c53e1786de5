"""From a directory on disk to a tree: a container's upper directory, a layer's, or a plain root file system.

An overlay directory speaks overlayfs: 0/0 devices delete, attributes of certain names are its own (`marks`). (Kernel:
Documentation/filesystems/overlayfs.rst.) A plain one says what it is.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from typing import BinaryIO

from hpmapper.errors import InvalidArgument
from hpmapper.layer.acl import XFS_NAMES
from hpmapper.layer.marks import ESCAPED, OPAQUE, OVERLAY, REDIRECT
from hpmapper.tree import Inode, Xattrs

_PIECE = 1 << 20
_Links = dict[tuple[int, int], Inode]
"""Inodes that have several names, by device and number."""


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
    links: _Links = {}
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


def scan_pair(
    before: bytes, after: bytes, same: Callable[[os.DirEntry[bytes], os.DirEntry[bytes]], bool]
) -> tuple[Inode, Inode]:
    """The trees of two plain directories, without what they have in common, for `compare`.

    `same` tells of two entries of one name, in directories that correspond, whether they and all below them are known
    to be the same. A regular file that seems so, but for `same`, is left out of the first tree if its data differ.

    Raises:
        InvalidArgument: they are too deep.
    """
    try:
        return _scan_pair(before, after, same)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise InvalidArgument(f"the directories in {os.fsdecode(after)} are nested too deeply to be read") from None


def _scan_pair(
    before: bytes, after: bytes, same: Callable[[os.DirEntry[bytes], os.DirEntry[bytes]], bool]
) -> tuple[Inode, Inode]:
    links: tuple[_Links, _Links] = {}, {}
    roots = read_inode(before, overlay=False), read_inode(after, overlay=False)
    stack: list[tuple[bytes | None, bytes, Inode, Inode]] = [(before, after, *roots)]
    while stack:
        old_path, new_path, old, new = stack.pop()
        olds, news = _entries(old_path), _entries(new_path)
        for name in olds.keys() | news.keys():
            former, entry = olds.get(name), news.get(name)
            if former and entry and same(former, entry):
                continue
            was = _linked(former, False, links[0]) if former else None
            child = _linked(entry, False, links[1]) if entry else None
            if was and not (child and entry and former and _differ_in_data_only(was, child, former.path, entry.path)):
                old.entries()[name] = was
            if child and entry:
                new.entries()[name] = child
                if child.is_dir:
                    below = former.path if former and was and was.is_dir else None
                    stack.append((below, entry.path, was or child, child))
    return roots


def _entries(path: bytes | None) -> dict[bytes, os.DirEntry[bytes]]:
    if path is None:
        return {}
    with os.scandir(path) as entries:
        return {entry.name: entry for entry in entries}


def _differ_in_data_only(old: Inode, new: Inode, old_path: bytes, new_path: bytes) -> bool:
    """Whether two regular files of one size and time, as whoever sets a file's time back makes them, differ."""
    if not (stat.S_ISREG(old.mode) and stat.S_ISREG(new.mode) and new.size):
        return False
    if (old.size, old.mtime_ns) != (new.size, new.mtime_ns):
        return False
    with open(old_path, "rb") as one, open(new_path, "rb") as other:
        return any(one.read(_PIECE) != other.read(_PIECE) for _ in range(0, new.size, _PIECE))


def _linked(entry: os.DirEntry[bytes], overlay: bool, links: _Links) -> Inode:
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
