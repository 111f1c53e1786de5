"""An image as text: one line per path, in order, for golden tests and for people.

    /usr/bin/a 100755 2 0:0 1700000000.000000000 object 81920 ab12… security.capability=\\x01…
    path       mode   links owner mtime          what, and what belongs to it; xattrs

A further name of a file is "= " and its first. Bytes that are not printable ASCII, and space, "\\" and "=", are
written \\xNN. Times before 1970 count seconds down and nanoseconds up, as in struct timespec. Nothing depends on
where things lie in the image.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from blake3 import blake3

from hpmapper.erofs.inodes import SECOND, MapInode
from hpmapper.erofs.reader import Map
from hpmapper.tree import walk

_SHOWN = frozenset(range(0x21, 0x7F)) - frozenset(b"\\=")
_INLINE_SHOWN = 48


def dump(image: Map) -> Iterator[str]:
    """The lines of `image`, without line ends.

    Raises:
        Corrupt: the image is damaged.
    """
    first: dict[int, bytes] = {}
    for path, inode in walk(image.tree()):
        if not isinstance(inode, MapInode):
            raise TypeError
        known = first.setdefault(inode.nid, path)
        yield f"/{_text(path)} " + (f"= /{_text(known)}" if known != path else _line(image, inode))


def _line(image: Map, inode: MapInode) -> str:
    seconds, nsec = divmod(inode.mtime_ns, SECOND)
    owner = f"{inode.uid}:{inode.gid}"
    xattrs = (f"{_text(name)}={_text(value)}" for name, value in inode.xattrs)
    return " ".join((f"{inode.mode:o}", str(inode.nlink), owner, f"{seconds}.{nsec:09}", _what(image, inode), *xattrs))


def _what(image: Map, inode: MapInode) -> str:
    if inode.is_dir:
        return "opaque" if inode.opaque else "directory"
    if inode.is_whiteout:
        return "whiteout"
    if stat.S_ISLNK(inode.mode):
        return f"symlink {_text(inode.target)}"
    if isinstance(inode.content, bytes):
        return f"object {inode.size} {inode.content.hex()}"
    if stat.S_ISREG(inode.mode):
        return f"data {inode.size} {_data(image, inode)}"
    return f"special {os.major(inode.rdev)}:{os.minor(inode.rdev)}"


def _data(image: Map, inode: MapInode) -> str:
    """A little data as it is, more by its hash."""
    if inode.size <= _INLINE_SHOWN:
        return _text(image.read(inode)) or "-"
    hasher = blake3()
    for piece in image.pieces(inode):
        hasher.update(piece)
    return f"blake3:{hasher.hexdigest(length=16)}"


def _text(data: bytes) -> str:
    return "".join(chr(byte) if byte in _SHOWN else f"\\x{byte:02x}" for byte in data)
