"""Containers under a memory limit: what sharing, and the cache manager, give those that are at work."""

from __future__ import annotations

import argparse
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hpmapper.bench.figures import MIB, Samples, take_in
from hpmapper.bench.layout import silent_bring
from hpmapper.bench.measure import drop_caches, remove_group
from hpmapper.bench.roots import PAGE, Place, on_slow_device, on_xfs, place
from hpmapper.bench.starts import WEB, run_inside
from hpmapper.cache.manager import CacheManager, Settings
from hpmapper.containers import Containers
from hpmapper.errors import Unsupported
from hpmapper.kernel import memcg

_SET = 96 * MIB
"""A working set."""


def pressure(options: argparse.Namespace) -> Samples:
    """4 KiB reads a second, at random places, by containers in a memory control group of twice their working set.

    "One content": ten containers of ten images that have the same file in layers of their own; each reads it.
    "Idle copies": eight containers have written to the image's file, read it twice, and sleep. Then two others read
    the image's file, and one its own copy, for as long as is measured; the first seconds are what the manager can win.
    """
    samples: Samples = {}
    if not memcg.has_pressure_events(memcg.ROOT):
        raise Unsupported("this host has no memory control groups of version 1")
    with on_xfs(options.work, "hpmapper", "overlay") as places:
        for run in range(options.runs):
            for one in places:
                _one_content(one, run, options.seconds, samples)
            for managed in (False, True):
                _idle_copies(places[0], f"{run}-{managed}", options.seconds, samples, managed=managed)
            _idle_copies(places[1], f"{run}-overlay", options.seconds, samples, managed=False)
    return samples


@contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """A memory control group; whatever is in it at the end is killed."""
    group = memcg.ROOT / f"hpmapper-bench-{os.getpid()}"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(str(limit))
    try:
        yield group
    finally:
        for pid in (group / "cgroup.procs").read_text().split():
            os.kill(int(pid), signal.SIGKILL)
        remove_group(group)


class Reader:
    """A process in a container and a control group that reads a file; `seconds` 0: twice through, then it sleeps."""

    def __init__(self, group: Path, root: Path, seconds: float, seed: int) -> None:
        self._result, told = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                (group / "cgroup.procs").write_text(str(os.getpid()))
                os.chroot(root)
                fd = os.open("/data", os.O_RDONLY)
                done = _read_for(fd, seconds, seed) if seconds else _read_twice(fd)
                os.write(told, str(done).encode())
                time.sleep(3600 if not seconds else 0)
            finally:
                os._exit(0)
        os.close(told)

    def reads(self) -> int:
        """How many reads it did; waits until it has."""
        answer = os.read(self._result, 64)
        return int(answer or b"0")

    def end(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._result)


def _read_for(fd: int, seconds: float, seed: int) -> int:
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    chosen, pages = random.Random(seed), _SET // PAGE
    deadline, done = time.monotonic() + seconds, 0
    while time.monotonic() < deadline:
        for _ in range(64):
            os.pread(fd, PAGE, chosen.randrange(pages) * PAGE)
        done += 64
    return done


def _read_twice(fd: int) -> int:
    for _ in range(2):
        for offset in range(0, os.fstat(fd).st_size, MIB):
            os.pread(fd, MIB, offset)
    return 1


def _one_content(one: Place, run: int, seconds: float, samples: Samples) -> None:
    tops = [take_in(one.engine, {"data": _SET, f"own{number}": PAGE}, f"same{run}") for number in range(10)]
    rows = [one.engine.prepare(f"same-{run}-{number}", top) for number, top in enumerate(tops)]
    roots = [one.engine.mount(row) for row in rows]
    drop_caches()
    with memory_group(2 * _SET) as group:
        readers = [Reader(group, root, seconds, number) for number, root in enumerate(roots)]
        total = sum(reader.reads() for reader in readers)
        for reader in readers:
            reader.end()
    samples.setdefault(f"one content, {one.name}", []).append(total / seconds)
    for row in rows:
        one.engine.remove(row)


