"""What a pool is: one reflink file system below <root>, found and mounted whenever it is needed.

A pool keeps no state of its own beside its `PoolConfig`, which the database stores: `attach` finds out what is there.
Hence nothing needs to be started after a reboot, and any number of processes may use one pool.

    config = PoolConfig.loop(size=parse_size("100G")).with_uuid()
    record(config)                            # the intent, so that a crash in between is repaired by the next line
    pool = open_pool(root, config)
    config = pool.create()
    path = pool.attach()                      # any time, any process; one system call when it is there
    check_floor(pool.space(), floor)
    config = pool.grow(parse_size("200G"))    # while containers run
"""

from __future__ import annotations

import dataclasses
import re
import uuid as uuids
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from pathlib import Path
from typing import Protocol

from hpmapper.errors import InvalidArgument
from hpmapper.model import Space

KIB, MIB, GIB, TIB, PIB = (1 << shift for shift in (10, 20, 30, 40, 50))

POOL_NAME = "pool"
LOCK_NAME = "pool.lock"
LABEL = "hpmapper"

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGTP]?)(?:I?B)?", re.IGNORECASE)
_UNITS = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": TIB, "P": PIB}


class PoolKind(StrEnum):
    """Where a pool's file system comes from."""

    LOOP = "loop"
    DIRECT = "direct"
    DIRECTORY = "directory"


class PoolFs(StrEnum):
    """The reflink file systems that are made here."""

    XFS = "xfs"
    BTRFS = "btrfs"


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """All that is to be known about a pool to find it again.

    Attributes:
        kind: see `PoolKind`.
        fs: what is made (loop, direct).
        size: bytes of a loop pool's file; 0: chosen by `create`.
        device: a direct pool's block device, as an absolute path.
        directory: a directory pool's place; None: <root>/pool itself.
        uuid: names the file system (loop, direct) or the directory's marker; a device or directory without it
            is not ours.
    """

    kind: PoolKind
    fs: PoolFs = PoolFs.XFS
    size: int = 0
    device: Path | None = None
    directory: Path | None = None
    uuid: str = ""

    def __post_init__(self) -> None:
        if (self.device is not None) != (self.kind is PoolKind.DIRECT):
            raise InvalidArgument("a direct pool needs a device, and only a direct pool has one")
        if self.directory is not None and self.kind is not PoolKind.DIRECTORY:
            raise InvalidArgument(f"a {self.kind} pool has no directory of its own choice")
        if self.size and self.kind is not PoolKind.LOOP:
            raise InvalidArgument(f"a {self.kind} pool has the size of what it stands on")

    def with_uuid(self) -> PoolConfig:
        """The same with a new UUID, unless it has one: record this before `create`."""
        return self if self.uuid else dataclasses.replace(self, uuid=str(uuids.uuid4()))

    def to_dict(self) -> dict[str, str | int | None]:
        """For storing as JSON."""
        return {
            "kind": str(self.kind),
            "fs": str(self.fs),
            "size": self.size,
            "device": None if self.device is None else str(self.device),
            "directory": None if self.directory is None else str(self.directory),
            "uuid": self.uuid,
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, object]) -> PoolConfig:
        """What `to_dict` gave.

        Raises:
            InvalidArgument: a key or value that `to_dict` would not have written.
        """
        unknown = stored.keys() - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise InvalidArgument(f"unknown pool setting {min(unknown)!r}")
        try:
            return cls(
                kind=PoolKind(str(stored["kind"])),
                fs=PoolFs(str(stored.get("fs", PoolFs.XFS))),
                size=int(str(stored.get("size", 0))),
                device=_optional_path(stored.get("device")),
                directory=_optional_path(stored.get("directory")),
                uuid=str(stored.get("uuid", "")),
            )
        except (KeyError, ValueError) as error:
            raise InvalidArgument(f"the pool's settings are not readable: {error}") from None


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What a check of the file system found.

    Attributes:
        sound: False: damage was found; None: not enough was checked to say.
        checked: what was looked at, one line.
        unchecked: what was not, and how to have it checked; empty when nothing was left out.
        findings: the checker's own lines about damage.
    """

    sound: bool | None
    checked: str
    unchecked: str = ""
    findings: tuple[str, ...] = ()


class Pool(Protocol):
    """One reflink file system. Every method may be called by several processes at once, and again after a failure."""

    @property
    def config(self) -> PoolConfig:
        """What this pool is; after `create` or `grow` as these returned it."""

    @property
    def path(self) -> Path:
        """Where the file system is when attached. Known, and the same, before it exists."""

    def create(self, *, force: bool = False) -> PoolConfig:
        """Make the file system; returns the settings with size and UUID filled in, to be recorded.

        With a UUID given and already there (a crash came between making and recording) it does nothing.

        Args:
            force: overwrite another file system, partition table or left-over pool. Never one that is in use.

        Raises:
            AlreadyExists: something that is not this pool is in the way.
            InvalidArgument: size too small, not a block device, …
            Unsupported: no reflink here, tools missing.
            NoSpace: the file system below <root> cannot hold even the smallest pool.
        """

    def attach(self) -> Path:
        """Have it mounted; returns `path`. Cheap when it is.

        Raises:
            NotFound: there is no such pool; it was never made, or its device or file is gone.
            FailedPrecondition: what is there is not this pool.
        """

    def is_attached(self) -> bool:
        """Whether it is mounted, in this mount namespace."""

    def detach(self) -> None:
        """Unmount it and free its loop device; nothing to do is no error.

        Raises:
            FailedPrecondition: it is in use; the message says by what.
        """

    def space(self) -> Space:
        """Bytes in all and free. Of a sparse file's pool only what the file system below could really provide counts.

        Raises:
            FailedPrecondition: it is not attached.
        """

    def grow(self, size: int = 0) -> PoolConfig:
        """Grow to `size` bytes (direct: to the device's end, which must be at least that), also while in use.

        A growth that a crash cut off is finished by the next `attach` or by asking again.

        Raises:
            InvalidArgument: smaller than it is: neither XFS nor a pool can shrink.
            Unsupported: a directory pool.
        """

    def check(self) -> CheckReport:
        """Check the file system's own structures: thoroughly when detached, what is possible when attached."""

    def trim(self) -> int:
        """Give unused blocks back to the device or file below; returns bytes, 0 where it is not possible."""

    def facts(self) -> dict[str, str]:
        """What it stands on, for people: backing file, device, direct I/O, …"""

    def destroy(self) -> None:
        """Detach and delete it with all its data. A pool that is gone already is no error.

        Raises:
            FailedPrecondition: it is in use, or what is there is not this pool.
        """


def parse_size(text: str) -> int:
    """Bytes of "100G", "1.5TiB", "512 MB", "4096". Units are powers of 1024 with or without the i, as in Docker.

    Raises:
        InvalidArgument: not a size.
    """
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise InvalidArgument(f"{text[:40]!r} is not a size", hint="a number and K, M, G, T or P: 100G, 1.5TiB")
    return int(Fraction(match[1]) * _UNITS[match[2].upper()])


def format_size(size: int) -> str:
    """Bytes for people: "1.5 GiB"."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} PiB"


def _optional_path(value: object) -> Path | None:
    return None if value is None else Path(str(value))
