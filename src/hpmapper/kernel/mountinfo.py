"""What is mounted where: statx(2) for one path, mountinfo for many."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import select
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from hpmapper.kernel.syscall import (
    AT_FDCWD,
    AT_NO_AUTOMOUNT,
    AT_STATX_DONT_SYNC,
    AT_SYMLINK_NOFOLLOW,
    NR_STATX,
    AnyPath,
    opened,
    syscall,
)

_STATX_ATTR_MOUNT_ROOT = 0x2000  # Linux 5.8, commit 80340fe3605c
_STATX_ATTRIBUTES = struct.Struct("=8xQ40xQ")
_STATX_SIZE = 256
_ESCAPE = re.compile(r"\\([0-7]{3})")
_ESCAPED_IN_OPTIONS = re.compile(r"[\s\\:,#]")


class Mount(NamedTuple):
    """One line of mountinfo (proc_pid_mountinfo(5)). `root`: the part of the file system that is mounted."""

    id: int
    parent: int
    device: int
    root: str
    target: str
    options: str
    fstype: str
    source: str
    super_options: str

    @property
    def upper(self) -> str:
        """An overlay's upper directory, "" if it has none."""
        if self.fstype != "overlay":
            return ""
        return next((unescape(one[9:]) for one in self.super_options.split(",") if one.startswith("upperdir=")), "")


def is_mountpoint(path: AnyPath) -> bool:
    """Whether something is mounted at `path` itself; one system call. A missing path is none."""
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    flags = AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT | AT_STATX_DONT_SYNC
    try:
        syscall(NR_STATX, AT_FDCWD, os.fsencode(path), flags, 0, buffer, path=path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return False
        raise
    attributes, mask = _STATX_ATTRIBUTES.unpack_from(buffer.raw)
    if mask & _STATX_ATTR_MOUNT_ROOT:
        return bool(attributes & _STATX_ATTR_MOUNT_ROOT)
    return os.path.ismount(path)


def mounts() -> list[Mount]:
    """Everything mounted in the calling thread's namespace, in the order of mounting."""
    return list(_parsed(_text()))


def _parsed(text: str) -> Iterator[Mount]:
    # Not splitlines(): names may hold other characters that it takes for the end of a line.
    return map(parse_mount, text.removesuffix("\n").split("\n"))


# Not /proc/self, which is the main thread's: a thread may have a namespace of its own.
_TABLE = "/proc/thread-self/mountinfo"


class _Watched(threading.local):
    """The table that this thread keeps open, and what it said last."""

    fd = -1
    text: str | None = None


_watched = _Watched()


@contextmanager
def watched() -> Iterator[None]:
    """In the body this thread reads the table anew only when it has changed; it has to stay in its namespace.

    Of a thousand mounts reading takes a millisecond. The kernel tells of changes by poll(2) (proc_pid_mountinfo(5)).
    """
    with opened(_TABLE) as fd:
        _watched.fd, _watched.text = fd, None
        try:
            yield
        finally:
            _watched.fd, _watched.text = -1, None


def _text() -> str:
    if _watched.fd < 0:
        with opened(_TABLE) as fd:
            return _read(fd)
    poll = select.poll()
    poll.register(_watched.fd, select.POLLPRI)
    if poll.poll(0) or _watched.text is None:
        _watched.text = _read(_watched.fd)
    return _watched.text


def _read(fd: int) -> str:
    with open(fd, "rb", closefd=False) as file:
        file.seek(0)
        return os.fsdecode(file.read())


def mounts_below(path: AnyPath) -> list[Mount]:
    """The mounts at `path` and below it, last mounted first: the order in which they can be unmounted."""
    top = os.path.realpath(os.fsdecode(path))
    prefix = top.rstrip("/") + "/"
    return [one for one in reversed(mounts()) if one.target == top or one.target.startswith(prefix)]


def is_lower(path: str) -> bool:
    """Whether an overlay that is mounted in this namespace has the directory for a lower layer."""
    text = _text()
    if not _ESCAPED_IN_OPTIONS.search(path) and path not in text:
        return False  # the usual answer, without understanding thousands of lines
    return any(path in _lowers(one.super_options) for one in _parsed(text) if one.fstype == "overlay")


def _lowers(options: str) -> set[str]:
    """The lower layers in an overlay's options: "lowerdir=A:B" or "lowerdir+=A,lowerdir+=B"."""
    found: set[str] = set()
    for option in options.split(","):
        key, _, value = option.partition("=")
        if key in ("lowerdir", "lowerdir+"):
            found.update(unescape(value).split(":"))
    return found


def parse_mount(line: str) -> Mount:
    """One line of mountinfo. Names carry space, tab, newline and backslash as octal escapes."""
    fixed, _, rest = line.rstrip("\n").partition(" - ")
    number, parent, device, root, target, options, *_ = fixed.split(" ")
    fstype, source, super_options = rest.split(" ", 2)
    major, _, minor = device.partition(":")
    return Mount(
        int(number),
        int(parent),
        os.makedev(int(major), int(minor)),
        unescape(root),
        unescape(target),
        options,
        fstype,
        unescape(source),
        super_options,
    )


def unescape(text: str) -> str:
    r"""Undo mountinfo's octal escapes (" " is \040)."""
    if "\\" not in text:
        return text
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text)
