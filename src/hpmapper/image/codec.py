"""Compression of whole streams: recognising it, undoing it, applying it, and setting a stream aside on disk."""

from __future__ import annotations

import gzip
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from isal import igzip, igzip_lib

from hpmapper.errors import Corrupt, InvalidArgument, NoSpace, Unsupported

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

COPY = 1 << 20
"""Bytes moved at a time."""

COMPRESSIONS = ("none", "gzip", "zstd")

HEAD = 6
"""Bytes that `sniff` needs."""

_IGzipFile: Any = igzip.IGzipFile  # it has no annotations
_IsalError = cast(type[Exception], igzip_lib.IsalError)  # its stub calls the class an instance

# What a single bomb may leave of the file system that it is spooled to.
_SPOOL_FLOOR = 0.05

_OTHERS = {b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"PK\3\4": "zip"}


def sniff(head: bytes, name: str) -> str:
    """Return none, gzip or zstd by a stream's first bytes; `name` is for the message when it is something else."""
    if head.startswith(b"\x1f\x8b"):
        return "gzip"
    # A skippable frame (0x184D2A5?) comes first in files of zstd:chunked and pzstd.
    if head.startswith(b"\x28\xb5\x2f\xfd") or (head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5):
        return "zstd"
    for magic, what in _OTHERS.items():
        if head.startswith(magic):
            raise Unsupported(
                f"{name} is compressed with {what}", hint="decompress it first; gzip and zstd can be read"
            )
    return "none"


@contextmanager
def damage(name: str) -> Iterator[None]:
    """Turn what the decompressors raise on bad input into Corrupt, naming `name`."""
    try:
        yield
    except (EOFError, _IsalError, gzip.BadGzipFile, zstd.ZstdError) as error:
        raise Corrupt(f"{name} is damaged: {error}") from error


def decompressed(raw: BinaryIO, compression: str) -> BinaryIO:
    """Return `raw` without its compression; reading it belongs inside `damage`. Closing it leaves `raw` open."""
    if compression == "gzip":
        return cast(BinaryIO, _IGzipFile(fileobj=raw, mode="rb"))
    if compression == "zstd":
        return cast(BinaryIO, zstd.ZstdFile(raw, "r"))
    return raw


def compressed(out: BinaryIO, compression: str) -> BinaryIO:
    """Return a stream that writes to `out` with `compression`; close it to finish, `out` stays open.

    The same input gives the same bytes again: no time or name in gzip's header, and zstd's threads cut jobs by
    size, not by how many threads there are.
    """
    if compression == "gzip":
        return cast(BinaryIO, _IGzipFile(filename="", fileobj=out, mode="wb", compresslevel=2, mtime=0))
    if compression == "zstd":
        workers = min(4, os.cpu_count() or 1)
        options: dict[int, int] = {
            zstd.CompressionParameter.compression_level: 3,
            zstd.CompressionParameter.checksum_flag: 1,
            zstd.CompressionParameter.nb_workers: workers,
        }
        return cast(BinaryIO, zstd.ZstdFile(out, "w", options=options))
    raise InvalidArgument(f"{compression!r} is not a compression", hint="one of " + ", ".join(COMPRESSIONS))


class Readable(Protocol):
    """The one thing that is asked of most streams."""

    def read(self, size: int, /) -> bytes: ...


def chunks(stream: Readable) -> Iterator[bytes]:
    """Yield what is left of `stream`."""
    while chunk := stream.read(COPY):
        yield chunk


def spool(stream: BinaryIO, directory: Path, name: str) -> BinaryIO:
    """Return a seekable copy of `stream`: an unnamed file in `directory`, gone when closed or when we die.

    Raises:
        NoSpace: a bomb, or a small disk: less than 5 % of the file system would be left.
        Corrupt: `stream` decompresses badly.
    """
    copy = cast(BinaryIO, tempfile.TemporaryFile(dir=directory))  # noqa: SIM115 - the caller closes it
    try:
        with damage(name):
            for chunk in chunks(stream):
                _keep_floor(copy, name)
                copy.write(chunk)
        copy.flush()
        copy.seek(0)
    except BaseException as error:
        copy.close()
        if isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT):
            raise _too_big(name) from error
        raise
    return copy


def _keep_floor(file: BinaryIO, name: str) -> None:
    space = os.fstatvfs(file.fileno())
    if space.f_bavail < space.f_blocks * _SPOOL_FLOOR:
        raise _too_big(name)


def _too_big(name: str) -> NoSpace:
    return NoSpace(
        f"no room to unpack {name} to a temporary file", hint="free some space, or unpack it elsewhere first"
    )
