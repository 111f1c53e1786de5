"""What a container's start asks for first is read ahead of it, where nothing of it is cached: names.

That is the image's map, of which a start asks for names all over it, a block at a time, and the directories of the
objects. After a boot, or long after the last start, each would be waited for. (What files hold is read ahead by start
profiles: hpmapper.cache.profile.)
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress

from hpmapper.kernel.cachestat import cachestat
from hpmapper.kernel.syscall import opened
from hpmapper.store.objects import ObjectStore

_MOST = 16 << 20
"""Bytes of a map that are read ahead: all, but of the largest images' (250 bytes for each file)."""

_PIECE = 128 << 10
"""Bytes asked for at a time. Of more, Linux reads no more than the device takes in one request (mm/readahead.c)."""

_BEGINNING = 1 << 20
_AT_MOUNT = 8
"""Pages: mounting a map reads its superblock and root, a start dozens."""

_LATER_SECONDS = 0.1
"""How long a thread waits: until then the runtime reads its own programs, and what made the root is being answered.

Measured: docs/measurements.md."""

_LOOK_SECONDS = 0.2
"""How long a map that was looked at needs no other look: cachestat(2) takes a tenth of a container's start."""

_NEVER: tuple[tuple[str, ...], float] = ((), float("-inf"))


class NamesAhead:
    """Reads ahead the names of a pool's images.

    Asking for them all takes 10 ms and more: a thread does it, in a process that has threads (the daemon), while the
    runtime sets the container up. One that has none, as a command that runs a container, may be about to fork.
    """

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._looked = _NEVER
        self._at_once = threading.Event()

    def begin(self, lowers: Sequence[str]) -> None:
        """A container starts on these layers."""
        layers, now = tuple(lowers), time.monotonic()
        before, when = self._looked
        if layers == before and now - when < _LOOK_SECONDS:
            return
        self._looked = layers, now
        with suppress(OSError):  # it starts without it, too
            cold = [path for path in _files_of_maps(lowers) if _is_cold(path)]
            if cold and threading.active_count() > 1:
                self._start(cold)
            elif cold:
                self._read(cold)

    def wait(self) -> None:
        """Until nothing is being read any more: what is read cannot be unmounted."""
        with self._lock:
            if self._thread:
                self._at_once.set()
                self._thread.join()
                self._thread = None
            self._looked = _NEVER

    def _start(self, cold: list[str]) -> None:
        with self._lock:
            if self._thread is None or not self._thread.is_alive():  # else of a start that came a moment ago
                self._at_once.clear()
                self._thread = threading.Thread(target=self._read_later, args=(cold,), name="names-ahead")
                self._thread.start()

    def _read_later(self, cold: list[str]) -> None:
        self._at_once.wait(_LATER_SECONDS)
        self._read(cold)

    def _read(self, cold: list[str]) -> None:
        with suppress(OSError):
            for path in cold:
                _read_map(path)
            self._objects.read_ahead()


def _files_of_maps(lowers: Sequence[str]) -> Iterator[str]:
    """The maps among an overlay's layers that are mounted straight from files, and so have no block device's number."""
    for lower in lowers:
        above, name = os.path.split(lower)
        if name == "m" and os.major(os.stat(lower).st_dev) == 0:
            yield f"{above}/map"


def _is_cold(path: str) -> bool:
    """Whether no more is cached of a map's beginning than mounting it has read."""
    pages = -(-min(os.stat(path).st_size, _BEGINNING) // mmap.PAGESIZE)
    return cachestat(path, 0, _BEGINNING).cached < min(_AT_MOUNT, pages)


def _read_map(path: str) -> None:
    with opened(path) as fd:
        for piece in range(0, min(_MOST, os.fstat(fd).st_size), _PIECE):
            os.posix_fadvise(fd, piece, _PIECE, os.POSIX_FADV_WILLNEED)
