"""What a daemon tells Prometheus.

Everything is asked for when somebody looks; only calls are counted as they happen (`hpmapper.rpc.calls`). Looking into
the page cache takes longest (a tenth of a second for ten thousand objects), so that one look holds for a while.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from typing import TypeVar

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from hpmapper.cache.count import Counts
from hpmapper.cache.manager import COUNTERS, CacheManager
from hpmapper.cache.overview import Observer, Overview
from hpmapper.cache.places import Places
from hpmapper.cache.starts import COUNTERS as START_COUNTERS
from hpmapper.cache.starts import Starts
from hpmapper.cache.stat import total
from hpmapper.drivers.devicemapper import DeviceMapperDriver, admin
from hpmapper.engine import Engine
from hpmapper.errors import HpmapperError
from hpmapper.meta import images, snapshots, totals
from hpmapper.rpc.calls import BOUNDS, Calls, Tally

log = logging.getLogger(__name__)

_Words = TypeVar("_Words", bound=tuple[str, ...])

LOOK_EVERY = 30.0
"""Seconds that a look into the page cache holds at least; longer, if looking took long."""

_LOOKING_SHARE = 0.02
"""At most this part of the time goes into looking."""

_WARNING, _CRITICAL = 80, 90
"""Percent of a thin pool in use from which on its severity is that, as for `hpmapper pool watch`."""


def registry(engine: Engine, manager: CacheManager, starts: Starts, calls: Mapping[str, Calls]) -> CollectorRegistry:
    """All metrics of a daemon; `calls`: of each front end, by its name."""
    found = CollectorRegistry()
    found.register(Collected(lambda: root_metrics(engine)))
    found.register(Collected(lambda: call_metrics(calls)))
    found.register(Collected(lambda: manager_metrics(manager)))
    found.register(Collected(lambda: start_metrics(starts)))
    if isinstance(engine.driver, Places):
        found.register(CacheCollector(Observer(engine.db, engine.driver)))
    ProcessCollector(registry=found)
    return found


class Collected(Collector):
    """A function as a collector. What fails is logged and left out: the rest is still worth having."""

    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect

    def describe(self) -> list[Metric]:
        return []  # else the registry would ask for values before there are any

    def collect(self) -> Iterator[Metric]:
        try:
            yield from self._collect()
        except (HpmapperError, OSError) as error:
            log.warning("some metrics cannot be told: %s", error)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"hpmapper_{name}", text, value=value)


def _gauges(name: str, text: str, labels: str, values: Mapping[_Words, float]) -> Metric:
    family = GaugeMetricFamily(f"hpmapper_{name}", text, labels=labels.split())
    for words, value in values.items():
        family.add_metric(words, value)
    return family


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"hpmapper_{name}", text, value=value)


def _version() -> str:
    """hpmapper's version; empty where it runs out of its source directory, without being installed."""
    try:
        return metadata.version("hpmapper")
    except metadata.PackageNotFoundError:
        return ""


def root_metrics(engine: Engine) -> Iterator[Metric]:
    """The pool, what is in it, and what was spared when it came."""
    driver, db = engine.driver, engine.db
    about = {(driver.name, _version()): 1.0}
    yield _gauges("info", "The driver, and the version of hpmapper.", "driver version", about)
    space = driver.space()
    values = {("total",): space.total, ("free",): space.free}
    yield _gauges("pool_bytes", "Bytes of the file system or pool that everything lies in.", "kind", values)
    yield _gauges("snapshots", "Snapshots, by whose they are and what.", "owner kind", _snapshots(engine))
    yield _gauge(
        "images", "Images known by name or id; containerd's and Docker's are their own.", len(images.images(db))
    )
    sizes = [size for _, size in snapshots.objects(db)]
    yield _gauge("objects", "Objects in the store.", len(sizes))
    yield _gauge("objects_bytes", "Bytes of the objects in the store.", sum(sizes))
    for name, value in totals.totals(db).items():
        yield _counter(f"ingest_{name}", f"At ingest, since the root was made: {totals.NAMES[name]}.", value)
    if isinstance(driver, DeviceMapperDriver):
        yield from _thin_pool(driver)


def _snapshots(engine: Engine) -> dict[tuple[str, ...], float]:
    found: Counter[tuple[str, ...]] = Counter()
    for one in snapshots.walk(engine.db):
        owner, colon, _ = one.key.partition(":")
        found[owner if colon and owner in ("containerd", "docker") else "hpmapper", str(one.kind)] += 1
    return dict(found)


def _thin_pool(driver: DeviceMapperDriver) -> Iterator[Metric]:
    """As `hpmapper pool watch --metrics` tells them."""
    pool, fill = (driver.devices.pool,), admin.watch(driver.devices, _WARNING, _CRITICAL)
    yield _gauges("thinpool_data_used_ratio", "Part of the pool's data in use.", "pool", {pool: fill.data / 100})
    yield _gauges(
        "thinpool_metadata_used_ratio", "Part of the pool's metadata in use.", "pool", {pool: fill.metadata / 100}
    )
    yield _gauges("thinpool_severity", "0 fine, 1 warning, 2 critical, 3 unknown.", "pool", {pool: int(fill.severity)})
    yield _gauges("thinpool_writable", "Whether the pool takes new data.", "pool", {pool: int(fill.mode == "rw")})


