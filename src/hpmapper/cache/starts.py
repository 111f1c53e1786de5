"""The starts that a daemon sees: containers of containerd and Docker, read ahead or recorded as `start` does for ours.

    starts = Starts(db, driver)
    starts.start()
    starts.starting(snapshot, mounted=False)     a container's storage was made: what there is is read ahead
    starts.starting(snapshot, mounted=True)      its root was handed out: its first start is recorded
    starts.stop()

Being told is on the way of a call, so it takes a microsecond: a thread does the rest. A container whose root is handed
out is about to start; how long it takes is its runtime's affair, and nobody tells us. So the window begins with that.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from hpmapper.cache.places import Places, places
from hpmapper.cache.profile import Profile
from hpmapper.cache.replay import sweep
from hpmapper.cache.start import ImageFiles, StartSettings, first_map, keep, load, record
from hpmapper.drivers.base import Driver
from hpmapper.errors import HpmapperError
from hpmapper.meta.db import Database
from hpmapper.meta.snapshots import Snapshot, layers_below
from hpmapper.model import ObjectDigest, SnapshotId

log = logging.getLogger(__name__)

_AGAIN_SECONDS = 2.0
"""Between two looks at the starts of one image: what was just read ahead is there."""

_RECORDERS = 4
"""Starts of different images that are recorded at a time; a further one is recorded the next time."""

_MOST_WAITING = 100
"""Starts that wait to be looked at. There is no use in reading ahead what has long been started."""

_REMEMBERED = 1000

COUNTERS: Mapping[str, str] = {
    "watched": "starts that began to be recorded",
    "recorded": "starts that were recorded",
    "read_ahead": "starts that were read ahead",
    "cached": "starts of which all was cached already",
    "skipped": "starts that were left alone: nothing is known of their image's files, or too many came at once",
    "read_ahead_bytes": "bytes asked for ahead of starts",
}


class Starts:
    """See the module's text. For any thread; does nothing for a driver without objects."""

    def __init__(self, db: Database, driver: Driver, settings: StartSettings | None = None) -> None:
        self._db = db
        self._driver = driver
        self._settings = settings or StartSettings()
        self._useful = isinstance(driver, Places) and driver.object_file(ObjectDigest(bytes(32))) is not None
        self._queue: queue.Queue[tuple[SnapshotId, bool] | None] = queue.Queue(_MOST_WAITING)
        self._lately: dict[tuple[SnapshotId, bool], float] = {}
        self._thread: threading.Thread | None = None
        self._recorders: dict[str, threading.Thread] = {}
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def start(self) -> None:
        """Begin."""
        if self._useful:
            self._told, self._tell = os.pipe2(os.O_CLOEXEC)
            self._thread = threading.Thread(target=self._run, name="starts", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End; what is being recorded is given up."""
        if self._thread is None:
            return
        os.close(self._tell)
        self._queue.put(None)
        self._thread.join()
        self._thread = None
        for recorder in list(self._recorders.values()):
            recorder.join()
        os.close(self._told)

    def starting(self, snapshot: Snapshot, *, mounted: bool) -> None:
        """A container is about to start on a snapshot of its own."""
        if self._thread is None or snapshot.parent is None:
            return
        now, key = time.monotonic(), (snapshot.parent, mounted)
        if now - self._lately.get(key, -_AGAIN_SECONDS) < _AGAIN_SECONDS:
            return
        if len(self._lately) > _REMEMBERED:
            self._lately.clear()
        self._lately[key] = now
        try:
            self._queue.put_nowait(key)
        except queue.Full:
            self._count(skipped=1)

    def counters(self) -> dict[str, float]:
        """What was done so far; see `COUNTERS`."""
        with self._lock:
            return {name: float(self._counts[name]) for name in COUNTERS}

    def _count(self, **amounts: int) -> None:
        with self._lock:
            self._counts.update(amounts)

    # The thread.

    def _run(self) -> None:
        while (one := self._queue.get()) is not None:
            try:
                self._look(*one)
            except (HpmapperError, OSError) as error:
                log.warning("a start is neither recorded nor read ahead: %s", error)
                self._count(skipped=1)
            except Exception:
                log.exception("a start is neither recorded nor read ahead")
                self._count(skipped=1)

    def _look(self, parent: SnapshotId, mounted: bool) -> None:
        """Read ahead what is known of the image below, or record its start."""
        profile = load(self._db, parent)
        if profile is None and not (mounted and self._settings.record):
            return
        if profile is not None and profile.cold:
            self._read_ahead(profile, first_map(places(self._driver), layers_below(self._db, parent)))
            return
        files = ImageFiles(self._db, self._driver, parent)
        if files.chain_id is None or not files.sample:
            self._count(skipped=1)
        elif profile is not None and not files.is_cold():
            self._read_ahead(profile, files.map_file)
        elif mounted and self._settings.record:
            self._begin_recording(files.chain_id, files)

    def _read_ahead(self, profile: Profile, map_file: Path | None) -> None:
        if self._settings.replay:
            swept = sweep(profile, places(self._driver), map_file)
            done = "read_ahead" if swept.files else "cached"
            self._count(**{done: 1, "read_ahead_bytes": swept.bytes})

    def _begin_recording(self, chain_id: str, files: ImageFiles) -> None:
        with self._lock:
            self._recorders = {name: one for name, one in self._recorders.items() if one.is_alive()}
            if chain_id in self._recorders or len(self._recorders) >= _RECORDERS:
                return
            thread = threading.Thread(target=self._record, args=(files,), name="record-start", daemon=True)
            self._recorders[chain_id] = thread
        thread.start()

    def _record(self, files: ImageFiles) -> None:
        try:
            side = _Watched(self._told, lambda: self._count(watched=1))
            profile = record(files, side, self._settings.window, cold=files.is_cold())
            if profile.objects and self._thread is not None:
                keep(self._db, files, profile)
                self._count(recorded=1)
        except (HpmapperError, OSError) as error:
            log.warning("a start is not recorded: %s", error)
        except Exception:
            log.exception("a start is not recorded")


class _Watched(NamedTuple):
    """A recording's side (`hpmapper.cache.start.Told`)."""

    told: int
    ready: Callable[[], None]
