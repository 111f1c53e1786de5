"""Device mapper: devices made of tables of targets (include/uapi/linux/dm-ioctl.h, version 4).

The ioctls are issued here and not through libdevmapper, whose errors are texts in a log: what fails has an errno.

A device is made in three steps, as the kernel has them: create (a name), load (a table, not yet in use), resume (the
table takes over). Making, resuming and removing tell udev, where it runs; it then makes or removes
/dev/mapper/NAME. See `hpmapper.kernel.dmudev` for how that is waited for; where no udev runs, the nodes are made here.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from hpmapper.kernel import dmudev
from hpmapper.kernel.syscall import fail, ioctl, iowr, opened

SECTOR = 512
DIRECTORY = Path("/dev/mapper")
CONTROL = DIRECTORY / "control"
NAME_MAX = 127

_VERSION = (4, 0, 0)
_HEADER = struct.Struct("=3I3Ii3IQ128s129s7x")  # struct dm_ioctl
_TARGET = struct.Struct("=QQiI16s")  # struct dm_target_spec
_NAME_LIST = struct.Struct("=QI")  # struct dm_name_list, up to the name
_VERSIONS = struct.Struct("=4I")  # struct dm_target_versions, up to the name

_BUFFER = 16 << 10
_LARGEST = 16 << 20

_CMD_VERSION, _CMD_LIST, _CMD_CREATE, _CMD_REMOVE = 0, 2, 3, 4
_CMD_SUSPEND, _CMD_STATUS, _CMD_WAIT, _CMD_LOAD = 6, 7, 8, 9
_CMD_CLEAR, _CMD_TABLE_STATUS, _CMD_VERSIONS, _CMD_MESSAGE = 10, 12, 13, 14

READ_ONLY = 1 << 0
SUSPEND = 1 << 1
_STATUS_TABLE = 1 << 4
ACTIVE = 1 << 5
_BUFFER_FULL = 1 << 8
_SKIP_LOCKFS = 1 << 10
_NO_FLUSH = 1 << 11
_UEVENT = 1 << 13
_DEFERRED_REMOVE = 1 << 17


class Target(NamedTuple):
    """A stretch of a device: `length` sectors from `start` on are of `kind`, with the target's own parameters."""

    start: int
    length: int
    kind: str
    params: str


class Device(NamedTuple):
    """What the kernel says of a device. `number`: st_rdev; `event`: counts events such as a pool's low water."""

    name: str
    uuid: str
    number: int
    opens: int
    event: int
    flags: int

    @property
    def suspended(self) -> bool:
        return bool(self.flags & SUSPEND)

    @property
    def read_only(self) -> bool:
        return bool(self.flags & READ_ONLY)

    @property
    def active(self) -> bool:
        """Whether it has a table in use."""
        return bool(self.flags & ACTIVE)

    @property
    def removing(self) -> bool:
        """Whether it goes when its last user does."""
        return bool(self.flags & _DEFERRED_REMOVE)

    @property
    def dev(self) -> str:
        """The number as tables and status lines have it: "253:4"."""
        return f"{os.major(self.number)}:{os.minor(self.number)}"

    @property
    def kernel_name(self) -> str:
        """As in /sys/block and in the kernel's messages: "dm-4"."""
        return f"dm-{os.minor(self.number)}"


def version(control: Path = CONTROL) -> tuple[int, int, int]:
    """The version of the kernel's interface; ENODEV or ENOENT when it has none."""
    # The caller names the version that it was written for; 4.0.0 is any.
    request = bytearray(_HEADER.size)
    _HEADER.pack_into(request, 0, *_VERSION, _HEADER.size, _HEADER.size, 0, 0, 0, 0, 0, 0, b"", b"")
    with opened(control, os.O_RDWR) as fd:
        ioctl(fd, iowr(0xFD, _CMD_VERSION, _HEADER.size), request, path=control)
    major, minor, patch, *_ = _HEADER.unpack(request)
    return major, minor, patch


def make_control(path: Path) -> None:
    """Make a node for the control device at `path`, where /dev has none; FileNotFoundError without device-mapper."""
    for line in Path("/proc/misc").read_text(encoding="ascii").splitlines():
        minor, name = line.split()
        if name == "device-mapper":
            _mknod(path, stat.S_IFCHR, os.makedev(10, int(minor)))
            return
    raise FileNotFoundError(2, "the kernel has no device-mapper", "/proc/misc")


