"""btrfs's subvolumes and trees, by its ioctls (include/uapi/linux/btrfs.h, btrfs_tree.h).

A subvolume is a directory with inode numbers and a device number of its own. Deleting one takes constant time; the
kernel's cleaner frees its extents later.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

from hpmapper.kernel.fs import filesystem_magic
from hpmapper.kernel.mountinfo import is_mountpoint
from hpmapper.kernel.sync import syncfs
from hpmapper.kernel.syscall import AnyPath, ioctl, ior, iow, iowr, opened

MAGIC = 0x9123683E

_MAGIC = 0x94
_SNAP_DESTROY = iow(_MAGIC, 15, 4096)
_TREE_SEARCH_V2 = iowr(_MAGIC, 17, 112)
_SNAP_CREATE_V2 = iow(_MAGIC, 23, 4096)
_SUBVOL_CREATE_V2 = iow(_MAGIC, 24, 4096)
_SUBVOL_GETFLAGS = ior(_MAGIC, 25, 8)
_SUBVOL_SETFLAGS = iow(_MAGIC, 26, 8)
_GET_SUBVOL_INFO = ior(_MAGIC, 60, 504)
_SNAP_DESTROY_V2 = iow(_MAGIC, 63, 4096)

_VOL_ARGS = struct.Struct("=q4088s")
_VOL_ARGS_V2 = struct.Struct("=qQQ32x4040s")
_VOL_ARGS_V2_BY_ID = struct.Struct("=qQQ32xQ4032x")
_SEARCH_ARGS = struct.Struct("=7Q4I4QQ")  # struct btrfs_ioctl_search_key, and buf_size
_SEARCH_HEADER = struct.Struct("=QQQII")
_SUBVOL_INFO = struct.Struct("=Q256sQQQQ16s16s16xQQ144x")
_INODE_ITEM = struct.Struct("=QQ")  # the beginning: the transactions that made it, and that last changed it
_EXTENT_DATA = struct.Struct("=QQBBHB")  # the fixed part of struct btrfs_file_extent_item
_EXTENT_PLACE = struct.Struct("=Q16xQ")  # what follows it, unless the data does: address on disk, length in the file
_INODE_EXTREF = struct.Struct("=QQH")

_SUBVOL_RDONLY = 1 << 1
_ROOT_SUBVOL_RDONLY = 1 << 0
_SUBVOL_SPEC_BY_ID = 1 << 4
_FIRST_FREE_OBJECTID = 256
_ROOT_TREE = 1
_INODE_ITEM_KEY = 1
_INODE_REF_KEY = 12
_INODE_EXTREF_KEY = 13
_EXTENT_DATA_KEY = 108
_EXTENT_INLINE = 0
_ROOT_REF_KEY = 156
_MOST = 2**64 - 1
_SEARCH_BUFFER = 1 << 16


class Subvolume(NamedTuple):
    """One subvolume.

    Attributes:
        id, parent: its number, and that of the one that it lies in.
        read_only: whether it cannot be changed.
        uuid, source: its own, and that of the subvolume that it is a snapshot of; zeros for none.
        born: the transaction that made it. What a snapshot got from its source was written in it or before.
    """

    id: int
    parent: int
    read_only: bool
    uuid: bytes
    source: bytes
    born: int


class Item(NamedTuple):
    """One item of a tree: its key, the transaction that wrote the leaf it lies in, and its bytes."""

    objectid: int
    type: int
    offset: int
    transid: int
    data: memoryview


def is_subvolume(path: AnyPath) -> bool:
    """Whether `path` itself is a subvolume's root; one that is merely mounted there does not count."""
    try:
        status = os.lstat(path)
        return status.st_ino == _FIRST_FREE_OBJECTID and filesystem_magic(path) == MAGIC and not is_mountpoint(path)
    except FileNotFoundError:
        return False


def create_subvolume(path: AnyPath) -> None:
    """Make an empty subvolume; FileExistsError when there is something."""
    parent, name = _split(path)
    with opened(parent) as fd:
        ioctl(fd, _SUBVOL_CREATE_V2, bytearray(_VOL_ARGS_V2.pack(0, 0, 0, name)), path=path)


