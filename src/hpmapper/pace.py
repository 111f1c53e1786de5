"""How the interpreter runs while layers come in: without a search for cycles.

A layer's tree is a hundred thousand objects without any, which the collector would walk again and again (0.05 s of an
ingest of 22,000 members, half of it in one stop of all threads). The setting is the process's, so it is counted and put
back.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_users = 0
_collected = True


@contextmanager
def ingesting() -> Iterator[None]:
    """Do not collect until the last who asked for that has ended. May be nested, and used by several threads."""
    global _users, _collected
    with _lock:
        if not _users:
            _collected = gc.isenabled()
            gc.disable()
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users and _collected:
                gc.enable()
