"""Work that nobody waits for: a daemon's thread that frees, merges and ingests behind the requests.

    removed snapshots       their storage is freed
    sealed layers           what was unpacked through a mount becomes objects and a map, once nobody unpacks any more
                            (other commits, as the few files that Docker writes for each container, stay directories: as
                            maps they would want an image map for each of them)
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
from hpmapper.errors import FailedPrecondition, HpmapperError, NotFound
from hpmapper.meta import snapshots
from hpmapper.meta.snapshots import Snapshot
from hpmapper.model import SnapshotId
from hpmapper.writeback import Writeback

log = logging.getLogger(__name__)

_QUIET_SECONDS = 0.3
"""After the last commit: the next layer of an image follows within that time."""

_IDLE_SECONDS = 5.0
"""After the last commit: reading layers then disturbs nobody's unpacking."""

_GATHER_SECONDS = 0.25
"""Between two rounds of freeing what was removed: many at once cost one transaction."""

_RETRY_SECONDS = 30.0
"""What is in use is tried again after that time."""

_THOROUGH_SECONDS = 600.0
"""Between two walks of all objects that no removed layer asks for. containerd has us clean up after each container."""


class Caretaker:
    """A root's caretaker; it may be told things from any thread, before `start` as well."""

    def __init__(self, engine: Engine, *, idle_seconds: float = _IDLE_SECONDS) -> None:
        self._engine = engine
        self._idle_seconds = idle_seconds
        self._wake = threading.Condition()
        self._stopping = False
        self._retry_at = math.inf
        self._collect_at = math.inf
        self._thorough_at = -math.inf
        self._freed_at = -math.inf
        self._removed = True  # a daemon before this one may have left some
        self._collect = True
        self._tops: set[SnapshotId] = set()  # committed, and perhaps the last layer of an image
        self._written: set[SnapshotId] = set()  # committed, and perhaps still mounted
        self._last_commit = time.monotonic()
        self._hopeless: set[SnapshotId] = set()  # sealed layers that cannot be ingested, or are not worth another try
        self._sealed = not engine.driver.capabilities.keeps_sealed
        self._writeback = Writeback(engine.driver.scratch)
        self._thread = threading.Thread(target=self._run, name="caretaker")

    def start(self) -> None:
        """Begin."""
        self._writeback.start()
        self._thread.start()

    def stop(self) -> None:
        """Finish the step under way and end."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()
        self._writeback.stop()

    def unpacking(self, snapshot: Snapshot) -> None:
        """A layer is going to be written into a snapshot."""
        self._writeback.begin(snapshot.id)

    def applying(self, snapshot: Snapshot) -> None:
        """It is not: it is read by our differ, which sees to its own writing."""
        self._writeback.end(snapshot.id)

    def committed(self, snapshot: Snapshot, parent: Snapshot | None) -> None:
        """A snapshot was committed on that parent."""
        self._writeback.end(snapshot.id)
        with self._wake:
            was_idle = not self._tops
            self._tops.add(snapshot.id)
            self._written.add(snapshot.id)
            if parent is not None:
                self._tops.discard(parent.id)
            self._last_commit = time.monotonic()
            self._sealed = not self._engine.driver.capabilities.keeps_sealed
            if was_idle:  # else the thread looks again by itself: waking it costs more than the commit
                self._wake.notify()

    def removed(self, snapshot: Snapshot) -> None:
        """A snapshot was marked as removed."""
        self._writeback.end(snapshot.id)
        with self._wake:
            if not self._removed:
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
            now = time.monotonic()
            quiet = now - self._last_commit
            if self._removed or now >= self._retry_at:
                if now < self._freed_at + _GATHER_SECONDS:
                    return None, self._freed_at + _GATHER_SECONDS - now
                self._removed, self._retry_at, self._freed_at = False, math.inf, now
                return self._free, 0
            if self._tops:
                if quiet >= _QUIET_SECONDS:
                    return self._finish, 0
                return None, _QUIET_SECONDS - quiet
            if self._collect or now >= self._collect_at:
                self._collect, self._collect_at = False, math.inf
                return self._collect_all, 0
            if self._sealed:
                if quiet >= self._idle_seconds:
                    return self._ingest_sealed, 0
                return None, self._idle_seconds - quiet
            return None, _RETRY_SECONDS

    def _collect_all(self) -> None:
        now = time.monotonic()
        thorough = now >= self._thorough_at
        if self._engine.rubbish.collect(thorough=thorough).waiting:
            self._thorough_at = -math.inf
            with self._wake:
                self._collect_at = time.monotonic() + _RETRY_SECONDS
        elif thorough:
            self._thorough_at = now + _THOROUGH_SECONDS

    def _free(self) -> None:
        if not self._engine.rubbish.free_removed():
            self._retry_at = time.monotonic() + _RETRY_SECONDS

    def _finish(self) -> None:
        """Take away the mounts in which layers were written, and make the images on top of them ready."""
        with self._wake:
            tops, self._tops, written, self._written = self._tops, set(), self._written, set()
        for snapshot in written:
            try:
                self._engine.driver.unmount(snapshot)
            except FailedPrecondition:
                log.info("snapshot %s is still mounted", snapshot)
        for snapshot in tops:
            self._make_ready(snapshot)

    def _make_ready(self, top: SnapshotId) -> None:
        """Merge the maps of the image whose uppermost layer a snapshot is."""
        try:
            self._engine.finish(snapshots.by_id(self._engine.db, top))
        except NotFound:
            pass  # removed since
        except HpmapperError as error:
            log.warning("the image of snapshot %s is not made ready: %s", top, error)

    def _ingest_sealed(self) -> None:
        sealed = snapshots.sealed_of_images(self._engine.db)
        waiting = [one for one in sealed if one not in self._hopeless]
        if not waiting:
            self._sealed = False
            self._collect = True
            for top in snapshots.tops(self._engine.db):
                self._make_ready(top.id)
            return
        try:
            self._engine.ingest_sealed_layer(waiting[0])
        except Exception as error:
            self._hopeless.add(waiting[0])  # whatever it is, it would be the same at once
            log.warning("layer %s stays a directory: %s", waiting[0], error, exc_info=_unless_ours(error))


def _unless_ours(error: Exception) -> Exception | None:
    """What is to be logged with its traceback."""
    return None if isinstance(error, HpmapperError) else error
