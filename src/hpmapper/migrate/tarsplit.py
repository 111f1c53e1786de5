"""A layer's tar made again from what Docker keeps of it: tar-split's records, and the layer's files.

Docker (layer/layer_store.go) keeps `tar-split.json.gz`, a JSON object a line (github.com/vbatts/tar-split,
tar/storage/entry.go): a segment has bytes of the tar, base64; a file has the name and size of what stands there.
Nothing of it is believed: the tar's digest is compared with the DiffID by whoever reads it.
"""

from __future__ import annotations

import binascii
import gzip
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec

from hpmapper.errors import Corrupt
from hpmapper.kernel import fs

_FILE, _SEGMENT = 1, 2
_COPY = 1 << 20

MAX_LINE = 64 << 20
"""Bytes of one record: a segment has the headers between two files, with their extended attributes."""


class _Entry(msgspec.Struct, frozen=True):
    type: int
    name: str = ""
    name_raw: str = ""
    size: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0
    payload: str | None = None


_DECODER = msgspec.json.Decoder(_Entry)


def assemble(records: Path, root: Path) -> Iterator[bytes]:
    """Yield the tar; names are looked up in `root` as a chroot would, so that nothing outside is reached.

    Raises:
        Corrupt: the records are damaged, or a file is missing or has another size; names it.
    """
    try:
        with gzip.open(records, "rb") as lines:
            while line := lines.readline(MAX_LINE):
                if len(line) == MAX_LINE:
                    raise Corrupt(f"{records} has a record of more than {MAX_LINE} bytes")
                yield from _piece(_DECODER.decode(line), root)
    except FileNotFoundError as error:
        raise Corrupt(f"{error.filename} is missing") from None
    except (EOFError, gzip.BadGzipFile, zlib.error, msgspec.DecodeError, binascii.Error) as error:
        raise Corrupt(f"{records} is damaged: {error}") from None


def _piece(entry: _Entry, root: Path) -> Iterator[bytes]:
    payload = binascii.a2b_base64(entry.payload or "", strict_mode=True)
    if entry.type == _SEGMENT:
        yield payload
    elif entry.type == _FILE:
        if entry.size:
            name = binascii.a2b_base64(entry.name_raw, strict_mode=True) if entry.name_raw else os.fsencode(entry.name)
            yield from _data(root, name, entry.size)
    else:
        raise Corrupt(f"a record of tar-split has the unknown type {entry.type}")


def _data(root: Path, name: bytes, size: int) -> Iterator[bytes]:
    with _opened(root, name) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_size != size:
            raise Corrupt(
                f"the layer's file {os.fsdecode(name)!r} is not the one that was unpacked: it had {size} bytes"
            )
        while piece := file.read(min(size, _COPY)):
            size -= len(piece)
            yield piece
    if size:
        raise Corrupt(f"the layer's file {os.fsdecode(name)!r} is too short")


def _opened(root: Path, name: bytes) -> BinaryIO:
    try:
        if b"\0" in name:
            raise FileNotFoundError
        # Not blocking: a pipe in its place must not stop us.
        return open(fs.open_in_root(root, name.lstrip(b"/") or b".", os.O_RDONLY | os.O_NONBLOCK), "rb")
    except OSError as error:
        why = error.strerror or "no such name"
        raise Corrupt(f"the layer's file {os.fsdecode(name)!r} cannot be read: {why}") from None
