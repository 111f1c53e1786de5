"""Results as one HTML file: the tables, and the plots in it as SVG. It loads nothing."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from hpmapper.bench.growth import RULE, growths
from hpmapper.bench.harness import SUITES
from hpmapper.bench.report import goals, paper, plots, shown
from hpmapper.bench.report.markdown import HOW_TO_READ
from hpmapper.bench.report.shown import Grid
from hpmapper.bench.results import CaseInfo, Results

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem }
body { color: #111; background: #fff }
table { border-collapse: collapse; margin: .8rem 0; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; vertical-align: top }
th:first-child, td:first-child { text-align: left; white-space: nowrap }
.words td, .words th { text-align: left }
caption { text-align: left; font-weight: 600; padding: .3rem 0 }
svg { max-width: 100%; height: auto }
svg text { font-family: system-ui, sans-serif !important }
 .small { color: #555; font-size: 13px } .bad { color: #b00020; font-weight: 600 }
nav a { margin-right: 1rem } div.wide { overflow-x: auto }
"""


def page(results: Results) -> str:
    """The whole page.

    Raises:
        Unsupported: matplotlib is not installed.
    """
    plots.require()
    body = "\n".join(_body(results))
    head = f'<meta charset="utf-8"><title>Benchmarks of container storage</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def _body(results: Results) -> Iterator[str]:
    yield "<h1>Benchmarks of container storage</h1>"
    yield f"<p>{escape(HOW_TO_READ)}</p>"
    present = dict.fromkeys(case.suite for case in results.cases)
    yield (
        "<nav>" + "".join(f'<a href="#{suite}">{suite}</a>' for suite in present) + '<a href="#growth">growth</a></nav>'
    )
    for suite in present:
        yield f'<h2 id="{suite}">{suite}: {escape(SUITES.get(suite, ""))}</h2>'
        for case in results.cases:
            if case.suite == suite:
                yield from _case(results, case)
    if (judged := goals.table(results)) is not None:
        rows = [[cell.replace("**", "") for cell in row] for row in judged.rows]
        yield '<h2 id="goals">Goals</h2>' + _table(Grid("", judged.headers, rows), words=True)
    if (claims := paper.table(results)) is not None:
        yield f'<h2 id="paper">Beside the paper</h2><p>{escape(paper.REMARK)}</p>'
        yield _table(claims, words=True)
    yield from _growth(results)
    yield "<h2>Where and with what</h2>"
    for label, facts in results.hosts.items():
        yield _table(Grid(f"host {label}", ("", ""), list(facts.items())), words=True)
    yield _table(
        Grid("sides", ("", "what it is", "host"), [(s.name, s.about, s.host) for s in results.sides]), words=True
    )
    absent = [(a.side, a.why, a.host) for a in results.absent]
    yield _table(Grid("wanted, and cannot run", ("", "why", "host"), absent), words=True) if absent else ""
    if results.skipped:
        left = shown.left_out(results)
        yield _table(Grid("not measured", left.headers, left.rows), words=True)
    sessions = [(one.host, one.began, one.ended, one.version, " ".join(one.command)) for one in results.sessions]
    yield _table(Grid("sessions", ("host", "began", "ended", "version", "command"), sessions), words=True)


def _case(results: Results, case: CaseInfo) -> Iterator[str]:
    for host in shown.hosts_of(results, case):
        where = f", on {escape(host)}" if len(results.hosts) > 1 else ""
        yield f"<h3>{escape(case.name)}{where}</h3><p>{escape(case.text)}</p>"
        yield plots.svg(results, case, host)
        for grid in shown.grids(results, case, host):
            yield _table(grid)
        limits = "; ".join(shown.floors(case))
        remark = shown.remark(results, case, host) + (f" Physical limit: {limits}." if limits else "")
        yield f'<p class="small">{escape(remark)}</p>'


def _growth(results: Results) -> Iterator[str]:
    yield f'<h2 id="growth">How cost grows</h2><p>{escape(RULE)}</p>'
    rows = []
    for one in growths(results):
        name = f"{one.suite}/{one.case}: {one.quantity} ({one.host})"
        verdict = " worse than linear" if one.is_worse_than_linear else ""
        rows.append(
            (
                name,
                one.side,
                f"{one.exponent:.2f}{verdict}",
                f"{one.fit:.2f}",
                f"{one.end:.2f}",
                f"{shown.number(one.first)} → {shown.number(one.last)}",
            )
        )
    yield (
        _table(Grid("", ("quantity", "side", "exponent", "R²", "at the end", "first → last"), rows))
        if rows
        else "<p>Not measured.</p>"
    )


def _table(grid: Grid, *, words: bool = False) -> str:
    def row(cells: object, tag: str) -> str:
        assert isinstance(cells, (list, tuple))
        return "<tr>" + "".join(f"<{tag}>{escape(str(one))}</{tag}>" for one in cells) + "</tr>"

    caption = f"<caption>{escape(grid.title)}</caption>" if grid.title else ""
    rows = "".join(row(cells, "td") for cells in grid.rows)
    kind = ' class="words"' if words else ""
    return f'<div class="wide"><table{kind}>{caption}{row(grid.headers, "th")}{rows}</table></div>'
