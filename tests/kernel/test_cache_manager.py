"""The manager's thread: woken by real pressure, acts in order, rests again, ends when told."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hpmapper.cache.count import count
from hpmapper.cache.manager import COUNTERS, CacheManager, Settings
from hpmapper.kernel import memcg, psi
from hpmapper.kernel.sync import syncfs
from tests.cacheroot import MIB, CacheRoot, cache_root, forget

pytestmark = pytest.mark.kernel

SIZE = 16 * MIB
BIG = random.Random(8).randbytes(SIZE)


def within(seconds: float, holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def until(holds: Callable[[], bool], what: str) -> None:
    assert within(60, holds), what


@pytest.fixture
def group() -> Iterator[Path]:
    """A memory control group of 32 MiB."""
    if not memcg.has_pressure_events(memcg.ROOT):
        pytest.skip("this host has no memory control groups of version 1: only PSI wakes the manager here")
    path = memcg.ROOT / f"hpmapper-test-{os.getpid()}"
    path.mkdir()
    (path / "memory.limit_in_bytes").write_text(str(32 * MIB))
    try:
        yield path
    finally:
        path.rmdir()


def squeeze(group: Path, file: Path) -> None:
    """Read a file that is larger than the group, twice, in a process of the group."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            (group / "cgroup.procs").write_text(str(os.getpid()))
            for _ in range(2):
                with file.open("rb", buffering=0) as data:
                    while data.read(MIB):
                        pass
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@contextmanager
def managed(root: CacheRoot, settings: Settings) -> Iterator[CacheManager]:
    manager = CacheManager(root.engine.db, root.engine.driver, settings)
    manager.start()
    try:
        yield manager
    finally:
        manager.stop(60)


def with_duplicates(root: CacheRoot) -> tuple[Path, Callable[[], None]]:
    """An image, a reader, and a writer whose pages are there twice: the writer's file, and what reads both again."""
    root.image("one", {"big": BIG})
    (_, reader), (row, writer) = root.container("one", "reader"), root.container("one", "writer")
    with (writer / "big").open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"w" * 4096, MIB)
    syncfs(root.home)

    def read() -> None:
        assert (reader / "big").read_bytes() == BIG
        assert len((writer / "big").read_bytes()) == SIZE

    read()
    return root.home / "a" / str(row.snapshot) / "u/big", read


def test_memory_pressure_of_a_control_group_trims_duplicates(tmp_path: Path, group: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(bytes(96 * MIB))
    os.sync()
    with cache_root(tmp_path) as root:
        upper, read = with_duplicates(root)
        assert count(upper).cached >= SIZE - MIB
        settings = Settings(calm_after=0.2, pause=0.1, dedupe_every=0, groups=[group])
        with managed(root, settings) as manager:

            def is_trimmed() -> bool:
                # Again: the kernel itself may have taken some of the pages first (DAMON), or not yet have noticed.
                read()
                forget(large)
                squeeze(group, large)
                return within(5, lambda: manager.counters()["trimmed_idle_bytes"] >= SIZE - MIB)

            until(is_trimmed, "too little was trimmed")
            until(lambda: count(upper).cached <= 4096, "the rest was not trimmed")
            seen = manager.counters()
            assert seen["pressure_events"] >= 1
            assert seen["relief_begun"] >= 1
            assert seen["trimmed_busy_bytes"] == 0
            until(lambda: _rests(manager), "it does not come to rest")
        assert seen.keys() == COUNTERS.keys()


def _rests(manager: CacheManager) -> bool:
    before = manager.counters()["rounds"]
    time.sleep(0.5)
    return manager.counters()["rounds"] == before


def test_a_round_has_a_limit(tmp_path: Path) -> None:
    with cache_root(tmp_path) as root:
        upper, _ = with_duplicates(root)
        manager = CacheManager(root.engine.db, root.engine.driver, Settings(round_bytes=4 * MIB))
        manager._round(busy=False)
        seen = manager.counters()
        assert 4 * MIB <= seen["trimmed_idle_bytes"] < 8 * MIB
        assert seen["rounds_at_limit"] == 1
        assert count(upper).cached >= SIZE - 8 * MIB


def test_rounds_come_sooner_while_they_are_worth_it(tmp_path: Path) -> None:
    with cache_root(tmp_path) as root:
        manager = CacheManager(root.engine.db, root.engine.driver, Settings(pause=1.0, eager_pause=0.25))
        intervals = [1.0]
        for worth in (True, True, True, False, False, False, False, False, False, True):
            intervals.append(manager._interval(intervals[-1], worth=worth))
        assert intervals == [1.0, 0.5, 0.25, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 4.0]


def test_it_dedupes_from_time_to_time(tmp_path: Path) -> None:
    with cache_root(tmp_path) as root:
        root.image("one", {"big": BIG})
        _, path = root.container("one", "c")
        (path / "copy").write_bytes(BIG)
        syncfs(root.home)
        # An earlier test's pressure is not to keep it watchful.
        settings = Settings(dedupe_every=0.1, dedupe_min_age=0, io_limit=100, calm_after=0)
        with managed(root, settings) as manager:
            until(lambda: manager.counters()["deduped_files"] == 1, "it did not dedupe")


def test_it_ends_at_once_and_begins_again(tmp_path: Path) -> None:
    with cache_root(tmp_path) as root:
        manager = CacheManager(root.engine.db, root.engine.driver)
        for _ in range(3):
            manager.start()
            manager.start()
            manager.stop(10)
            manager.stop()
            assert manager._thread is None


def test_a_failure_is_counted_and_survived(tmp_path: Path) -> None:
    with cache_root(tmp_path) as root:
        manager = CacheManager(root.engine.db, root.engine.driver)

        def fails() -> float:
            raise OSError("no")

        assert manager._guarded(fails) is None
        assert manager.counters()["failures"] == 1


def test_pressure_files_are_read() -> None:
    text = "some avg10=1.50 avg60=0.10 avg300=0.00 total=77\nfull avg10=0.25 avg60=0.00 avg300=0.00 total=1\n"
    assert psi.parse_pressure(text) == psi.Pressure(1.5, 0.25, 77)
    assert psi.parse_pressure(text.splitlines()[0]) == psi.Pressure(1.5, 0.0, 77)
    assert psi.pressure("memory").some_us >= 0
