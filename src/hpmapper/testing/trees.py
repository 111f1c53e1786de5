"""Trees as lists of small operations, and what two directories must agree on.

The same operations are applied to a mounted snapshot and to a plain directory, which must then be alike in every
attribute. For that every operation gives what it touched, the directory around it and the root a time of its own,
fixed when the operation is written down:

    base = [directory("etc"), file("etc/motd", b"hello"), symlink("motd", "etc/issue")]
    apply(base, mounted)
    apply(base, model)
    assert_same(mounted, model)
"""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import NamedTuple

from hpmapper.store.workspace import remove_tree

Operation = Callable[[bytes], None]
"""Does one thing in the tree whose root is given."""

Name = str | bytes
"""A path inside the tree, without a leading slash."""

_FIRST = 1_600_000_000_123_456_789
_STEP = 1_000_000_001  # so that the nanoseconds differ too
_times = count(_FIRST, _STEP)


def apply(operations: Iterable[Operation], root: Path) -> None:
    """Do the operations in a tree."""
    for operation in operations:
        operation(os.fsencode(root))


def _operation(name: Name, act: Callable[[bytes], object]) -> Operation:
    """An operation on the path `name`, with its time."""
    when = next(_times)
    raw = os.fsencode(name)

    def run(root: bytes) -> None:
        path = os.path.join(root, raw)
        act(path)
        for touched in (path, os.path.dirname(path), root):
            if os.path.lexists(touched):
                os.utime(touched, ns=(when, when), follow_symlinks=False)

    return run


def file(
    name: Name,
    data: bytes = b"",
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    xattrs: Mapping[str, bytes] | None = None,
) -> Operation:
    """Make a regular file."""

    def act(path: bytes) -> None:
        with open(path, "xb") as out:
            out.write(data)
        _attributes(path, mode, uid, gid, xattrs)

    return _operation(name, act)


def directory(
    name: Name, mode: int = 0o755, uid: int = 0, gid: int = 0, xattrs: Mapping[str, bytes] | None = None
) -> Operation:
    """Make a directory."""

    def act(path: bytes) -> None:
        os.mkdir(path)
        _attributes(path, mode, uid, gid, xattrs)

    return _operation(name, act)


def symlink(target: Name, name: Name) -> Operation:
    """Make a symlink."""
    return _operation(name, lambda path: os.symlink(os.fsencode(target), path))


def hard_link(old: Name, new: Name) -> Operation:
    """Give a file one more name."""
    raw = os.fsencode(old)

    def act(path: bytes) -> None:
        root = path[: len(path) - len(os.fsencode(new))]
        os.link(root + raw, path, follow_symlinks=False)

    return _operation(new, act)


def node(name: Name, mode: int, major: int = 0, minor: int = 0) -> Operation:
    """Make a fifo, socket or device: `mode` with its type, as in mknod(2)."""

    def act(path: bytes) -> None:
        os.mknod(path, mode, os.makedev(major, minor))
        os.chmod(path, stat.S_IMODE(mode))

    return _operation(name, act)


def write(name: Name, data: bytes, offset: int = 0) -> Operation:
    """Overwrite a part of a file."""

    def act(path: bytes) -> None:
        with open(path, "r+b", buffering=0) as out:
            out.seek(offset)
            out.write(data)

    return _operation(name, act)


def append(name: Name, data: bytes) -> Operation:
    """Make a file longer."""

    def act(path: bytes) -> None:
        with open(path, "ab") as out:
            out.write(data)

    return _operation(name, act)


def truncate(name: Name, size: int) -> Operation:
    """Cut a file, or lengthen it by a hole."""
    return _operation(name, lambda path: os.truncate(path, size))


def map_write(name: Name, data: bytes, offset: int = 0) -> Operation:
    """Overwrite a part of a file through a shared mapping."""

    def act(path: bytes) -> None:
        with open(path, "r+b") as mapped, mmap.mmap(mapped.fileno(), 0) as memory:
            memory[offset : offset + len(data)] = data

    return _operation(name, act)


def chmod(name: Name, mode: int) -> Operation:
    """Change permissions. "" is the root."""
    return _operation(name, lambda path: os.chmod(path, mode))


def chown(name: Name, uid: int, gid: int) -> Operation:
    """Change the owner."""
    return _operation(name, lambda path: os.chown(path, uid, gid, follow_symlinks=False))


def set_xattr(name: Name, attribute: str, value: bytes) -> Operation:
    """Set an extended attribute."""
    return _operation(name, lambda path: os.setxattr(path, attribute, value, follow_symlinks=False))


def remove_xattr(name: Name, attribute: str) -> Operation:
    """Remove an extended attribute."""
    return _operation(name, lambda path: os.removexattr(path, attribute, follow_symlinks=False))


