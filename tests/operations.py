"""Random file operations, done alike in a container's root and in a plain directory; and a layer's tar, applied to one.

A `Step` is drawn without knowing what there is; `planned` turns it into an operation on paths that are there. Done in
two trees, an operation has the same outcome: success, or the same errno.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import io
import mmap
import os
import shutil
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from hypothesis import strategies as st

from hpmapper.kernel.sync import rename_exchange

_T = TypeVar("_T")

NAMES = (b"a", b"b", b"c", b"d", b".hidden", b"\xff\n")
SIZES = (0, 1, 100, 1023, 1024, 4095, 4096, 5000, 70_000)
OFFSETS = (0, 1, 511, 1024, 4096, 9000, 200_000)
MODES = (0o644, 0o600, 0, 0o755, 0o4755, 0o1777, 0o2711)
OWNERS = ((0, 0), (1000, 1000), (70_000, 5), (2**31, 2**32 - 2))
TIMES = (0, -1, -1_000_000_007, 4_000_000_000_000_000_001, 1_600_000_000_000_000_000)
ATTRIBUTES = ("user.one", "user.two", "trusted.three", "security.capability", "trusted.overlay.opaque")
VALUES = (b"", b"1", b"a=b\n\0c", b"v" * 1000)
TYPES = ((stat.S_IFIFO, 0, 0), (stat.S_IFCHR, 1, 3), (stat.S_IFBLK, 7, 200), (stat.S_IFCHR, 511, 262_143))
TARGETS = (b"a", b"../b", b"/etc/passwd", b"missing", b"\xfe" * 300)

_CAPABILITY = bytes.fromhex("0100000200240000000000000000000000000000")
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16
RANGES = (0, _KEEP_SIZE, _KEEP_SIZE | _PUNCH_HOLE, _ZERO_RANGE)
"""fallocate(2)'s modes that XFS, ext4 and btrfs all have."""

_libc = ctypes.CDLL(None, use_errno=True)


class Step(NamedTuple):
    """An operation's name, and numbers from which it takes what it needs: paths, names, sizes."""

    name: str
    one: int
    other: int
    value: int


class Operation(NamedTuple):
    """An operation on paths below a root.

    Attributes:
        text: for people.
        act: does it, in the tree whose root is given.
        changes: paths whose files it changes, be it their place alone.
        puts: paths that get what was elsewhere.
    """

    text: str
    act: Callable[[bytes], object]
    changes: tuple[bytes, ...]
    puts: tuple[bytes, ...] = ()

    def outcome(self, root: Path) -> int:
        """Do it in a tree; 0, or the errno, of which a file system may choose between two (rename(2), rmdir(2))."""
        try:
            self.act(os.fsencode(root))
        except OSError as error:
            number = error.errno or errno.EIO
            return errno.EEXIST if number == errno.ENOTEMPTY else number
        return 0


class _Nothing(Exception):
    """There is nothing to work on."""


