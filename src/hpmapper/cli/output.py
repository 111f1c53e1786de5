"""Facts, as JSON or as text for people: the only place that knows which of the two is wanted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime

import click

from hpmapper.cli.state import State
from hpmapper.pool.base import format_size

Facts = Mapping[str, object]

_GAP = "   "


def show(state: State, facts: object, text: Callable[[], str]) -> None:
    """Print `facts` as JSON when that is wanted, else `text()`; nothing when that is empty."""
    if state.json:
        click.echo(json.dumps(facts, indent=2, default=str))
        return
    lines = text()
    if lines:
        click.echo(os.fsencode(lines))  # names may be any bytes


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be, the last one ragged."""
    lines = [headers, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    return "\n".join(_GAP.join(map(str.ljust, line, widths)).rstrip() for line in lines)


def pairs(facts: Mapping[str, str]) -> str:
    """One fact a line, the values aligned."""
    width = max(map(len, facts), default=0)
    return "\n".join(f"{name:<{width}}{_GAP}{value}".rstrip() for name, value in facts.items())


def size(value: int) -> str:
    """Bytes for people."""
    return format_size(value)


def moment(nanoseconds: int) -> str:
    """A time of the database for people, in their time zone."""
    return datetime.fromtimestamp(nanoseconds / 1e9).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def timestamp(nanoseconds: int) -> str:
    """A time of the database as JSON has it (RFC 3339)."""
    return datetime.fromtimestamp(nanoseconds / 1e9, UTC).isoformat(timespec="microseconds")


def yes(value: bool) -> str:
    """A truth for people."""
    return "yes" if value else "no"
