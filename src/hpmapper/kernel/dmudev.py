"""Waiting for udev after a device-mapper event, by the protocol of libdevmapper ("udev cookies").

A cookie is the key of a SysV semaphore. It goes to the kernel with the ioctl, from there with the uevent to udev, whose
rules (10-dm.rules to 95-dm-notify.rules) make /dev/mapper/NAME and then lower the semaphore. Whoever waits for
zero knows that udev has done its part; whoever does not, races with it (moby/moby#4036). Where no udev runs, nothing is
waited for, and `hpmapper.kernel.dm` makes the nodes.

The upper half of the number tells udev's rules what to leave out: its scans of the device (which would keep it open,
and a thin device busy), and the links by label and UUID, which all snapshots of one file system share.
"""

from __future__ import annotations

import ctypes
import errno
import secrets
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hpmapper.kernel.syscall import fail

_MAGIC = 0x0D4D  # libdevmapper: DM_COOKIE_MAGIC
_FLAGS = 0x0002 | 0x0004 | 0x0008 | 0x0020  # DM_UDEV_DISABLE_{SUBSYSTEM,DISK,OTHER}_RULES, …_LIBRARY_FALLBACK
_FLAGS_SHIFT = 16

_IPC_CREAT, _IPC_EXCL, _IPC_RMID = 0o1000, 0o2000, 0
_SETVAL = 16
_SEMBUF = struct.Struct("=Hhh")  # struct sembuf
_UDEV = Path("/run/udev/control")

_SECONDS = 30
"""After this, udev is taken for dead: a queue of hundreds of devices is worked off in less."""

_libc = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


_libc.semget.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int)
_libc.semctl.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.semtimedop.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.POINTER(_Timespec))


@dataclass
class Event:
    """One ioctl's event. `value` goes into it; `sent`: the kernel has told udev, which will answer."""

    value: int = 0
    sent: bool = False


def is_running() -> bool:
    """Whether udev listens here."""
    return _UDEV.exists()


@contextmanager
def cookie() -> Iterator[Event]:
    """For one ioctl: its event, and at the end, if it was sent, wait for udev."""
    if not is_running():
        yield Event()
        return
    low, semaphore = _new()
    event = Event(_FLAGS << _FLAGS_SHIFT | low)
    try:
        yield event
        if event.sent:
            _wait(semaphore)
    finally:
        _libc.semctl(semaphore, 0, _IPC_RMID, 0)


def _new() -> tuple[int, int]:
    """A cookie that nobody uses and its semaphore, at 1: udev will lower it."""
    while True:
        low = secrets.randbelow(0xFFFF) + 1
        semaphore = _libc.semget(_MAGIC << 16 | low, 1, 0o600 | _IPC_CREAT | _IPC_EXCL)
        if semaphore >= 0:
            break
        if ctypes.get_errno() != errno.EEXIST:
            fail(ctypes.get_errno(), "semaphore for udev")
    if _libc.semctl(semaphore, 0, _SETVAL, 1) < 0:
        fail(ctypes.get_errno(), "semaphore for udev")
    return low, semaphore


def _wait(semaphore: int) -> None:
    """Wait for zero; a udev that does not answer is given up, and the node is made without it."""
    operation = _SEMBUF.pack(0, 0, 0)
    limit = _Timespec(_SECONDS, 0)
    while _libc.semtimedop(semaphore, operation, 1, ctypes.byref(limit)) < 0:
        if ctypes.get_errno() == errno.EAGAIN:
            return
        if ctypes.get_errno() != errno.EINTR:
            fail(ctypes.get_errno(), "semaphore for udev")