def snapshot(source: AnyPath, path: AnyPath, *, read_only: bool = False) -> None:
    """Make a subvolume that shares all of `source`'s, as it is at this moment; nested subvolumes become empty
    directories."""
    parent, name = _split(path)
    with opened(parent) as fd, opened(source) as source_fd:
        flags = _SUBVOL_RDONLY if read_only else 0
        ioctl(fd, _SNAP_CREATE_V2, bytearray(_VOL_ARGS_V2.pack(source_fd, 0, flags, name)), path=path)


def set_read_only(path: AnyPath | int, read_only: bool) -> None:
    """Let a subvolume be changed, or not."""
    with opened(path) as fd:
        value = bytearray(8)
        ioctl(fd, _SUBVOL_GETFLAGS, value)
        flags = int.from_bytes(value, "little") & ~_SUBVOL_RDONLY
        ioctl(fd, _SUBVOL_SETFLAGS, bytearray((flags | (_SUBVOL_RDONLY if read_only else 0)).to_bytes(8, "little")))


def subvolume(path: AnyPath | int) -> Subvolume:
    """The subvolume that `path` lies in; ENOTTY when it is not on btrfs."""
    value = bytearray(504)
    with opened(path) as fd:
        ioctl(fd, _GET_SUBVOL_INFO, value)
    number, _, parent, _, _, flags, uuid, source, _, born = _SUBVOL_INFO.unpack(value)
    return Subvolume(number, parent, bool(flags & _ROOT_SUBVOL_RDONLY), uuid, source, born)


def nested(path: AnyPath | int, number: int) -> list[int]:
    """The subvolumes that lie in subvolume `number` or in one of them, the deepest last; `path`: any on that btrfs."""
    found = []
    with opened(path) as fd:
        pending = [number]
        while pending:
            here = pending.pop()
            inner = [item.offset for item in search(fd, _ROOT_TREE, here, (_ROOT_REF_KEY, _ROOT_REF_KEY))]
            found += inner
            pending += inner
    return found


def delete_subvolume(path: AnyPath) -> None:
    """Delete a subvolume with all those in it; FileNotFoundError when there is none.

    Those in it are deleted by number, so no name that somebody chose is ever followed (Linux 5.7, commit 949964c928e0).
    """
    parent, name = _split(path)
    with opened(parent) as fd:
        for inner in reversed(nested(fd, subvolume(path).id)):
            request = _VOL_ARGS_V2_BY_ID.pack(0, 0, _SUBVOL_SPEC_BY_ID, inner)
            ioctl(fd, _SNAP_DESTROY_V2, bytearray(request), path=path)
        ioctl(fd, _SNAP_DESTROY, bytearray(_VOL_ARGS.pack(0, name)), path=path)


def count_inodes(path: AnyPath | int) -> int:
    """The inodes of the subvolume that `path` lies in, and of those in it, read from their trees; nothing is walked."""
    with opened(path) as fd:
        own = subvolume(fd).id
        trees = (own, *nested(fd, own))
        return sum(item.type == _INODE_ITEM_KEY for tree in trees for item in search(fd, tree))


def changed_inodes(path: AnyPath | int, since: int) -> set[int]:
    """The inodes of a subvolume that were made or changed after a transaction, and the directories above them.

    Whatever changes a file changes its inode: data and attributes by its times, a name by the directory's. The cost is
    that of what was changed, not of what is there.
    """
    with opened(path) as fd:
        # What was written into a file changes its inode in the tree only when the data is on its way: to end the
        # present transaction is not enough.
        syncfs(fd)
        changed = set()
        for item in search(fd, 0, newer_than=since):
            if item.type == _INODE_ITEM_KEY and _INODE_ITEM.unpack_from(item.data)[1] > since:
                changed.add(item.objectid)
        pending = list(changed)
        while pending:
            for parent in _parents(fd, pending.pop()):
                if parent not in changed:
                    changed.add(parent)
                    pending.append(parent)
    return changed


