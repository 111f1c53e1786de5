"""The ground that sides stand on: for each a fresh file system of the same size, on a loop device with direct I/O.

Its backing is a sparse file in the work directory, or an equal part of a device that was given. The loop devices go
with the mounts, and the mounts with the mount namespace: whatever ends the process, nothing stays.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hpmapper.errors import InvalidArgument
from hpmapper.kernel import fs, mount
from hpmapper.pool.base import GIB, format_size
from hpmapper.pool.tools import run_tool

_MAKE = {
    "xfs": ("mkfs.xfs", "-q", "-f", "-K", "-m", "reflink=1"),
    "ext4": ("mkfs.ext4", "-q", "-F", "-E", "nodiscard"),
    "btrfs": ("mkfs.btrfs", "-q", "-f", "-K"),
}
# ext4 would otherwise write its inode tables in the background, which others would be charged for.
_OPTIONS = {"xfs": "noatime,discard", "ext4": "noatime,discard,noinit_itable", "btrfs": "noatime,discard"}
_ALIGNMENT = 1 << 20


@dataclass
class Ground:
    """Where file systems are made.

    Attributes:
        size: of each, in bytes. device: to be cut into `parts` of that size, instead of files in `work`.
    """

    work: Path
    size: int
    device: Path | None = None
    _taken: list[str] = field(default_factory=list)

    @classmethod
    def over(cls, work: Path, device: Path | None, size: int, parts: int) -> Ground:
        """Ground for `parts` sides; what is on a device given is overwritten.

        Raises:
            InvalidArgument: the device is too small, or in use.
        """
        if device is None:
            return cls(work, size)
        if any(Path(one.source) == device for one in mount.mounts()):
            raise InvalidArgument(f"{device} is mounted", hint="name an unused device: all on it would be lost")
        size = fs.device_size(device) // parts // _ALIGNMENT * _ALIGNMENT
        if size < GIB:
            raise InvalidArgument(f"{device} gives only {format_size(size)} to each of {parts} sides")
        return cls(work, size, device)

    @contextmanager
    def file_system(self, kind: str, name: str) -> Iterator[Path]:
        """A fresh file system of that kind, mounted; gone at the end."""
        target = self.work / "sides" / name
        target.mkdir(parents=True, exist_ok=True)
        backing, part = self._backing(name)
        try:
            device = self._attach(backing, part)
            with _mounted(kind, device, target, name):
                yield target
        finally:
            if self.device is None:
                backing.unlink()
            target.rmdir()

    def _backing(self, name: str) -> tuple[Path, int]:
        """The file or device below a side, and which part of it."""
        self._taken.append(name)
        if self.device is not None:
            return self.device, len(self._taken) - 1
        file = self.work / f"{name}.img"
        with file.open("wb") as made:
            os.truncate(made.fileno(), self.size)
        return file, 0

    def _attach(self, backing: Path, part: int) -> str:
        command = ["losetup", "--find", "--show", "--direct-io=on", "--sector-size=4096"]
        if self.device is not None:
            command += [f"--offset={part * self.size}", f"--sizelimit={self.size}"]
        return run_tool([*command, backing]).stdout.strip()


@contextmanager
def _mounted(kind: str, device: str, target: Path, name: str) -> Iterator[None]:
    """A fresh file system on a loop device, mounted; the device goes with the mount."""
    pool = f"hpmapper-bench-{os.getpid()}-{name}"
    try:
        if kind == "zfs":
            run_tool(["zpool", "create", "-f", "-O", "atime=off", "-m", target, pool, device])
        else:
            run_tool([*_MAKE[kind], device])
            run_tool(["mount", "-t", kind, "-o", _OPTIONS[kind], device, target])
    finally:
        run_tool(["losetup", "--detach", device])
    try:
        yield
    finally:
        for one in mount.mounts_below(target):
            mount.umount(one.target, lazy=True)
        if kind == "zfs":  # of all that is made here, this alone outlives the process
            run_tool(["zpool", "destroy", "-f", pool])