def utime(name: Name, nanoseconds: int) -> Operation:
    """Set the modification time."""

    def run(root: bytes) -> None:
        os.utime(os.path.join(root, os.fsencode(name)), ns=(nanoseconds, nanoseconds), follow_symlinks=False)

    return run


def remove(name: Name) -> Operation:
    """Remove a file, or a directory with all below it."""
    return _operation(name, _remove)


def rename(old: Name, new: Name) -> Operation:
    """Move as mv(1) does, which copies a directory where the kernel answers EXDEV (overlayfs; rename(2))."""
    raw = os.fsencode(old)

    def act(path: bytes) -> None:
        source = path[: len(path) - len(os.fsencode(new))] + raw
        subprocess.run([b"mv", b"-T", b"--", source, path], check=True)
        os.utime(os.path.dirname(source), ns=(_FIRST, _FIRST))

    return _operation(new, act)


def replace_directory(name: Name, mode: int = 0o755) -> Operation:
    """Remove a directory with all below it and make an empty one in its place: an opaque directory."""

    def act(path: bytes) -> None:
        _remove(path)
        os.mkdir(path)
        os.chmod(path, mode)

    return _operation(name, act)


def _remove(path: bytes) -> None:
    if stat.S_ISDIR(os.lstat(path).st_mode):
        remove_tree(Path(os.fsdecode(path)))
    else:
        os.unlink(path)


def _attributes(path: bytes, mode: int, uid: int, gid: int, xattrs: Mapping[str, bytes] | None) -> None:
    os.chown(path, uid, gid)
    os.chmod(path, mode)  # after chown, which clears set-user-ID
    for name, value in (xattrs or {}).items():
        os.setxattr(path, name, value)


class Facts(NamedTuple):
    """What two trees must agree on for one path. `same_as`: the first of a file's names in path order."""

    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int
    rdev: int
    xattrs: tuple[tuple[str, bytes], ...]
    target: bytes
    content: str
    same_as: bytes


def read_tree(root: Path) -> dict[bytes, Facts]:
    """The facts of every path below and including `root`, which is b"."; mount points are entered."""
    top = os.fsencode(root)
    names: dict[tuple[int, int], bytes] = {}
    return {path: _facts(os.path.join(top, path), path, names) for path in sorted(_paths(top))}


def _paths(top: bytes) -> Iterator[bytes]:
    yield b"."
    for here, directories, files in os.walk(top):
        inside = os.path.relpath(here, top)
        for name in directories + files:
            yield os.path.normpath(os.path.join(inside, name))


def _facts(path: bytes, name: bytes, names: dict[tuple[int, int], bytes]) -> Facts:
    status = os.lstat(path)
    regular, link = stat.S_ISREG(status.st_mode), stat.S_ISLNK(status.st_mode)
    many = not stat.S_ISDIR(status.st_mode) and status.st_nlink > 1
    return Facts(
        status.st_mode,
        status.st_uid,
        status.st_gid,
        status.st_mtime_ns,
        status.st_size if regular else 0,
        status.st_rdev,
        read_xattrs(path),
        os.readlink(path) if link else b"",
        _digest(path) if regular else "",
        names.setdefault((status.st_dev, status.st_ino), name) if many else name,
    )


def read_xattrs(path: bytes) -> tuple[tuple[str, bytes], ...]:
    """A file's extended attributes, but for those that are the host's doing."""
    names = sorted(os.listxattr(path, follow_symlinks=False))
    return tuple((name, os.getxattr(path, name, follow_symlinks=False)) for name in names if name not in _LABELS)


# Labels of security modules; and XFS lists ACLs a second time under names of its own.
_LABELS = ("security.selinux", "security.SMACK64", "trusted.SGI_ACL_FILE", "trusted.SGI_ACL_DEFAULT")


def _digest(path: bytes) -> str:
    with open(path, "rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def differences(found: Path, expected: Path) -> list[str]:
    """What two trees disagree on, a line each."""
    ours, theirs = read_tree(found), read_tree(expected)
    lines = [f"{path!r} is missing" for path in sorted(theirs.keys() - ours.keys())]
    lines += [f"{path!r} should not be there" for path in sorted(ours.keys() - theirs.keys())]
    for path in sorted(ours.keys() & theirs.keys()):
        for field, mine, other in zip(Facts._fields, ours[path], theirs[path], strict=True):
            if mine != other:
                lines.append(f"{path!r}: {field} is {_show(field, mine)} instead of {_show(field, other)}")
    return lines


def _show(field: str, value: object) -> str:
    return oct(value) if field == "mode" and isinstance(value, int) else repr(value)[:700]


def assert_same(found: Path, expected: Path) -> None:
    """Fail, naming every difference, unless two trees agree in all facts."""
    found_differences = differences(found, expected)
    if found_differences:
        raise AssertionError(f"{found} is not as {expected}:\n  " + "\n  ".join(found_differences[:40]))
