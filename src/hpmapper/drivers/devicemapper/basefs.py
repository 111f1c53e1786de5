"""The file systems on thin devices: all are copies of the base device's, which is made once."""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from pathlib import Path
from typing import NamedTuple

from hpmapper.errors import FailedPrecondition
from hpmapper.kernel import fs
from hpmapper.kernel.syscall import opened
from hpmapper.pool.tools import run_tool

log = logging.getLogger(__name__)

_BTRFS, _EXT4, _XFS = (0x10040, b"_BHRfS_M"), (0x438, b"\x53\xef"), (0, b"XFSB")
_UUID_AT = {"btrfs": 0x10020, "ext4": 0x468, "xfs": 32}
_READ = 0x10048


class Signature(NamedTuple):
    """Which file system a device carries."""

    kind: str
    uuid: str


def choose(wanted: str | None) -> str:
    """The file system for a new base device: what was asked for, else xfs where that can be made and mounted."""
    if wanted is not None:
        return wanted
    why = "" if _kernel_has_xfs() else "the kernel has no xfs"
    if not shutil.which("mkfs.xfs", path=f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"):
        why = "mkfs.xfs is not installed"
    if why:
        log.warning("XFS is not supported in your system (%s). Defaulting to ext4 filesystem", why)
        return "ext4"
    return "xfs"


def _kernel_has_xfs() -> bool:
    known = Path("/proc/filesystems")
    if "\txfs\n" not in known.read_text():
        run_tool(["modprobe", "xfs"], accept=range(256))
    return "\txfs\n" in known.read_text()


def make(kind: str, device: Path, arguments: tuple[str, ...]) -> None:
    """Make a file system on a new thin device. There is nothing to discard on it."""
    if kind == "xfs":
        run_tool(["mkfs.xfs", "-q", "-f", "-K", *arguments, device])
    else:
        options = "nodiscard,lazy_itable_init=0,lazy_journal_init=0"
        run_tool(["mkfs.ext4", "-q", "-F", "-E", options, *arguments, device])


def signature(device: Path) -> Signature:
    """What a device carries.

    Raises:
        FailedPrecondition: nothing that is known.
    """
    with opened(device) as fd:
        head = os.pread(fd, _READ, 0)
    for kind, (offset, magic) in (("btrfs", _BTRFS), ("ext4", _EXT4), ("xfs", _XFS)):
        if head[offset : offset + len(magic)] == magic:
            at = _UUID_AT[kind]
            return Signature(kind, str(uuid.UUID(bytes=head[at : at + 16])))
    raise FailedPrecondition(f"devmapper: Unknown filesystem type on {device}")


def mount_options(kind: str, more: dict[str, str | None]) -> dict[str, str | None]:
    """Options of every mount: all file systems are copies of one and have its UUID, which xfs would refuse."""
    return {**({"nouuid": None} if kind == "xfs" else {}), **more}


def grow(kind: str, path: Path, size: int) -> None:
    """Let the file system mounted at `path` fill its device of `size` bytes; nothing to do is no error."""
    if kind == "ext4":
        fs.ext4_grow(path, size)
    elif fs.xfs_geometry(path).size < size:
        fs.xfs_grow(path, size)


def limit_retries(kernel_name: str, retries: int) -> None:
    """How often xfs tries again to write metadata to a full pool (dm.xfs_nospace_max_retries).

    Raises:
        FailedPrecondition: this kernel cannot be told.
    """
    knob = Path("/sys/fs/xfs", kernel_name, "error/metadata/ENOSPC/max_retries")
    try:
        knob.write_text(str(retries), encoding="ascii")
    except OSError as error:
        raise FailedPrecondition(
            "devmapper: user specified daemon option dm.xfs_nospace_max_retries but it does not seem to be supported "
            f"on this system :{error}"
        ) from error
