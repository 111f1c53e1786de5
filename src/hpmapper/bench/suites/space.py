"""What many versions of an image take on the disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hpmapper.bench import images
from hpmapper.bench.harness import MIB, Bench, Run, Side, Turn, case
from hpmapper.bench.results import Axis, Quantity
from hpmapper.bench.synthetic import Files, small_files
from hpmapper.kernel.sync import syncfs

_VERSIONS = 10


def _short(bench: Bench) -> list[Path]:
    """Three versions of an image of a shared layer and 100 files, of which 5 change each time."""

    def layer(version: int) -> Files:
        return {f"app/f{number}": (20_000, version if number < 5 else 0) for number in range(100)}

    return [bench.synthetic(f"version-{number}", [small_files(50), layer(number)]) for number in range(3)]


@case(
    "space",
    quantities=[
        Quantity("used", "MiB", "lower", "each distinct file once"),
        Quantity("inodes", "", "lower", "one for each distinct file"),
    ],
    axis=Axis("versions"),
    points=[None],
    runs=1,
)
@contextmanager
def releases(side: Side, bench: Bench) -> Iterator[Run]:
    """Ten releases of one application, one after the other: a Debian layer that they share, and above it a layer with
    the application (Django 5.2.1 to 5.2.10) and what it needs, installed by pip. How much more the file system holds
    after each. The bare file system has one tree for each. btrfs does not count inodes."""
    layouts = _short(bench) if bench.short else images.releases(bench.images, _VERSIONS)

    def run(turn: Turn) -> None:
        syncfs(side.home)
        empty = os.statvfs(side.home)
        for number, layout in enumerate(layouts, 1):
            side.bring(layout, f"release-{number}")
            syncfs(side.home)
            now = os.statvfs(side.home)
            turn.note("used", (empty.f_bfree - now.f_bfree) * now.f_frsize / MIB, at=number)
            if now.f_files:
                turn.note("inodes", (now.f_files - now.f_ffree) - (empty.f_files - empty.f_ffree), at=number)
        for number in range(1, len(layouts) + 1):
            side.forget(f"release-{number}")

    yield run
