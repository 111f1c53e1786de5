"""What containers that read the same keep in the page cache, and read from the disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hpmapper.bench.harness import MIB, Bench, NotHere, Run, Side, Turn, case, container, image
from hpmapper.bench.measure import brought_in, drop_caches
from hpmapper.bench.results import Axis, Quantity
from hpmapper.bench.suites.ingest import device_bytes

_QUANTITIES = [
    Quantity("page cache", "MiB", "lower", "each distinct byte once"),
    Quantity("read", "MiB", "lower", "each distinct byte once"),
]
_PLAIN = 10
"""Containers that are whole copies: more of them take the disk's space, and show nothing new."""


def _read(side: Side, roots: list[Path], turn: Turn) -> None:
    """Let each root be read, one after the other, from empty caches; note what was read, and what is cached of it."""
    drop_caches()
    read = device_bytes(side.home, written=False)
    turn.note("page cache", brought_in(roots) / MIB)
    turn.note("read", (device_bytes(side.home, written=False) - read) / MIB)


@case(
    "cache",
    quantities=_QUANTITIES,
    axis=Axis("containers"),
    points=[1, 10, 50],
    short_points=[1, 3, 20],
    cold=True,
    kinds=("driver", "peer"),
)
@contextmanager
def same_image(side: Side, bench: Bench) -> Iterator[Run]:
    """So many containers of one image, each of which reads all of its 40 MiB, one after the other. Page cache:
    what the readers brought in, by their control group; what a FUSE server reads for them is not in it."""
    size = 2 * MIB if bench.short else 5 * MIB
    if side.name == "vfs" and bench.number > _PLAIN:
        raise NotHere(f"{bench.number} whole copies of the image cache {bench.number} times its bytes")
    layout = bench.synthetic(f"read-{size}", [{f"f{number}": size for number in range(8)}])
    with ExitStack() as stack:
        read = stack.enter_context(image(side, layout, "read"))
        roots = [stack.enter_context(container(side, f"reader-{n}", read)) for n in range(bench.number)]
        yield lambda turn: _read(side, roots, turn)


@case("cache", quantities=_QUANTITIES, cold=True, kinds=("driver", "peer"))
@contextmanager
def two_versions(side: Side, bench: Bench) -> Iterator[Run]:
    """A container of each of two versions of an image, which are single layers of 400 files of 256 KiB (100 MiB), a
    tenth of them different; each reads all of it."""
    count, size = (40, 256 << 10) if bench.short else (400, 256 << 10)
    with ExitStack() as stack:
        roots = []
        for version in (1, 2):
            files = {f"f{number}": (size, version if number % 10 == 0 else 0) for number in range(count)}
            layout = bench.synthetic(f"versions-{count}-{version}", [files])
            name = stack.enter_context(image(side, layout, f"version-{version}"))
            roots.append(stack.enter_context(container(side, f"of-{version}", name)))
        yield lambda turn: _read(side, roots, turn)
