"""The free-space floor: making things stops before the file system is full, so that removing still works."""

from __future__ import annotations

from dataclasses import dataclass

from hpmapper.errors import InvalidArgument, NoSpace
from hpmapper.model import Space
from hpmapper.pool.base import format_size, parse_size


@dataclass(frozen=True, slots=True)
class Floor:
    """Bytes that have to stay free: so many, and so many percent of the pool."""

    percent: float = 0.0
    bytes: int = 0

    def of(self, space: Space) -> int:
        """The floor of a pool with this space, in bytes."""
        return max(self.bytes, int(space.total * self.percent / 100))

    def __str__(self) -> str:
        return f"{self.percent:g}%" if self.percent else format_size(self.bytes)


DEFAULT_FLOOR = Floor(percent=10)
"""As `dm.min_free_space` of Docker's devicemapper driver."""


def parse_floor(text: str) -> Floor:
    """A floor from "10%" or "5G"; "0" is none.

    Raises:
        InvalidArgument: neither, or a percentage outside 0 to 99.
    """
    text = text.strip()
    if not text.endswith("%"):
        return Floor(bytes=parse_size(text))
    try:
        percent = float(text[:-1])
    except ValueError:
        percent = -1
    if not 0 <= percent <= 99:
        raise InvalidArgument(f"{text!r} is not a free-space floor", hint="0% to 99%, or a size such as 5G")
    return Floor(percent=percent)


def check_floor(space: Space, floor: Floor = DEFAULT_FLOOR, needed: int = 0) -> None:
    """Let pass when `needed` more bytes leave the floor free.

    Raises:
        NoSpace: they would not; figures and cures are in the message.
    """
    least = floor.of(space)
    left = space.free - needed
    if left >= least:
        return
    wanted = f", {format_size(needed)} are needed" if needed else ""
    raise NoSpace(
        f"the pool has {format_size(space.free)} of {format_size(space.total)} free{wanted}, "
        f"and {format_size(least)} ({floor}) must stay free",
        hint="remove containers or images and run 'hpmapper gc', or enlarge it with 'hpmapper pool grow SIZE'",
    )
