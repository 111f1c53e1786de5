"""How long containers take to the first output of a real program."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from hpmapper.bench import images
from hpmapper.bench.harness import Bench, NotHere, Run, Side, Turn, case, image
from hpmapper.bench.results import Axis, Quantity
from hpmapper.errors import Unsupported

_PROGRAM = ("/usr/bin/python3", "-c", "import flask; print(flask.Flask, flush=True)")
_QUANTITIES = [
    Quantity("slowest", "s", "lower", "the program on the bare file system, as often, on the cores there are"),
    Quantity("mean", "s", "lower"),
]
_AXIS = Axis("containers at once", growth=True)
_POINTS = [1, 10, 50]
_PLAIN = 10


def _what(bench: Bench) -> tuple[Path, Sequence[str]]:
    """The image, and the program in it."""
    if not bench.short:
        return images.debian_web(bench.images), _PROGRAM
    busybox = shutil.which("busybox")
    if busybox is None:
        raise NotHere("busybox is not installed: apt install busybox-static")
    return bench.synthetic("busybox", [{"bin/busybox": Path(busybox).resolve()}]), ("/bin/busybox", "echo", "started")


@contextmanager
def _starting(side: Side, bench: Bench) -> Iterator[Run]:
    if side.name == "vfs" and bench.number > _PLAIN:
        raise NotHere(f"{bench.number} whole copies of the image fill the disk")
    layout, program = _what(bench)

    def run(turn: Turn) -> None:
        names = [f"start-{turn.number}-{number}" for number in range(bench.number)]
        with ThreadPoolExecutor(len(names)) as threads:
            tried = [threads.submit(_start, side, name, program) for name in names]
        for name in names:
            side.remove(name)
        seconds = [one.result() for one in tried]
        turn.note("slowest", max(seconds))
        turn.note("mean", statistics.mean(seconds))

    with image(side, layout, "program"):
        yield run


def _start(side: Side, name: str, program: Sequence[str]) -> float:
    """Seconds from the request for a container to its program's first output; waits for its end."""
    begin = time.perf_counter()
    side.prepare(name, "program")
    root = side.mount(name)
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
    process = subprocess.Popen(["chroot", root, *program], stdout=subprocess.PIPE, env=environment, bufsize=0)
    assert process.stdout is not None
    with process.stdout as stream:
        first = os.read(stream.fileno(), 1)
        seconds = time.perf_counter() - begin
        stream.read()
    if process.wait() or not first:
        raise Unsupported(f"the program in {name} failed with status {process.returncode}")
    return seconds


@case("start", quantities=_QUANTITIES, axis=_AXIS, points=_POINTS, short_points=[1, 3], cold=True)
@contextmanager
def cold(side: Side, bench: Bench) -> Iterator[Run]:
    """So many containers of a Debian with Python are made, mounted and started at once, from empty caches: until Python
    in them has imported Flask and printed a line. In a chroot: no OCI runtime is part of it, for any side. Our
    drivers are called in this process; each call of a peer is a process of its client."""
    with _starting(side, bench) as run:
        yield run


@case("start", quantities=_QUANTITIES, axis=_AXIS, points=_POINTS, short_points=[1, 3])
@contextmanager
def warm(side: Side, bench: Bench) -> Iterator[Run]:
    """The same with what the last run left in the caches; the first run, which fills them, is not counted."""
    with _starting(side, bench) as run:
        run(Turn(-1, bench.at))
        yield run