def _idle_copies(one: Place, run: str, seconds: float, samples: Samples, *, managed: bool) -> None:
    top = take_in(one.engine, {"data": _SET}, f"copies{run}")
    rows = [one.engine.prepare(f"copies-{run}-{number}", top) for number in range(11)]
    roots = [one.engine.mount(row) for row in rows]
    for root in roots[:9]:  # eight will be idle, the ninth works on a copy of its own
        _write_a_block(root / "data")
    drop_caches()
    name = f"idle copies, {one.name}{' and manager' if managed else ''}"
    manager = CacheManager(one.engine.db, one.engine.driver, Settings(dedupe_every=0, round_bytes=1 << 30))
    with ExitStack() as stack:
        group = stack.enter_context(memory_group(2 * _SET))
        if managed:
            manager.start()
            stack.callback(manager.stop)
            time.sleep(0.3)
        idle = [Reader(group, root, 0, 0) for root in roots[:8]]
        for reader in idle:
            reader.reads()
        for phase in ("first seconds", "later"):
            busy = [Reader(group, root, seconds / 2, number) for number, root in enumerate(roots[8:])]
            total = sum(reader.reads() for reader in busy)
            for reader in busy:
                reader.end()
            samples.setdefault(f"{name}, {phase}", []).append(total / (seconds / 2))
        for reader in idle:
            reader.end()
        if managed:
            seen = manager.counters()
            for what in ("trimmed_idle_bytes", "trimmed_busy_bytes"):
                samples.setdefault(f"manager, {what}, MiB", []).append(seen[what] / MIB)
    for row in rows:
        one.engine.remove(row)


def turns(options: argparse.Namespace) -> Samples:
    """A web application starts again and again, on a disk of 1 ms, and between its starts three of twelve others take
    their turns: each writes to its copy of a file of 64 MiB of an image, reads all of it twice, and sleeps. Together
    they are limited to twice what a start needs. Starts a second; and of what starts read, the percentage that the
    cache answered."""
    samples: Samples = {}
    with on_slow_device(options.work) as late, place(late.home / "overlay-root", "overlay") as overlay:
        for one in (late, overlay):
            silent_bring(one.engine, options.web, "web", options.work)
        for run in range(options.runs):
            for one, managed in ((late, False), (late, True), (overlay, False)):
                _take_turns(one, late, run, samples, managed=managed)
    return samples


_TURNS = 12
_BURST = 3
"""Turns between starts."""
_COPY = 64 * MIB
"""Of the file. A start's own working set is some 95 MiB: 43 of files, the rest the interpreter's memory."""
_PAUSE = 1.5
"""Seconds after a turn: the manager looks once a second."""


def _take_turns(one: Place, disk: Place, run: int, samples: Samples, *, managed: bool) -> None:
    """`disk`: whose device all of it comes from."""
    top = take_in(one.engine, {"data": _COPY}, f"turns-{run}-{one.name}-{managed}")
    rows = [one.engine.prepare(f"turns-{run}-{managed}-{number}", top) for number in range(_TURNS)]
    roots = [one.engine.mount(row) for row in rows]
    for root in roots:
        _write_a_block(root / "data")
    web = Containers(one.engine).create("web")
    shown = Containers(one.engine).mount(web)
    manager = CacheManager(one.engine.db, one.engine.driver, Settings(dedupe_every=0))
    drop_caches()
    before = disk.device_bytes()
    run_inside(shown, WEB)
    needed = disk.device_bytes() - before
    drop_caches()
    with ExitStack() as stack:
        group = stack.enter_context(memory_group(2 * _SET))
        if managed:
            manager.start()
            stack.callback(manager.stop)
        run_inside(shown, WEB, group)  # what is read from here on was cached before
        seconds, read = 0.0, 0
        for burst in range(0, len(roots), _BURST):
            for root in roots[burst : burst + _BURST]:
                sleeper = Reader(group, root, 0, 0)
                stack.callback(sleeper.end)
                sleeper.reads()
                time.sleep(_PAUSE)
            began, before = time.perf_counter(), disk.device_bytes()
            run_inside(shown, WEB, group)
            seconds += time.perf_counter() - began
            read += disk.device_bytes() - before
    starts = len(roots) // _BURST
    name = f"{one.name}{' and manager' if managed else ''}"
    samples.setdefault(f"{name}, starts a second", []).append(starts / seconds)
    samples.setdefault(f"{name}, answered by the cache, %", []).append(100 * (1 - read / (starts * needed)))
    if managed:
        samples.setdefault("manager, dropped, MiB", []).append(manager.counters()["trimmed_idle_bytes"] / MIB)
    Containers(one.engine).remove(web)
    for row in rows:
        one.engine.remove(row)


def _write_a_block(file: Path) -> None:
    """Write to a file of the image, which copies it up."""
    with file.open("r+b", buffering=0) as opened:
        os.pwrite(opened.fileno(), b"own" * 1000, 0)
        os.fsync(opened.fileno())
