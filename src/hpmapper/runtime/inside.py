"""Paths inside a container's root, resolved as the container itself would: no symlink or ".." leads out of it.

What lies there was written by strangers, and may be changed by a running container while it is looked at.
"""

from __future__ import annotations

import os
import posixpath
import stat
from dataclasses import dataclass
from pathlib import Path

from hpmapper.errors import InvalidArgument
from hpmapper.kernel.fs import open_in_root

_LARGEST_TEXT = 4 << 20


@dataclass(frozen=True, slots=True)
class Made:
    """A file or directory that was made inside a root, and what its parent's times were and became by that."""

    parent: str
    name: str
    inode: int
    is_dir: bool
    times_before: tuple[int, int]
    mtime_after: int


def parts(path: str) -> list[str]:
    """The components of an absolute or relative path below the root."""
    return [part for part in posixpath.normpath(path).split("/") if part not in ("", ".", "..")]


def read_text(root: Path, path: str) -> str:
    """The contents of a regular file, "" where there is none.

    Raises:
        InvalidArgument: it is larger than any such file.
    """
    try:
        # First without opening it for real: opening a device or a fifo may do something.
        place = open_in_root(root, path, os.O_PATH)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    try:
        if not stat.S_ISREG(os.fstat(place).st_mode):
            return ""
        with open(f"/proc/self/fd/{place}", "rb") as file:
            data = file.read(_LARGEST_TEXT + 1)
    finally:
        os.close(place)
    if len(data) > _LARGEST_TEXT:
        raise InvalidArgument(f"the container's {path} is larger than {_LARGEST_TEXT >> 20} MiB")
    return data.decode(errors="surrogateescape")


def make_directories(root: Path, path: str) -> list[Made]:
    """Make a directory and those above it where they are missing; says which were, the outermost first.

    Raises:
        InvalidArgument: something else than a directory is in the way.
    """
    names = parts(path)
    made = []
    for depth, name in enumerate(names):
        if not _is_directory(root, "/".join(names[: depth + 1])):
            made.append(_make(root, "/".join(names[:depth]) or "/", name, is_dir=True))
    return made


def make_file(root: Path, path: str) -> list[Made]:
    """Make an empty file, with the directories above it, unless something is there.

    Raises:
        InvalidArgument: something else than a directory is above it.
    """
    *above, name = parts(path)
    made = make_directories(root, "/".join(above))
    try:
        os.close(open_in_root(root, path, os.O_PATH))
    except FileNotFoundError:
        made.append(_make(root, "/".join(above) or "/", name, is_dir=False))
    return made


def unmake(root: Path, made: list[Made]) -> None:
    """Take away again what was made and not used; its parents look untouched unless the container touched them."""
    for one in reversed(made):
        try:
            parent = open_in_root(root, one.parent, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue  # the container removed or replaced it
        try:
            _unmake(parent, one)
        finally:
            os.close(parent)


def _unmake(parent: int, made: Made) -> None:
    untouched = os.fstat(parent).st_mtime_ns == made.mtime_after
    try:
        status = os.stat(made.name, dir_fd=parent, follow_symlinks=False)
        if status.st_ino != made.inode or (status.st_size and not made.is_dir):
            return
        if made.is_dir:
            os.rmdir(made.name, dir_fd=parent)
        else:
            os.unlink(made.name, dir_fd=parent)
    except OSError:
        return  # gone, or no longer empty: the container's own
    if untouched:
        os.utime(parent, ns=made.times_before)


def _is_directory(root: Path, path: str) -> bool:
    try:
        place = open_in_root(root, path, os.O_PATH)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise InvalidArgument(f"the container's /{path} cannot be reached: {error.strerror}") from None
    try:
        if not stat.S_ISDIR(os.fstat(place).st_mode):
            raise InvalidArgument(f"the container's /{path} is not a directory")
    finally:
        os.close(place)
    return True


def _make(root: Path, parent: str, name: str, *, is_dir: bool) -> Made:
    directory = open_in_root(root, parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        before = os.fstat(directory)
        if is_dir:
            os.mkdir(name, 0o755, dir_fd=directory)
        else:
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=directory))
        inode = os.stat(name, dir_fd=directory, follow_symlinks=False).st_ino
        times = (before.st_atime_ns, before.st_mtime_ns)
        return Made(parent, name, inode, is_dir, times, os.fstat(directory).st_mtime_ns)
    except FileExistsError:
        raise InvalidArgument(f"the container's {parent}/{name} is a symlink to nowhere") from None
    finally:
        os.close(directory)
