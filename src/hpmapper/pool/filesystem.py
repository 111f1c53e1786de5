"""The two file systems that pools are made of: making, recognising, mounting, growing and checking them."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import NamedTuple

from hpmapper.errors import InvalidArgument, Unsupported
from hpmapper.kernel import fs, mount
from hpmapper.kernel.fscontext import MOUNT_ATTR_NOATIME
from hpmapper.pool.base import LABEL, MIB, CheckReport, PoolFs, format_size
from hpmapper.pool.tools import run_tool

BLOCK_SIZE = 4096
"""Logical block size of pools, whatever lies below: direct I/O from a loop device then is aligned everywhere, and a
pool image moves between disks of 512-byte and 4-KiB sectors."""

# mkfs.xfs refuses less since xfsprogs 5.19 (commit 6e0ed3d19c54, "stop allowing tiny filesystems"); mkfs.btrfs wants
# 109 MiB or more, and below 256 MiB nothing useful fits beside its metadata.
_SMALLEST = {PoolFs.XFS: 300 * MIB, PoolFs.BTRFS: 256 * MIB}
_GROW_SLACK = 16 * MIB


class Signature(NamedTuple):
    """What blkid recognises at the start of a device or file; empty strings where it is silent."""

    kind: str
    uuid: str

    def __str__(self) -> str:
        return f"{self.kind} {self.uuid}".strip()


def check_size(kind: PoolFs, size: int) -> None:
    """Refuse a size that mkfs would refuse, with a better reason."""
    if size < _SMALLEST[kind]:
        raise InvalidArgument(
            f"{format_size(size)} is too small: a pool with {kind} needs {format_size(_SMALLEST[kind])}",
            hint="name a larger size",
        )


def smallest(kind: PoolFs) -> int:
    """The smallest pool."""
    return _SMALLEST[kind]


def make(kind: PoolFs, target: Path, uuid: str) -> None:
    """Make the file system on a device or file, over anything that is there."""
    # No discard of the whole device (-K): a sparse file is empty, and a thin or network device may take minutes.
    if kind is PoolFs.XFS:
        command = ["mkfs.xfs", "-q", "-f", "-K", "-L", LABEL, "-s", f"size={BLOCK_SIZE}"]
        run_tool([*command, "-m", f"crc=1,reflink=1,uuid={uuid}", target])
    else:
        run_tool(["mkfs.btrfs", "-q", "-f", "-K", "-L", LABEL, "-U", uuid, target])


def signature(target: Path) -> Signature | None:
    """What lies on a device or file: a file system, a partition table, RAID or LVM member, …; None: nothing known."""
    # -p reads the device instead of blkid's cache; status 2: nothing found, 8: several contradictory things found.
    answer = run_tool(["blkid", "-p", "-o", "export", target], accept=(0, 2, 8))
    if answer.code == 8:
        return Signature("several signatures", "")
    pairs = dict(line.partition("=")[::2] for line in answer.stdout.splitlines())
    kind = pairs.get("TYPE") or pairs.get("PTTYPE", "")
    if "PTTYPE" in pairs and "TYPE" not in pairs:
        kind += " partition table"
    return Signature(kind, pairs.get("UUID", "")) if kind else None


def device_of(uuid: str) -> Path | None:
    """The device that carries the file system of this UUID, by looking at all there are."""
    command = ["blkid", "-c", "/dev/null", "-l", "-o", "device", "-t", f"UUID={uuid}"]
    answer = run_tool(command, accept=(0, 2)).stdout.strip()
    return Path(answer) if answer else None


def attach(kind: PoolFs, device: Path, target: Path, *, discard: bool) -> None:
    """Mount the pool. noatime: otherwise each first read of an object writes its inode."""
    options: dict[str, str | None] = {"discard": None} if discard else {}
    try:
        if kind is PoolFs.XFS and _mount_counting(device, target, options):
            return
        mount.filesystem(kind, device, target, options=options, attributes=MOUNT_ATTR_NOATIME)
    except OSError as error:
        if error.errno == errno.ENODEV:
            raise Unsupported(
                f"this kernel has no {kind}", hint=f"modprobe {kind}, or choose another file system"
            ) from error
        raise


def _mount_counting(device: Path, target: Path, options: mount.Options) -> bool:
    """Mount an XFS with project quota, which only a mount can switch on; False: this kernel's XFS has none."""
    try:
        counting = {**options, "prjquota": None}
        mount.filesystem("xfs", device, target, options=counting, attributes=MOUNT_ATTR_NOATIME)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


def grow_to_device(kind: PoolFs, target: Path, device: Path) -> None:
    """Let the mounted file system fill its device; nothing to do is no error."""
    if kind is PoolFs.BTRFS:
        fs.btrfs_grow(target)
        return
    size = fs.device_size(device)
    if size >= fs.xfs_geometry(target).size + _GROW_SLACK:
        _grow_xfs(target, size)


def _grow_xfs(target: Path, size: int) -> None:
    # EWOULDBLOCK: a second growth is under way (it holds m_growlock); it may have begun with an older size.
    for _ in range(100):
        try:
            fs.xfs_grow(target, size)
        except BlockingIOError:
            time.sleep(0.02)
        else:
            return
    fs.xfs_grow(target, size)


def check_attached(kind: PoolFs, target: Path) -> CheckReport:
    """What can be checked under running containers."""
    if kind is PoolFs.BTRFS:
        return _scrub_btrfs(target)
    geometry = fs.xfs_geometry(target)
    os.statvfs(target)
    return CheckReport(
        sound=None,
        checked=f"the superblock: {format_size(geometry.size)}, reflink {'on' if geometry.reflink else 'off'}",
        unchecked="allocation, inode and reference trees: xfs_repair needs the pool detached",
    )


def check_detached(kind: PoolFs, target: Path) -> CheckReport:
    """Read all metadata of a device or file that is not mounted, changing nothing."""
    if kind is PoolFs.BTRFS:
        answer = run_tool(["btrfs", "check", "--readonly", target], accept=(0, 1))
        return _report(answer.code == 0, "all metadata (btrfs check)", answer.stderr)
    image = [] if target.is_block_device() else ["-f"]
    answer = run_tool(["xfs_repair", "-n", *image, target], accept=(0, 1, 2))
    text = answer.stdout + answer.stderr
    if "valuable metadata changes in a log" in text:
        return CheckReport(
            sound=None,
            checked="the superblock",
            unchecked="the rest: the journal has not been replayed; attach the pool, detach it, and check again",
        )
    return _report(answer.code == 0, "all metadata (xfs_repair -n)", text)


def _scrub_btrfs(target: Path) -> CheckReport:
    answer = run_tool(["btrfs", "scrub", "start", "-B", target], accept=(0, 3))
    unrepaired = answer.code == 3
    return _report(not unrepaired, "every block's checksum (btrfs scrub)", answer.stdout + answer.stderr)


def _report(sound: bool, checked: str, text: str) -> CheckReport:
    lines = () if sound else tuple(line.strip() for line in text.splitlines() if line.strip())
    return CheckReport(sound, checked, findings=lines)
