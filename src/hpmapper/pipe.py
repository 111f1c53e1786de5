"""One thread writes, the other reads: joins a producer of a stream to its consumer without a temporary file."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import BinaryIO, Self, cast


class _Reader(io.RawIOBase):
    """The reading end. The end of the stream is told only after the writer is known to have succeeded."""

    def __init__(self, fd: int, outcome: Callable[[], None]) -> None:
        self._raw = os.fdopen(fd, "rb", buffering=0)
        self._outcome = outcome

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = self._raw.readinto(buffer)
        if not count:
            self._outcome()
        return count or 0

    def close(self) -> None:
        self._raw.close()
        super().close()


@contextmanager
def piped(write: Callable[[BinaryIO], None]) -> Iterator[BinaryIO]:
    """Run `write` in a thread and yield what it writes.

    An error of the writer is raised by the reader's next read; a reader that stops early ends the writer.
    """
    read_fd, write_fd = os.pipe()
    failures: list[BaseException] = []

    def run() -> None:
        try:
            with os.fdopen(write_fd, "wb") as out:
                write(out)
        except BrokenPipeError:
            pass  # the reader has had enough
        except BaseException as error:  # handed to the reader
            failures.append(error)

    thread = threading.Thread(target=run, name="pipe-writer")

    def outcome() -> None:
        thread.join()
        if failures:
            raise failures[0]

    thread.start()
    reader = _Reader(read_fd, outcome)
    try:
        yield cast(BinaryIO, io.BufferedReader(reader, 1 << 20))
    finally:
        reader.close()
        thread.join()


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
