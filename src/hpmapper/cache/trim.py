"""Dropping duplicates from the page cache, those first that are missed least.

Never dirty pages, never what is mapped into a process, and never the last copy: of each block the copy stays that is
read most (`hpmapper.cache.duplicates.find`). A container at work reads its copy from the disk again if it needs it, so
its copies go last.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from hpmapper.cache.activity import Work
from hpmapper.cache.count import opened
from hpmapper.cache.duplicates import Duplicate
from hpmapper.kernel.cachestat import cachestat
from hpmapper.kernel.mincore import PAGE
from hpmapper.model import SnapshotId

_WIDER = (64 * 1024, 1 << 20, 2 << 20)
"""Large folios go as a whole or not at all; these are tried around a range. 2 MiB is the largest on x86."""

_MOST_AT_ONCE = 32 << 20
"""Bytes between two looks at the clock and the limit."""


@dataclass(frozen=True, slots=True)
class Trimmed:
    """Bytes: of duplicates found, of these dropped from idle and from busy containers (or objects).

    `kept`: could not be dropped: dirty by now, mapped, or part of a larger piece of memory that is.
    `passed`: left alone: beyond the limit, or of a busy container.
    """

    found: int = 0
    idle: int = 0
    busy: int = 0
    kept: int = 0
    passed: int = 0

    @property
    def dropped(self) -> int:
        return self.idle + self.busy


def trim(
    duplicates: Sequence[Duplicate],
    work: Mapping[SnapshotId, Work],
    *,
    limit: int | None = None,
    busy: bool = True,
    stop: threading.Event | None = None,
) -> Trimmed:
    """Drop duplicates, idle containers' first; `work`: what the live containers do.

    Args:
        limit: bytes to drop at most.
        busy: also those of containers at work.
        stop: ends it early when set.
    """
    order = sorted(duplicates, key=lambda one: not _is_idle(one, work))  # stable: what is missed least comes first
    dropped = {True: 0, False: 0}
    kept = passed = 0
    for path, pieces in groupby(order, key=lambda one: one.path):
        with opened(path) as fd:
            for one in pieces:
                idle = _is_idle(one, work)
                room = None if limit is None else limit - sum(dropped.values())
                if fd is None or (room is not None and room <= 0) or not (busy or idle) or (stop and stop.is_set()):
                    passed += one.size
                    continue
                end = one.end if room is None else min(one.end, one.start + max(PAGE, room // PAGE * PAGE))
                freed = _drop(fd, one.start, end, wide=idle)
                dropped[idle] += freed
                kept += max(0, end - one.start - freed)
                passed += one.end - end
    found = sum(one.size for one in duplicates)
    return Trimmed(found, dropped[True], dropped[False], kept, passed)


def _is_idle(one: Duplicate, work: Mapping[SnapshotId, Work]) -> bool:
    """Of an object that has duplicates in containers, no live reader is left: it is as idle as can be."""
    return one.owner is None or work.get(one.owner, Work()).idle


def _drop(fd: int, start: int, end: int, *, wide: bool) -> int:
    """Drop clean pages; returns the bytes that went, those around the range included."""
    freed = 0
    for low in range(start, end, _MOST_AT_ONCE):
        high = min(end, low + _MOST_AT_ONCE)
        freed += _drop_once(fd, low, high)
        for grain in _WIDER if wide else ():
            if not cachestat(fd, low, high - low).cached:
                break
            freed += _drop_once(fd, low // grain * grain, -(-high // grain) * grain)
    return freed


def _drop_once(fd: int, start: int, end: int) -> int:
    before = cachestat(fd, start, end - start)
    if not before.cached or before.dirty or before.writeback:
        return 0  # the kernel would begin to write the dirty ones
    os.posix_fadvise(fd, start, end - start, os.POSIX_FADV_DONTNEED)
    after = cachestat(fd, start, end - start)
    return max(0, before.cached - after.cached) * PAGE
