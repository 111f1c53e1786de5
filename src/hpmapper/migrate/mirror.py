"""One root file system made like another, and compared with it: names, attributes, links and contents.

Only what differs is written, of files only the blocks that do: a container that changed 4 KiB of a file of its image
keeps sharing the rest, where the file system can share.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from hpmapper.errors import InvalidArgument
from hpmapper.layer.scan import scan
from hpmapper.store.workspace import remove_tree
from hpmapper.tree import Inode, Xattrs, walk

_CHUNK = 1 << 20
_BLOCK = 4096
_HOST_LABELS = frozenset((b"security.selinux", b"security.SMACK64"))
"""Given by the host's policy, by place."""


class Difference(NamedTuple):
    """A path (without a leading slash, the root's is b"") and what is wrong with it."""

    path: bytes
    what: str

    def __str__(self) -> str:
        return f"/{os.fsdecode(self.path)}: {self.what}"


def mirror(source: Path, target: Path, *, contents: bool = False) -> None:
    """Make `target` like `source`. Without `contents`, files of one size, time and attributes are taken for equal.

    Nobody else may be at work in either. Both are root file systems: no path leads out of them, since none is followed
    through a symlink.

    Raises:
        InvalidArgument: something cannot be made on the target's file system; names it.
    """
    _Mirror(os.fsencode(source), os.fsencode(target), contents).run()


def differences(source: Path, target: Path) -> Iterator[Difference]:
    """What `target` has otherwise than `source`, contents included, in path order."""
    top, other = os.fsencode(source), os.fsencode(target)
    before, after = _Tree(top), _Tree(other)
    for path in sorted(before.inodes.keys() | after.inodes.keys()):
        old, new = before.inodes.get(path), after.inodes.get(path)
        if old is None or new is None:
            yield Difference(path, "is missing" if new is None else "should not be there")
            continue
        for name, is_same in _COMPARED:
            if not is_same(old, new):
                yield Difference(path, f"has another {name}")
        if not old.is_dir and before.names[old] != after.names[new]:
            yield Difference(path, "has other hard links")
        if stat.S_ISREG(old.mode) and old.size == new.size and not _same_data(_at(top, path), _at(other, path)):
            yield Difference(path, "has other contents")


class _Tree:
    """A scanned tree, by path; `names` has all paths of an inode."""

    def __init__(self, top: bytes) -> None:
        self.inodes = dict(walk(scan(top, overlay=False)))
        self.names: dict[Inode, list[bytes]] = defaultdict(list)
        for path, inode in self.inodes.items():
            self.names[inode].append(path)


def _xattrs(inode: Inode) -> Xattrs:
    return tuple(pair for pair in inode.xattrs if pair[0] not in _HOST_LABELS)


_COMPARED: tuple[tuple[str, Callable[[Inode, Inode], bool]], ...] = (
    ("type or mode", lambda old, new: old.mode == new.mode),
    ("owner", lambda old, new: (old.uid, old.gid) == (new.uid, new.gid)),
    ("modification time", lambda old, new: old.mtime_ns == new.mtime_ns),
    ("size", lambda old, new: old.size == new.size),
    ("device number", lambda old, new: old.rdev == new.rdev),
    ("target", lambda old, new: old.target == new.target),
    ("set of extended attributes", lambda old, new: _xattrs(old) == _xattrs(new)),
)


def _same_attributes(old: Inode, new: Inode) -> bool:
    return all(is_same(old, new) for _, is_same in _COMPARED)


def _can_become(present: Inode, wanted: Inode) -> bool:
    """Whether a file can be made like another one without being replaced. Directories go their own way."""
    if present.is_dir or stat.S_IFMT(present.mode) != stat.S_IFMT(wanted.mode):
        return False
    return stat.S_ISREG(wanted.mode) or (present.target, present.rdev) == (wanted.target, wanted.rdev)


