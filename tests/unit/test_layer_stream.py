"""A layer's bytes: every compression in every shape gives the same tar and the right digests; damage is found."""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpmapper.errors import Corrupt
from hpmapper.layer.stream import CHUNK, Digests, Expected, LayerStream
from hpmapper.testing.tars import zstd_packed

DATA = bytes(range(256)) * 20_000 + b"odd"  # more than the queue's chunks
SKIPPABLE = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"12345"


class Dribble(io.BytesIO):
    """A stream whose reads give as few bytes as `sizes` say, in turn."""

    def __init__(self, data: bytes, sizes: Iterable[int]) -> None:
        super().__init__(data)
        self._sizes = list(sizes)
        self._turn = 0

    def read(self, size: int | None = -1) -> bytes:
        self._turn += 1
        return super().read(self._sizes[self._turn % len(self._sizes)])


def read_all(blob: bytes | io.BytesIO) -> tuple[bytes, Digests]:
    with LayerStream(io.BytesIO(blob) if isinstance(blob, bytes) else blob) as stream:
        data = b"".join(map(bytes, stream.finish()))
        return data, stream.digests


def gzip_with_header(data: bytes) -> bytes:
    """A member with extra field, name and comment (RFC 1952), but no header checksum: igzip needs it in one piece."""
    head = b"\x1f\x8b\x08\x1c" + bytes(6) + b"\x03\x00abc" + b"name\0" + b"comment\0"
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = packer.compress(data) + packer.flush()
    tail = zlib.crc32(data).to_bytes(4, "little") + (len(data) & 0xFFFFFFFF).to_bytes(4, "little")
    return head + body + tail


def in_pieces(pack: Callable[[bytes], bytes], data: bytes = DATA, size: int = 700_001) -> bytes:
    return b"".join(pack(data[at : at + size]) for at in range(0, len(data), size))


SHAPES = {
    "plain": DATA,
    "gzip": gzip.compress(DATA, 6),
    "gzip, stored": gzip.compress(DATA, 0),
    "gzip, full header": gzip_with_header(DATA),
    "gzip members": in_pieces(gzip.compress),
    "gzip, empty members": gzip.compress(b"") + gzip.compress(DATA) + gzip.compress(b""),
    "gzip, padded": gzip.compress(DATA) + bytes(3000),
    "gzip members, padded between": in_pieces(lambda piece: gzip.compress(piece) + bytes(512)),
    "zstd": zstd_packed(DATA),
    "zstd frames": in_pieces(zstd_packed),
    "zstd, empty frames": zstd_packed(b"") + zstd_packed(DATA) + zstd_packed(b""),
    "zstd, skippable frames": SKIPPABLE + in_pieces(lambda piece: zstd_packed(piece) + SKIPPABLE),
    "zstd, padded": zstd_packed(DATA) + bytes(3000),
}


@pytest.mark.parametrize("sizes", [(CHUNK,), (1, 2, 3, 5000), (65_536,)], ids=str)
@pytest.mark.parametrize("blob", SHAPES.values(), ids=SHAPES.keys())
def test_every_shape(blob: bytes, sizes: tuple[int, ...]) -> None:
    data, digests = read_all(Dribble(blob, sizes))
    assert data == DATA
    assert digests == Digests(
        f"sha256:{hashlib.sha256(blob).hexdigest()}", len(blob), f"sha256:{hashlib.sha256(DATA).hexdigest()}", len(DATA)
    )


@pytest.mark.parametrize("blob", [SHAPES[name] for name in ("gzip", "gzip, full header", "zstd")])
def test_cut_anywhere(blob: bytes) -> None:
    cuts = {*range(4, 30), *range(30, len(blob), max(1, len(blob) // 40)), len(blob) - 1, len(blob) - 8}
    for length in sorted(cuts):
        with pytest.raises(Corrupt):
            read_all(blob[:length])


@pytest.mark.parametrize("rest", [b"rubbish", b"\x1f\x8b", b"\0\0rubbish", b"\x28\xb5\x2f\xfd"])
@pytest.mark.parametrize("name", ["gzip", "zstd"])
def test_rubbish_behind(name: str, rest: bytes) -> None:
    with pytest.raises(Corrupt):
        read_all(SHAPES[name] + rest)


@given(st.data())
def test_damage_is_found(data: st.DataObject) -> None:
    """A checksum finds every changed byte that changes the data; nothing but Corrupt comes of the others."""
    plain = b"some text that is long enough to be compressed " * 100
    blob = bytearray(data.draw(st.sampled_from([gzip.compress(plain, mtime=0), zstd_packed(plain)])))
    blob[data.draw(st.integers(0, len(blob) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        found, _ = read_all(bytes(blob))
    except Corrupt:
        return
    assert found in (plain, bytes(blob)), "damaged data passed"  # the latter: its magic number is gone


def test_reading_in_any_sizes() -> None:
    with LayerStream(io.BytesIO(SHAPES["gzip"])) as stream:
        at = 0
        for size in (0, 1, 511, CHUNK, 3 * CHUNK + 7, 100):
            assert stream.read(size) == DATA[at : at + size]
            at += size
        pieces = [bytes(piece) for piece in stream.pieces(100_000)]
        assert b"".join(pieces) == DATA[at : at + 100_000]
        at += 100_000
        first = bytes(next(iter(stream.pieces(10))))  # whoever leaves the iteration early has read what he got
        assert stream.read(5) == DATA[at + len(first) : at + len(first) + 5]


def test_the_end() -> None:
    with LayerStream(io.BytesIO(b"1234567")) as stream:
        assert stream.read_or_end(7) == b"1234567"
        assert stream.read_or_end(7) == b""
        assert stream.read_or_end(7) == b""
    with LayerStream(io.BytesIO(b"1234567")) as stream, pytest.raises(Corrupt):
        stream.read_or_end(8)


def test_progress_counts_compressed_bytes() -> None:
    seen: list[int] = []
    blob = SHAPES["gzip members"]
    with LayerStream(io.BytesIO(blob), seen.append) as stream:
        for _ in stream.finish():
            pass
    assert sum(seen) == len(blob)


def test_an_error_of_the_blob_reaches_the_reader() -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell():
                raise ConnectionError("gone")
            return super().read(1000)

    with LayerStream(Broken(DATA)) as stream, pytest.raises(ConnectionError):
        stream.read(5000)


def test_leaving_early_ends_the_thread() -> None:
    with LayerStream(io.BytesIO(DATA * 10)) as stream:
        assert stream.read(3) == DATA[:3]
    assert not stream._thread.is_alive()


@pytest.mark.parametrize(
    ("expected", "word"),
    [
        (Expected(diff_id="sha256:" + "0" * 64), "DiffID"),
        (Expected(digest="sha256:" + "0" * 64), "digest"),
        (Expected(size=1), "size"),
    ],
)
def test_broken_promises_are_named(expected: Expected, word: str) -> None:
    _, digests = read_all(SHAPES["zstd"])
    Expected(digests.diff_id, digests.blob_digest, digests.blob_size).verify(digests)
    Expected().verify(digests)
    with pytest.raises(Corrupt, match=word):
        expected.verify(digests)