class _Picker:
    """Takes what an operation works on from a step's numbers."""

    def __init__(self, step: Step, root: Path) -> None:
        self._step = step
        top = os.fsencode(root)
        below = [
            os.path.relpath(os.path.join(here, name), top)
            for here, directories, files in os.walk(top)
            for name in directories + files
        ]
        self._found = sorted(below)
        modes = {path: os.lstat(os.path.join(top, path)).st_mode for path in self._found}
        self._files = [path for path in self._found if stat.S_ISREG(modes[path])]
        self._directories = [b".", *(path for path in self._found if stat.S_ISDIR(modes[path]))]

    def there(self, number: int) -> bytes:
        """A path at which there is something."""
        return _one_of(self._found, number)

    def one(self) -> bytes:
        return self.there(self._step.one)

    def other(self) -> bytes:
        return self.there(self._step.other)

    def file(self) -> bytes:
        return _one_of(self._files, self._step.one)

    def other_file(self) -> bytes:
        return _one_of(self._files, self._step.other)

    def new(self) -> bytes:
        return self.place(self._step.one)

    def other_new(self) -> bytes:
        return self.place(self._step.other)

    def place(self, number: int) -> bytes:
        """A name in a directory, where perhaps there is something."""
        directory = _one_of(self._directories, number // len(NAMES))
        return os.path.normpath(os.path.join(directory, NAMES[number % len(NAMES)]))

    def value(self, choices: tuple[_T, ...]) -> _T:
        return choices[self._step.value % len(choices)]

    def second(self, choices: tuple[_T, ...]) -> _T:
        return choices[self._step.other % len(choices)]

    def data(self, size: int) -> bytes:
        return hashlib.shake_128(b"%d" % self._step.value).digest(size)


def _one_of(found: list[_T], number: int) -> _T:
    if not found:
        raise _Nothing
    return found[number % len(found)]


def planned(step: Step, root: Path) -> Operation | None:
    """The operation that a step stands for, by what there is in a tree; None if there is nothing to work on."""
    try:
        return PLANS[step.name](_Picker(step, root))
    except _Nothing:
        return None


def _create(pick: _Picker) -> Operation:
    path, data, mode = pick.new(), pick.data(pick.second(SIZES)), pick.value(MODES)

    def act(top: bytes) -> None:
        fd = os.open(os.path.join(top, path), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(fd, "wb") as out:
            out.write(data)
        os.chmod(os.path.join(top, path), mode)

    return Operation(f"create {path!r} {len(data)} {mode:o}", act, ())


def _temporary(pick: _Picker) -> Operation:
    """A file without a name gets one."""
    path, data = pick.new(), pick.data(pick.second(SIZES))

    def act(top: bytes) -> None:
        fd = os.open(os.path.dirname(os.path.join(top, path)), os.O_TMPFILE | os.O_RDWR, 0o640)
        with open(fd, "wb") as out:
            out.write(data)
            out.flush()
            os.link(f"/proc/self/fd/{fd}", os.path.join(top, path), src_dir_fd=fd, follow_symlinks=True)

    return Operation(f"temporary {path!r} {len(data)}", act, ())


def _write(pick: _Picker) -> Operation:
    path, data, offset = pick.file(), pick.data(pick.value(SIZES)), pick.second(OFFSETS)

    def act(top: bytes) -> None:
        with open(os.path.join(top, path), "r+b") as out:
            out.seek(offset)
            out.write(data)

    return Operation(f"write {path!r} {len(data)} at {offset}", act, (path,))


def _append(pick: _Picker) -> Operation:
    path, data = pick.file(), pick.data(pick.value(SIZES))

    def act(top: bytes) -> None:
        with open(os.path.join(top, path), "ab") as out:
            out.write(data)

    return Operation(f"append {path!r} {len(data)}", act, (path,))


def _truncate(pick: _Picker) -> Operation:
    path, size = pick.file(), pick.value(SIZES)
    return Operation(f"truncate {path!r} {size}", lambda top: os.truncate(os.path.join(top, path), size), (path,))


def _map_write(pick: _Picker) -> Operation:
    path, number = pick.file(), pick.value(OFFSETS)
    data = pick.data(300)

    def act(top: bytes) -> None:
        with open(os.path.join(top, path), "r+b") as mapped:
            size = os.fstat(mapped.fileno()).st_size
            if size:  # nothing can be mapped of an empty file
                with mmap.mmap(mapped.fileno(), 0) as memory:
                    offset = number % size
                    memory[offset : offset + 300] = data[: size - offset]

    return Operation(f"mmap {path!r} write at {number}", act, (path,))


def _fallocate(pick: _Picker) -> Operation:
    path, mode, offset = pick.file(), pick.value(RANGES), pick.second(OFFSETS)

    def act(top: bytes) -> None:
        with open(os.path.join(top, path), "r+b") as file:
            arguments = file.fileno(), mode, ctypes.c_long(offset), ctypes.c_long(5000)
            if _libc.fallocate(*arguments):
                raise OSError(ctypes.get_errno(), "fallocate")

    return Operation(f"fallocate {path!r} mode {mode} at {offset}", act, (path,))


def _copy_range(pick: _Picker) -> Operation:
    """As cp(1) does: by reading and writing, where the kernel answers EXDEV (a file in a map, copy_file_range(2))."""
    source, target, offset = pick.other_file(), pick.file(), pick.value(OFFSETS)

    def act(top: bytes) -> None:
        with open(os.path.join(top, source), "rb") as out, open(os.path.join(top, target), "r+b") as into:
            try:
                os.copy_file_range(out.fileno(), into.fileno(), 4096, 0, offset)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                os.pwrite(into.fileno(), os.pread(out.fileno(), 4096, 0), offset)

    return Operation(f"copy_file_range {source!r} to {target!r} at {offset}", act, (target,))


def _rename(pick: _Picker) -> Operation:
    source, target = pick.one(), pick.other_new()

    def act(top: bytes) -> None:
        os.rename(os.path.join(top, source), os.path.join(top, target))

    return Operation(f"rename {source!r} to {target!r}", act, () if source == target else (source,), (target,))


def _exchange(pick: _Picker) -> Operation:
    one, other = pick.one(), pick.other()

    def act(top: bytes) -> None:
        rename_exchange(os.path.join(top, one), os.path.join(top, other))

    return Operation(f"exchange {one!r} and {other!r}", act, () if one == other else (one, other))


def _link(pick: _Picker) -> Operation:
    source, target = pick.one(), pick.other_new()

    def act(top: bytes) -> None:
        os.link(os.path.join(top, source), os.path.join(top, target), follow_symlinks=False)

    return Operation(f"link {source!r} as {target!r}", act, (source,))


def _symlink(pick: _Picker) -> Operation:
    path, target = pick.new(), pick.value(TARGETS)
    return Operation(f"symlink {path!r} to {target!r}", lambda top: os.symlink(target, os.path.join(top, path)), ())


def _mkdir(pick: _Picker) -> Operation:
    path, mode = pick.new(), pick.value(MODES)

    def act(top: bytes) -> None:
        os.mkdir(os.path.join(top, path))
        os.chmod(os.path.join(top, path), mode)

    return Operation(f"mkdir {path!r} {mode:o}", act, ())


def _mknod(pick: _Picker) -> Operation:
    path, (kind, major, minor), mode = pick.new(), pick.value(TYPES), pick.second(MODES)

    def act(top: bytes) -> None:
        os.mknod(os.path.join(top, path), kind, os.makedev(major, minor))
        os.chmod(os.path.join(top, path), mode)

    return Operation(f"mknod {path!r} {kind:o} {major}:{minor}", act, ())


def _unlink(pick: _Picker) -> Operation:
    path = pick.one()
    return Operation(f"unlink {path!r}", lambda top: os.unlink(os.path.join(top, path)), ())


def _rmdir(pick: _Picker) -> Operation:
    path = pick.one()
    return Operation(f"rmdir {path!r}", lambda top: os.rmdir(os.path.join(top, path)), ())


def _remove(pick: _Picker) -> Operation:
    """All of it, as `rm -r`."""
    path = pick.one()
    return Operation(f"remove {path!r}", lambda top: _remove_all(os.path.join(top, path)), ())


def _replace(pick: _Picker) -> Operation:
    """What was there makes room for an empty directory: an opaque one, if it was in the image."""
    path, mode = pick.one(), pick.value(MODES)

    def act(top: bytes) -> None:
        _remove_all(os.path.join(top, path))
        os.mkdir(os.path.join(top, path))
        os.chmod(os.path.join(top, path), mode)

    return Operation(f"replace {path!r} by a directory {mode:o}", act, ())


def _remove_all(path: bytes) -> None:
    if stat.S_ISDIR(os.lstat(path).st_mode):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def _chmod(pick: _Picker) -> Operation:
    path, mode = pick.one(), pick.value(MODES)

    def act(top: bytes) -> None:
        place = os.path.join(top, path)
        if stat.S_ISLNK(os.lstat(place).st_mode):
            raise OSError(errno.EOPNOTSUPP, "symlinks have no permissions")
        os.chmod(place, mode)

    return Operation(f"chmod {path!r} {mode:o}", act, (path,))


def _chown(pick: _Picker) -> Operation:
    path, owner = pick.one(), pick.value(OWNERS)

    def act(top: bytes) -> None:
        os.chown(os.path.join(top, path), *owner, follow_symlinks=False)

    return Operation(f"chown {path!r} {owner}", act, (path,))


def _utime(pick: _Picker) -> Operation:
    path, time = pick.one(), pick.value(TIMES)

    def act(top: bytes) -> None:
        os.utime(os.path.join(top, path), ns=(time, time), follow_symlinks=False)

    return Operation(f"utime {path!r} {time}", act, (path,))


def _set_attribute(pick: _Picker) -> Operation:
    path, name = pick.one(), pick.value(ATTRIBUTES)
    value = _CAPABILITY if name == "security.capability" else pick.second(VALUES)

    def act(top: bytes) -> None:
        os.setxattr(os.path.join(top, path), name, value, follow_symlinks=False)

    return Operation(f"setxattr {path!r} {name} {value[:20]!r}", act, (path,))


def _remove_attribute(pick: _Picker) -> Operation:
    path, name = pick.one(), pick.value(ATTRIBUTES)

    def act(top: bytes) -> None:
        os.removexattr(os.path.join(top, path), name, follow_symlinks=False)

    return Operation(f"removexattr {path!r} {name}", act, (path,))


PLANS: dict[str, Callable[[_Picker], Operation]] = {
    "create": _create,
    "mkdir": _mkdir,
    "write": _write,
    "append": _append,
    "truncate": _truncate,
    "map_write": _map_write,
    "fallocate": _fallocate,
    "copy_range": _copy_range,
    "temporary": _temporary,
    "rename": _rename,
    "exchange": _exchange,
    "link": _link,
    "symlink": _symlink,
    "mknod": _mknod,
    "unlink": _unlink,
    "rmdir": _rmdir,
    "remove": _remove,
    "replace": _replace,
    "chmod": _chmod,
    "chown": _chown,
    "utime": _utime,
    "set_attribute": _set_attribute,
    "remove_attribute": _remove_attribute,
}

_numbers = st.integers(0, 255)

steps = st.builds(Step, st.sampled_from(list(PLANS)), _numbers, _numbers, _numbers)
"""One step; the simplest creates an empty file in the root."""


def split_off(root: Path, path: bytes) -> None:
    """Make a name of a linked file a file of its own, as overlayfs does when it copies up."""
    place = os.path.join(os.fsencode(root), path)
    copy = place + b".copy"
    status = os.lstat(place)
    if stat.S_ISLNK(status.st_mode):
        os.symlink(os.readlink(place), copy)
    elif stat.S_ISREG(status.st_mode):
        shutil.copyfile(place, copy)
    else:
        os.mknod(copy, status.st_mode, status.st_rdev)
    os.chown(copy, status.st_uid, status.st_gid, follow_symlinks=False)
    if not stat.S_ISLNK(status.st_mode):
        os.chmod(copy, stat.S_IMODE(status.st_mode))
    for name in os.listxattr(place, follow_symlinks=False):
        os.setxattr(copy, name, os.getxattr(place, name, follow_symlinks=False), follow_symlinks=False)
    os.utime(copy, ns=(status.st_mtime_ns, status.st_mtime_ns), follow_symlinks=False)
    os.rename(copy, place)


def apply_layer(layer: bytes, root: Path) -> None:
    """Apply a layer's tar to a plain directory: an unpacker of its own, by the OCI's image specification."""
    top = os.fsencode(root)
    times: list[tuple[bytes, int]] = []
    with tarfile.open(fileobj=io.BytesIO(layer), errors="surrogateescape") as members:
        for member in members:
            path = os.path.normpath(os.path.join(top, os.fsencode(member.name)))
            directory, name = os.path.split(path)
            if name == b".wh..wh..opq":
                for inside in os.listdir(directory):
                    _remove_all(os.path.join(directory, inside))
            elif name.startswith(b".wh."):
                _remove_all(os.path.join(directory, name.removeprefix(b".wh.")))
            else:
                _extract(members, member, path, top)
                times.append((path, _nanoseconds(member)))
    for path, time in reversed(times):  # what is in a directory comes after it
        os.utime(path, ns=(time, time), follow_symlinks=False)


def _extract(members: tarfile.TarFile, member: tarfile.TarInfo, path: bytes, top: bytes) -> None:
    is_directory = os.path.lexists(path) and stat.S_ISDIR(os.lstat(path).st_mode)
    if os.path.lexists(path) and not (is_directory and member.isdir()):
        _remove_all(path)
    if member.islnk():
        os.link(os.path.join(top, os.fsencode(member.linkname)), path, follow_symlinks=False)
        return
    if member.isdir():
        if not is_directory:
            os.mkdir(path)
    elif member.isreg():
        data = members.extractfile(member)
        assert data is not None
        Path(os.fsdecode(path)).write_bytes(data.read())
    elif member.issym():
        os.symlink(os.fsencode(member.linkname), path)
    else:
        kind = stat.S_IFIFO if member.isfifo() else stat.S_IFCHR if member.ischr() else stat.S_IFBLK
        os.mknod(path, kind, os.makedev(member.devmajor, member.devminor))
    os.chown(path, member.uid, member.gid, follow_symlinks=False)
    if not member.issym():
        os.chmod(path, member.mode)
    _set_attributes(path, member)


def _set_attributes(path: bytes, member: tarfile.TarInfo) -> None:
    prefix = "SCHILY.xattr."
    wanted = {
        key.removeprefix(prefix): value.encode("utf-8", "surrogateescape")
        for key, value in member.pax_headers.items()
        if key.startswith(prefix)
    }
    for name in os.listxattr(path, follow_symlinks=False):
        if name not in wanted:
            os.removexattr(path, name, follow_symlinks=False)
    for name, data in wanted.items():
        os.setxattr(path, name, data, follow_symlinks=False)


def _nanoseconds(member: tarfile.TarInfo) -> int:
    """Exactly: `tarfile` has a float."""
    text = member.pax_headers.get("mtime", str(int(member.mtime)))
    whole, _, fraction = text.partition(".")
    sign = -1 if text.startswith("-") else 1
    return int(whole) * 10**9 + sign * int(fraction.ljust(9, "0") or 0)
