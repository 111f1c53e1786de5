"""How bringing in an image is shown: bars on a terminal, a line for each layer elsewhere, nothing when not wanted."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from hpmapper.cli.output import size
from hpmapper.engine import Taken
from hpmapper.images import Watcher

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


@contextmanager
def watching(*, quiet: bool) -> Iterator[Watcher]:
    """A watcher for standard error as it is."""
    if quiet:
        yield _Silent()
    elif not sys.stderr.isatty():
        yield _Lines()
    else:
        with bars() as drawn:
            yield _Bars(drawn)


def outcome(taken: Taken) -> str:
    """What a layer cost, in words."""
    if taken.ingested is None:
        return "already there"
    known = taken.ingested.deduplicated
    return f"stored {size(taken.ingested.size)}" + (f", {size(known)} were known" if known else "")


class _Silent:
    def layer(self, number: int, count: int, size: int | None) -> Callable[[int], None]:
        return lambda _read: None

    def layer_done(self, number: int, taken: Taken) -> None:
        pass


class _Lines:
    def __init__(self) -> None:
        self._count = 0

    def layer(self, number: int, count: int, size: int | None) -> Callable[[int], None]:
        self._count = count
        return lambda _read: None

    def layer_done(self, number: int, taken: Taken) -> None:
        click.echo(f"layer {number + 1}/{self._count}: {outcome(taken)}", err=True)


class _Bars:
    """A bar of compressed bytes for each layer at work, and a line above them for each one done."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._count = 0
        self._tasks: dict[int, TaskID] = {}

    def layer(self, number: int, count: int, size: int | None) -> Callable[[int], None]:
        self._count = count
        self._tasks[number] = task = self._bars.add_task(f"layer {number + 1}/{count}", total=size)
        return lambda read: self._bars.advance(task, read)

    def layer_done(self, number: int, taken: Taken) -> None:
        self._bars.remove_task(self._tasks.pop(number))
        self._bars.console.print(f"layer {number + 1}/{self._count}: {outcome(taken)}", highlight=False)


def bars() -> Progress:
    """Bars of bytes on standard error."""
    # rich takes 60 ms to import: only for those who see it.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
