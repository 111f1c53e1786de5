"""The object store: regular files' data, each content once, named by its BLAKE3 digest, never changed.

    o/ab/cdef…      one object: mode 0444, whole and on stable storage before it got this name

An ingest writes into a `Staging` directory on the same file system and publishes in the end. What o/ holds and the
database does not name is rubbish of a crash; whoever sweeps it holds the store's lock exclusively, whoever relies on
an object being there (an ingest) holds it shared.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from blake3 import blake3

from hpmapper import faults
from hpmapper.errors import Corrupt
from hpmapper.files import Pieces, Segments, write_data, write_file
from hpmapper.kernel import lock, sync
from hpmapper.model import ObjectDigest, object_path

_BUFFERED = 8 << 20
"""Files up to this many bytes are digested before anything is written, so a known one costs no write at all."""

_WRITEBACK_EVERY = 64 << 20
"""Bytes after which writing out begins in the background, so that the final sync finds little left."""


class ObjectStore:
    """The objects under one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._prefix = f"{directory}/"

    def path(self, digest: ObjectDigest) -> str:
        """Where the object is, or would be. A string: an ingest asks for tens of thousands."""
        return self._prefix + object_path(digest)

    def open(self, digest: ObjectDigest) -> BinaryIO:
        """The object's data.

        Raises:
            Corrupt: it is missing.
        """
        try:
            return open(self.path(digest), "rb")
        except FileNotFoundError:
            raise Corrupt(f"object {digest.hex()} is missing", hint="run hpmapper fsck") from None

    def size(self, digest: ObjectDigest) -> int | None:
        """The object's length in bytes; None if it is missing."""
        try:
            return os.stat(self.path(digest)).st_size
        except FileNotFoundError:
            return None

    def verify(self, digest: ObjectDigest) -> bool:
        """Read the object and say whether its data is what its name says."""
        with self.open(digest) as data:
            hasher = blake3()
            while piece := data.read(1 << 20):
                hasher.update(piece)
        return hasher.digest() == digest

    def delete(self, digests: Iterable[ObjectDigest]) -> int:
        """Delete objects (those that are there); returns the bytes they had. The caller holds the lock exclusively."""
        freed = 0
        for digest in digests:
            path = self.path(digest)
            try:
                freed += os.stat(path).st_blocks * 512
                os.unlink(path)
            except FileNotFoundError:
                continue
            faults.point("objects.deleted")
        return freed

    def __iter__(self) -> Iterator[ObjectDigest]:
        """The digests of all objects on disk."""
        for directory in sorted(os.scandir(self.directory), key=lambda entry: entry.name):
            if directory.is_dir(follow_symlinks=False):
                for entry in os.scandir(directory.path):
                    yield ObjectDigest(bytes.fromhex(directory.name + entry.name))

    def shared(self) -> AbstractContextManager[int]:
        """Keep sweepers out: what is an object now stays one until this ends."""
        return lock.shared(self.directory)

    def exclusive(self, timeout: float) -> AbstractContextManager[int]:
        """Keep ingests out; BlockingIOError after `timeout` seconds."""
        return lock.exclusive(self.directory, timeout=timeout)


