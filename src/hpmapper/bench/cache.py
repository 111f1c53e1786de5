"""Figures of the cache: what sharing, trimming, profiles and the manager give. All sides of a case in one run.

    python -m hpmapper.bench.cache --work DIR [--web LAYOUT] [--database LAYOUT] [--runs N] [CASE…]

Cases: stat, shared, starts, coldstart, record, pressure, turns. `starts`, `coldstart` and `record` need --web and
--database, `turns` --web (`hpmapper.bench.images`). Each is a function, and its text says what is measured: the first
two are here, the others in `hpmapper.bench.starts`, `recording` and `pressure`.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from hpmapper.bench.figures import MIB, Samples, table, take_in
from hpmapper.bench.measure import drop_caches, read_all
from hpmapper.bench.pressure import pressure, turns
from hpmapper.bench.recording import record
from hpmapper.bench.roots import PAGE, Place, on_xfs, place, read_all_of
from hpmapper.bench.starts import coldstart, start_when_told, starts
from hpmapper.cache import duplicates, inventory
from hpmapper.cache.stat import cache_stat
from hpmapper.cache.trim import trim
from hpmapper.kernel import mount
from hpmapper.kernel.sync import syncfs


def stat(options: argparse.Namespace) -> Samples:
    """Counting 10,000 objects, of which all or none are cached, in s."""
    samples: Samples = {}
    with place(options.work / "stat", "hpmapper", "pool.size=4G") as one:
        take_many(one, 10_000)
        for _ in range(options.runs):
            for side, prepare in (("cached", lambda: read_all(one.home / "o")), ("after dropping all", drop_caches)):
                prepare()
                begin = time.perf_counter()
                found = cache_stat(inventory.take(one.engine.db, one.engine.driver), one.engine.driver)
                samples.setdefault(side, []).append(time.perf_counter() - begin)
                assert len(found.objects) == 10_000
    return samples


def take_many(one: Place, number: int) -> None:
    """An image of `number` files of 4 KiB."""
    files = {f"f{index}": PAGE for index in range(number)}
    top = take_in(one.engine, files)
    one.engine.prepare("reader", top)


def shared(options: argparse.Namespace) -> Samples:
    """Page cache of containers of one image, MiB for each: each reads 200 MiB of the image, writes 100 blocks of 4 KiB
    into a 100 MiB file of it, and reads that file. Plain copies: fewer containers, since each adds the same."""
    samples: Samples = {}
    with on_xfs(options.work, "hpmapper", "overlay", "vfs") as places:
        for run in range(options.runs):
            for one in places:
                containers = options.plain if one.name == "vfs" else options.containers
                _mixed(one, containers, run, samples)
    return samples


def _mixed(one: Place, containers: int, run: int, samples: Samples) -> None:
    top = take_in(one.engine, {"shared": 200 * MIB, "written": 100 * MIB}, f"mixed{run}")
    rows = [one.engine.prepare(f"mixed-{run}-{number}", top) for number in range(containers)]
    drop_caches()
    for number, row in enumerate(rows):
        root = one.engine.mount(row)
        read_all_of(root / "shared")
        blocks = random.Random(number).sample(range(100 * MIB // PAGE), 100)
        with (root / "written").open("r+b", buffering=0) as file:
            for block in blocks:
                os.pwrite(file.fileno(), b"%016d" % number * 256, block * PAGE)
            os.fsync(file.fileno())
        read_all_of(root / "written")
    syncfs(one.home)
    _note_cache(samples, f"{one.name}, {containers} containers", one, containers)
    taken = inventory.take(one.engine.db, one.engine.driver)
    begin = time.perf_counter()
    done = trim(duplicates.find(taken), {})
    samples.setdefault(f"{one.name}, seconds of the trim", []).append(time.perf_counter() - begin)
    if done.dropped:
        _note_cache(samples, f"{one.name}, {containers} containers, after trim", one, containers)
    for row in rows:
        one.engine.remove(row)


def _note_cache(samples: Samples, name: str, one: Place, containers: int) -> None:
    total = cache_stat(inventory.take(one.engine.db, one.engine.driver), one.engine.driver).total.cached
    samples.setdefault(name, []).append(total / MIB / containers)


CASES: dict[str, Callable[[argparse.Namespace], Samples]] = {
    "stat": stat,
    "shared": shared,
    "starts": starts,
    "coldstart": coldstart,
    "record": record,
    "pressure": pressure,
    "turns": turns,
}


def main() -> None:
    """Run the cases and print their tables."""
    parser = argparse.ArgumentParser(prog="python -m hpmapper.bench.cache")
    parser.add_argument("cases", nargs="*", metavar="CASE")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--web", type=Path)
    parser.add_argument("--database", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--containers", type=int, default=50)
    parser.add_argument("--plain", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--at-once", type=int, nargs="*", default=[1, 10])
    parser.add_argument("--start", help=argparse.SUPPRESS)
    parser.add_argument("--driver", help=argparse.SUPPRESS)
    parser.add_argument("--profile", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        start_when_told(options)
    options.work.mkdir(parents=True, exist_ok=True)
    mount.private_namespace()  # no mount is left, however this ends
    for name in options.cases or CASES:
        if name not in CASES:
            parser.error(f"no case {name!r}; there are {', '.join(CASES)}")
        Console(width=140).print(table(f"{name}: {CASES[name].__doc__}", CASES[name](options)))


if __name__ == "__main__":
    main()
