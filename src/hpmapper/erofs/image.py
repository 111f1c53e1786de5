"""Bounded reads from an image, wherever it is.

Not mmap: an I/O error there is a SIGBUS, which no caller could turn into an error about one map.
"""

from __future__ import annotations

import os
from typing import Protocol

from hpmapper.errors import Corrupt

_WINDOW = 16 << 10


class Image(Protocol):
    """An image's bytes. `size` is its length, `name` is for messages."""

    name: str
    size: int

    def read(self, offset: int, size: int) -> bytes:
        """Exactly these bytes.

        Raises:
            Corrupt: they are not all inside the image.
        """

    def close(self) -> None: ...


class MemoryImage:
    """An image in memory."""

    def __init__(self, data: bytes, name: str = "map") -> None:
        self._data = data
        self.name = name
        self.size = len(data)

    def read(self, offset: int, size: int) -> bytes:
        check_range(self, offset, size)
        return self._data[offset : offset + size]

    def close(self) -> None:
        """Nothing to do."""


class FileImage:
    """An image in a file, read by windows: a walk through a tree mostly stays in the last one."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = os.fspath(path)
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._fd).st_size
        self._start = 0
        self._window = b""

    def read(self, offset: int, size: int) -> bytes:
        check_range(self, offset, size)
        at = offset - self._start
        if at < 0 or at + size > len(self._window):
            self._load(offset, size)
            at = offset - self._start
        return self._window[at : at + size]

    def close(self) -> None:
        os.close(self._fd)

    def _load(self, offset: int, size: int) -> None:
        start = offset // _WINDOW * _WINDOW
        wanted = max(_WINDOW, offset + size - start)
        window = os.pread(self._fd, wanted, start)
        if len(window) < offset + size - start:
            raise Corrupt(f"{self.name}: shorter than when it was opened")
        self._start, self._window = start, window


def check_range(image: Image, offset: int, size: int) -> None:
    """Raise Corrupt unless the range lies in the image."""
    if offset < 0 or size < 0 or offset + size > image.size:
        raise Corrupt(f"bytes {offset} to {offset + size} are outside the map of {image.size} bytes")
