"""Device-mapper's control device: so far only whether it answers (include/uapi/linux/dm-ioctl.h)."""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path

from hpmapper.kernel.syscall import ioctl, iowr, opened

_DM_IOCTL = struct.Struct("=3I300x")
_DM_VERSION = iowr(0xFD, 0, _DM_IOCTL.size)
CONTROL = Path("/dev/mapper/control")


def version(control: Path = CONTROL) -> tuple[int, int, int]:
    """The version of the kernel's device-mapper interface."""
    # The caller names the version that it was written for; 4.0.0 is any.
    request = bytearray(_DM_IOCTL.pack(4, 0, 0))
    with opened(control, os.O_RDWR) as fd:
        ioctl(fd, _DM_VERSION, request, path=control)
    major, minor, patch = _DM_IOCTL.unpack(request)
    return major, minor, patch


def make_control(path: Path) -> None:
    """Make a node for the control device at `path`, where /dev has none; FileNotFoundError without device-mapper."""
    for line in Path("/proc/misc").read_text(encoding="ascii").splitlines():
        minor, name = line.split()
        if name == "device-mapper":
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(10, int(minor)))
            return
    raise FileNotFoundError(2, "the kernel has no device-mapper", "/proc/misc")
