"""How the interpreter runs while layers come in. These settings are the process's, so they are counted and put back.

- No search for cycles: a layer's tree is a hundred thousand objects without any, which the collector would walk again
  and again (0.05 s of an ingest of 22,000 members, half of it in one stop of all threads).
- A thread that waits for Python's lock gets it after half a millisecond instead of 5: while one layer's map is being
  written, the threads that decompress the next need the lock only for moments, many times for each MiB.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_SWITCH_SECONDS = 0.0005

_lock = threading.Lock()
_users = 0
_before = (True, 0.005)


@contextmanager
def ingesting() -> Iterator[None]:
    """Set the pace until the last who asked for it has ended. May be nested, and used by several threads."""
    global _users, _before
    with _lock:
        if not _users:
            _before = gc.isenabled(), sys.getswitchinterval()
            gc.disable()
            sys.setswitchinterval(_SWITCH_SECONDS)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                collects, interval = _before
                sys.setswitchinterval(interval)
                if collects:
                    gc.enable()
