"""Thin pools and thin devices: tables, status lines and messages.

Linux: drivers/md/dm-thin.c and Documentation/admin-guide/device-mapper/thin-provisioning.rst.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from hpmapper.errors import Corrupt, FailedPrecondition, NotFound
from hpmapper.kernel import dm

MAX_DEVICE_ID = (1 << 24) - 1
METADATA_BLOCK = 4096

CAREFUL = ("skip_block_zeroing", "error_if_no_space")
"""Features of pools made here. Docker's queued writes for a minute when the pool was full, with everybody hanging."""


class Mode(StrEnum):
    """What a pool does at present, in degrading order, as its status line has it."""

    WRITE = "rw"
    OUT_OF_DATA_SPACE = "out_of_data_space"
    READ_ONLY = "ro"
    FAIL = "Fail"


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """A pool's state. Blocks of metadata have 4096 bytes, those of data the size that the table says.

    Attributes:
        held_root: the block of the metadata snapshot that user space may read; None: none is held.
        needs_check: metadata has to be checked offline before the pool can be written to again.
    """

    mode: Mode
    transaction: int = 0
    metadata_used: int = 0
    metadata_total: int = 0
    data_used: int = 0
    data_total: int = 0
    held_root: int | None = None
    errors_when_full: bool = False
    needs_check: bool = False

    @property
    def data_free(self) -> int:
        return self.data_total - self.data_used

    @property
    def metadata_free(self) -> int:
        return self.metadata_total - self.metadata_used

    @property
    def takes_messages(self) -> bool:
        """Whether devices can be made and deleted: not once metadata is read-only."""
        return self.mode in (Mode.WRITE, Mode.OUT_OF_DATA_SPACE)


class PoolTable(NamedTuple):
    """What a pool is made of. `length` and `block` in sectors, `low_water` in blocks; devices: a path or "7:0"."""

    length: int
    metadata: str
    data: str
    block: int
    low_water: int = 0
    features: tuple[str, ...] = CAREFUL

    def target(self) -> dm.Target:
        """As the kernel takes it."""
        words = [self.metadata, self.data, self.block, self.low_water, len(self.features), *self.features]
        return dm.Target(0, self.length, "thin-pool", " ".join(map(str, words)))


def parse_pool_table(target: dm.Target) -> PoolTable:
    """The table of a pool as the kernel tells it.

    Raises:
        FailedPrecondition: it is no thin pool.
    """
    words = target.params.split()
    if target.kind != "thin-pool" or len(words) < 4:
        raise FailedPrecondition(f"a table of kind {target.kind!r} is none of a thin pool")
    count = int(words[4]) if len(words) > 4 else 0
    return PoolTable(target.length, words[0], words[1], int(words[2]), int(words[3]), tuple(words[5 : 5 + count]))


def parse_pool_status(params: str) -> PoolStatus:
    """A pool's status line. Words that older kernels lack (needs_check, the low-water mark) are taken as absent.

    Raises:
        Corrupt: it is none.
    """
    words = params.split()
    if words[:1] in (["Fail"], ["Error"]):
        return PoolStatus(Mode.FAIL, needs_check=True)
    try:
        metadata, data = (tuple(map(int, word.split("/"))) for word in words[1:3])
        return PoolStatus(
            mode=Mode(words[4]),
            transaction=int(words[0]),
            metadata_used=metadata[0],
            metadata_total=metadata[1],
            data_used=data[0],
            data_total=data[1],
            held_root=None if words[3] == "-" else int(words[3]),
            errors_when_full="error_if_no_space" in words,
            needs_check="needs_check" in words,
        )
    except (ValueError, IndexError) as error:
        raise Corrupt(f"the status of a thin pool is not understood: {params!r}") from error


def pool_status(pool: str, *, commit: bool = True) -> PoolStatus:
    """The pool's state; `commit`: of the metadata first, so that the counts are exact.

    Raises:
        NotFound: there is no such pool. FailedPrecondition: it is something else.
    """
    return parse_pool_status(_only(pool, lambda: dm.status(pool, flush=commit)).params)


def pool_table(pool: str) -> PoolTable:
    """What the pool is made of; raises as `pool_status`."""
    return parse_pool_table(_only(pool, lambda: dm.table(pool)))


def _only(pool: str, ask: Callable[[], list[dm.Target]]) -> dm.Target:
    try:
        found = ask()
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        raise NotFound(f"devicemapper: Non existing device {pool}", hint="hpmapper pool activate") from None
    if len(found) != 1 or found[0].kind != "thin-pool":
        raise FailedPrecondition(f"devmapper: Device {pool} is not a thin pool")
    return found[0]


def thin_target(pool: str, device: int, size: int) -> dm.Target:
    """The table of a thin device of `size` bytes."""
    return dm.Target(0, size // dm.SECTOR, "thin", f"{dm.path(pool)} {device}")


# Messages. Each that succeeds is committed when it returns.


def create(pool: str, device: int) -> None:
    """Make an empty device. OSError: EEXIST."""
    _tell(pool, f"create_thin {device}")


def snapshot(pool: str, device: int, origin: int) -> None:
    """Make a device that is a copy of another, in constant time. OSError: EEXIST; ENODATA, there is no origin."""
    _tell(pool, f"create_snap {device} {origin}")


def delete(pool: str, device: int) -> bool:
    """Delete a device; False: there is none. OSError: EBUSY, it is active."""
    try:
        _tell(pool, f"delete {device}")
    except OSError as error:
        if error.errno != errno.ENODATA:
            raise
        return False
    return True


def set_transaction(pool: str, present: int, following: int) -> None:
    """Count one transaction on. OSError: EINVAL, the present one is another."""
    _tell(pool, f"set_transaction_id {present} {following}")


def reserve_metadata(pool: str) -> None:
    """Hold a copy of the metadata for user space to read. OSError: EBUSY, one is held."""
    _tell(pool, "reserve_metadata_snap")


def release_metadata(pool: str) -> None:
    """Let go of it."""
    _tell(pool, "release_metadata_snap")


def _tell(pool: str, text: str) -> None:
    """Send a message; a pool that takes none any more is told from a device that has a fault of its own.

    Raises:
        FailedPrecondition: the pool is read-only or has failed.
    """
    try:
        dm.message(pool, text)
    except OSError as error:
        status = _status_or_none(pool) if error.errno in (errno.EOPNOTSUPP, errno.EINVAL) else None
        if status is not None and not status.takes_messages:
            state = "has failed" if status.mode is Mode.FAIL else "is read-only"
            why = ", its metadata needs a check" if status.needs_check else ""
            raise FailedPrecondition(
                f"thin pool {pool} {state}{why}: it takes no {text.split()[0]!r}", hint="hpmapper pool repair"
            ) from error
        raise


def _status_or_none(pool: str) -> PoolStatus | None:
    try:
        return pool_status(pool, commit=False)
    except (OSError, NotFound):
        return None
