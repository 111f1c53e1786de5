"""What a container did: from the tree of its changes to Docker's letters and to a layer tar."""

from __future__ import annotations

import binascii
import os
import stat
import tarfile
from collections.abc import Callable, Iterator
from typing import BinaryIO
from urllib.parse import quote_from_bytes

from hpmapper.errors import InvalidArgument
from hpmapper.layer.build import OPAQUE_MARKER, WHITEOUT_PREFIX, Below
from hpmapper.layer.tar import BLOCK
from hpmapper.model import Change, ChangeKind
from hpmapper.tree import Inode, walk, whiteout

OpenData = Callable[[bytes], BinaryIO]
"""Opens the data of the regular file at a path of the tree."""

_COPY = 1 << 20
_TYPES = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
}


def changes(tree: Inode, below: Below) -> Iterator[Change]:
    """Yield what the tree of a container's changes does to what is below it, in path order.

    A directory counts as changed when something in it changed, as in `docker diff`. The root is not listed.
    """
    new: bytes | None = None  # the beginning of paths in a directory where there was none
    covered: bytes | None = None  # in a directory that hides the former one
    for path, inode in walk(tree):
        if not path:
            continue
        if new is not None and not path.startswith(new):
            new = None
        if covered is not None and not path.startswith(covered):
            covered = None
        before = below.lookup(path) if new is None else None
        if inode.is_whiteout:
            if before is not None:
                yield Change(ChangeKind.DELETED, b"/" + path)
            continue
        yield Change(ChangeKind.CHANGED if before is not None else ChangeKind.ADDED, b"/" + path)
        if inode.is_dir and new is None:
            if before is None or not before.is_dir:
                new = path + b"/"
            elif inode.opaque or covered is not None:
                covered = covered or path + b"/"
                _spell_out(path, inode, below)


def _spell_out(path: bytes, inode: Inode, below: Below) -> None:
    """Enter deletions into a directory for what it hides: `walk` then brings them in their places."""
    for name in below.names(path):
        inode.entries().setdefault(name, whiteout())


def write_tar(tree: Inode, open_data: OpenData, out: BinaryIO) -> None:
    """Write a tree as a layer tar (pax): names in byte order, no user names, times to the nanosecond, so deterministic.

    Sockets are left out: no tar format has them.

    Raises:
        InvalidArgument: a file's name begins with ".wh.", which a layer can only say of deletions.
    """
    first_names: dict[Inode, bytes] = {}
    for path, inode in walk(tree):
        name = path.rpartition(b"/")[2]
        if name.startswith(WHITEOUT_PREFIX):
            raise InvalidArgument(
                f"{path!r} cannot be stored in a layer: names that begin with .wh. mean deletions",
                hint="rename it",
            )
        if inode.is_whiteout:
            out.write(_deletion(path[: len(path) - len(name)] + WHITEOUT_PREFIX + name))
        elif inode in first_names:
            out.write(_header(path, inode, link=first_names[inode]))
        elif not stat.S_ISSOCK(inode.mode):
            _write_member(path, inode, open_data, out)
            if not inode.is_dir:
                first_names[inode] = path
    out.write(bytes(2 * BLOCK))


def _write_member(path: bytes, inode: Inode, open_data: OpenData, out: BinaryIO) -> None:
    out.write(_header(path, inode))
    if inode.opaque:
        out.write(_deletion(path + b"/" + OPAQUE_MARKER))
    if stat.S_ISREG(inode.mode) and inode.size:
        with open_data(path) as data:
            _copy(data, out, inode.size)
        out.write(bytes(-inode.size % BLOCK))


def _copy(source: BinaryIO, out: BinaryIO, size: int) -> None:
    """Copy exactly `size` bytes: a file that shrinks meanwhile is filled up, as tar(1) does, so the tar stays whole."""
    while size:
        data = source.read(min(size, _COPY)) or bytes(min(size, _COPY))
        out.write(data)
        size -= len(data)


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _deletion(path: bytes) -> bytes:
    info = tarfile.TarInfo(_text(path))
    info.mode = 0
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _header(path: bytes, inode: Inode, link: bytes | None = None) -> bytes:
    info = tarfile.TarInfo(_text(path) + "/" * (inode.is_dir and bool(path)) or "./")
    info.type = tarfile.LNKTYPE if link is not None else _TYPES[stat.S_IFMT(inode.mode)]
    info.mode = stat.S_IMODE(inode.mode)
    info.uid, info.gid = inode.uid, inode.gid
    info.size = inode.size if info.type == tarfile.REGTYPE else 0
    info.linkname = _text(link if link is not None else inode.target)
    info.devmajor, info.devminor = os.major(inode.rdev), os.minor(inode.rdev)
    info.mtime = max(inode.mtime_ns // 1_000_000_000, 0)
    # Of a link, too: unpackers that chown it would else take the file's capabilities away.
    records = dict(_xattr_record(name, value) for name, value in inode.xattrs)
    if inode.mtime_ns < 0 or inode.mtime_ns % 1_000_000_000:
        records["mtime"] = _decimal_seconds(inode.mtime_ns)
    info.pax_headers = records
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _decimal_seconds(mtime_ns: int) -> str:
    whole, fraction = divmod(abs(mtime_ns), 1_000_000_000)
    return f"{'-' * (mtime_ns < 0)}{whole}.{fraction:09}"


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _xattr_record(name: bytes, value: bytes) -> tuple[str, str]:
    """A pax record; in libarchive's form where a name has "=" or is no UTF-8, which SCHILY's cannot hold."""
    if b"=" in name or not _is_utf8(name):
        encoded = binascii.b2a_base64(value, newline=False).rstrip(b"=")
        return f"LIBARCHIVE.xattr.{quote_from_bytes(name)}", encoded.decode("ascii")
    return f"SCHILY.xattr.{_text(name)}", _text(value)
