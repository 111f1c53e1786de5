"""A directory and a tar archive as the same thing: files by name, none of which can lie outside.

An image's parts are read through `Files`, so that a layout's reader does not care which of the two it has.
"""

from __future__ import annotations

import io
import os
import posixpath
import stat
import tarfile
from collections.abc import Callable, Iterator
from errno import ELOOP, ENOENT, ENOTDIR, ENXIO
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol, cast

from hpmapper.errors import Corrupt, Unsupported
from hpmapper.image import codec, oci

MAX_MEMBERS = 200_000
"""Of an image archive: thousands of images. A root file system is told apart before that many."""

_MAX_LINKS = 8

# A tar's extension headers (long names, pax) are read into memory, and tarfile's regular expressions over them
# have been quadratic (CVE-2024-6232); nobody has a megabyte of them.
_MAX_HEADER = 1 << 20


class File(NamedTuple):
    """A regular file: its size, and how to get a new stream of its bytes."""

    size: int
    open: Callable[[], BinaryIO]


class Files(Protocol):
    """Files by relative path."""

    name: str
    """What to call the whole in a message."""

    def find(self, path: str) -> File | None:
        """Return the regular file at `path`, None when there is nothing.

        Raises:
            Corrupt: it leads outside, or is not a regular file.
        """
        ...


class FileRange(io.RawIOBase):
    """`size` bytes of an open file from `start`: independent of the file's position and of its other ranges."""

    def __init__(self, fd: int, start: int, size: int, name: str) -> None:
        super().__init__()
        self._fd = os.dup(fd)  # the source may be closed before this
        self._at = start
        self._end = start + size
        self._name = name

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # Buffer is 3.12's
        wanted = min(len(buffer), self._end - self._at)
        if not wanted:
            return 0
        got = os.preadv(self._fd, [memoryview(buffer)[:wanted]], self._at)
        if not got:
            raise Corrupt(f"{self._name} ends {self._end - self._at} bytes early")
        self._at += got
        return got

    def close(self) -> None:
        if not self.closed:
            os.close(self._fd)
        super().close()


def open_range(fd: int, start: int, size: int, name: str) -> BinaryIO:
    """Return a buffered stream of that range."""
    return cast(BinaryIO, io.BufferedReader(FileRange(fd, start, size, name), codec.COPY))


def read_all(files: Files, path: str) -> bytes | None:
    """Return a small document's bytes, None when it is not there."""
    file = files.find(path)
    return None if file is None else read_document(file, f"{path} in {files.name}")


def read_document(file: File, what: str) -> bytes:
    """Return a small file's bytes.

    Raises:
        Corrupt: it is larger than any document may be.
    """
    if file.size > oci.MAX_JSON:
        raise Corrupt(f"{what} has {file.size} bytes, more than the {oci.MAX_JSON} allowed")
    with file.open() as stream:
        return stream.read()


class DirectoryFiles:
    """The files below a directory. Symlinks are refused wherever they point: a layout has no use for one."""

    def __init__(self, root: Path) -> None:
        self.name = str(root)
        self._root = root

    def find(self, path: str) -> File | None:
        fd = self._open(path)
        if fd is None:
            return None
        try:
            size = os.fstat(fd).st_size
        finally:
            os.close(fd)
        return File(size, lambda: self._stream(path, size))

    def _stream(self, path: str, size: int) -> BinaryIO:
        fd = self._open(path)
        if fd is None:
            raise Corrupt(f"{path} has vanished from {self.name}")
        try:
            return open_range(fd, 0, size, f"{path} in {self.name}")
        finally:
            os.close(fd)

    def _open(self, path: str) -> int | None:
        """Open `path` step by step, so that no component is followed out of the directory."""
        fd = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for component in path.split("/"):
            # O_NONBLOCK: a fifo in place of a blob must not make us wait for its writer.
            try:
                below = os.open(component, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=fd)
            except OSError as error:
                if error.errno == ENOENT:
                    return None
                if error.errno in (ELOOP, ENOTDIR, ENXIO):
                    raise self._not_a_file(path) from error
                raise
            finally:
                os.close(fd)
            fd = below
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise self._not_a_file(path)
        return fd

    def _not_a_file(self, path: str) -> Corrupt:
        return Corrupt(f"{path} in {self.name} is not a plain file", hint="symlinks are not followed; copy with cp -rL")


