"""A writer and a reader of one stream: all of it arrives, or the reader hears why not."""

from __future__ import annotations

import threading
from typing import BinaryIO

import pytest

from hpmapper.pipe import piped, stream_of


def _writers() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name == "pipe-writer"]


def test_all_of_it_arrives() -> None:
    pieces = [bytes([number % 256]) * (number * 7) for number in range(2000)]
    with piped(lambda out: out.writelines(pieces)) as stream:
        assert stream.read() == b"".join(pieces)
    assert not _writers()


def test_the_reader_hears_of_the_writers_error_instead_of_the_end() -> None:
    def write(out: BinaryIO) -> None:
        out.write(b"begun")
        raise BrokenPipeError("the source of it all is gone")

    with piped(write) as stream:
        assert stream.read(5) == b"begun"
        with pytest.raises(BrokenPipeError, match="source"):
            stream.read(1)


def test_a_reader_that_stops_early_ends_the_writer() -> None:
    ended = threading.Event()

    def write(out: BinaryIO) -> None:
        try:
            while True:
                out.write(bytes(1 << 16))
        finally:
            ended.set()

    stream = stream_of(write)
    assert stream.read(10) == bytes(10)
    stream.close()
    assert ended.is_set()
    assert not _writers()
