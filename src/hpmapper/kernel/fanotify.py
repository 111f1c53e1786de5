"""Who opens and reads what on a file system: fanotify(7).

Marks belong on the pool's own file system: overlay and EROFS mounts refuse them, and a mount mark does not see what
overlayfs does underneath (it opens the real files since Linux 6.5 so that events arrive, commit bc2473c90fca).

Trap: each event brings an open file, and to close a file gives up all of the process's POSIX locks on it (fcntl(2)).
Files that this process has such locks on, as SQLite has on an open database, must be `ignored`.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from hpmapper.kernel.syscall import AT_FDCWD, NR_FANOTIFY_INIT, NR_FANOTIFY_MARK, AnyPath, syscall

FAN_ACCESS = 0x1
FAN_OPEN = 0x20

_FAN_CLOEXEC = 0x1
_FAN_NONBLOCK = 0x2
_FAN_MARK_ADD = 0x1
_FAN_MARK_IGNORED_MASK = 0x20
_FAN_MARK_IGNORED_SURV_MODIFY = 0x40
_FAN_MARK_FILESYSTEM = 0x100
_METADATA = struct.Struct("=IBBHQii")
_BUFFER = 64 * 1024


class Event(NamedTuple):
    """Something happened to a file. Whoever reads the event closes `fd` (-1: the queue overflowed)."""

    mask: int
    fd: int
    pid: int


@contextmanager
def watching(filesystem: AnyPath, mask: int, *, ignored: Iterable[AnyPath] = ()) -> Iterator[int]:
    """A non-blocking fanotify fd that hears of `mask` on the whole file system that holds this path.

    Args:
        ignored: files, wherever they are, of which it does not hear; they must be there for as long as it listens.
    """
    events = os.O_RDONLY | os.O_CLOEXEC | os.O_LARGEFILE
    fd = syscall(NR_FANOTIFY_INIT, _FAN_CLOEXEC | _FAN_NONBLOCK, events, path=filesystem)
    try:
        for path in ignored:  # first: from the next mark on there are events
            _mark(fd, _FAN_MARK_IGNORED_MASK | _FAN_MARK_IGNORED_SURV_MODIFY, mask, path)
        _mark(fd, _FAN_MARK_FILESYSTEM, mask, filesystem)
        yield fd
    finally:
        os.close(fd)


def _mark(fd: int, kind: int, mask: int, path: AnyPath) -> None:
    syscall(NR_FANOTIFY_MARK, fd, _FAN_MARK_ADD | kind, mask, AT_FDCWD, os.fsencode(path), path=path)


def read_events(fd: int) -> list[Event]:
    """The events that wait; an empty list when none does."""
    try:
        data = os.read(fd, _BUFFER)
    except BlockingIOError:
        return []
    events = []
    offset = 0
    while offset < len(data):
        length, _, _, _, mask, file, pid = _METADATA.unpack_from(data, offset)
        events.append(Event(mask, file, pid))
        offset += length
    return events
