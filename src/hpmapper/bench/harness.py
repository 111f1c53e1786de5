"""How a benchmark is written: cases, the sides that do them, and what a case is given.

    @case("cow", quantities=[Quantity("latency", "ms", "lower", "…")], axis=Axis("file size", "bytes"), points=SIZES)
    @contextmanager
    def first_write(side: Side, bench: Bench) -> Iterator[Run]:
        \"\"\"What it measures: this text is in the report.\"\"\"
        def run(turn: Turn) -> None:
            with container(side, f"c{turn.number}", "data") as root, turn.timed("latency"):
                …

        with image(side, bench.synthetic("data", [{"file": bench.number}]), "data"):
            yield run

The runner opens a case on all sides, and then lets them run in turns: A B C A B C. A side that cannot do a case raises
`NotHere`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from hpmapper.bench import synthetic
from hpmapper.bench.results import Axis, CaseInfo, Quantity
from hpmapper.errors import Unsupported
from hpmapper.model import Space
from hpmapper.pool.base import format_size

SUITES = {
    "cow": "the first write to data of an image, and the writes after it",
    "cache": "page cache and reads of containers that read the same",
    "start": "containers at once, to the first output of a real program",
    "ingest": "from an image's blobs to something that containers can start on",
    "space": "many versions of an image: bytes and inodes on the disk",
    "ops": "making, committing and removing snapshots, by how many there are already",
    "diff": "few changes in large trees: telling them, and making a layer of them",
    "io": "reading, writing and metadata in a container's root, against the bare file system",
    "apps": "programs at work on data that lies in their image",
}
"""The suites, in the order in which they run."""

MIB = 1 << 20


class NotHere(Unsupported):
    """A side cannot do a case; the message says why."""


@dataclass(frozen=True)
class Cost:
    """What a program took: seconds, seconds of CPU of it and of what works for it, and MiB of memory at its peak."""

    wall: float
    cpu: float
    memory: float


class Side(Protocol):
    """A storage driver, a peer, or the bare file system, at work on a file system of its own.

    Attributes:
        kind: "driver", "peer" or "bare". about: what it is, with versions.
        home: a directory on the side's file system, where it is measured what is stored.
    """

    name: str
    kind: str
    about: str
    home: Path

    def bring(self, layout: Path, image: str) -> None:
        """Take in an OCI layout's image, until containers can start on it."""

    def ingest(self, layout: Path, image: str) -> Cost:
        """The same by the side's own client, from the command to its end, with what it cost."""

    def prepare(self, container: str, image: str) -> None:
        """Make a container of an image."""

    def mount(self, container: str) -> Path:
        """The path of a container's root file system, mounted if it was not."""

    def commit(self, container: str, image: str) -> None:
        """Make an image of a container's changes on top of its image. NotHere if the side has no such thing."""

    def changed(self, container: str) -> int:
        """How many paths a container changed, as the side tells. NotHere if it does not."""

    def usage(self, container: str) -> int:
        """How many bytes a container occupies, as the side tells. NotHere if it does not."""

    def remove(self, container: str) -> None:
        """Remove a container with all it wrote."""

    def forget(self, image: str) -> None:
        """Remove an image, and free what only it had."""


@contextmanager
def image(side: Side, layout: Path, name: str) -> Iterator[str]:
    """An image of a layout, under that name; forgotten at the end."""
    side.bring(layout, name)
    try:
        yield name
    finally:
        side.forget(name)


@contextmanager
def container(side: Side, name: str, image: str) -> Iterator[Path]:
    """A container's root file system, mounted; the container is removed at the end."""
    side.prepare(name, image)
    try:
        yield side.mount(name)
    finally:
        side.remove(name)


@dataclass(frozen=True)
class Bench:
    """What a case may need.

    Attributes:
        short: whether only the shape of the results matters: everything small.
        images: where images are built and kept. work: for scratch files of the case, not on the side's file system.
        sides: how many take part. at: the place on the case's axis.
    """

    short: bool
    images: Path
    work: Path
    sides: int = 1
    at: float | None = None

    def synthetic(self, name: str, layers: Sequence[synthetic.Files]) -> Path:
        """An image of random files; see `hpmapper.bench.synthetic`."""
        return synthetic.layout(self.work / "images", name, layers)

    def require_free(self, size: int, what: str) -> None:
        """Raise NotHere unless the disk below all sides has room for `size` bytes of `what` on each."""
        if Space.of(self.work).free < size * self.sides:
            raise NotHere(
                f"{what} on {self.sides} sides takes {format_size(size * self.sides)}, which are not free here"
            )

    @property
    def number(self) -> int:
        """The place on the axis."""
        assert self.at is not None
        return int(self.at)


@dataclass
class Turn:
    """One run of a case on a side: notes samples by quantity and place on the axis."""

    number: int
    at: float | None
    samples: dict[tuple[str, float | None], list[float]] = field(default_factory=dict)

    def note(self, quantity: str, value: float, *, at: float | None = None) -> None:
        """A sample; `at`: where the run itself moves along the axis."""
        self.samples.setdefault((quantity, self.at if at is None else at), []).append(value)

    @contextmanager
    def timed(self, quantity: str, scale: float = 1e3) -> Iterator[None]:
        """Note how long the body took, in ms (or what `scale` makes of seconds)."""
        begin = time.perf_counter()
        yield
        self.note(quantity, (time.perf_counter() - begin) * scale)


Run = Callable[[Turn], None]
Opened = Callable[[Side, Bench], AbstractContextManager[Run]]


@dataclass(frozen=True)
class Case:
    """A benchmark. points: of its axis, for a short form and in full; kinds: of sides that take part."""

    info: CaseInfo
    open: Opened
    points: Sequence[float | None]
    short_points: Sequence[float | None]
    kinds: tuple[str, ...]
    runs: int | None

    @property
    def name(self) -> str:
        return f"{self.info.suite}/{self.info.name}"


CASES: list[Case] = []
"""Every case, in the order of definition; filled by importing `hpmapper.bench.suites`."""


def case(
    suite: str,
    *,
    quantities: Sequence[Quantity],
    axis: Axis | None = None,
    points: Sequence[float | None] = (None,),
    short_points: Sequence[float | None] | None = None,
    cold: bool = False,
    kinds: tuple[str, ...] = ("bare", "driver", "peer"),
    runs: int | None = None,
) -> Callable[[Opened], Opened]:
    """Register a case; its name is the function's, its text the docstring. `runs`: at most so many."""

    def register(opened: Opened) -> Opened:
        name = getattr(opened, "__name__", "").replace("_", "-")
        text = " ".join((opened.__doc__ or "").split())
        info = CaseInfo(suite, name, text, cold, list(quantities), axis)
        few = points[:2] if short_points is None else short_points
        CASES.append(Case(info, opened, points, few, kinds, runs))
        return opened

    return register
