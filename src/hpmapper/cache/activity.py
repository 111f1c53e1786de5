"""Which containers are at work: what the processes do that have a container's root for theirs.

Told from /proc alone, so it holds for every runtime and front end. A process counts for a container when its root
directory is the container's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import NamedTuple

from hpmapper.cache.inventory import Inventory
from hpmapper.model import SnapshotId

LOOK_SECONDS = 0.25
"""How long `Activity.over` watches: 25 ticks of the clock in which the kernel counts processor time."""

_UTIME, _STIME, _MINFLT, _MAJFLT = 11, 12, 7, 9  # proc_pid_stat(5), counted behind the command's name


class Work(NamedTuple):
    """What a container's processes did since the last look: clock ticks, then bytes read and pages faulted in."""

    ticks: int = 0
    reads: int = 0

    @property
    def idle(self) -> bool:
        return self == _NONE


_NONE = Work()


class Activity:
    """Compares each look with the one before."""

    def __init__(self) -> None:
        self._before: dict[int, Work] = {}

    def look(self, inventory: Inventory) -> dict[SnapshotId, Work]:
        """What each live container did since the last look; at the first one, since its processes began."""
        done = dict.fromkeys(inventory.live, _NONE)
        seen: dict[int, Work] = {}
        for pid, snapshot in processes(inventory):
            work = _work(pid)
            if work is not None:
                seen[pid] = work
                before = self._before.get(pid, _NONE)
                done[snapshot] = Work(
                    done[snapshot].ticks + max(0, work.ticks - before.ticks),
                    done[snapshot].reads + max(0, work.reads - before.reads),
                )
        self._before = seen
        return done

    @classmethod
    def over(cls, inventory: Inventory, seconds: float = LOOK_SECONDS) -> dict[SnapshotId, Work]:
        """Watch for a moment."""
        activity = cls()
        activity.look(inventory)
        time.sleep(seconds)
        return activity.look(inventory)


def _roots(inventory: Inventory) -> dict[tuple[int, int], SnapshotId]:
    roots = {}
    for snapshot in inventory.live:
        try:
            status = os.stat(inventory.places.root(snapshot))
        except OSError:
            continue  # unmounted or removed meanwhile
        roots[status.st_dev, status.st_ino] = snapshot
    return roots


def processes(inventory: Inventory) -> Iterator[tuple[int, SnapshotId]]:
    """The processes of live containers: (pid, the container's snapshot)."""
    roots = _roots(inventory)
    if not roots:
        return
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            status = os.stat(f"/proc/{name}/root")
        except OSError:
            continue  # it has ended, or is a kernel thread's
        snapshot = roots.get((status.st_dev, status.st_ino))
        if snapshot is not None:
            yield int(name), snapshot


def _work(pid: int) -> Work | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            words = file.read().rpartition(b")")[2].split()
        with open(f"/proc/{pid}/io", "rb") as file:
            read = int(file.readline().split()[1])  # rchar: also what the cache answered
    except (OSError, IndexError):
        return None
    ticks = int(words[_UTIME]) + int(words[_STIME])
    return Work(ticks, read + int(words[_MINFLT]) + int(words[_MAJFLT]))
