"""Images made of nothing but numbers: files of random bytes, as many and as large as a case wants. Not compressed.

The same names and sizes give the same bytes everywhere.
"""

from __future__ import annotations

import hashlib
import os
import random
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

from hpmapper.bench.images import EPOCH, Layer, cached, write_layout

_MIB = 1 << 20


Files = Mapping[str, int | tuple[int, int] | Path]
"""Sizes in bytes by name; a file's bytes depend on its name, and on the second number if there is one. Instead of a
size, a program of this host."""


def layout(directory: Path, name: str, layers: Sequence[Files]) -> Path:
    """An OCI layout of layers of files of these sizes in bytes, lowest first; made once, in `directory`."""

    def build(new: Path, scratch: Path) -> None:
        made = [_layer(new, files, f"layer {number}") for number, files in enumerate(layers)]
        write_layout(new, name, made)

    return cached(directory / name, build)


def small_files(number: int, size: int = 200) -> Files:
    """That many files, a hundred to a directory."""
    return {f"d{index // 100:05}/f{index:07}": size for index in range(number)}


def _layer(new: Path, files: Files, comment: str) -> Layer:
    blobs = new / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=blobs, delete=False) as out:
        write_tar(out, files)
        out.seek(0)
        digest = hashlib.file_digest(out, "sha256").hexdigest()
        size = out.seek(0, os.SEEK_END)
    os.chmod(out.name, 0o644)
    os.rename(out.name, blobs / digest)
    return Layer(f"sha256:{digest}", f"sha256:{digest}", size, comment)


def write_tar(out: object, files: Files) -> None:
    """A tar of random files; large ones repeat one random MiB with a counter, which no deduplication finds."""
    block = random.Random(0).randbytes(_MIB)
    with tarfile.open(fileobj=out, mode="w") as tar:  # type: ignore[call-overload]
        for folder in sorted({str(Path(name).parent) for name in files} - {"."}):
            member = tarfile.TarInfo(folder)
            member.type, member.mode, member.mtime = tarfile.DIRTYPE, 0o755, EPOCH
            tar.addfile(member)
        for name, found in files.items():
            if isinstance(found, Path):
                tar.add(found, name)
                continue
            size, version = found if isinstance(found, tuple) else (found, 0)
            member = tarfile.TarInfo(name)
            member.size, member.mode, member.mtime = size, 0o644, EPOCH
            tar.addfile(member, _Numbered(block, f"{name} {version}", size))


class _Numbered(BytesIO):
    """A file's bytes, made a MiB at a time."""

    def __init__(self, block: bytes, name: str, size: int) -> None:
        super().__init__()
        self._block = block
        self._mark = hashlib.blake2b(name.encode(), digest_size=16).digest()
        self._left = size
        self._number = 0
        self._piece = b""

    def read(self, size: int | None = -1, /) -> bytes:
        wanted = self._left if size is None or size < 0 else min(size, self._left)
        while len(self._piece) < wanted:
            self._piece += self._number.to_bytes(8, "big") + self._mark + self._block[24:]
            self._number += 1
        answer, self._piece = self._piece[:wanted], self._piece[wanted:]
        self._left -= wanted
        return answer