class _HeaderReader:
    """What tarfile may see of an archive: forward, and headers only.

    A negative member size makes tarfile go back and loop for ever (CVE-2025-8194), a large extension header makes
    it take all memory. Both end here.
    """

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream = stream
        self._name = name
        self.last = b""

    def tell(self) -> int:
        return self._stream.tell()

    def seek(self, offset: int) -> None:
        if offset < self._stream.tell():
            raise Corrupt(f"{self._name} has a member of negative size")
        self._stream.seek(offset)

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_HEADER:
            raise Corrupt(f"{self._name} has a header of {size} bytes")
        self.last = self._stream.read(size)
        return self.last


def tar_members(stream: BinaryIO, name: str) -> Iterator[tarfile.TarInfo]:
    """Yield a tar's members, reading headers only; `stream` need not be able to seek backwards.

    Raises:
        Corrupt: it is not a tar, or is damaged or cut.
    """
    headers = _HeaderReader(stream, name)
    try:
        with tarfile.TarFile(fileobj=cast(BinaryIO, headers), encoding="utf-8", errors="surrogateescape") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would keep them all
                if member.size < 0:
                    raise Corrupt(f"{name} has a member of negative size")
                yield member
    except (tarfile.TarError, ValueError, IndexError) as error:
        raise Corrupt(f"{name} is not a readable tar archive: {error}") from error
    # tarfile takes a broken header for the end.
    if headers.last.strip(b"\0") or not headers.last:
        raise Corrupt(f"{name} is damaged or cut: it does not end as a tar archive must")


def member_path(name: str) -> str | None:
    """Return the normal form of a member's or link's name, None when it leads outside; "." is the archive's root."""
    path = posixpath.normpath(name)
    outside = name.startswith("/") or path == ".." or path.startswith("../")
    return None if outside or "\0" in path else path


class TarFiles:
    """The members of an uncompressed tar on a seekable file; nothing is extracted.

    The archive's own symlinks and hard links are followed, since `docker save` shares layers through them.
    """

    def __init__(self, archive: BinaryIO, name: str) -> None:
        self.name = name
        self._archive = archive  # not its number, which would name another file once it is closed
        self._end = os.fstat(archive.fileno()).st_size
        self._members: dict[str, tarfile.TarInfo] = {}
        archive.seek(0)
        for member in tar_members(archive, name):
            self._add(member)

    def _add(self, member: tarfile.TarInfo) -> None:
        path = member_path(member.name)
        if path is None:
            raise Corrupt(f"{self.name} has a member {member.name[:100]!r}, which leads outside")
        # Which of two were meant would depend on the reader.
        if path in self._members and not (member.isdir() and self._members[path].isdir()):
            raise Corrupt(f"{self.name} has two members named {path[:100]!r}")
        if len(self._members) >= MAX_MEMBERS:
            raise Corrupt(f"{self.name} has more than {MAX_MEMBERS} members: not an image archive")
        self._members[path] = member

    def __contains__(self, path: str) -> bool:
        return path in self._members

    def find(self, path: str) -> File | None:
        member = self._resolve(path)
        if member is None:
            return None
        where = f"{path} in {self.name}"
        if member.issparse():
            raise Unsupported(f"{where} is a sparse file", hint="make the archive without tar's --sparse")
        start, size = member.offset_data, member.size
        if start + size > self._end:
            raise Corrupt(f"{where} ends {start + size - self._end} bytes early")
        return File(size, lambda: open_range(self._archive.fileno(), start, size, where))

    def _resolve(self, path: str) -> tarfile.TarInfo | None:
        """Follow links from `path` to a regular file."""
        here: str | None = path
        for _ in range(_MAX_LINKS):
            member = self._members.get(here or "")
            if member is None or member.isreg():
                return member
            if member.issym():
                here = member_path(posixpath.join(posixpath.dirname(here or ""), member.linkname))
            elif member.islnk():
                here = member_path(member.linkname)
            else:
                break
            if here is None:
                raise Corrupt(f"{path} in {self.name} is a link that leads outside")
        raise Corrupt(f"{path} in {self.name} is not a plain file")
