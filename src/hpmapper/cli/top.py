"""`hpmapper top`: containers, what they have in the page cache, and what they do with the disk."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from hpmapper.cache.overview import ContainerFacts, Observer, Overview, Used
from hpmapper.cli import output
from hpmapper.cli.session import session
from hpmapper.cli.state import State, json_option, pass_state
from hpmapper.image import reference

if TYPE_CHECKING:
    from rich.console import RenderableType

_ONCE_SECONDS = 0.5
"""How long is watched when only one picture is wanted."""

_COLUMNS = ("CONTAINER", "IMAGE", "PIDS", "CPU", "OWN CACHE", "DIRTY", "SHARED", "READ/S", "WRITTEN/S", "COPIED UP")
_LEFT = ("CONTAINER", "IMAGE")

_SORTS = {
    "cache": lambda one: one.facts.own.cached,
    "cpu": lambda one: one.rate.seconds,
    "io": lambda one: one.rate.read + one.rate.written,
    "copied": lambda one: one.facts.copy_ups.bytes,
}


@dataclass(frozen=True, slots=True)
class _Row:
    """A container, and what it used for each second that was watched."""

    facts: ContainerFacts
    rate: Used


@dataclass(frozen=True, slots=True)
class _Picture:
    overview: Overview
    rows: list[_Row]


@click.command()
@click.option("--once", is_flag=True, help="One picture, and end; so it is where standard output is no terminal.")
@click.option("--interval", type=click.FloatRange(min=0.2), default=2.0, metavar="SECONDS", help="By default 2.")
@click.option("--sort", type=click.Choice(list(_SORTS)), default="cache", help="By what; by default its own cache.")
@click.option("--all", "everything", is_flag=True, help="Also containers whose root is not mounted.")
@json_option
@pass_state
def top(state: State, once: bool, interval: float, sort: str, everything: bool) -> None:
    """Watch containers: cache, processor, disk, copy-ups, and the pool's space.

    SHARED is what is cached of the container's image, which all containers of it share. READ and WRITTEN reach the
    disk. COPIED UP are files of the image that it has opened for writing. Ctrl-C ends it.
    """
    with session(state) as opened:
        observer = Observer(opened.engine.db, opened.engine.driver)
        if once or state.json or not sys.stdout.isatty():
            pictures = _pictures(observer, _ONCE_SECONDS, sort, everything=everything)
            picture = next(pictures)
            output.show(state, _facts(picture), lambda: _text(picture))
            return
        _live(_pictures(observer, interval, sort, everything=everything))


def _pictures(observer: Observer, interval: float, sort: str, *, everything: bool) -> Iterator[_Picture]:
    """One picture every `interval` seconds."""
    before, began = observer.look(), time.monotonic()
    while True:
        time.sleep(interval)
        now, ended = observer.look(), time.monotonic()
        earlier = {one.name: one.used for one in before.containers}
        rows = [
            _Row(one, _each_second(one.used.since(earlier.get(one.name, one.used)), ended - began))
            for one in now.containers
            if one.live or everything
        ]
        yield _Picture(now, sorted(rows, key=_SORTS[sort], reverse=True))
        before, began = now, ended


def _each_second(used: Used, seconds: float) -> Used:
    return Used(used.seconds / seconds, round(used.read / seconds), round(used.written / seconds))


def _facts(picture: _Picture) -> dict[str, Any]:
    overview = picture.overview
    return {
        "pool": {"total": overview.space.total, "free": overview.space.free},
        "cache": {
            "total": overview.stat.total.cached,
            "shared": overview.shared,
            "private": overview.private,
            "dirty": overview.stat.total.dirty,
            "plain_copies": overview.stat.plain_copies,
        },
        "containers": [
            {
                "name": one.facts.name,
                "image": one.facts.image,
                "live": one.facts.live,
                "processes": one.facts.processes,
                "own": one.facts.own._asdict(),
                "shared": one.facts.shown,
                "copied_up": one.facts.copy_ups._asdict(),
                "cpu": round(one.rate.seconds, 3),
                "read_per_second": one.rate.read,
                "written_per_second": one.rate.written,
            }
            for one in picture.rows
        ],
    }


def _head(overview: Overview) -> str:
    space, stat = overview.space, overview.stat
    saved = max(0, stat.plain_copies - stat.total.cached)
    pool = f"pool  {output.size(space.used)} used of {output.size(space.total)}, {output.size(space.free)} free"
    cache = (
        f"cache {output.size(stat.total.cached)}: {output.size(overview.shared)} shared, "
        f"{output.size(overview.private)} private, {output.size(stat.total.dirty)} dirty; "
        f"plain copies: up to {output.size(saved)} more"
    )
    live = sum(1 for one in overview.containers if one.live)
    return f"{pool}\n{cache}\n{live} of {len(overview.containers)} containers mounted"


def _text(picture: _Picture) -> str:
    rows = [_cells(row) for row in picture.rows]
    return "\n\n".join([_head(picture.overview), *([output.table(_COLUMNS, rows)] if rows else [])])


def _cells(row: _Row) -> tuple[str, ...]:
    one, rate = row.facts, row.rate
    copied = f"{one.copy_ups.files} ({output.size(one.copy_ups.bytes)})" if one.copy_ups.files else "-"
    sizes = (one.own.cached, one.own.dirty, one.shown, rate.read, rate.written)
    return (
        one.name,
        _short(one.image),
        str(one.processes),
        f"{rate.seconds:.0%}",
        *(output.size(value) if value else "-" for value in sizes),
        copied,
    )


def _short(image: str) -> str:
    if not image:
        return "-"
    return image[7:19] if image.startswith("sha256:") else reference.parse(image).familiar


def _live(pictures: Iterator[_Picture]) -> None:
    """Draw until Ctrl-C."""
    from rich.live import Live  # 60 ms to import: only for those who see it

    try:
        with Live("looking…", screen=True, auto_refresh=False) as live:
            for picture in pictures:
                live.update(_drawn(picture), refresh=True)
    except KeyboardInterrupt:
        pass


def _drawn(picture: _Picture) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold reverse", expand=True)
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name in _LEFT else "right", no_wrap=True, overflow="ellipsis")
    for row in picture.rows:
        table.add_row(*map(Text, _cells(row)), style="" if row.facts.processes else "dim")
    return Group(Text(_head(picture.overview)), Text(), table)
