"""Work that nobody waits for: a daemon's thread that frees, merges and ingests behind the requests.

    removed snapshots       their storage is freed
    sealed layers           what was written becomes objects and a map, once nobody unpacks any more
    committed chains        the maps of an image's layers are merged once no more layers follow
    committed snapshots     their mount is taken away
    whatever nobody has     is collected

All of it can be cut short at any instant and is found again in the database; nothing is lost with the thread.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable

from hpmapper.engine import Engine
from hpmapper.errors import FailedPrecondition, HpmapperError
from hpmapper.meta import snapshots
from hpmapper.meta.snapshots import Snapshot
from hpmapper.model import SnapshotId

log = logging.getLogger(__name__)

_QUIET_SECONDS = 0.3
"""After the last commit: the next layer of an image follows within that time."""

_IDLE_SECONDS = 5.0
"""After the last commit: reading layers then disturbs nobody's unpacking."""

_RETRY_SECONDS = 30.0
"""What is in use is tried again after that time."""


class Caretaker:
    """A root's caretaker; it may be told things from any thread, before `start` as well."""

    def __init__(self, engine: Engine, *, idle_seconds: float = _IDLE_SECONDS) -> None:
        self._engine = engine
        self._idle_seconds = idle_seconds
        self._wake = threading.Condition()
        self._stopping = False
        self._retry_at = math.inf
        self._removed = True  # a daemon before this one may have left some
        self._collect = True
        self._tops: dict[SnapshotId, Snapshot] = {}  # committed, and perhaps the last layer of an image
        self._last_commit = time.monotonic()
        self._hopeless: set[SnapshotId] = set()  # sealed layers that cannot be ingested, or are not worth another try
        self._sealed = not engine.driver.capabilities.keeps_sealed
        self._thread = threading.Thread(target=self._run, name="caretaker")

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Finish the step under way and end."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def committed(self, snapshot: Snapshot) -> None:
        """A snapshot was committed."""
        self._changed(snapshot, committed=True)

    def removed(self, snapshot: Snapshot) -> None:
        """A snapshot was marked as removed."""
        self._changed(snapshot, committed=False)

    def _changed(self, snapshot: Snapshot, *, committed: bool) -> None:
        with self._wake:
            if committed:
                self._tops[snapshot.id] = snapshot
                self._last_commit = time.monotonic()
                self._sealed = not self._engine.driver.capabilities.keeps_sealed
                if snapshot.parent is not None:
                    self._tops.pop(snapshot.parent, None)
            else:
                self._removed = True
            self._wake.notify()

    def clean_up(self) -> None:
        """Collect what nobody has any more, soon."""
        with self._wake:
            self._collect = self._removed = True
            self._wake.notify()

    # The thread.

    def _run(self) -> None:
        while True:
            step, delay = self._next()
            if step is None:
                with self._wake:
                    if self._stopping:
                        return
                    self._wake.wait(delay)
                continue
            try:
                step()
            except HpmapperError as error:
                log.warning("%s", error)
            except Exception:
                log.exception("background work failed")

    def _next(self) -> tuple[Callable[[], object] | None, float]:
        """The most urgent step, or how many seconds there is none."""
        with self._wake:
            if self._stopping:
                return None, 0
            quiet = time.monotonic() - self._last_commit
            if self._removed or time.monotonic() >= self._retry_at:
                self._removed, self._retry_at = False, math.inf
                return self._free, 0
            if self._tops:
                if quiet >= _QUIET_SECONDS:
                    tops, self._tops = self._tops, {}
                    return lambda: self._finish(tops), 0
                return None, _QUIET_SECONDS - quiet
            if self._collect:
                self._collect = False
                return self._engine.collect, 0
            if self._sealed:
                if quiet >= self._idle_seconds:
                    return self._ingest_sealed, 0
                return None, self._idle_seconds - quiet
            return None, _RETRY_SECONDS

    def _free(self) -> None:
        if not self._engine.free_removed():
            self._retry_at = time.monotonic() + _RETRY_SECONDS

    def _finish(self, tops: dict[SnapshotId, Snapshot]) -> None:
        for top in tops.values():
            self._settle(top)
            try:
                self._engine.finish(top)
            except HpmapperError as error:
                log.warning("the image of snapshot %s is not made ready: %s", top.key, error)

    def _settle(self, committed: Snapshot) -> None:
        """Take away the mount in which a committed snapshot was written."""
        try:
            self._engine.driver.unmount(committed.id)
        except FailedPrecondition:
            log.info("snapshot %s is still mounted", committed.key)

    def _ingest_sealed(self) -> None:
        waiting = [one for one in snapshots.sealed_layers(self._engine.db) if one not in self._hopeless]
        if not waiting:
            self._sealed = False
            self._collect = True
            return
        try:
            self._engine.ingest_sealed_layer(waiting[0])
        except HpmapperError as error:
            self._hopeless.add(waiting[0])
            log.warning("layer %s stays a directory: %s", waiting[0], error)
