"""The thread that keeps the cache tidy: trims under memory pressure, dedupes while the disk is idle.

    manager = CacheManager(db, driver)
    manager.start()
    …
    manager.stop()          waits for its end; what it was about is cut short

Calm until the kernel reports pressure: a PSI trigger of the machine's memory, PSI triggers of control groups of version
2, and reclaim events of control groups of version 1. The last also tell of clean cache being squeezed, where nobody
stalls (level "low": "medium" did not come when a group read a file of three times its size).
Then *relieving*: rounds of trimming, idle containers' duplicates first; those of containers at work only where the
machine as a whole stalls (PSI "full"), because these read theirs from the disk again (docs/measurements.md). A round
drops at most `round_bytes`. After one that was worth it the next begins twice as soon, down to `eager_pause`; after one
that was not it takes twice as long, up to `pause` while somebody presses, and else up to a multiple of it; and always
so long that looking takes no more than its share of the time. Calm again once pressure is below `calm_below` and no
event came for `calm_after`: that is long, because where memory was short once it is short again, and what the kernel
evicts before anybody looks is not the duplicates, but what was read longest ago.

Nothing here is on anybody's way: whoever starts the thread can stop it, or die, at any moment.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from hpmapper.cache import duplicates, inventory
from hpmapper.cache.activity import LOOK_SECONDS, Activity, Work
from hpmapper.cache.dedupe import Deduper, Throttle
from hpmapper.cache.inventory import Inventory
from hpmapper.cache.origins import Origins
from hpmapper.cache.places import Places
from hpmapper.cache.trim import trim
from hpmapper.drivers.base import Driver
from hpmapper.errors import HpmapperError, Unsupported
from hpmapper.kernel import memcg, psi
from hpmapper.meta import snapshots
from hpmapper.meta.db import Database
from hpmapper.model import SnapshotId

log = logging.getLogger(__name__)

_WINDOW_US = 2_000_000
"""Of the PSI triggers: without CAP_SYS_RESOURCE only multiples of two seconds are taken (Linux 6.5)."""

_MOST_PATIENCE = 8
"""How many pauses lie between two rounds at most, while nothing happens."""

_WORTH = 512 << 20
"""Bytes that a second of looking must have dropped to be worth it: as many as a fast disk reads in that time."""

_WORTH_LEAST = 1 << 20


@dataclass(frozen=True, slots=True)
class Settings:
    """How eager the manager is.

    Attributes:
        stall_us: microseconds of two seconds that tasks must stall for memory until it acts.
        calm_below: percent of stalled time (PSI's avg10) below which it rests again.
        busy_above: percent of time in which all tasks stall (PSI's full avg10) from which on containers at work lose
            their duplicates too.
        calm_after: seconds without an event after which it rests again.
        round_bytes: dropped at most in one round.
        pause: seconds between rounds that are not worth it, while memory is short.
        eager_pause: seconds between rounds at least.
        looking_share: at most this part of the time goes into looking for duplicates.
        dedupe_every: seconds between passes of deduplication; 0: never. io_limit: see `Throttle.limit`.
        groups: control groups to listen to; None: all there are.
    """

    stall_us: int = 100_000
    calm_below: float = 1.0
    busy_above: float = 10.0
    calm_after: float = 120.0
    round_bytes: int = 256 << 20
    pause: float = 1.0
    eager_pause: float = 0.25
    looking_share: float = 0.1
    dedupe_every: float = 3600.0
    dedupe_min_age: float = 600.0
    io_limit: float = 10.0
    groups: Sequence[Path] | None = None


@dataclass
class Counters:
    """What was decided so far, for metrics. Names are what `CacheManager.counters` returns."""

    _values: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, **values: float) -> None:
        with self._lock:
            self._values.update(values)

    def snapshot(self) -> dict[str, float]:
        with self._lock:
            return dict.fromkeys(COUNTERS, 0.0) | {name: float(value) for name, value in self._values.items()}


COUNTERS: Mapping[str, str] = {
    "pressure_events": "times the kernel reported memory pressure",
    "relief_begun": "times trimming began",
    "rounds": "rounds of trimming",
    "rounds_delayed": "rounds that waited because looking had been expensive",
    "rounds_at_limit": "rounds that ended at their limit of bytes",
    "duplicate_bytes_found": "bytes of duplicates found in rounds",
    "trimmed_idle_bytes": "bytes dropped from idle containers, and from objects nobody reads",
    "trimmed_busy_bytes": "bytes dropped from containers at work",
    "spared_bytes": "bytes of duplicates left alone: of containers at work, or beyond a round's limit",
    "kept_bytes": "bytes of duplicates that could not be dropped: dirty or mapped meanwhile",
    "looking_seconds": "seconds spent looking for duplicates",
    "dedupe_passes": "passes of deduplication",
    "deduped_files": "files that share their blocks since",
    "deduped_bytes": "bytes of disk given up by them",
    "dedupe_read_bytes": "bytes read for that",
    "dedupe_waited_seconds": "seconds that it waited for the disk",
    "failures": "rounds and passes that failed",
}


class CacheManager:
    """See the module's text. One for each root; the driver must be attached for as long as it runs."""

    def __init__(self, db: Database, driver: Driver, settings: Settings | None = None) -> None:
        self._db = db
        self._driver = driver
        self._settings = settings or Settings()
        self._counters = Counters()
        self._stop = threading.Event()
        self._wake = -1
        self._thread: threading.Thread | None = None
        self._deduper = Deduper(Throttle(self._settings.io_limit), self._stop, self._settings.dedupe_min_age)
        self._activity = Activity()
        self._origins = Origins()

    def start(self) -> None:
        """Begin. Does nothing when it runs already, or when the driver's cache cannot be looked into."""
        if self._thread is None and isinstance(self._driver, Places):
            self._stop.clear()
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._thread = threading.Thread(target=self._run, name="cache-manager", daemon=True)
            self._thread.start()

    def stop(self, timeout: float | None = None) -> None:
        """End, and wait for it. Does nothing when it does not run."""
        if self._thread is not None:
            self._stop.set()
            os.eventfd_write(self._wake, 1)
            self._thread.join(timeout)
            if not self._thread.is_alive():
                os.close(self._wake)
                self._thread = None

    def counters(self) -> dict[str, float]:
        """What it has done so far; see `COUNTERS`."""
        return self._counters.snapshot()

    def _run(self) -> None:
        with self._sources() as sources:
            due = time.monotonic() + self._settings.dedupe_every
            while not self._stop.is_set():
                sleep = max(0.0, due - time.monotonic()) if self._settings.dedupe_every else None
                if self._wait(sources, sleep):
                    self._relieve(sources)
                elif self._settings.dedupe_every and time.monotonic() >= due:
                    self._guarded(self._dedupe)
                    due = time.monotonic() + self._settings.dedupe_every

    @contextmanager
    def _sources(self) -> Iterator[select.poll]:
        """Everything that reports pressure, as far as this kernel has it."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        self._eventfds = {self._wake}
        groups = self._settings.groups
        if groups is None:
            groups = [memcg.ROOT] if memcg.has_pressure_events(memcg.ROOT) else []
        with ExitStack() as stack:
            resources = ["memory", *(str(group / "memory.pressure") for group in groups)]
            for resource in resources:
                try:
                    trigger = psi.trigger(resource, stall_us=self._settings.stall_us, window_us=_WINDOW_US)
                    poll.register(stack.enter_context(trigger), select.POLLPRI)
                except FileNotFoundError:
                    pass  # a kernel without PSI, or a control group of version 1
                except OSError as error:
                    log.warning("no PSI trigger on %s: %s", resource, error)
            for group in filter(memcg.has_pressure_events, groups):
                try:
                    event = stack.enter_context(memcg.pressure_events(group, "low"))
                except OSError as error:
                    log.warning("no memory pressure events of %s: %s", group, error)
                    continue
                self._eventfds.add(event)
                poll.register(event, select.POLLIN)
            yield poll

    def _wait(self, sources: select.poll, seconds: float | None) -> bool:
        """Wait for pressure or the end; whether it was pressure."""
        ready = sources.poll(None if seconds is None else seconds * 1000)
        pressed = False
        for fd, _ in ready:
            if fd in self._eventfds:
                try:
                    os.eventfd_read(fd)
                except BlockingIOError:
                    continue
            pressed |= fd != self._wake
        if pressed and not self._stop.is_set():
            self._counters.add(pressure_events=1)
            return True
        return False

    def _relieve(self, sources: select.poll) -> None:
        """Trim until the pressure is over."""
        self._counters.add(relief_begun=1)
        if self._guarded(self._begin_watching) is not None:
            self._stop.wait(LOOK_SECONDS)
        last_event, interval = time.monotonic(), self._settings.pause
        while not self._stop.is_set():
            began, before = time.monotonic(), self._dropped()
            looked = self._guarded(partial(self._round, busy=self._is_critical())) or 0.0
            worth = self._dropped() - before >= max(_WORTH_LEAST, looked * _WORTH)
            interval = self._interval(interval, worth=worth)
            earliest = began + max(min(interval, self._settings.pause), looked / self._settings.looking_share)
            if earliest > began + interval:
                self._counters.add(rounds_delayed=1)
            if self._rest(sources, earliest, max(earliest, began + interval)):
                last_event = time.monotonic()
                interval = min(interval, self._settings.pause)
            quiet = time.monotonic() - last_event > self._settings.calm_after
            if quiet and not self._is_pressed():
                return

    def _interval(self, last: float, *, worth: bool) -> float:
        """Seconds until the next round, unless somebody presses."""
        if worth:
            return max(last / 2, min(self._settings.eager_pause, self._settings.pause))
        return min(last * 2, _MOST_PATIENCE * self._settings.pause)

    def _rest(self, sources: select.poll, earliest: float, latest: float) -> bool:
        """Wait until then, or until pressure comes, but not less than until `earliest`; whether it came."""
        pressed = False
        until = latest
        while not self._stop.is_set() and time.monotonic() < until:
            if self._wait(sources, until - time.monotonic()):
                pressed, until = True, earliest
                self._stop.wait(min(0.1, max(0.0, until - time.monotonic())))  # events come in swarms
        return pressed

    def _dropped(self) -> float:
        counted = self._counters.snapshot()
        return counted["trimmed_idle_bytes"] + counted["trimmed_busy_bytes"]

    def _begin_watching(self) -> float:
        """What containers do from here on decides who is idle."""
        self._activity.look(self._take())
        return 0.0

    def _is_pressed(self) -> bool:
        try:
            return psi.pressure("memory").some >= self._settings.calm_below
        except OSError:
            return False

    def _is_critical(self) -> bool:
        try:
            return psi.pressure("memory").full >= self._settings.busy_above
        except OSError:
            return False

    def _take(self) -> Inventory:
        return inventory.take(self._db, self._driver)

    def _round(self, *, busy: bool) -> float:
        """Look and drop; returns the seconds that looking took."""
        began = time.monotonic()
        taken = self._take()
        work: Mapping[SnapshotId, Work] = self._activity.look(taken)
        found = duplicates.find(taken, work, self._origins)
        looked = time.monotonic() - began
        done = trim(found, work, limit=self._settings.round_bytes, busy=busy, stop=self._stop)
        self._counters.add(
            rounds=1,
            rounds_at_limit=int(done.dropped >= self._settings.round_bytes),
            duplicate_bytes_found=done.found,
            trimmed_idle_bytes=done.idle,
            trimmed_busy_bytes=done.busy,
            spared_bytes=done.passed,
            kept_bytes=done.kept,
            looking_seconds=looked,
        )
        return looked

    def _dedupe(self) -> float:
        waited = self._deduper.throttle.waited
        done = self._deduper.run(self._take(), dict(snapshots.objects(self._db)), time.time())
        self._counters.add(
            dedupe_passes=1,
            deduped_files=done.files,
            deduped_bytes=done.bytes,
            dedupe_read_bytes=done.read_bytes,
            dedupe_waited_seconds=self._deduper.throttle.waited - waited,
        )
        return 0.0

    def _guarded(self, act: Callable[[], float]) -> float | None:
        """A failure is told and counted; the next round may do better."""
        try:
            return act()
        except Unsupported as error:
            log.info("cache manager: %s", error)
        except (HpmapperError, OSError) as error:
            log.warning("cache manager: %s", error)
        self._counters.add(failures=1)
        return None
