"""What every report shows of results, in words: numbers with their spread, places on axes, tables by case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hpmapper.bench.results import Axis, CaseInfo, Measurement, Quantity, Results
from hpmapper.pool.base import format_size

_MANY = 100
"""Samples from which a 99th percentile says something."""


SHORT = "Short form: smaller than the text says, and programs are busybox."


@dataclass(frozen=True)
class Grid:
    """A table of text; the first column names the row."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]


def number(value: float) -> str:
    """Three digits that count, thousands grouped."""
    if value and abs(value) < 0.0005:
        return f"{value:.1e}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def cell(one: Measurement | None) -> str:
    """Median of the runs' medians, least and most of all samples, and the 99th percentile of many."""
    if one is None or not one.of_runs:
        return "–"
    samples = one.samples
    text = number(one.median)
    if len(samples) > 1:
        text += f" ({number(min(samples))}–{number(max(samples))})"
    return text + (f", p99 {number(one.percentile(0.99))}" if len(samples) >= _MANY else "")


def place(axis: Axis, at: float) -> str:
    """A place on an axis."""
    return format_size(int(at)) if axis.unit == "bytes" else f"{at:,g}"


def hosts_of(results: Results, case: CaseInfo) -> list[str]:
    """The hosts on which a case was measured."""
    return list(dict.fromkeys(m.host for m in results.measurements if (m.suite, m.case) == (case.suite, case.name)))


def members(results: Results, case: CaseInfo, host: str) -> list[Measurement]:
    """A case's measurements on a host."""
    wanted = (host, case.suite, case.name)
    return [one for one in results.measurements if (one.host, one.suite, one.case) == wanted]


def sides_of(results: Results, found: Sequence[Measurement]) -> list[str]:
    """The sides of measurements, in the order in which the results list them."""
    order = [side.name for side in results.sides]
    present = dict.fromkeys(one.side for one in found)
    return sorted(present, key=lambda name: order.index(name) if name in order else len(order))


def grids(results: Results, case: CaseInfo, host: str) -> list[Grid]:
    """A case's tables: sides by quantity, or, with an axis, for each quantity sides by place."""
    found = members(results, case, host)
    sides = sides_of(results, found)
    by_key = {(one.quantity, one.side, one.at): one for one in found}
    quantities = [q for q in case.quantities if any(one.quantity == q.name for one in found)]
    if case.axis is None:
        headers = ["side", *map(label, quantities)]
        rows = [[side, *(cell(by_key.get((q.name, side, None))) for q in quantities)] for side in sides]
        return [Grid("", headers, rows)]
    made = []
    for quantity in quantities:
        places = sorted({one.at for one in found if one.quantity == quantity.name and one.at is not None})
        headers = [f"by {case.axis.name}", *(place(case.axis, at) for at in places)]
        rows = [[side, *(cell(by_key.get((quantity.name, side, at))) for at in places)] for side in sides]
        made.append(Grid(label(quantity), headers, [row for row in rows if set(row[1:]) != {"–"}]))
    return made


def label(quantity: Quantity) -> str:
    """A quantity with its unit."""
    return f"{quantity.name}, {quantity.unit}" if quantity.unit else quantity.name


def left_out(results: Results) -> Grid:
    """What was not measured, and why; sides of one reason together."""
    sides: dict[tuple[str, str], list[str]] = {}
    for one in results.skipped:
        axis = results.case(one.suite, one.case).axis
        where = "" if one.at is None or axis is None else f", {axis.name} {place(axis, one.at)}"
        why = ("failed: " if one.failed else "") + one.why
        sides.setdefault((f"{one.suite}/{one.case}{where}", why), []).append(one.side)
    return Grid("", ("case", "why", "sides"), [(case, why, ", ".join(names)) for (case, why), names in sides.items()])


def about(case: CaseInfo) -> str:
    """How a case's figures are to be read."""
    better = {q.better for q in case.quantities}
    words = [f"{better.pop()} is better" if len(better) == 1 else ""]
    if len(case.quantities) > 1 and not words[0]:
        words = [", ".join(f"{q.name}: {q.better} is better" for q in case.quantities)]
    words.append("caches dropped before each run" if case.cold else "caches as the last run left them")
    return "; ".join(words) + "."


def floors(case: CaseInfo) -> list[str]:
    """What limits a case's quantities."""
    return [f"{q.name}: {q.floor}" for q in case.quantities if q.floor]


def remark(results: Results, case: CaseInfo, host: str) -> str:
    """How a case's figures are to be read, and what else went on."""
    text = f"{about(case)} Noise: {noise(results, case, host)}."
    short = any(session.short for session in results.sessions if session.host == host)
    return text[0].upper() + text[1:] + (f" {SHORT}" if short else "")


def noise(results: Results, case: CaseInfo, host: str) -> str:
    """What else went on while a case was measured."""
    seen = [noise for one in members(results, case, host) for noise in one.noise]
    if not seen:
        return ""
    load, waited, stolen = ([getattr(one, name) for one in seen] for name in ("load", "waited", "stolen"))
    return (
        f"load {min(load):.1f}–{max(load):.1f}; some task waited for a CPU {max(waited):.0%} of the time at most; "
        f"at most {max(stolen):.0%} of the CPUs stolen"
    )
