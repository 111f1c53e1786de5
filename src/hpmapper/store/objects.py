"""The object store: regular files' data, each content once, named by its BLAKE3 digest, never changed.

    o/ab/cdef…      one object: mode 0444

A file here is an object once the database says so, and then it is whole and on stable storage. Until then it is on
its way, or rubbish of a crash, and nobody but its writer touches it: whoever sweeps holds the store's lock
exclusively, whoever writes or relies on an object being there (an ingest) holds it shared.

Objects are written under their final names. To write each elsewhere and rename it took a tenth of an ingest's time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from blake3 import blake3

from hpmapper import faults
from hpmapper.errors import Corrupt
from hpmapper.files import Pieces, Segments, write_data, write_file
from hpmapper.kernel import lock, sync
from hpmapper.kernel.syscall import opened
from hpmapper.model import ObjectDigest, object_path

_DIRECTORIES = {f"{number:02x}" for number in range(256)}

_BUFFERED = 8 << 20
"""Files up to this many bytes are digested before anything is written, so a known one costs no write at all."""

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC

_WRITEBACK_EVERY = 64 << 20
"""Bytes after which writing out begins in the background, so that the final sync finds little left."""

IsObject = Callable[[ObjectDigest], bool]
"""Whether the database names an object."""


class ObjectStore:
    """The objects under one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._prefix = f"{directory}/"

    def make(self) -> None:
        """Make the directories that are missing. All at once, so that their inodes lie together on the disk: a start
        with empty caches waits for each place where some lie."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in _DIRECTORIES - set(os.listdir(self.directory)):
            with suppress(FileExistsError):  # another process is at it
                os.mkdir(self._prefix + name, 0o700)

    def read_ahead(self) -> None:
        """Have the directories read in the background: opening one has XFS read its first block (xfs_dir_open)."""
        with opened(self.directory) as top:
            for name in os.listdir(top):
                os.close(os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=top))

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

    def __init__(
        self, store: ObjectStore, directory: Path, spool: BinaryIO, inline_below: int, is_object: IsObject
    ) -> None:
        """Use `directory`, on the store's file system; the caller removes it, closes the spool, and sweeps the store
        if the ingest fails. `is_object` tells what the database names."""
        self.inline_below = inline_below
        self.objects: dict[ObjectDigest, int] = {}
        self.new_bytes = 0
        self._spool = spool
        self._store = store
        self._is_object = is_object
        self._prefix = f"{directory}/"
        self._beside: list[ObjectDigest] = []  # written in `directory`, not yet in the store
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
        """Put what was written beside the store in its place. It is on stable storage already: the caller synced."""
        for digest in self._beside:
            os.rename(self._prefix + digest.hex(), self._store.path(digest))
            faults.point("ingest.object-published")

    def _put_buffered(self, pieces: Pieces, size: int) -> ObjectDigest:
        data = _whole(pieces)
        digest = ObjectDigest(blake3(data).digest())
        if digest in self.objects:
            return digest
        self.objects[digest] = size
        fd = self._create(digest, size)
        if fd is not None:
            try:
                write_data(fd, data)
            finally:
                os.close(fd)
            self._wrote(size)
            self.new_bytes += size
            faults.point("ingest.object-written")
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
        if digest in self.objects or self._has(digest, size):
            os.unlink(temporary)
        else:
            os.rename(temporary, self._prefix + digest.hex())
            self._beside.append(digest)
            self.new_bytes += size
        self.objects[digest] = size
        return digest

    def _create(self, digest: ObjectDigest, size: int) -> int | None:
        """A new file for an object, open for writing; None if the store has the object."""
        try:
            return os.open(self._store.path(digest), _CREATE, 0o444)
        except FileExistsError:
            if self._has(digest, size):
                return None
        # Another ingest may be writing it and may yet fail, or a crash has left it: replaced once ours is durable.
        self._beside.append(digest)
        return os.open(self._prefix + digest.hex(), _CREATE, 0o444)

    def _has(self, digest: ObjectDigest, size: int) -> bool:
        """Whether the store has the object. One of another size is damaged, and to be replaced."""
        return self._is_object(digest) and self._store.size(digest) == size

    def _counted(self, pieces: Pieces) -> Pieces:
        for piece in pieces:
            self._wrote(len(piece))
            yield piece

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
    parts = tuple(pieces)
    return parts[0] if len(parts) == 1 else b"".join(parts)