def manager_metrics(manager: CacheManager) -> Iterator[Metric]:
    """Every decision of the cache manager."""
    for name, value in manager.counters().items():
        yield _counter(f"cache_manager_{name}", f"Of the cache manager: {COUNTERS[name]}.", value)


def start_metrics(starts: Starts) -> Iterator[Metric]:
    """What was done about starts of containerd's and Docker's containers."""
    for name, value in starts.counters().items():
        yield _counter(f"starts_{name}", f"Of containers of containerd and Docker: {START_COUNTERS[name]}.", value)


def call_metrics(calls: Mapping[str, Calls]) -> Iterator[Metric]:
    """Calls and how long they took, by front end, method and outcome."""
    family = HistogramMetricFamily(
        "hpmapper_call_seconds",
        "Calls from their last byte in to their answer, by gRPC's codes; no method: there is none of that name.",
        labels=["front_end", "method", "code"],
    )
    for front_end, one in calls.items():
        for (method, outcome), tally in one.tallies().items():
            family.add_metric([front_end, method, outcome], _cumulative(tally), tally.seconds)
    yield family


def _cumulative(tally: Tally) -> list[tuple[str, float]]:
    """Prometheus's buckets hold all calls that took no longer than their bound."""
    found, so_far = [], 0
    for bound, count in zip((*BOUNDS, math.inf), tally.buckets, strict=True):
        so_far += count
        found.append(("+Inf" if bound == math.inf else repr(bound), float(so_far)))
    return found


class CacheCollector(Collector):
    """The page cache, and containers one by one. One look serves all who ask for a while."""

    def __init__(self, observer: Observer, every: float = LOOK_EVERY) -> None:
        self._observer = observer
        self._every = every
        self._lock = threading.Lock()
        self._found: Overview | None = None
        self._look_at = 0.0

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        try:
            overview = self._overview()
        except (HpmapperError, OSError) as error:
            log.warning("the page cache cannot be told: %s", error)
            return
        yield from cache_metrics(overview)
        yield from container_metrics(overview)

    def _overview(self) -> Overview:
        with self._lock:
            began = time.monotonic()
            if self._found is None or began >= self._look_at:
                self._found = self._observer.look()
                ended = time.monotonic()
                self._look_at = ended + max(self._every, (ended - began) / _LOOKING_SHARE)
            return self._found


def cache_metrics(overview: Overview) -> Iterator[Metric]:
    """The page cache by what it holds."""
    stat = overview.stat
    kinds = {
        "objects": total(stat.objects.values()),
        "layers": total(stat.layers.values()),
        "maps": total(stat.maps.values()),
        "own": total(stat.own.values()),
        "devices": total(stat.devices.values()),
    }
    values = {(kind, state): float(size) for kind, one in kinds.items() for state, size in _states(one).items()}
    text = "Bytes in the page cache; evicted_lately: those that a little more memory would have kept."
    yield _gauges("page_cache_bytes", text, "of state", values)
    text = "Bytes that would be cached if no container shared anything: an estimate from above."
    yield _gauge("page_cache_plain_copies_bytes", text, stat.plain_copies)


def _states(counts: Counts) -> dict[str, int]:
    return {
        "cached": counts.cached,
        "dirty": counts.dirty,
        "writeback": counts.writeback,
        "evicted_lately": counts.recently_evicted,
    }


def container_metrics(overview: Overview) -> Iterator[Metric]:
    """Each container whose root is mounted."""
    live = [one for one in overview.containers if one.live]
    yield _gauge("containers_mounted", "Containers whose root is mounted.", len(live))
    cached = {(one.name, kind): size for one in live for kind, size in (("own", one.own.cached), ("image", one.shown))}
    text = "Bytes cached of a container's own files, and of its image, which others may share."
    yield _gauges("container_cache_bytes", text, "container of", cached)
    copied = {(one.name,): float(one.copy_ups.files) for one in live}
    yield _gauges("container_copied_up_files", "Files of the image that it opened for writing.", "container", copied)
    copied = {(one.name,): float(one.copy_ups.bytes) for one in live}
    yield _gauges("container_copied_up_bytes", "The sizes of those files.", "container", copied)
    yield _used("cpu_seconds", "Processor time of its processes", {one.name: one.used.seconds for one in live})
    yield _used("read_bytes", "Bytes that its processes read from storage", {one.name: one.used.read for one in live})
    yield _used("written_bytes", "Bytes that they sent to storage", {one.name: one.used.written for one in live})


def _used(name: str, text: str, values: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(f"hpmapper_container_{name}", f"{text}, as far as seen.", labels=["container"])
    for container, value in values.items():
        family.add_metric([container], value)
    return family
