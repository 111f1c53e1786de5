"""Being woken when memory control groups run short (cgroup-v1/memory.rst, "Memory Pressure").

Only control groups of version 1 have this; in version 2 a group's memory.pressure takes PSI triggers
(`hpmapper.kernel.psi`). It tells of reclaim as such, also of clean cached pages, which hardly ever stalls anybody and
so is seen by no PSI trigger.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hpmapper.kernel.syscall import opened

ROOT = Path("/sys/fs/cgroup/memory")
"""Where version 1 usually has its topmost group: it hears of all groups below that nobody else listens to."""


def has_pressure_events(group: Path) -> bool:
    """Whether that is a memory control group of version 1."""
    return (group / "memory.pressure_level").exists()


@contextmanager
def pressure_events(group: Path, level: str = "medium") -> Iterator[int]:
    """An eventfd that becomes readable when reclaim in the group, or one below, reaches `level` or worse.

    Levels: "low", pages are reclaimed; "medium", the cache is squeezed, or swapping begins; "critical", reclaim finds
    nothing any more.
    """
    with ExitStack() as stack:
        event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        stack.callback(os.close, event)
        source = stack.enter_context(opened(group / "memory.pressure_level"))
        with opened(group / "cgroup.event_control", os.O_WRONLY) as control:
            os.write(control, f"{event} {source} {level}".encode())
        yield event
