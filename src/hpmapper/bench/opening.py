"""Which sides are wanted, and how each is opened."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from hpmapper.bench.ground import Ground
from hpmapper.bench.runner import Wanted
from hpmapper.bench.sides import LOCALS, Local
from hpmapper.drivers.registry import nearest
from hpmapper.errors import InvalidArgument


def wanted(work: Path, drivers: str | None, peers: str, device: Path | None, size: int) -> list[Wanted]:
    """The sides by the command line's words: `drivers` None means all, `peers` empty none.

    Raises:
        InvalidArgument: there is no such side, or the device is too small for all.
    """
    ours = _chosen(drivers)
    found = [(one.name, one.verdict(work), one) for one in ours]
    parts = sum(not why for _, why, _ in found)
    ground = Ground.over(work, device, size, max(parts, 1))
    return [Wanted(name, why, partial(one.opened, ground)) for name, why, one in found]


def _chosen(drivers: str | None) -> list[Local]:
    """Sides named, or of drivers named; the bare file systems are always there."""
    if drivers is None:
        return list(LOCALS)
    words = [word.strip() for word in drivers.split(",") if word.strip()]
    known = {one.name for one in LOCALS} | {one.driver for one in LOCALS if one.driver}
    for word in words:
        if word not in known:
            raise InvalidArgument(f"there is no driver {word!r}", hint=nearest(word, known))
    taken = [one for one in LOCALS if one.name in words or one.driver in words]
    below = {one.file_system for one in taken}
    return [one for one in LOCALS if one in taken or (one.driver is None and one.file_system in below)]
