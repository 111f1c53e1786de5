"""Results as Markdown."""

from __future__ import annotations

from collections.abc import Iterator

from hpmapper.bench.growth import RULE, growths
from hpmapper.bench.report import goals, paper, shown
from hpmapper.bench.report.shown import Grid
from hpmapper.bench.results import CaseInfo, Results

HOW_TO_READ = (
    "Cells are the median of the runs' medians (least–most of all samples). Sides took turns, run by run. "
    "“bare” is the file system without any driver."
)


def report(results: Results) -> str:
    """The whole report."""
    return "\n".join(_lines(results)) + "\n"


def table(grid: Grid) -> str:
    """A table, with its title above it."""
    lines = [f"*{grid.title}*", ""] if grid.title else []
    lines += [_row(grid.headers), _row(["---"] * len(grid.headers)), *map(_row, grid.rows)]
    return "\n".join(lines)


def _row(cells: object) -> str:
    assert isinstance(cells, (list, tuple))
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _lines(results: Results) -> Iterator[str]:
    yield "# Benchmarks of container storage\n"
    yield HOW_TO_READ + "\n"
    for session in results.sessions:
        cut = ", interrupted" if session.interrupted else ""
        yield f"- {session.began} to {session.ended} on {session.host}{cut}: `{' '.join(session.command)}`"
    for label, facts in results.hosts.items():
        yield f"\n## Host: {label}\n"
        yield table(Grid("", ("", ""), list(facts.items())))
    yield "\n## Sides\n"
    yield table(Grid("", ("side", "what it is", "host"), [(s.name, s.about, s.host) for s in results.sides]))
    if results.absent:
        yield "\nThese were wanted and cannot run:\n"
        yield table(Grid("", ("side", "why", "host"), [(a.side, a.why, a.host) for a in results.absent]))
    for case in results.cases:
        yield from _case(results, case)
    if (judged := goals.table(results)) is not None:
        yield f"\n## Goals\n\n{table(judged)}"
    if (claims := paper.table(results)) is not None:
        yield "\n## Beside the paper\n"
        yield f"{paper.REMARK}\n\n{table(claims)}"
    yield from _growth(results)
    yield from _skipped(results)


def _case(results: Results, case: CaseInfo) -> Iterator[str]:
    for host in shown.hosts_of(results, case):
        yield f"\n## {case.suite}/{case.name}" + (f", on {host}" if len(results.hosts) > 1 else "") + "\n"
        yield f"{case.text}\n\n{shown.remark(results, case, host)}\n"
        for grid in shown.grids(results, case, host):
            yield table(grid) + "\n"
        if floors := shown.floors(case):
            yield "Physical limit: " + "; ".join(floors) + "."


def _growth(results: Results) -> Iterator[str]:
    found = growths(results)
    if not found:
        return
    yield "\n## How cost grows\n"
    yield f"{RULE}\n"
    rows = [
        (
            f"{one.suite}/{one.case}: {one.quantity}",
            one.side,
            f"{one.exponent:.2f}" + (" **worse than linear**" if one.is_worse_than_linear else ""),
            f"{one.fit:.2f}",
            f"{one.end:.2f}",
            f"{shown.number(one.first)} → {shown.number(one.last)}",
        )
        for one in found
    ]
    yield table(Grid("", ("quantity", "side", "exponent", "R²", "at the end", "first → last"), rows))


def _skipped(results: Results) -> Iterator[str]:
    if not results.skipped:
        return
    yield "\n## Not measured\n"
    yield table(shown.left_out(results))