def _parents(fd: int, inode: int) -> Iterator[int]:
    """The directories that have names of an inode."""
    for item in search(fd, 0, inode, (_INODE_REF_KEY, _INODE_EXTREF_KEY)):
        if item.type == _INODE_REF_KEY:
            yield item.offset
        else:  # many names, of which several may have one hash
            position = 0
            while position < len(item.data):
                parent, _, length = _INODE_EXTREF.unpack_from(item.data, position)
                position += _INODE_EXTREF.size + length
                yield parent


def written_since(path: AnyPath | int, since: int) -> tuple[int, int]:
    """Bytes of data that a subvolume's files got, and inodes that were made, after a transaction and are still there.

    What lies in memory only does not count yet. The cost is that of what was changed.
    """
    size = inodes = 0
    with opened(path) as fd:
        for item in search(fd, 0, newer_than=since):
            if item.type == _INODE_ITEM_KEY:
                inodes += _INODE_ITEM.unpack_from(item.data)[0] > since
            elif item.type == _EXTENT_DATA_KEY:
                size += _new_bytes(item.data, since)
    return size, inodes


def _new_bytes(extent: memoryview, since: int) -> int:
    generation, _, _, _, _, kind = _EXTENT_DATA.unpack_from(extent)
    if generation <= since:
        return 0
    if kind == _EXTENT_INLINE:
        return len(extent) - _EXTENT_DATA.size
    address, length = _EXTENT_PLACE.unpack_from(extent, _EXTENT_DATA.size)
    return length if address else 0  # else a hole


def search(
    fd: int, tree: int, objectid: int | None = None, types: tuple[int, int] = (0, 255), *, newer_than: int = 0
) -> Iterator[Item]:
    """Yield a tree's items in key order; 0: of the subvolume that `fd` is on. An item lives until the next is asked.

    Args:
        objectid: only the items of that object.
        types: and of it only those of these types, the first and the last.
        newer_than: only those in leaves written after that transaction. The kernel passes over what is older, so the
            cost is that of what has changed.
    """
    first, last = (0 if tree == _ROOT_TREE else _FIRST_FREE_OBJECTID, 0, 0), (_MOST, 255)
    if objectid is not None:
        first, last = (objectid, types[0], 0), (objectid, types[1])
    while True:
        buffer = bytearray(_SEARCH_ARGS.size + _SEARCH_BUFFER)
        ids, offsets, transids = (first[0], last[0]), (first[2], _MOST), (newer_than + 1, _MOST)
        numbers = (*ids, *offsets, *transids, first[1], last[1])
        _SEARCH_ARGS.pack_into(buffer, 0, tree, *numbers, 2**32 - 1, 0, 0, 0, 0, 0, _SEARCH_BUFFER)
        try:
            ioctl(fd, _TREE_SEARCH_V2, buffer)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return  # no such tree (any more)
            raise
        count = _SEARCH_ARGS.unpack_from(buffer)[9]
        if count == 0:
            return
        view, position, item = memoryview(buffer), _SEARCH_ARGS.size, None
        for _ in range(count):
            transid, found, offset, kind, length = _SEARCH_HEADER.unpack_from(buffer, position)
            position += _SEARCH_HEADER.size
            item = Item(found, kind, offset, transid, view[position : position + length])
            position += length
            yield item
        assert item is not None
        first = _after(item)


def _after(item: Item) -> tuple[int, int, int]:
    """The key that follows an item's."""
    if item.offset < _MOST:
        return item.objectid, item.type, item.offset + 1
    return (item.objectid, item.type + 1, 0) if item.type < 255 else (item.objectid + 1, 0, 0)


def _split(path: AnyPath) -> tuple[bytes, bytes]:
    parent, name = os.path.split(os.fsencode(path))
    if not name or len(name) > 255:
        raise OSError(errno.EINVAL, "not a subvolume's name", os.fsdecode(path))
    return parent or b".", name


def delete_subvolumes_in(directory: AnyPath) -> None:
    """Delete the subvolumes in a directory, at whatever depth; all else stays. On other file systems there are none."""
    for here, names, _ in os.walk(os.fsencode(directory)):
        for name in list(names):
            if is_subvolume(here + b"/" + name):
                delete_subvolume(here + b"/" + name)
                names.remove(name)