def targets() -> dict[str, tuple[int, int, int]]:
    """The kinds of target that are loaded, with their versions."""
    answer = _call(_CMD_VERSIONS)
    found = {}
    for offset in _chain(answer.data, _VERSIONS):
        _, *numbers = _VERSIONS.unpack_from(answer.data, offset)
        found[_text(answer.data, offset + _VERSIONS.size)] = (numbers[0], numbers[1], numbers[2])
    return found


def devices() -> dict[str, int]:
    """All devices of this machine, by name, with their numbers."""
    answer = _call(_CMD_LIST)
    found = {}
    for offset in _chain(answer.data, _NAME_LIST):
        number = struct.unpack_from("=Q", answer.data, offset)[0]
        if number:  # a list of none is one entry of zeros
            found[_text(answer.data, offset + _NAME_LIST.size)] = _number(number)
    return found


def find(name: str) -> Device | None:
    """The device of that name, if there is one."""
    try:
        return _call(_CMD_STATUS, name).device
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        raise


def path(name: str) -> Path:
    """Where the device's node is."""
    return DIRECTORY / name


def activate(name: str, table: Sequence[Target], *, uuid: str = "", read_only: bool = False) -> Device:
    """Make a device with that table, its node included. What fails half-way is taken back.

    Raises:
        OSError: EBUSY, the name or UUID is taken; others as the targets say.
    """
    _call(_CMD_CREATE, name, uuid=uuid)
    try:
        load(name, table, read_only=read_only)
        device = resume(name)
    except BaseException:
        remove(name)
        raise
    return device


def load(name: str, table: Sequence[Target], *, read_only: bool = False) -> None:
    """Prepare another table; `resume` makes it the device's."""
    data = b"".join(map(_packed, table))
    _call(_CMD_LOAD, name, flags=READ_ONLY if read_only else 0, data=data, count=len(table))


def suspend(name: str, *, flush: bool = True, freeze: bool = True) -> None:
    """Hold back all input and output; `freeze`: and sync the file system on it first, so that a snapshot is clean."""
    _call(_CMD_SUSPEND, name, flags=SUSPEND | (0 if flush else _NO_FLUSH) | (0 if freeze else _SKIP_LOCKFS))


def resume(name: str) -> Device:
    """Let it go on, with the prepared table if there is one; its node is there when this returns."""
    with dmudev.cookie() as event:
        answer = _call(_CMD_SUSPEND, name, event=event.value)
        event.sent = bool(answer.flags & _UEVENT)
    make_node(answer.device)
    return answer.device


@contextmanager
def suspended(name: str) -> Iterator[None]:
    """Suspended, with the file system on it frozen, for as long as this lasts."""
    suspend(name)
    try:
        yield
    finally:
        resume(name)


def remove(name: str, *, deferred: bool = False) -> bool:
    """Remove the device, if there is one; with `deferred`, one that is in use goes with its last user.

    Returns whether it is gone by now.

    Raises:
        OSError: EBUSY, it is in use.
    """
    try:
        with dmudev.cookie() as event:
            answer = _call(_CMD_REMOVE, name, flags=_DEFERRED_REMOVE if deferred else 0, event=event.value)
            event.sent = bool(answer.flags & _UEVENT)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        _remove_node(name)
        return True
    if answer.flags & _DEFERRED_REMOVE:
        if not dmudev.is_running():
            _remove_node(name)  # nobody else will, once it is gone
        return False
    _remove_node(name)
    return True


def message(name: str, text: str, *, sector: int = 0) -> str:
    """Tell a target something; returns its answer, which most do not give.

    Raises:
        OSError: as the target says. ENXIO: there is no such device.
    """
    answer = _call(_CMD_MESSAGE, name, data=struct.pack("=Q", sector) + text.encode("ascii") + b"\0")
    return _text(answer.data, 0) if answer.data else ""


def status(name: str, *, flush: bool = True) -> list[Target]:
    """Each target's state. A thin pool commits its metadata for that, unless `flush` is False."""
    return _table_status(name, 0 if flush else _NO_FLUSH)


def table(name: str) -> list[Target]:
    """The table in use."""
    return _table_status(name, _STATUS_TABLE)


