"""Sharing extents between files of one file system: reflinks and deduplication.

Both files lie on one file system (else EXDEV), the destination is open for writing (EBADF), offsets and lengths are
multiples of its block size unless they end at the source's end (EINVAL).
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Sequence
from typing import NamedTuple

from hpmapper.kernel.syscall import ioctl, iow, iowr

_FICLONE = iow(0x94, 9, 4)
_FIDEDUPERANGE = iowr(0x94, 54, 24)

_DEDUPE = struct.Struct("=QQHHI")  # struct file_dedupe_range
_DEDUPE_TARGET = struct.Struct("=qQQiI")  # struct file_dedupe_range_info
_DEDUPE_RANGE_DIFFERS = 1

NOT_CLONEABLE = frozenset({errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS})
"""The errnos by which a kernel or a file system says that it cannot share these two files' extents."""


def clone(source: int, target: int) -> None:
    """Make `target`'s data the whole of `source`'s, sharing its extents.

    Dirty pages of `source` are written first: cloning a file that has just been written waits for the disk.
    """
    ioctl(target, _FICLONE, source)


class Deduped(NamedTuple):
    """What FIDEDUPERANGE did to one target: bytes now shared; `same` False: contents differ; errno 0: no failure."""

    bytes: int
    same: bool
    errno: int


def dedupe_range(source: int, source_offset: int, length: int, targets: Sequence[tuple[int, int]]) -> list[Deduped]:
    """Let each (fd, offset) of `targets` share `source`'s extents where its bytes are equal.

    The kernel compares the bytes under a lock, so no writer can lose data. One request is not split here: file systems
    may stop early (btrfs: 16 MiB per call), see `Deduped.bytes`.
    """
    entries = [_DEDUPE_TARGET.pack(fd, offset, 0, 0, 0) for fd, offset in targets]
    request = bytearray(_DEDUPE.pack(source_offset, length, len(entries), 0, 0) + b"".join(entries))
    ioctl(source, _FIDEDUPERANGE, request)
    answers = _DEDUPE_TARGET.iter_unpack(memoryview(request)[_DEDUPE.size :])
    return [Deduped(done, status != _DEDUPE_RANGE_DIFFERS, max(0, -status)) for _, _, done, status, _ in answers]


def can_clone(directory: str | os.PathLike[str]) -> bool:
    """Whether the file system of `directory` shares extents, found by cloning one block of a nameless file."""
    flags = os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC
    source = os.open(directory, flags, 0o600)
    try:
        os.write(source, bytes(4096))
        target = os.open(directory, flags, 0o600)
        try:
            clone(source, target)
        finally:
            os.close(target)
    except OSError as error:
        if error.errno in NOT_CLONEABLE:
            return False
        raise
    finally:
        os.close(source)
    return True
