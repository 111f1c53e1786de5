"""What a container of an image reads while it starts: parts of the image's map, and of its objects.

As JSON, because it travels with images and is read by others than its maker:

    {"version": 1, "cold": true, "seconds": 12.5, "map": {"size": …, "ranges": [[start, length], …]},
     "objects": [{"digest": "…64 hexadecimal digits", "ranges": [[start, length], …]}, …]}

Objects stand in the order in which the start opened them; where the disk rotates, each few dozen of them in the order
in which they lie on it. A profile holds for contents, not for names: objects are named by digest, so one that the image
no longer has is passed over; ranges of a map of another size are too. The worst that a false profile can do is to have
some of the image's own files read ahead.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import msgspec

from hpmapper.cache.count import opened
from hpmapper.cache.places import Places
from hpmapper.errors import Corrupt
from hpmapper.kernel import fiemap
from hpmapper.kernel.mincore import Run
from hpmapper.model import ObjectDigest

VERSION = 1

MAX_BYTES = 8 << 20
"""Of a profile. A hundred thousand files have room in it."""

_STRETCH = 64
"""Objects that are put in the order of the disk among themselves."""

_Offset = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]
_Range = tuple[_Offset, _Offset]


class _Part(msgspec.Struct):
    ranges: list[_Range]


class _MapPart(_Part):
    size: _Offset


class _ObjectPart(_Part):
    digest: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class _Document(msgspec.Struct):
    version: int
    map: _MapPart
    objects: list[_ObjectPart]
    cold: bool = True
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Profile:
    """See the module's text.

    Attributes:
        map_size: bytes of the map that `map` is about; 0: none.
        cold: whether little of the image was cached when it was recorded. If not, it has whole files where the start
            read parts of them.
        seconds: how long was watched.
    """

    map_size: int
    map: tuple[Run, ...]
    objects: tuple[tuple[ObjectDigest, tuple[Run, ...]], ...]
    cold: bool = True
    seconds: float = 0.0

    @property
    def size(self) -> int:
        """Bytes that it would have read."""
        return _bytes(self.map) + sum(_bytes(runs) for _, runs in self.objects)

    def restricted(self, digests: Container[ObjectDigest]) -> Profile:
        """Without the objects that are not among these."""
        return replace(self, objects=tuple(one for one in self.objects if one[0] in digests))

    def encode(self) -> bytes:
        """As it is stored."""
        return msgspec.json.encode(
            _Document(
                VERSION,
                _MapPart(_ranges(self.map), self.map_size),
                [_ObjectPart(_ranges(runs), digest.hex()) for digest, runs in self.objects],
                self.cold,
                self.seconds,
            )
        )


def decode(data: bytes, what: str) -> Profile:
    """Read a profile; `what` names it in errors.

    Raises:
        Corrupt: it is none, or a later version's.
    """
    if len(data) > MAX_BYTES:
        raise Corrupt(f"{what} has {len(data)} bytes, more than the {MAX_BYTES} allowed")
    try:
        found = msgspec.json.decode(data, type=_Document)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Corrupt(f"{what} is not valid: {error}") from error
    if found.version != VERSION:
        raise Corrupt(f"{what} has version {found.version}", hint=f"this hpmapper reads version {VERSION}")
    objects = ((ObjectDigest(bytes.fromhex(one.digest)), _runs(one)) for one in found.objects)
    return Profile(found.map.size, _runs(found.map), tuple(objects), found.cold, found.seconds)


def for_this_disk(profile: Profile, places: Places) -> Profile:
    """With its objects in the order that this machine's disk likes best; those that are not here are left out.

    What is needed first had better come first: the start goes on while the rest is read (docs/measurements.md). A disk
    that rotates likes them as they lie on it, so that is what a few dozen of them do; not all, since many virtual
    disks rotate in name only.
    """
    here = tuple(one for one in profile.objects if os.path.exists(places.object_file(one[0]) or ""))
    found = replace(profile, objects=here)
    return in_disk_order(found, places) if rotates(places.scratch) else found


def rotates(path: Path) -> bool:
    """Whether the disk below a path rotates, as far as the kernel knows."""
    number = os.stat(path).st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    for queue in (device / "queue", device / "../queue"):  # a partition has its disk's
        try:
            return (queue / "rotational").read_text().strip() == "1"
        except FileNotFoundError:
            continue
    return False


def in_disk_order(profile: Profile, places: Places) -> Profile:
    """With its objects by stretches as they lie on this machine's disk; those that are not here are left out."""
    placed = []
    for digest, runs in profile.objects:
        with opened(places.object_file(digest) or "") as fd:
            if fd is not None and runs:
                placed.append((_physical(fd, runs[0].start), digest, runs))
    stretches = (placed[start : start + _STRETCH] for start in range(0, len(placed), _STRETCH))
    ordered = [one for stretch in stretches for one in sorted(stretch, key=lambda one: one[0])]
    return replace(profile, objects=tuple((digest, runs) for _, digest, runs in ordered))


def _physical(fd: int, start: int) -> int:
    extent = next(fiemap.extents(fd, start), None)
    return extent.physical if extent is not None and extent.placed else 0


def joined(runs: Sequence[Run], gap: int) -> tuple[Run, ...]:
    """Runs in order, those less than `gap` bytes apart as one: a little too much is cheaper than two requests."""
    result: list[Run] = []
    for run in sorted(runs):
        if result and run.start - result[-1].end < gap:
            result[-1] = Run(result[-1].start, max(result[-1].end, run.end))
        else:
            result.append(run)
    return tuple(result)


def file_size(path: str | os.PathLike[str]) -> int:
    """The file's size, 0 if it is gone."""
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


def _bytes(runs: Iterable[Run]) -> int:
    return sum(run.end - run.start for run in runs)


def _ranges(runs: Iterable[Run]) -> list[_Range]:
    return [(run.start, run.end - run.start) for run in runs]


def _runs(part: _Part) -> tuple[Run, ...]:
    return tuple(Run(start, start + length) for start, length in part.ranges)
