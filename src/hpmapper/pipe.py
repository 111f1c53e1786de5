"""One thread writes, the other reads: joins a producer of a stream to its consumer without a temporary file."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import BinaryIO, Self, cast

_BUFFER = 1 << 20
_PIPE = 64 << 10
"""Bytes that a pipe holds (pipe(7))."""


def stream_of(write: Callable[[BinaryIO], None]) -> BinaryIO:
    """A stream of what `write` writes, in a thread, while it is read.

    An error of the writer is raised by the reader's next read; a reader that closes the stream early ends the writer.
    """
    return cast(BinaryIO, io.BufferedReader(_Reader(write), _BUFFER))


@contextmanager
def piped(write: Callable[[BinaryIO], None]) -> Iterator[BinaryIO]:
    """As `stream_of`; the writer has ended when the block has."""
    with stream_of(write) as stream:
        yield stream


class _Reader(io.RawIOBase):
    """The reading end. The end of the stream is told only after the writer is known to have succeeded."""

    def __init__(self, write: Callable[[BinaryIO], None]) -> None:
        super().__init__()
        self._failure: BaseException | None = None
        self._fd, out = os.pipe()
        self._thread = threading.Thread(target=self._run, args=(write, out), name="pipe-writer", daemon=True)
        self._thread.start()

    def _run(self, write: Callable[[BinaryIO], None], fd: int) -> None:
        try:
            with os.fdopen(fd, "wb", _PIPE) as out:
                write(out)
        except BaseException as error:  # for the reader, if there is one still
            self._failure = error

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # Buffer is 3.12's
        count = os.readv(self._fd, [buffer])
        if not count:
            self._thread.join()
            if self._failure is not None:
                raise self._failure
        return count

    def close(self) -> None:
        if not self.closed:
            os.close(self._fd)  # a writer that is not done gets EPIPE and ends
            self._thread.join()
        super().close()


class Flag:
    """Set or not. An Event could be waited for, too, but takes ten times as long to make: each call has a flag."""

    __slots__ = ("_set",)

    def __init__(self) -> None:
        self._set = False

    def set(self) -> None:
        self._set = True

    def is_set(self) -> bool:
        return self._set


def stoppable(stream: BinaryIO, stop: Flag | threading.Event) -> BinaryIO:
    """The stream, whose reads fail once `stop` is set, so that the thread that reads it comes to an end."""
    return cast(BinaryIO, _Stoppable(stream, stop))


class _Stoppable:
    """Not an io class: those close themselves when they are dropped, and closing waits for a thread that reads."""

    def __init__(self, stream: BinaryIO, stop: Flag | threading.Event) -> None:
        self._stream = stream
        self._stop = stop

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def read(self, size: int = -1) -> bytes:
        if self._stop.is_set():
            raise InterruptedError("nobody waits for this any more")
        return self._stream.read(size)

    def close(self) -> None:
        self._stream.close()
