"""A layer's bytes, from the compressed blob to a verified tar stream.

One thread reads, digests and decompresses ahead of the parser (both digests and the decompressors release the
GIL); a bounded queue holds the parser's next few MiB, so memory does not grow with the layer.
"""

from __future__ import annotations

import hashlib
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import BinaryIO, Protocol, Self

from isal import igzip_lib

from hpmapper.errors import Corrupt

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

CHUNK = 1 << 20
"""Bytes handed on at a time, compressed or not."""

_AHEAD = 8
"""Chunks decompressed ahead of the parser."""

_MAGIC_SIZE = 4
_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"  # after one byte 0x50-0x5f; zstd:chunked begins with such a frame


class _Decompressor(Protocol):
    """What igzip's and zstd's streaming decompressors have in common (as in `bz2.BZ2Decompressor`)."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


def _new_gzip() -> _Decompressor:
    return igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)


def _new_zstd() -> _Decompressor:
    return zstd.ZstdDecompressor()


def new_zstd_compressor() -> zstd.ZstdCompressor:
    """What makes a zstd layer."""
    return zstd.ZstdCompressor(level=3)


def _decompressor_for(head: bytes) -> Callable[[], _Decompressor] | None:
    """The decompressor that the first bytes ask for. The media type is not trusted: Docker's has been wrong."""
    if head.startswith(_GZIP_MAGIC):
        return _new_gzip
    if head.startswith(_ZSTD_MAGIC) or (len(head) >= 4 and head[0] >> 4 == 5 and head[1:4] == _ZSTD_SKIPPABLE):
        return _new_zstd
    return None


def _decompress(blob: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the uncompressed bytes of `blob`, which may hold several gzip members or zstd frames."""
    first = next(blob, b"")
    while len(first) < _MAGIC_SIZE and (more := next(blob, b"")):
        first += more  # a socket may give a byte at a time
    new = _decompressor_for(first)
    if new is None:
        yield first
        yield from blob
        return
    data, current = first, new()
    while True:
        if current.eof:
            data = _past_padding(current.unused_data, blob)
            if not data:
                return
            current = new()
        elif current.needs_input and not data:
            data = next(blob, b"")
            if not data:
                raise Corrupt("the compressed layer ends too early", hint="fetch it again")
        piece = current.decompress(data, CHUNK)
        data = b""
        if piece:
            yield piece


def _past_padding(data: bytes, blob: Iterator[bytes]) -> bytes:
    """What follows a member: zero bytes are padding, as gzip(1) has it; b"" at the end."""
    while not (data := data.lstrip(b"\0")):
        data = next(blob, b"")
        if not data:
            break
    return data


@dataclass(frozen=True, slots=True)
class Digests:
    """What a layer's stream was found to be: sha256 of the blob and of the tar, and their lengths in bytes."""

    blob_digest: str
    blob_size: int
    diff_id: str
    tar_size: int


@dataclass(frozen=True, slots=True)
class Expected:
    """What a layer's stream is promised to be; None where nothing is promised.

    Attributes:
        diff_id: sha256 of the uncompressed tar, as the image's config says.
        digest, size: of the blob, as the manifest says.
    """

    diff_id: str | None = None
    digest: str | None = None
    size: int | None = None

    def verify(self, found: Digests) -> None:
        """Compare.

        Raises:
            Corrupt: the stream is something else.
        """
        pairs = (
            ("digest", self.digest, found.blob_digest),
            ("size", self.size, found.blob_size),
            ("DiffID", self.diff_id, found.diff_id),
        )
        for what, promised, seen in pairs:
            if promised is not None and promised != seen:
                raise Corrupt(f"the layer's {what} is {seen}, not {promised} as promised", hint="fetch it again")


class LayerStream:
    """The uncompressed tar of a layer, for one reader, as a context manager.

    The reader takes bytes with `read` (exact) and `pieces`; `finish` drains what is left and tells the digests.

    Raises (from any method):
        Corrupt: the compressed data is damaged or ends too early, or the tar ends inside a member.
    """

    def __init__(self, blob: BinaryIO, progress: Callable[[int], None] | None = None) -> None:
        """Read `blob` to its end; `progress` is told the number of compressed bytes as they are read."""
        self._blob = blob
        self._progress = progress
        self._queue: queue.Queue[bytes | BaseException | None] = queue.Queue(_AHEAD)
        self._stop = threading.Event()
        self._digests: Digests | None = None
        self._chunk = b""
        self._at = 0
        self._ended = False
        self._thread = threading.Thread(target=self._produce, name="layer-stream", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes."""
        end = self._at + size
        if end <= len(self._chunk):
            data = self._chunk[self._at : end]
            self._at = end
            return data
        return b"".join(self.pieces(size))

    def read_or_end(self, size: int) -> bytes:
        """Exactly `size` bytes, or b"" when the stream ended just here."""
        if self._at == len(self._chunk) and not self._next_chunk():
            return b""
        return self.read(size)

    def pieces(self, size: int) -> Iterable[bytes | memoryview]:
        """The next `size` bytes in pieces, not copied."""
        start, end = self._at, self._at + size
        if end > len(self._chunk):
            return self._pieces(size)
        self._at = end
        return (memoryview(self._chunk)[start:end],)

    def _pieces(self, size: int) -> Iterator[bytes | memoryview]:
        while size:
            if self._at == len(self._chunk) and not self._next_chunk():
                raise Corrupt("the layer's tar ends inside a member", hint="fetch it again")
            take = min(size, len(self._chunk) - self._at)
            whole = take == len(self._chunk)
            piece = self._chunk if whole else memoryview(self._chunk)[self._at : self._at + take]
            # Before the piece is handed out: whoever has enough does not come back for the end of the iteration.
            self._at += take
            size -= take
            yield piece

    def finish(self) -> Iterator[bytes | memoryview]:
        """Yield what is left; afterwards `digests` is known."""
        while self._at < len(self._chunk) or self._next_chunk():
            yield memoryview(self._chunk)[self._at :]
            self._at = len(self._chunk)

    @property
    def digests(self) -> Digests:
        """The digests of all that was read, once `finish` is through."""
        assert self._digests is not None, "finish() first"
        return self._digests

    def _next_chunk(self) -> bool:
        if self._ended:
            return False
        chunk = self._queue.get()
        if isinstance(chunk, BaseException):
            self._ended = True
            raise chunk
        self._ended = chunk is None
        self._chunk, self._at = chunk or b"", 0
        return not self._ended

    def _produce(self) -> None:
        try:
            self._pump()
        except (zstd.ZstdError, igzip_lib.error, EOFError) as error:  # type: ignore[misc]
            self._put(Corrupt(f"the compressed layer is damaged: {error}", hint="fetch it again"))
        except BaseException as error:  # handed to the reader's thread, which raises it
            self._put(error)
        else:
            self._put(None)

    def _pump(self) -> None:
        blob_hash, tar_hash = hashlib.sha256(), hashlib.sha256()
        blob_size = tar_size = 0

        def blob() -> Iterator[bytes]:
            nonlocal blob_size
            while not self._stop.is_set() and (data := self._blob.read(CHUNK)):
                blob_hash.update(data)
                blob_size += len(data)
                if self._progress:
                    self._progress(len(data))
                yield data

        for piece in _decompress(blob()):
            tar_hash.update(piece)
            tar_size += len(piece)
            self._put(piece)
            if self._stop.is_set():
                return
        self._digests = Digests(
            f"sha256:{blob_hash.hexdigest()}", blob_size, f"sha256:{tar_hash.hexdigest()}", tar_size
        )

    def _put(self, item: bytes | BaseException | None) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
        return None
