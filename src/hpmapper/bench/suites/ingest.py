"""What it takes to bring in a real image."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hpmapper.bench import images
from hpmapper.bench.harness import MIB, Bench, NotHere, Run, Side, Turn, case
from hpmapper.bench.measure import read_all
from hpmapper.bench.results import Quantity
from hpmapper.bench.synthetic import small_files
from hpmapper.kernel.fs import filesystem_name
from hpmapper.kernel.sync import syncfs

_QUANTITIES = [
    Quantity("wall", "s", "lower", "decompressing and hashing on the cores there are, writing at the disk's speed"),
    Quantity("wall with sync", "s", "lower", "the same"),
    Quantity("CPU", "s", "lower", "decompression and SHA-256 of the blobs and of the tars"),
    Quantity("peak memory", "MiB", "lower", "an interpreter, or a tar"),
    Quantity("written", "MiB", "lower", "the image's bytes"),
]


def device_bytes(home: Path, *, written: bool) -> int:
    """Bytes read from, or written to, the device below a directory so far (Documentation/block/stat.rst)."""
    number = home.stat().st_dev
    if os.major(number) == 0:  # btrfs: a device of its own, made up
        number = _below(home)
    fields = Path("/sys/dev/block", f"{os.major(number)}:{os.minor(number)}", "stat").read_text().split()
    return int(fields[6 if written else 2]) * 512


def _below(home: Path) -> int:
    from hpmapper.kernel import mount

    if filesystem_name(home) == "zfs":
        raise NotHere("ZFS has a cache of its own, and does not tell the device below a dataset")
    found = max((one for one in mount.mounts() if home.is_relative_to(one.target)), key=lambda one: len(one.target))
    return os.stat(found.source).st_rdev


@case("ingest", quantities=_QUANTITIES)
@contextmanager
def real_image(side: Side, bench: Bench) -> Iterator[Run]:
    """Debian with Python and numpy, pandas, scipy and others (two gzip layers, 22,496 entries, 530 MB), from blobs in
    the page cache to an image that containers can start on, by the side's own client. The bare file system's is tar.
    With sync: and a syncfs, after which nothing is left to be written. Peers' CPU is their daemon's and client's; their
    memory the daemon's."""
    layout = bench.synthetic("plain", [small_files(500)]) if bench.short else images.debian_python(bench.images)

    def run(turn: Turn) -> None:
        read_all(layout)
        before, begin = device_bytes(side.home, written=True), time.perf_counter()
        cost = side.ingest(layout, "ingested")
        syncfs(side.home)
        turn.note("wall", cost.wall)
        turn.note("wall with sync", time.perf_counter() - begin)
        turn.note("CPU", cost.cpu)
        turn.note("peak memory", cost.memory)
        turn.note("written", (device_bytes(side.home, written=True) - before) / MIB)
        side.forget("ingested")

    yield run