class Staging:
    """Files of one ingest on their way into the store (the builder's `FileSink`); a context manager.

    Attributes:
        objects: every object that the layer refers to, with its size in bytes.
        new_bytes: bytes of those that the store did not have.
    """

    def __init__(self, store: ObjectStore, directory: Path, spool: BinaryIO, inline_below: int) -> None:
        """Stage in `directory`, on the store's file system; the caller removes it, and closes the spool."""
        self.inline_below = inline_below
        self.objects: dict[ObjectDigest, int] = {}
        self.new_bytes = 0
        self._spool = spool
        self._store = store
        self._prefix = f"{directory}/"
        self._new: list[ObjectDigest] = []
        self._spooled = 0
        self._dirty = 0
        self._writeback = _Writeback(directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._writeback.close()

    def inline(self, data: bytes) -> int:
        """Keep a small file's data for the map; returns its offset in the spool."""
        offset = self._spooled
        self._spool.write(data)
        self._spooled += len(data)
        return offset

    def put(self, pieces: Pieces, size: int, segments: Segments | None) -> tuple[ObjectDigest | int, bytes]:
        """Make a file an object, unless the store has it. See `FileSink.put`."""
        if segments is None and size <= _BUFFERED:
            digest = self._put_buffered(pieces, size)
        else:
            digest = self._put_streamed(pieces, size, segments)
        return digest, digest

    def start_writeback(self) -> None:
        """Let what was written go to the disk in the background, while something else is done."""
        self._writeback.start()

    def publish(self) -> None:
        """Give the new objects their names. Their data is on stable storage already: the caller synced."""
        for digest in self._new:
            self._publish_one(digest)
            faults.point("ingest.object-published")

    def _publish_one(self, digest: ObjectDigest) -> None:
        staged, final = self._prefix + digest.hex(), self._store.path(digest)
        try:
            sync.rename_noreplace(staged, final)
        except FileExistsError:
            os.unlink(staged)  # another ingest was first
        except FileNotFoundError:
            os.makedirs(os.path.dirname(final), mode=0o700, exist_ok=True)
            self._publish_one(digest)  # again from the start: another ingest may be publishing the same

    def _known(self, digest: ObjectDigest, size: int) -> bool:
        if digest in self.objects:
            return True
        self.objects[digest] = size
        known = self._store.size(digest)
        if known is not None and known != size:
            raise Corrupt(f"object {digest.hex()} has {known} bytes, not {size}", hint="run hpmapper fsck --repair")
        return known is not None

    def _put_buffered(self, pieces: Pieces, size: int) -> ObjectDigest:
        data = _whole(pieces)
        digest = ObjectDigest(blake3(data).digest())
        if not self._known(digest, size):
            fd = os.open(self._prefix + digest.hex(), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444)
            try:
                write_data(fd, data)
            finally:
                os.close(fd)
            self._added(digest, size)
        return digest

    def _put_streamed(self, pieces: Pieces, size: int, segments: Segments | None) -> ObjectDigest:
        temporary = self._prefix + "incoming"
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o444)
        hasher = blake3()
        try:
            write_file(fd, self._counted(pieces), size, segments, hasher.update)
        finally:
            os.close(fd)
        digest = ObjectDigest(hasher.digest())
        if self._known(digest, size):
            os.unlink(temporary)
        else:
            os.rename(temporary, self._prefix + digest.hex())
            self._added(digest, 0)
            self.new_bytes += size
        return digest

    def _counted(self, pieces: Pieces) -> Pieces:
        for piece in pieces:
            self._wrote(len(piece))
            yield piece

    def _added(self, digest: ObjectDigest, size: int) -> None:
        self._new.append(digest)
        self.new_bytes += size
        self._wrote(size)
        faults.point("ingest.object-staged")

    def _wrote(self, size: int) -> None:
        self._dirty += size
        if self._dirty >= _WRITEBACK_EVERY:
            self._dirty = 0
            self._writeback.start()


class _Writeback:
    """Syncs a file system in the background, one sync at a time."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._thread: ThreadPoolExecutor | None = None
        self._running: Future[None] | None = None

    def start(self) -> None:
        if self._running is None or self._running.done():
            self._thread = self._thread or ThreadPoolExecutor(1, "writeback")
            self._running = self._thread.submit(sync.syncfs, self._directory)

    def close(self) -> None:
        if self._thread:
            self._thread.shutdown()


def _whole(pieces: Pieces) -> bytes | memoryview:
    """The data of all pieces; of a single one, as it is, without copying it."""
    stream = iter(pieces)
    first = next(stream, b"")
    second = next(stream, None)
    return first if second is None else b"".join((first, second, *stream))
