"""The figures of the README, all sides in one run, on the same data, alternating; medians with their spread.

    python -m hpmapper.bench.figures --work DIR [--image LAYOUT --versions A B] [--chroot DIR] [--runs N] [CASE…]

Cases: copyup, firstwrite, cache, versions, create, help, ingest (needs --image and, for the peers, --chroot).
The work directory's own file system is the baseline called "host"; XFS comes from loop pools made in it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hpmapper.bench.measure import cached_below, cached_bytes, drop_caches, read_all
from hpmapper.config import Config
from hpmapper.drivers.hpmapper import HpmapperDriver
from hpmapper.engine import Engine
from hpmapper.kernel import mount
from hpmapper.kernel.fs import filesystem_name
from hpmapper.kernel.sync import syncfs
from hpmapper.layer.stream import Expected
from hpmapper.meta.snapshots import Snapshot
from hpmapper.root import open_root

MIB = 1 << 20
Samples = dict[str, list[float]]
"""Values by side."""


@dataclass(frozen=True)
class Side:
    """A driver on a file system, with its root open."""

    name: str
    engine: Engine

    @property
    def home(self) -> Path:
        return self.engine.driver.scratch.parent


@contextmanager
def sides(work: Path, size: str = "12G") -> Iterator[list[Side]]:
    """hpmapper and overlay on XFS (the overlay's root lies in a pool of its own), overlay on the host's file system."""
    with (
        _root(work / "hpmapper", "hpmapper", size) as flagship,
        _root(work / "xfs", "hpmapper", size) as carrier,
        _root(carrier.home / "overlay-root", "overlay", size) as overlay,
        _root(work / "host", "overlay", size) as host,
    ):
        yield [
            Side("hpmapper on xfs", flagship.engine),
            Side("overlay on xfs", overlay.engine),
            Side(f"overlay on {filesystem_name(work)}", host.engine),
        ]


@contextmanager
def _root(root: Path, driver: str, size: str) -> Iterator[Side]:
    config = Config(root=root, driver=driver).with_options([f"pool.size={size}", "min_free_space=0"])
    with open_root(config) as opened:
        try:
            yield Side(driver, opened.engine)
        finally:
            opened.engine.detach()
    shutil.rmtree(root)


def take(side: Side, files: dict[str, int], name: str = "") -> Snapshot:
    """A layer with files of these sizes (random data, the same for every side)."""
    top = side.engine.ingest(None, _Tar(files, seed=name), Expected()).snapshot
    side.engine.finish(top)
    return top


class _Tar(BytesIO):
    """A layer tar of random files; large ones repeat one random MiB with a counter, which no deduplication finds."""

    def __init__(self, files: dict[str, int], seed: str) -> None:
        super().__init__()
        block = _random(seed, MIB)
        with tarfile.open(fileobj=self, mode="w") as tar:
            for name, size in files.items():
                member = tarfile.TarInfo(name)
                member.size = size
                mark = name.encode().ljust(16, b"\0")
                data = b"".join(number.to_bytes(8, "big") + mark + block[24:] for number in range(-(-size // MIB)))
                tar.addfile(member, BytesIO(data[:size]))
        self.seek(0)


def _random(seed: str, size: int) -> bytes:
    import random

    return random.Random(seed).randbytes(size)


def copyup(work: Path, runs: int) -> Samples:
    """Opening a 16 MiB file of the image for writing, in ms: the copy-up alone. Also from an EROFS that holds the data,
    which is the shape of containerd's erofs snapshotter."""
    samples: Samples = {}
    count = 40
    with sides(work) as compared:
        tops = {side.name: take(side, {f"f{number}": 16 * MIB for number in range(count)}) for side in compared}
        with _erofs_with_data(compared[0].home, count) as merged_erofs:
            for run in range(runs):
                for side in compared:
                    snapshot = side.engine.prepare(f"run-{run}", tops[side.name])
                    _open_all(side.engine.mount(snapshot), count, samples.setdefault(side.name, []))
                    side.engine.remove(snapshot)
                _open_all(merged_erofs(run), count, samples.setdefault("erofs with data on xfs", []))
    return samples


def _open_all(root: Path, count: int, into: list[float]) -> None:
    for number in range(count):
        path = root / f"f{number}"
        path.stat()  # the lookup is not the copy-up
        begin = time.perf_counter()
        fd = os.open(path, os.O_RDWR)
        into.append((time.perf_counter() - begin) * 1e3)
        os.close(fd)


@contextmanager
def _erofs_with_data(pool: Path, count: int) -> Iterator[Callable[[int], Path]]:
    """Overlays whose lower is an EROFS with the files' data in it, on the same XFS."""
    place = pool / "erofs-peer"
    (place / "tree").mkdir(parents=True)
    with tarfile.open(fileobj=_Tar({f"f{number}": 16 * MIB for number in range(count)}, ""), mode="r") as tar:
        tar.extractall(place / "tree", filter="data")
    subprocess.run(["mkfs.erofs", "--quiet", place / "image", place / "tree"], check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(place / "tree")
    (place / "lower").mkdir()
    syncfs(place)
    mount.erofs(place / "image", place / "lower")
    mounted: list[Path] = []

    def merged(run: int) -> Path:
        for name in "uwm":
            (place / f"{run}{name}").mkdir()
        mount.overlay(place / f"{run}m", lowers=[place / "lower"], upper=place / f"{run}u", work=place / f"{run}w")
        mounted.append(place / f"{run}m")
        return mounted[-1]

    try:
        yield merged
    finally:
        for target in [*mounted, place / "lower"]:
            mount.umount(target)


def firstwrite(work: Path, runs: int) -> Samples:
    """The first 4 KiB written (and fsynced) into a file of the image: ms, and KiB of new space, by file size."""
    samples: Samples = {}
    sizes = {"1 MiB": MIB, "64 MiB": 64 * MIB, "1 GiB": 1024 * MIB}
    with sides(work) as compared:
        tops = {side.name: take(side, sizes) for side in compared}
        for run in range(runs):
            for side in compared:
                snapshot = side.engine.prepare(f"run-{run}", tops[side.name])
                root = side.engine.mount(snapshot)
                for name in sizes:
                    milliseconds, kib = _first_write(root / name, side.home)
                    samples.setdefault(f"{side.name}, {name}, ms", []).append(milliseconds)
                    samples.setdefault(f"{side.name}, {name}, KiB", []).append(kib)
                side.engine.remove(snapshot)
    return samples


def _first_write(path: Path, home: Path) -> tuple[float, float]:
    syncfs(home)
    before = os.statvfs(home)
    path.stat()
    begin = time.perf_counter()
    with path.open("r+b", buffering=0) as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"x" * 4096)
        written = time.perf_counter() - begin
    syncfs(home)
    after = os.statvfs(home)
    return written * 1e3, (before.f_bfree - after.f_bfree) * before.f_frsize / 1024


def cache(work: Path, runs: int, containers: int = 20) -> Samples:
    """Page cache of 20 containers that read the same 200 MiB, as a multiple of the data: every inode involved."""
    samples: Samples = {}
    with sides(work) as compared:
        tops = {side.name: take(side, {f"f{number}": 10 * MIB for number in range(20)}) for side in compared}
        for run in range(runs):
            for side in compared:
                snapshots = [side.engine.prepare(f"{run}-{n}", tops[side.name]) for n in range(containers)]
                roots = [side.engine.mount(snapshot) for snapshot in snapshots]
                drop_caches()
                data = [read_all(root) for root in roots].pop()
                samples.setdefault(side.name, []).append(_cached(side) / data)
                for snapshot in snapshots:
                    side.engine.remove(snapshot)
    samples["plain copies (by definition)"] = [float(containers)]
    return samples


def _cached(side: Side) -> int:
    """Everything cached of a side's files: objects, maps, the maps' own inodes, layers, uppers, its loop device."""
    tops = [side.home / place for place in ("o", "l", "i", "a") if (side.home / place).exists()]
    driver = side.engine.driver
    maps = (
        [path / "m" for place in ("l", "i") for path in (side.home / place).iterdir()]
        if (side.home / "i").exists()
        else []
    )
    devices = [
        one.source for one in mount.mounts() if isinstance(driver, HpmapperDriver) and one.target == str(side.home)
    ]
    return cached_below(*tops, *maps) + cached_bytes(devices)


def versions(work: Path, runs: int, layouts: list[Path]) -> Samples:
    """Two versions of one image, a tenth of the files changed: MiB on disk, and in the page cache once read."""
    from hpmapper.bench.layout import silent_bring

    samples: Samples = {}
    for _ in range(runs):
        with sides(work) as compared:
            for side in compared:
                syncfs(side.home)
                empty = os.statvfs(side.home)
                tops = [silent_bring(side.engine, layout, f"v{n}", work) for n, layout in enumerate(layouts)]
                syncfs(side.home)
                full = os.statvfs(side.home)
                roots = [side.engine.mount(side.engine.prepare(f"c{n}", top)) for n, top in enumerate(tops)]
                drop_caches()
                for root in roots:
                    read_all(root)
                disk = (empty.f_bfree - full.f_bfree) * full.f_frsize
                samples.setdefault(f"{side.name}, disk, MiB", []).append(disk / MIB)
                samples.setdefault(f"{side.name}, page cache, MiB", []).append(_cached(side) / MIB)
    return samples


def create(work: Path, runs: int) -> Samples:
    """Making and mounting a container in a running process, in ms, against mkdir and one mount(2) by hand."""
    samples: Samples = {"hpmapper": [], "by hand": []}
    with sides(work) as compared:
        side = compared[0]
        top = take(side, {"file": 100_000})
        view = side.engine.prepare("view", top)
        side.engine.mount(view)
        lower = next((side.home / "l").iterdir()) / "m"
        by_hand = side.home / "by-hand"
        by_hand.mkdir()
        for number in range(runs * 50):
            begin = time.perf_counter()
            snapshot = side.engine.prepare(f"c{number}", top)
            side.engine.mount(snapshot)
            samples["hpmapper"].append((time.perf_counter() - begin) * 1e3)
            begin = time.perf_counter()
            _by_hand(f"{by_hand}/{number}", str(lower), f"{side.home}/o")
            samples["by hand"].append((time.perf_counter() - begin) * 1e3)
            side.engine.remove(snapshot)
            mount.umount(f"{by_hand}/{number}/m")
    return samples


def _by_hand(top: str, lower: str, objects: str) -> None:
    for directory in (top, f"{top}/u", f"{top}/w", f"{top}/m"):
        os.mkdir(directory)
    options = {"metacopy": "off", "redirect_dir": "nofollow", "index": "off"}
    mount.overlay(f"{top}/m", lowers=[lower], data=objects, upper=f"{top}/u", work=f"{top}/w", options=options)


def help_time(work: Path, runs: int) -> Samples:
    """`hpmapper --help`, in ms."""
    command = [sys.executable, "-m", "hpmapper.cli.main", "--help"]
    samples: list[float] = []
    for _ in range(runs * 3):
        begin = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        samples.append((time.perf_counter() - begin) * 1e3)
    return {"hpmapper --help": samples}


def ingest(work: Path, runs: int, layout: Path, chroot: Path | None) -> Samples:
    """From blobs to an image that containers can start from, in s, on XFS, warm: ours (durable when done) against
    containerd's unpack with its overlayfs and erofs snapshotters, which sync nothing, and what a sync then costs."""
    from hpmapper.bench.layout import silent_bring

    samples: Samples = {}

    def ours(run: int) -> None:
        with _root(work / "ours", "hpmapper", "12G") as side:
            read_all(layout)
            os.sync()
            begin, cpu = time.perf_counter(), time.process_time()
            silent_bring(side.engine, layout, "image", work)
            samples.setdefault("hpmapper, wall", []).append(time.perf_counter() - begin)
            samples.setdefault("hpmapper, cpu", []).append(time.process_time() - cpu)

    if chroot is None:
        for run in range(runs):
            ours(run)
        return samples
    from hpmapper.bench.peers import SNAPSHOTTERS, Containerd, build_chroot, loop_xfs

    build_chroot(chroot)
    with loop_xfs(work / "peer.img", work / "peer", 16) as root, Containerd(chroot, work / "containerd", root) as peer:
        for run in range(runs):
            ours(run)
            for snapshotter in SNAPSHOTTERS:
                seen = peer.unpack(layout, snapshotter)
                for name, value in (("wall", seen.wall), ("cpu", seen.cpu), ("wall with sync", seen.wall + seen.sync)):
                    samples.setdefault(f"containerd {snapshotter}, {name}", []).append(value)
    return samples


def table(title: str, samples: Samples) -> Table:
    """Median, least and most, 99th percentile, and the ratio to the first side."""
    grid = Table("side", "median", "least to most", "p99", "to first", "samples", title=title, title_justify="left")
    first = statistics.median(next(iter(samples.values())))
    for side, values in samples.items():
        middle = statistics.median(values)
        high = sorted(values)[max(0, -(-len(values) * 99 // 100) - 1)]
        spread = f"{min(values):.3g} to {max(values):.3g}"
        ratio = f"{middle / first:.3g}" if first else "-"
        grid.add_row(side, f"{middle:.3g}", spread, f"{high:.3g}", ratio, str(len(values)))
    return grid


def main() -> None:
    """Run the cases and print their tables."""
    parser = argparse.ArgumentParser(prog="python -m hpmapper.bench.figures")
    parser.add_argument("cases", nargs="*", metavar="CASE")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--image", type=Path)
    parser.add_argument("--versions", type=Path, nargs=2)
    parser.add_argument("--chroot", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    mount.private_namespace()  # no mount is left, however this ends, and nobody else's namespace keeps one busy
    cases: dict[str, Callable[[], Samples]] = {
        "copyup": lambda: copyup(options.work, options.runs),
        "firstwrite": lambda: firstwrite(options.work, options.runs),
        "cache": lambda: cache(options.work, options.runs),
        "create": lambda: create(options.work, options.runs),
        "help": lambda: help_time(options.work, options.runs),
    }
    if options.versions:
        cases["versions"] = lambda: versions(options.work, options.runs, options.versions)
    if options.image:
        cases["ingest"] = lambda: ingest(options.work, options.runs, options.image, options.chroot)
    for name in options.cases or cases:
        if name not in cases:
            parser.error(f"no case {name!r}; there are {', '.join(cases)}")
        Console(width=140).print(table(f"{name}: {(globals().get(name) or help_time).__doc__}", cases[name]()))


if __name__ == "__main__":
    main()
