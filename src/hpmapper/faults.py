"""Named points at which a crash test may kill the process.

Every step between two durable states calls `point("operation.step")`. In production that is one comparison.
With HPMAPPER_FAULT=NAME:N the N-th hit of NAME (N from 1) ends the process as SIGKILL would; with
HPMAPPER_FAULT_LOG=FILE each hit is appended to FILE, which is how the tests learn which points exist.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

_target, _, _count = os.environ.get("HPMAPPER_FAULT", "").partition(":")
_log = os.environ.get("HPMAPPER_FAULT_LOG", "")
_hits: Counter[str] = Counter()


def point(name: str) -> None:
    """Mark the step `name`; dies here when a test asked for it."""
    if not _target and not _log:
        return
    _hits[name] += 1
    if _log:
        with open(_log, "a", encoding="ascii") as log:
            log.write(f"{name}:{_hits[name]}\n")
    if name == _target and _hits[name] == int(_count or "1"):
        os.kill(os.getpid(), signal.SIGKILL)
