"""Reading, writing and metadata in a container's root, against the bare file system, by fio and by a walk."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from hpmapper.bench import images
from hpmapper.bench.harness import MIB, Bench, NotHere, Run, Side, Turn, case, container, image
from hpmapper.bench.images import run as run_program
from hpmapper.bench.measure import drop_caches, files
from hpmapper.bench.results import Quantity
from hpmapper.bench.synthetic import small_files

_BARE = "the bare file system"


@contextmanager
def _container_of_data(side: Side, bench: Bench) -> Iterator[tuple[Path, int]]:
    """A container with a large file in its image, and the file's size."""
    if shutil.which("fio") is None:
        raise NotHere("fio is not installed: apt install fio")
    size = 8 * MIB if bench.short else 256 * MIB
    layout = bench.synthetic(f"data-{size >> 20}m", [{"data": size, "second": size}])
    with image(side, layout, "data"), container(side, "data", "data") as root:
        yield root, size


def _fio(path: Path, size: int, *words: str) -> tuple[float, float]:
    """MiB and operations a second of one fio job on a file."""
    command = ["fio", "--output-format=json", "--name=job", f"--filename={path}", f"--size={size}", "--ioengine=psync"]
    (job,) = json.loads(run_program([*command, "--randseed=1", "--fallocate=none", *words]))["jobs"]
    way = job["read"] if job["read"]["io_bytes"] else job["write"]
    return way["bw_bytes"] / MIB, way["iops"]


@case(
    "io",
    quantities=[
        Quantity("sequential read, cold", "MiB/s", "higher", _BARE),
        Quantity("sequential read, warm", "MiB/s", "higher", "memory bandwidth"),
        Quantity("random read, cold", "per second", "higher", _BARE),
    ],
)
@contextmanager
def read(side: Side, bench: Bench) -> Iterator[Run]:
    """fio reads a file of the image: from beginning to end in pieces of 1 MiB, after dropping caches and again; and
    another one at random in 4 KiB, for 2 s after dropping caches, without reading ahead."""
    with _container_of_data(side, bench) as (root, size):

        def run(turn: Turn) -> None:
            drop_caches()
            for kind in ("cold", "warm"):
                speed, _ = _fio(root / "data", size, "--rw=read", "--bs=1M", "--invalidate=0")
                turn.note(f"sequential read, {kind}", speed)
            drop_caches()
            words = ("--rw=randread", "--bs=4k", "--fadvise_hint=random", "--time_based", "--runtime=2")
            turn.note("random read, cold", _fio(root / "second", size, *words)[1])

        yield run


@case(
    "io",
    quantities=[
        Quantity("sequential write", "MiB/s", "higher", _BARE),
        Quantity("random write, new file", "per second", "higher", _BARE),
        Quantity("random write, file of the image", "per second", "higher", _BARE),
    ],
)
@contextmanager
def write(side: Side, bench: Bench) -> Iterator[Run]:
    """fio writes a new file from beginning to end in pieces of 1 MiB, with an fsync at the end; then 4 KiB at random
    into it, and into a file of the image that the container already has of its own, with an fdatasync after every
    sixteenth, for 2 s each."""
    with _container_of_data(side, bench) as (root, size):

        def run(turn: Turn) -> None:
            new = root / "new"
            turn.note("sequential write", _fio(new, size, "--rw=write", "--bs=1M", "--end_fsync=1")[0])
            random = ("--rw=randwrite", "--bs=4k", "--fdatasync=16", "--time_based", "--runtime=2", "--overwrite=1")
            turn.note("random write, new file", _fio(new, size, *random)[1])
            os.close(os.open(root / "second", os.O_WRONLY))
            turn.note("random write, file of the image", _fio(root / "second", size, *random)[1])
            new.unlink()

        yield run


@case(
    "io",
    quantities=[
        Quantity("create", "per second", "higher", _BARE),
        Quantity("stat", "per second", "higher", "one system call"),
        Quantity("rename", "per second", "higher", _BARE),
        Quantity("unlink", "per second", "higher", _BARE),
    ],
)
@contextmanager
def metadata(side: Side, bench: Bench) -> Iterator[Run]:
    """Many small files are created in a new directory, looked at, renamed and removed, by one process.
    Nothing is synced."""
    count = 500 if bench.short else 20_000

    def run(root: Path, turn: Turn) -> None:
        top = root / f"storm-{turn.number}"
        top.mkdir()
        old, new = [f"{top}/f{number}" for number in range(count)], [f"{top}/g{number}" for number in range(count)]
        steps: dict[str, Callable[[str, str], object]] = {
            "create": lambda path, _: os.close(os.open(path, os.O_CREAT | os.O_WRONLY)),
            "stat": lambda path, _: os.stat(path),
            "rename": os.rename,
            "unlink": lambda _, path: os.unlink(path),
        }
        for name, step in steps.items():
            begin = time.perf_counter()
            for path, other in zip(old, new, strict=True):
                step(path, other)
            turn.note(name, count / (time.perf_counter() - begin))
        top.rmdir()

    layout = bench.synthetic("few", [small_files(10)])
    with image(side, layout, "few"), container(side, "storm", "few") as top:
        yield partial(run, top)


@case(
    "io",
    quantities=[Quantity("cold", "s", "lower", _BARE), Quantity("warm", "s", "lower", "one system call for each file")],
)
@contextmanager
def walk(side: Side, bench: Bench) -> Iterator[Run]:
    """Every file of a real image is looked up and looked at (find and stat; 22,496 entries), from empty caches and
    again."""
    layout = bench.synthetic("plain", [small_files(500)]) if bench.short else images.debian_python(bench.images)

    def run(root: Path, turn: Turn) -> None:
        drop_caches()
        for kind in ("cold", "warm"):
            with turn.timed(kind, scale=1):
                sum(1 for _ in files(root))

    with image(side, layout, "walked"), container(side, "walk", "walked") as top:
        yield partial(run, top)
