"""The flagship driver's open decisions, measured: one map per image or a stack of one per layer, how small a file must
be to lie in the map, and how maps are mounted.

    python -m hpmapper.bench.layout --image LAYOUT --versions A B --work DIR

Every variant gets a pool of its own and the same images; runs alternate. What is printed is in docs/measurements.md.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hpmapper.bench.measure import cached_below, drop_caches, files, read_all, regular_files
from hpmapper.containers import Containers
from hpmapper.drivers.base import Chain, Fresh
from hpmapper.drivers.hpmapper import HpmapperDriver
from hpmapper.drivers.upper import METADATA_COPIES_MARK
from hpmapper.engine import Engine, Taken
from hpmapper.image.opening import SourceOptions
from hpmapper.images import Images
from hpmapper.kernel.mount import ErofsForm, private_namespace
from hpmapper.kernel.sync import syncfs
from hpmapper.meta.db import Database
from hpmapper.meta.snapshots import Snapshot
from hpmapper.model import SnapshotId
from hpmapper.pool import open_pool
from hpmapper.pool.base import GIB, PoolConfig, PoolKind
from hpmapper.pool.floor import Floor

Seen = dict[str, list[float]]
"""Measured values by name, one or more a run."""


class StackedDriver(HpmapperDriver):
    """The alternative: overlayfs stacks the layers' own maps, which takes metadata-only copies (metacopy=on)."""

    def prepare(self, snapshot: SnapshotId, chain: Chain, *, read_only: bool = False, size: int | None = None) -> None:
        super().prepare(snapshot, chain, read_only=read_only, size=size)
        (self._snapshot(snapshot) / METADATA_COPIES_MARK).touch()

    def finish(self, chain: Chain, fresh: Mapping[SnapshotId, Fresh]) -> None:
        """Nothing is merged."""

    def _lowers(self, chain: Chain) -> list[str]:
        return [self._mounted(str(self._layer(layer))) for layer in chain]


@dataclass(frozen=True)
class Variant:
    """One way to do it."""

    stacked: bool
    inline_below: int
    form: ErofsForm

    def __str__(self) -> str:
        return f"map per {'layer' if self.stacked else 'image'}, inline <{self.inline_below}, {self.form}"


VARIANTS = (
    Variant(False, 0, ErofsForm.FILE),
    Variant(False, 1024, ErofsForm.FILE),
    Variant(False, 2048, ErofsForm.FILE),
    Variant(False, 4096, ErofsForm.FILE),
    Variant(False, 16384, ErofsForm.FILE),
    Variant(False, 1024, ErofsForm.LOOP),
    Variant(True, 1024, ErofsForm.FILE),
)


class _Silent:
    def layer(self, number: int, count: int, size: int | None) -> Callable[[int], None]:
        return lambda count: None

    def layer_done(self, number: int, taken: Taken) -> None:
        pass


@contextmanager
def opened(variant: Variant, root: Path) -> Iterator[tuple[Engine, HpmapperDriver]]:
    """A new root with that variant of the driver, removed afterwards."""
    root.mkdir(parents=True)
    pool = open_pool(root, PoolConfig(PoolKind.LOOP, size=8 * GIB))
    pool.create()
    kind = StackedDriver if variant.stacked else HpmapperDriver
    driver = kind(pool, inline_below=variant.inline_below, map_form=variant.form)
    driver.attach()
    engine = Engine(Database(root / "hpmapper.db"), driver, Floor())
    engine.rubbish.reconcile()
    try:
        yield engine, driver
    finally:
        for container in Containers(engine).all():
            Containers(engine).remove(container)
        engine.detach()
        engine.close()
        shutil.rmtree(root)


def measure(variant: Variant, image: Path, versions: Sequence[Path], work: Path, seen: Seen) -> None:
    """One run of everything on one variant."""

    def note(name: str, value: float) -> None:
        seen.setdefault(name, []).append(value)

    with opened(variant, work / "root") as (engine, _):
        _ingest(engine, image, work, note)
        _start(engine, note)
        _copy_up(engine, note)
    with opened(variant, work / "root") as (engine, driver):
        _versions(engine, driver, versions, work, note)


Note = Callable[[str, float], None]


def silent_bring(engine: Engine, layout: Path, name: str, work: Path) -> Snapshot:
    """Bring in a layout's image; returns its topmost snapshot."""
    (brought,) = Images(engine).bring(f"oci:{layout}", SourceOptions(spool=work), [name], _Silent())
    return brought.layers[-1].snapshot


def _ingest(engine: Engine, image: Path, work: Path, note: Note) -> None:
    read_all(image)  # a warm page cache: the network is not measured
    wall, cpu = time.perf_counter(), time.process_time()
    silent_bring(engine, image, "image", work)
    note("ingest, s", time.perf_counter() - wall)
    note("ingest cpu, s", time.process_time() - cpu)


def _start(engine: Engine, note: Note) -> None:
    containers = Containers(engine)
    drop_caches()
    begin = time.perf_counter()
    merged = containers.mount(containers.create("image", "first"))
    subprocess.run(["chroot", merged, "python3", "-c", "import json, decimal"], check=True)
    note("cold start of python, s", time.perf_counter() - begin)
    containers.unmount(containers.get("first"))
    drop_caches()
    merged = containers.mount(containers.get("first"))
    for temperature in ("cold", "hot"):
        begin = time.perf_counter()
        sum(1 for _ in files(merged))
        note(f"{temperature} find+stat, s", time.perf_counter() - begin)


def _copy_up(engine: Engine, note: Note) -> None:
    containers = Containers(engine)
    merged = containers.mount(containers.get("first"))
    large = [path for path, size in regular_files(merged) if 2 << 20 < size < 64 << 20]
    for path in large[:20]:
        begin = time.perf_counter()
        os.close(os.open(path, os.O_RDWR))
        note("copy-up of 2 to 64 MiB, ms", (time.perf_counter() - begin) * 1e3)


def _versions(engine: Engine, driver: HpmapperDriver, versions: Sequence[Path], work: Path, note: Note) -> None:
    syncfs(driver.home)
    empty = driver.space().free
    for name, layout in zip("ab", versions, strict=True):
        silent_bring(engine, layout, name, work)
    syncfs(driver.home)
    note("disk of two versions, MiB", (empty - driver.space().free) / 2**20)
    containers = Containers(engine)
    roots = [containers.mount(containers.create(name, name)) for name in "ab"]
    drop_caches()
    for root in roots:
        read_all(root)
    maps = [path / "m" for place in ("l", "i") for path in (driver.home / place).iterdir()]
    note("cache of two versions, MiB", cached_below(driver.home / "o", driver.home / "l", driver.home / "i") / 2**20)
    note("of it in maps and their inodes, MiB", cached_below(driver.home / "l", driver.home / "i", *maps) / 2**20)


def table(results: dict[Variant, Seen]) -> Table:
    """Medians with the spread from least to most."""
    grid = Table("variant", *next(iter(results.values())))
    for variant, seen in results.items():
        cells = (f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})" for values in seen.values())
        grid.add_row(str(variant), *cells)
    return grid


def main() -> None:
    """Run every variant and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0] if __doc__ else None)
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--versions", type=Path, nargs=2, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    private_namespace()  # no mount is left, however this ends, and nobody else's namespace keeps one busy
    results: dict[Variant, Seen] = {variant: {} for variant in VARIANTS}
    for _ in range(arguments.runs):
        for variant, seen in results.items():
            measure(variant, arguments.image, arguments.versions, arguments.work, seen)
    Console(width=200).print(table(results))


if __name__ == "__main__":
    main()
