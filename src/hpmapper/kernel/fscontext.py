"""The mount API of Linux 5.2: a file system is configured, made, and attached in separate steps.

Its gain over mount(2): layers as file descriptors, no page-sized limit on options, a mount that is whole before anybody
can see it, and reasons in words, which every error from here carries as notes (`add_note`).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from hpmapper.kernel.syscall import (
    AT_EMPTY_PATH,
    AT_FDCWD,
    AT_RECURSIVE,
    NR_FSCONFIG,
    NR_FSMOUNT,
    NR_FSOPEN,
    NR_MOUNT_SETATTR,
    NR_MOVE_MOUNT,
    NR_OPEN_TREE,
    AnyPath,
    syscall,
)

MOUNT_ATTR_RDONLY = 0x01
MOUNT_ATTR_NOATIME = 0x10
MOUNT_ATTR_IDMAP = 0x100000

_CLOEXEC = 1  # FSOPEN_CLOEXEC and FSMOUNT_CLOEXEC
_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_F_EMPTY_PATH = 4
_SET_FLAG, _SET_STRING, _SET_FD, _CMD_CREATE = 0, 1, 5, 6
_MOUNT_ATTR = struct.Struct("=QQQQ")
_LOG_LINE = 8192


class Context:
    """A file system that is being configured (an fsopen(2) fd)."""

    def __init__(self, fd: int, name: AnyPath) -> None:
        self.fd = fd
        self.name = name

    def set(self, key: str, value: AnyPath | int | None = None) -> None:
        """Set an option: a string, a file descriptor (int), or a flag (None)."""
        if value is None:
            self._config(_SET_FLAG, key, None, 0)
        elif isinstance(value, int):
            self._config(_SET_FD, key, None, value)
        else:
            self._config(_SET_STRING, key, os.fsencode(value), 0)

    def mount(self, attributes: int = 0) -> int:
        """Make the file system; returns an fd of its detached mount, which the caller closes."""
        self._config(_CMD_CREATE, None, None, 0)
        with self._reasons():
            return syscall(NR_FSMOUNT, self.fd, _CLOEXEC, attributes, path=self.name)

    def _config(self, command: int, key: str | None, value: bytes | None, extra: int) -> None:
        encoded = key.encode() if key is not None else None
        with self._reasons(f"option {key}" if key else ""):
            syscall(NR_FSCONFIG, self.fd, command, encoded, value, extra, path=self.name)

    @contextmanager
    def _reasons(self, doing: str = "") -> Iterator[None]:
        try:
            yield
        except OSError as error:
            for line in ([doing] if doing else []) + self.log():
                error.add_note(line)
            raise

    def log(self) -> list[str]:
        """The kernel's messages so far ("e overlay: …", e for error, w for warning); each is given once."""
        lines = []
        while True:
            try:
                lines.append(os.read(self.fd, _LOG_LINE).decode(errors="replace").strip())
            except OSError as error:
                if error.errno != errno.EMSGSIZE:  # ENODATA: no more
                    return lines


@contextmanager
def fsopen(fstype: str, name: AnyPath) -> Iterator[Context]:
    """Begin to configure a file system; errors name `name` (the mount's source or target)."""
    fd = syscall(NR_FSOPEN, fstype.encode(), _CLOEXEC, path=name)
    try:
        yield Context(fd, name)
    finally:
        os.close(fd)


def open_tree(path: AnyPath, *, recursive: bool = False) -> int:
    """A detached copy of the mount at `path` (a bind mount that is not yet anywhere); the caller closes the fd."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | (AT_RECURSIVE if recursive else 0)
    return syscall(NR_OPEN_TREE, AT_FDCWD, os.fsencode(path), flags, path=path)


def move_mount(fd: int, target: AnyPath) -> None:
    """Attach the detached mount `fd` at `target`."""
    syscall(NR_MOVE_MOUNT, fd, b"", AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH, path=target)


def mount_setattr(
    fd: int,
    *,
    on: int = 0,
    off: int = 0,
    propagation: int = 0,
    user_namespace: int = 0,
    recursive: bool = False,
) -> None:
    """Change a mount's attributes (MOUNT_ATTR_…); with MOUNT_ATTR_IDMAP, `user_namespace` is the mapping's fd."""
    attributes = _MOUNT_ATTR.pack(on, off, propagation, user_namespace)
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    syscall(NR_MOUNT_SETATTR, fd, b"", flags, buffer, len(attributes), path=fd)
