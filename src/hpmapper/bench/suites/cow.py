"""What writing to data of the image costs: the first time, and after that."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hpmapper.bench.harness import MIB, Bench, Run, Side, Turn, case, container, image
from hpmapper.bench.results import Axis, Quantity
from hpmapper.kernel.sync import syncfs

_BLOCK = 4096
_FILES, _BYTES = 20, 320 * MIB
"""Of each size so many, or so many bytes, so that a run has more than one sample."""

SIZES = [MIB, 16 * MIB, 64 * MIB, 512 * MIB, 4096 * MIB]

_FLOOR = "one write of 4 KiB and an fsync on the bare file system"


def _space(side: Side) -> float:
    """KiB in use on a side's file system, once all is written out."""
    syncfs(side.home)
    status = os.statvfs(side.home)
    return (status.f_blocks - status.f_bfree) * status.f_frsize / 1024


@case(
    "cow",
    quantities=[
        Quantity("open", "ms", "lower", "one open(2) of a file that is there"),
        Quantity("first write", "ms", "lower", _FLOOR),
        Quantity("new space", "KiB", "lower", "4 KiB, and the metadata of one extent"),
    ],
    axis=Axis("file size", "bytes"),
    points=SIZES,
    short_points=[MIB, 16 * MIB],
)
@contextmanager
def first_write(side: Side, bench: Bench) -> Iterator[Run]:
    """A file of the image is opened for writing (where overlays copy it up), 4 KiB are written into its middle, and
    that is fsynced. New space: what the file system has less afterwards. Files are in no cache but what the last run
    left; the bare file system's file is overwritten in place, and vfs has copied it when the container was made."""
    bench.require_free(2 * max(bench.number, _BYTES), f"a file of {bench.number >> 20} MiB")
    count = max(1, min(_FILES, _BYTES // bench.number)) if not bench.short else 2
    name = f"file-{bench.number >> 20}m"
    layout = bench.synthetic(name, [dict.fromkeys(map(str, range(count)), bench.number)])

    def run(turn: Turn) -> None:
        with container(side, f"{name}-{turn.number}", name) as root:
            for number in range(count):
                _first_write(side, root / str(number), turn)

    with image(side, layout, name):
        yield run


def _first_write(side: Side, path: Path, turn: Turn) -> None:
    before = _space(side)
    size = path.stat().st_size  # the lookup is not the copy-up
    begin = time.perf_counter()
    fd = os.open(path, os.O_WRONLY)
    opened = time.perf_counter()
    os.pwrite(fd, os.urandom(_BLOCK), size // 2 // _BLOCK * _BLOCK)
    os.fsync(fd)
    done = time.perf_counter()
    os.close(fd)
    turn.note("open", (opened - begin) * 1e3)
    turn.note("first write", (done - begin) * 1e3)
    turn.note("new space", _space(side) - before)


@case(
    "cow",
    quantities=[Quantity("overwrites", "per second", "higher", "the same on the bare file system")],
    axis=Axis("second"),
    points=[None],
    runs=3,
)
@contextmanager
def overwrite(side: Side, bench: Bench) -> Iterator[Run]:
    """Random 4 KiB overwrites of a file of the image, each followed by an fdatasync: how many in each second from the
    first on. The first of them is the copy-up."""
    size, seconds = (16 * MIB, 2) if bench.short else (256 * MIB, 8)
    name = f"overwritten-{size >> 20}m"

    def run(turn: Turn) -> None:
        with container(side, f"{name}-{turn.number}", name) as root:
            done = _overwrite(root / "data", size, seconds, turn.number)
        for second, count in enumerate(done, 1):
            turn.note("overwrites", count, at=second)

    with image(side, bench.synthetic(name, [{"data": size}]), name):
        yield run


def _overwrite(path: Path, size: int, seconds: int, seed: int) -> list[int]:
    """How many were done in each second."""
    chosen, done = random.Random(seed), [0] * seconds
    begin = time.perf_counter()
    fd = os.open(path, os.O_WRONLY)
    try:
        while (second := int(time.perf_counter() - begin)) < seconds:
            os.pwrite(fd, chosen.randbytes(_BLOCK), chosen.randrange(size // _BLOCK) * _BLOCK)
            os.fdatasync(fd)
            done[second] += 1
    finally:
        os.close(fd)
    return done