class _Mirror:
    """Walks over the source's tree, parents first; directories get their attributes last, deepest first."""

    def __init__(self, source: bytes, target: bytes, contents: bool) -> None:
        self._source, self._target = source, target
        self._contents = contents
        self._before, self._after = _Tree(source), _Tree(target)
        self._touched: set[bytes] = set()
        self._home = self._homes()

    def _homes(self) -> dict[Inode, Inode]:
        """The target's inode that each of the source's goes on in; for those not in here a new one is made.

        Of files that are one inode in the target, but several in the source, that goes on in it which is like it.
        """
        home: dict[Inode, Inode] = {}
        for present, names in self._after.names.items():
            wanted = [inode for name in names if (inode := self._before.inodes.get(name)) and inode not in home]
            fitting = [inode for inode in wanted if _can_become(present, inode)]
            best = next((inode for inode in fitting if _same_attributes(inode, present)), None)
            if fitting:
                home[best or fitting[0]] = present
        return home

    def run(self) -> None:
        for path in [path for path in self._after.inodes if path not in self._before.inodes]:
            self._clear(path)  # with all below it, whose turn then finds nothing
        for path, inode in self._before.inodes.items():
            try:
                self._enter(path, inode)
            except OSError as error:
                raise _explained(path, error) from error
        for path, inode in reversed(self._before.inodes.items()):
            if inode.is_dir and (path in self._touched or not self._is_same(path, inode)):
                _set_attributes(_at(self._target, path), inode)

    def _enter(self, path: bytes, inode: Inode) -> None:
        present = self._after.inodes.get(path)
        if inode.is_dir:
            if present is None or not present.is_dir:
                self._clear(path)
                os.mkdir(_at(self._target, path), 0o700)
                self._touch(path)
            return
        home = self._home.get(inode)
        names = self._before.names[inode]
        anchor = next(name for name in names if self._after.inodes.get(name) is home) if home else names[0]
        if path == anchor:
            self._make(path, inode, home)
        elif home is None or present is not home:
            self._clear(path)
            os.link(_at(self._target, anchor), _at(self._target, path), follow_symlinks=False)
            self._touch(path)

    def _make(self, path: bytes, inode: Inode, home: Inode | None) -> None:
        """Make a file that is not a directory, out of the one that is there if it is to go on in that."""
        place = _at(self._target, path)
        if home is None:
            self._clear(path)
            _create(place, inode)
            self._touch(path)
        changed = home is None
        if stat.S_ISREG(inode.mode) and (home is None or not self._has_its_data(path, inode, home)):
            _copy_data(_at(self._source, path), place, inode.size, fresh=home is None)
            changed = True
        if changed or home is None or not _same_attributes(inode, home):
            _set_attributes(place, inode)

    def _has_its_data(self, path: bytes, inode: Inode, present: Inode) -> bool:
        if self._contents:
            return inode.size == present.size and _same_data(_at(self._source, path), _at(self._target, path))
        return (inode.size, inode.mtime_ns) == (present.size, present.mtime_ns)

    def _is_same(self, path: bytes, inode: Inode) -> bool:
        present = self._after.inodes.get(path)
        return present is not None and _same_attributes(inode, present)

    def _clear(self, path: bytes) -> None:
        """Remove what the target has at a path, if it has anything there."""
        place = _at(self._target, path)
        try:
            os.unlink(place)
        except FileNotFoundError:
            return
        except (IsADirectoryError, PermissionError):
            remove_tree(Path(os.fsdecode(place)))
        self._touch(path)

    def _touch(self, path: bytes) -> None:
        """Note that the directories around a path, and it if it is one, have to get their attributes again."""
        self._touched.update((path, path.rpartition(b"/")[0]))


def _at(top: bytes, path: bytes) -> bytes:
    return top + b"/" + path if path else top


def _create(place: bytes, inode: Inode) -> None:
    if stat.S_ISLNK(inode.mode):
        os.symlink(inode.target, place)
    elif stat.S_ISREG(inode.mode):
        os.close(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    else:
        os.mknod(place, inode.mode, inode.rdev)


def _set_attributes(place: bytes, inode: Inode) -> None:
    os.chown(place, inode.uid, inode.gid, follow_symlinks=False)
    if not stat.S_ISLNK(inode.mode):
        os.chmod(place, stat.S_IMODE(inode.mode))  # after chown, which clears set-user-ID
    wanted = dict(_xattrs(inode))
    for name in map(os.fsencode, os.listxattr(place, follow_symlinks=False)):
        if name not in wanted and name not in _HOST_LABELS:
            os.removexattr(place, name, follow_symlinks=False)
    for name, value in wanted.items():
        os.setxattr(place, name, value, follow_symlinks=False)
    os.utime(place, ns=(inode.mtime_ns, inode.mtime_ns), follow_symlinks=False)


def _opened(place: bytes, flags: int) -> int:
    return os.open(place, flags | os.O_NOFOLLOW | os.O_CLOEXEC)


def _copy_data(source: bytes, target: bytes, size: int, *, fresh: bool) -> None:
    """Give a file another one's data: into a `fresh` one what is not a hole, else only the blocks that differ."""
    with open(_opened(source, os.O_RDONLY), "rb") as data, open(_opened(target, os.O_RDWR), "r+b", buffering=0) as out:
        for start, end in _data_ranges(data.fileno(), size) if fresh else ((0, size),):
            for offset in range(start, end, _CHUNK):
                piece = os.pread(data.fileno(), min(_CHUNK, end - offset), offset)
                if fresh:
                    _write_at(out.fileno(), piece, offset)
                else:
                    _write_differing(out.fileno(), piece, offset)
        os.ftruncate(out.fileno(), size)


def _data_ranges(fd: int, size: int) -> Iterator[tuple[int, int]]:
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:
            return  # ENXIO: nothing but a hole
        end = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        yield start, end


def _write_differing(fd: int, piece: bytes, offset: int) -> None:
    present = os.pread(fd, len(piece), offset)
    if present == piece:
        return
    for at in range(0, len(piece), _BLOCK):
        block = piece[at : at + _BLOCK]
        if present[at : at + _BLOCK] != block:
            _write_at(fd, block, offset + at)


def _write_at(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _same_data(one: bytes, other: bytes) -> bool:
    with open(_opened(one, os.O_RDONLY), "rb", 0) as left, open(_opened(other, os.O_RDONLY), "rb", 0) as right:
        while True:
            piece = left.read(_CHUNK)
            if right.read(_CHUNK) != piece:
                return False
            if not piece:
                return True


def _explained(path: bytes, error: OSError) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        return error  # the disk's fault, not the file's
    return InvalidArgument(
        f"/{os.fsdecode(path)} cannot be made on the target's file system: {error.strerror}",
        hint="another storage driver may hold it",
    )
