"""What making, telling, committing and removing snapshots takes, by how much there is already."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from hpmapper.bench.harness import Bench, NotHere, Run, Side, Turn, case, image
from hpmapper.bench.results import Axis, Quantity
from hpmapper.bench.sides import DriverSide
from hpmapper.bench.synthetic import Files, small_files
from hpmapper.drivers.upper import UpperDriver
from hpmapper.kernel import mount
from hpmapper.kernel.sync import syncfs
from hpmapper.meta import snapshots

_TIMES = 20
"""Operations in a run."""

_TRANSACTION = "one durable transaction: a few writes and an fsync"
_OPERATIONS = [
    Quantity("prepare", "ms", "lower", "mkdir(2) a few times"),
    Quantity("mount", "ms", "lower", "one mount(2)"),
    Quantity("usage", "ms", "lower", "one walk of what the container wrote"),
    Quantity("commit", "ms", "lower", _TRANSACTION + " and a syncfs"),
    Quantity("remove", "ms", "lower", _TRANSACTION + " and an umount(2)"),
]


def _operate(side: Side, top: str, turn: Turn, times: int) -> None:
    """Make containers, let each write a file, commit and remove them, one after the other."""
    for number in range(times):
        name = f"op-{turn.number}-{number}"
        with turn.timed("prepare"):
            side.prepare(name, top)
        try:
            with turn.timed("mount"):
                root = side.mount(name)
            (root / "written").write_bytes(b"x" * 1000)
            _timed_if_possible(turn, "usage", partial(side.usage, name))
            committed = _timed_if_possible(turn, "commit", partial(side.commit, name, f"{name}-image"))
        finally:
            with turn.timed("remove"):
                side.remove(name)
        if committed:
            side.forget(f"{name}-image")


def _timed_if_possible(turn: Turn, quantity: str, do: Callable[[], object]) -> bool:
    """Note how long that took; False: the side has no such thing."""
    try:
        with turn.timed(quantity):
            do()
    except NotHere:
        return False
    return True


@case(
    "ops",
    quantities=[
        Quantity("mkdir and mount", "ms", "lower"),
        Quantity("umount", "ms", "lower"),
        Quantity("write and fsync", "ms", "lower"),
        Quantity("syncfs", "ms", "lower"),
    ],
    kinds=("bare",),
)
@contextmanager
def limits(side: Side, bench: Bench) -> Iterator[Run]:
    """What the kernel takes for the least that a driver has to do: four mkdir(2) and one mount(2) of an overlay, its
    umount(2), 4 KiB written and fsynced, a syncfs after it."""
    lower = side.home / "lower"
    lower.mkdir()

    def run(turn: Turn) -> None:
        for number in range(3 if bench.short else _TIMES):
            top = side.home / f"by-hand-{turn.number}-{number}"
            with turn.timed("mkdir and mount"):
                for path in (top, top / "u", top / "w", top / "m"):
                    path.mkdir()
                mount.overlay(top / "m", lowers=[lower], upper=top / "u", work=top / "w")
            with turn.timed("umount"):
                mount.umount(top / "m")
            with turn.timed("write and fsync"), (top / "file").open("wb", buffering=0) as file:
                file.write(b"x" * 4096)
                os.fsync(file.fileno())
            with turn.timed("syncfs"):
                syncfs(top)
            shutil.rmtree(top)

    yield run
    lower.rmdir()


@case(
    "ops",
    quantities=[
        Quantity("container create", "ms", "lower", "four mkdir(2)"),
        Quantity("create and mount", "ms", "lower", "the same by hand"),
        Quantity("by hand", "ms", "lower", "four mkdir(2) and one mount(2)"),
        Quantity("container create to by hand", "times", "lower", "less than 1: it mounts nothing"),
        Quantity("create and mount to by hand", "times", "lower", "1"),
    ],
    kinds=("driver",),
)
@contextmanager
def create(side: Side, bench: Bench) -> Iterator[Run]:
    """What `hpmapper container create` does, in a running process; a snapshot made and mounted by the engine, as a
    daemon does it; and by hand, four mkdir(2) and one mount(2) of the same layers. In turns, and each first as often as
    the others, since whoever comes later finds the kernel's paths warm. The ratios are those of the run's medians."""
    if not isinstance(side, DriverSide) or not isinstance(side.engine.driver, UpperDriver):
        raise NotHere("its roots are no overlays")

    def created(name: str) -> None:
        side.prepare(name, image_name)

    def ours(name: str) -> Path:
        return side.engine.mount(side.engine.prepare(name, top))

    def by_hand(name: str) -> None:
        for path in (f"{by}/{name}", f"{by}/{name}/u", f"{by}/{name}/w", f"{by}/{name}/m"):
            os.mkdir(path)
        options = {"index": "off", "metacopy": "off", "redirect_dir": "nofollow"}
        upper, work = f"{by}/{name}/u", f"{by}/{name}/w"
        mount.overlay(f"{by}/{name}/m", lowers=lowers, data=data, upper=upper, work=work, options=options)

    ways = {"container create": created, "create and mount": ours, "by hand": by_hand}

    def run(turn: Turn) -> None:
        took: dict[str, list[float]] = {quantity: [] for quantity in ways}
        for number in range(4 if bench.short else 10 * _TIMES):
            name = f"create-{turn.number}-{number}"
            first = number % len(ways)
            for quantity, make in [*ways.items()][first:] + [*ways.items()][:first]:
                begin = time.perf_counter()
                make(name)
                took[quantity].append((time.perf_counter() - begin) * 1e3)
            side.remove(name)
            side.engine.remove(snapshots.get(side.engine.db, name))
            mount.umount(f"{by}/{name}/m")
            shutil.rmtree(f"{by}/{name}")
        for quantity, samples in took.items():
            for sample in samples:
                turn.note(quantity, sample)
        by_hands = statistics.median(took["by hand"])
        for quantity in ("container create", "create and mount"):
            turn.note(f"{quantity} to by hand", statistics.median(took[quantity]) / by_hands)

    with image(side, bench.synthetic("ops", [small_files(10)]), "ops") as image_name:
        top = side.top(image_name)
        by = side.home / "by-hand"
        by.mkdir()
        lowers, data = _layers(ours("first"))
        run(Turn(-1, bench.at))  # statements are prepared
        yield run
        side.engine.remove(snapshots.get(side.engine.db, "first"))
        by.rmdir()


def _layers(root: Path) -> tuple[list[str], list[str]]:
    """The lower layers of an overlay, and its data-only ones, as the kernel tells them."""
    (found,) = (one for one in mount.mounts() if one.target == str(root))
    options = dict(option.partition("=")[::2] for option in found.super_options.split(","))
    lowers, *data = options["lowerdir"].split("::")
    return lowers.split(":"), data


@case(
    "ops",
    quantities=_OPERATIONS,
    axis=Axis("snapshots", growth=True),
    points=[10, 100, 1_000, 10_000],
    short_points=[3, 10, 30],
    kinds=("driver",),
)
@contextmanager
def by_snapshots(side: Side, bench: Bench) -> Iterator[Run]:
    """One container at a time is made, mounted, written to (1 kB), asked for its usage, committed and removed, while so
    many others are there."""
    with image(side, bench.synthetic("ops", [small_files(10)]), "ops") as top:
        others = [f"other-{number}" for number in range(bench.number)]
        for name in others:
            side.prepare(name, top)
        yield lambda turn: _operate(side, top, turn, 3 if bench.short else _TIMES)
        for name in others:
            side.remove(name)


@case(
    "ops",
    quantities=_OPERATIONS,
    axis=Axis("layers", growth=True),
    points=[1, 8, 32, 64, 125],
    short_points=[1, 4, 8],
    kinds=("driver", "peer"),
)
@contextmanager
def by_layers(side: Side, bench: Bench) -> Iterator[Run]:
    """The same on an image of so many layers, of ten small files each."""
    layers: list[Files] = [{f"layer{number}/f{index}": 200 for index in range(10)} for number in range(bench.number)]
    name = f"layers-{bench.number}"
    with image(side, bench.synthetic(name, layers), name):
        yield lambda turn: _operate(side, name, turn, 3 if bench.short else _TIMES)


@case(
    "ops",
    quantities=[
        *_OPERATIONS[:2],
        Quantity("ingest", "s", "lower", "creating as many files on the bare file system"),
        Quantity("remove", "ms", "lower", _TRANSACTION),
    ],
    axis=Axis("files", growth=True),
    points=[1_000, 10_000, 100_000, 1_000_000],
    short_points=[100, 1_000, 2_000],
    kinds=("driver", "peer"),
    runs=3,
)
@contextmanager
def by_files(side: Side, bench: Bench) -> Iterator[Run]:
    """An image of so many files of 200 bytes is taken in, and one container of it made, mounted and removed."""
    bench.require_free(6_000 * bench.number, f"{bench.number} files")
    name = f"files-{bench.number}"
    layout = bench.synthetic(name, [small_files(bench.number)])

    def run(turn: Turn) -> None:
        with turn.timed("ingest", scale=1):
            side.bring(layout, name)
        with turn.timed("prepare"):
            side.prepare(name, name)
        with turn.timed("mount"):
            side.mount(name)
        with turn.timed("remove"):
            side.remove(name)
        side.forget(name)

    yield run


@case(
    "ops",
    quantities=[
        Quantity("make and mount", "s", "lower", "mkdir(2) and mount(2) for each"),
        Quantity("remove", "s", "lower"),
    ],
    axis=Axis("containers", growth=True),
    points=[1, 10, 50, 200],
    short_points=[1, 2, 5],
    kinds=("driver", "peer"),
)
@contextmanager
def by_containers(side: Side, bench: Bench) -> Iterator[Run]:
    """So many containers of a small image are made and mounted, one after the other, and then removed."""

    def run(turn: Turn) -> None:
        names = [f"many-{turn.number}-{number}" for number in range(bench.number)]
        with turn.timed("make and mount", scale=1):
            for name in names:
                side.prepare(name, "many")
                side.mount(name)
        with turn.timed("remove", scale=1):
            for name in names:
                side.remove(name)

    with image(side, bench.synthetic("many", [small_files(10)]), "many"):
        yield run