def wait(name: str, event: int) -> Device:
    """Wait until the device has had more events than `event`. A signal ends it with EINTR."""
    return _call(_CMD_WAIT, name, event=event).device


def cancel_removal(name: str) -> None:
    """Keep a device that `remove` was to let go. ENXIO: it has gone already."""
    message(name, "@cancel_deferred_remove")


# How the kernel is asked.


class _Answer(NamedTuple):
    targets: int
    flags: int
    device: Device
    data: bytes


def _call(
    command: int,
    name: str = "",
    *,
    uuid: str = "",
    flags: int = 0,
    event: int = 0,
    data: bytes = b"",
    count: int = 0,
) -> _Answer:
    """Issue one command, with a larger buffer as long as the kernel asks for one."""
    if len(os.fsencode(name)) > NAME_MAX or "/" in name:
        fail(errno.EINVAL, name, "no name for a device-mapper device")
    size = max(_BUFFER, _HEADER.size + len(data) + 8)
    while True:
        buffer = bytearray(size)
        _HEADER.pack_into(
            buffer, 0, *_VERSION, size, _HEADER.size, count, 0, flags, event, 0, 0, os.fsencode(name), uuid.encode()
        )
        buffer[_HEADER.size : _HEADER.size + len(data)] = data
        with _control() as fd:
            ioctl(fd, iowr(0xFD, command, _HEADER.size), buffer, path=name or CONTROL)
        answer = _unpacked(buffer)
        if not answer.flags & _BUFFER_FULL or size >= _LARGEST:
            return answer
        size *= 4


def _unpacked(buffer: bytearray) -> _Answer:
    _, _, _, size, start, count, opens, flags, event, _, number, name, uuid = _HEADER.unpack_from(buffer)
    device = Device(_text(name, 0), _text(uuid, 0), _number(number), opens, event, flags)
    return _Answer(count, flags, device, bytes(buffer[start:size]))


@contextmanager
def _control() -> Iterator[int]:
    if not CONTROL.exists():
        DIRECTORY.mkdir(exist_ok=True)
        make_control(CONTROL)
    with opened(CONTROL, os.O_RDWR) as fd:
        yield fd


def _table_status(name: str, flags: int) -> list[Target]:
    answer = _call(_CMD_TABLE_STATUS, name, flags=flags)
    found, offset = [], 0
    for _ in range(answer.targets):
        start, length, _, following, kind = _TARGET.unpack_from(answer.data, offset)
        params = _text(answer.data, offset + _TARGET.size)
        found.append(Target(start, length, _text(kind, 0), params.rstrip(" ")))
        offset = following  # counted from the first
    return found


def _packed(target: Target) -> bytes:
    params = target.params.encode("ascii") + b"\0"
    params += bytes(-(_TARGET.size + len(params)) % 8)
    return _TARGET.pack(target.start, target.length, 0, _TARGET.size + len(params), target.kind.encode()) + params


def _chain(data: bytes, record: struct.Struct) -> Iterator[int]:
    """The offsets of records that each say how far the next is ("next", 0: the last)."""
    offset = 0
    while offset + record.size <= len(data):
        yield offset
        following = record.unpack_from(data, offset)[-1 if record is _NAME_LIST else 0]
        if not following:
            return
        offset += following


def _text(data: bytes, offset: int) -> str:
    return os.fsdecode(data[offset : data.index(0, offset)])


def _number(huge: int) -> int:
    """The kernel's huge_encode_dev, as st_rdev."""
    return os.makedev(huge >> 8 & 0xFFF, huge & 0xFF | huge >> 12 & 0xFFF00)


def make_node(device: Device) -> None:
    """Make /dev/mapper/NAME of an active device where udev has not: a container's own /dev, or a host without udev."""
    node = path(device.name)
    try:
        if os.stat(node).st_rdev == device.number:
            return
    except FileNotFoundError:
        pass
    node.unlink(missing_ok=True)  # of an earlier device of this name
    _mknod(node, stat.S_IFBLK, device.number)


def _mknod(node: Path, kind: int, number: int) -> None:
    try:
        os.mknod(node, kind | 0o600, number)
    except FileExistsError:
        pass


def _remove_node(name: str) -> None:
    path(name).unlink(missing_ok=True)
