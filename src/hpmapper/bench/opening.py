"""Which sides are wanted, and how each is opened."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path

from hpmapper.bench.ground import Ground
from hpmapper.bench.peers import PEERS, Peer
from hpmapper.bench.runner import Wanted
from hpmapper.bench.sides import LOCALS, Local
from hpmapper.drivers.registry import nearest
from hpmapper.errors import InvalidArgument

Chosen = tuple[list[Local], list[Peer]]


def chosen(drivers: str | None, peers: str) -> Chosen:
    """The sides by the command line's words: `drivers` None means all, `peers` empty none and "all" all.

    Raises:
        InvalidArgument: there is no such side.
    """
    return _locals(drivers), _peers(peers)


def wanted(work: Path, sides: Chosen, device: Path | None, size: int) -> list[Wanted]:
    """How those sides are opened, on file systems of `size` bytes or in parts of a device; nothing is opened yet.

    Raises:
        InvalidArgument: the device is too small for all, or in use.
    """
    ours = [(one, one.verdict(work)) for one in sides[0]]
    theirs = [(one, one.why_not()) for one in sides[1]]
    ground = Ground.over(work, device, size, sum(not why for _, why in (*ours, *theirs)))
    return [
        *(Wanted(one.name, why, partial(one.opened, ground)) for one, why in ours),
        *(Wanted(one.name, why, partial(one.open, ground)) for one, why in theirs),
    ]


def _locals(drivers: str | None) -> list[Local]:
    """Sides named, or of drivers named; with them the bare file systems that they are on."""
    if drivers is None:
        return list(LOCALS)
    words = _known_words(drivers, {one.name for one in LOCALS} | {one.driver for one in LOCALS if one.driver})
    taken = [one for one in LOCALS if one.name in words or one.driver in words]
    below = {one.file_system for one in taken}
    return [one for one in LOCALS if one in taken or (one.driver is None and one.file_system in below)]


def _peers(peers: str) -> list[Peer]:
    if peers == "all":
        return list(PEERS)
    words = _known_words(peers, {one.name for one in PEERS})
    return [one for one in PEERS if one.name in words]


def _known_words(text: str, known: Collection[str]) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words:
        if word not in known:
            raise InvalidArgument(f"there is no side {word!r}", hint=nearest(word, known))
    return words
