"""libc, syscall numbers and ioctl numbers: the wall's lowest course.

Every other module of this package calls `syscall` or `ioctl`; both raise OSError with errno and the file's name.
The raw numbers are used even where the C library has a wrapper, because it may be older than the kernel: glibc
knows fsopen since 2.36, and cachestat not at all.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

AnyPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
AT_NO_AUTOMOUNT = 0x800
AT_EMPTY_PATH = 0x1000
AT_STATX_DONT_SYNC = 0x4000
AT_RECURSIVE = 0x8000

# Since Linux 5.1 a new system call has one number on every architecture; older ones differ.
_OLD: dict[str, tuple[int, int]] = {
    "clone": (56, 220),
    "mincore": (27, 232),
    "mmap": (9, 222),
    "munmap": (11, 215),
    "statfs": (137, 43),
    "prctl": (157, 167),
    "mount": (165, 40),
    "umount2": (166, 39),
    "getdents64": (217, 61),
    "unshare": (272, 97),
    "sync_file_range": (277, 84),
    "fanotify_init": (300, 262),
    "fanotify_mark": (301, 263),
    "syncfs": (306, 267),
    "renameat2": (316, 276),
    "statx": (332, 291),
}
_COLUMN = {"x86_64": 0, "aarch64": 1}.get(platform.machine())


def _old(name: str) -> int:
    """The number here; elsewhere one that no kernel has, so that the answer is an honest ENOSYS."""
    return 0xFFFF if _COLUMN is None else _OLD[name][_COLUMN]


NR_CLONE = _old("clone")
NR_GETDENTS64 = _old("getdents64")
NR_MINCORE = _old("mincore")
NR_MMAP = _old("mmap")
NR_MUNMAP = _old("munmap")
NR_PRCTL = _old("prctl")
NR_STATFS = _old("statfs")
NR_MOUNT = _old("mount")
NR_UMOUNT2 = _old("umount2")
NR_UNSHARE = _old("unshare")
NR_SYNC_FILE_RANGE = _old("sync_file_range")
NR_FANOTIFY_INIT = _old("fanotify_init")
NR_FANOTIFY_MARK = _old("fanotify_mark")
NR_SYNCFS = _old("syncfs")
NR_RENAMEAT2 = _old("renameat2")
NR_STATX = _old("statx")
NR_OPEN_TREE = 428
NR_MOVE_MOUNT = 429
NR_FSOPEN = 430
NR_FSCONFIG = 431
NR_FSMOUNT = 432
NR_OPENAT2 = 437
NR_MOUNT_SETATTR = 442
NR_QUOTACTL_FD = 443
NR_CACHESTAT = 451


def _ioc(direction: int, kind: int | str, number: int, size: int) -> int:
    """include/uapi/asm-generic/ioctl.h, which x86 and arm64 share."""
    return direction << 30 | size << 16 | (ord(kind) if isinstance(kind, str) else kind) << 8 | number


def io(kind: int | str, number: int) -> int:
    """_IO of the kernel's headers."""
    return _ioc(0, kind, number, 0)


def iow(kind: int | str, number: int, size: int) -> int:
    """_IOW of the kernel's headers."""
    return _ioc(1, kind, number, size)


def ior(kind: int | str, number: int, size: int) -> int:
    """_IOR of the kernel's headers."""
    return _ioc(2, kind, number, size)


def iowr(kind: int | str, number: int, size: int) -> int:
    """_IOWR of the kernel's headers."""
    return _ioc(3, kind, number, size)


Argument = int | bytes | None | ctypes.Array[ctypes.c_char] | ctypes.Structure
"""What a system call takes: a number, a string, a null pointer, or memory that the kernel reads or fills."""


def _c(argument: Argument) -> object:
    # A bare int would be passed as a C int and lose its upper half.
    if isinstance(argument, int):
        return ctypes.c_long(argument)
    if argument is None or isinstance(argument, bytes):
        return argument  # a pointer to it
    return ctypes.byref(argument)


def syscall(number: int, *arguments: Argument, path: AnyPath | int | None = None) -> int:
    """Make the system call; a failure names `path` (an int is a file descriptor, looked up only then)."""
    result: int = _libc.syscall(ctypes.c_long(number), *[_c(argument) for argument in arguments])
    if result < 0:
        fail(ctypes.get_errno(), path)
    return result


def ioctl(fd: int, request: int, argument: int | bytearray = 0, *, path: AnyPath | None = None) -> int:
    """Make the ioctl; a failure names `path`, or else the file that `fd` stands for."""
    try:
        return fcntl.ioctl(fd, request, argument)
    except OSError as error:
        fail(error.errno or errno.EIO, fd if path is None else path)


def fail(number: int, path: AnyPath | int | None = None, what: str = "") -> NoReturn:
    """Raise the OSError for errno `number` at `path`; `what` adds what is known beyond errno."""
    name = fd_name(path) if isinstance(path, int) else path
    text = os.strerror(number) + (f": {what}" if what else "")
    if name is None:
        raise OSError(number, text)
    raise OSError(number, text, os.fsdecode(name))


def fd_name(fd: int) -> str:
    """The path behind a file descriptor as the kernel shows it, for messages."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return f"fd {fd}"


@contextmanager
def opened(path: AnyPath | int, flags: int = os.O_RDONLY, mode: int = 0o600) -> Iterator[int]:
    """A file descriptor of `path` that is closed at the end; one that is already open is lent and left open."""
    if isinstance(path, int):
        yield path
        return
    fd = os.open(path, flags | os.O_CLOEXEC, mode)
    try:
        yield fd
    finally:
        os.close(fd)
