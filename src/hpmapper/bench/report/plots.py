"""Plots of cases, by matplotlib (the package's extra "bench")."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpmapper.bench.report import shown
from hpmapper.bench.results import CaseInfo, Measurement, Quantity, Results
from hpmapper.errors import Unsupported

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind people tell apart; ours first.
_OURS_COLOUR = "#0072B2"
_COLOURS = ("#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#8C6D31", "#666666")
_BARE = "#000000"
_MARKS = "sD^vPX*h"
_OURS = "hpmapper"


def require() -> None:
    """Raise Unsupported if plots cannot be made."""
    try:
        import matplotlib as _  # noqa: F401 (asked for only)
    except ImportError:
        raise Unsupported(
            "plots need matplotlib, which is not installed",
            hint="pip install 'hpmapper[bench]', or --no-plots",
        ) from None


def svg(results: Results, case: CaseInfo, host: str) -> str:
    """A case's plots as one <svg> element."""
    figure = _drawn(results, case, host)
    import matplotlib

    out = io.StringIO()
    # Text stays text; ids of one plot are not those of another in the same page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"{case.suite} {case.name} {host}"}):
        figure.savefig(out, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = out.getvalue()
    return re.sub(r"^.*?(?=<svg)", "", text, flags=re.DOTALL)


def write_pngs(results: Results, directory: Path) -> list[Path]:
    """A PNG for each case and host; returns their paths."""
    directory.mkdir(exist_ok=True)
    written = []
    for case in results.cases:
        for host in shown.hosts_of(results, case):
            suffix = f"-{host}" if len(results.hosts) > 1 else ""
            path = directory / f"{case.suite}-{case.name}{suffix}.png"
            _drawn(results, case, host).savefig(path, dpi=110, bbox_inches="tight")
            written.append(path)
    return written


def _drawn(results: Results, case: CaseInfo, host: str) -> Figure:
    require()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = shown.members(results, case, host)
    quantities = [q for q in case.quantities if any(one.quantity == q.name for one in found)]
    sides = shown.sides_of(results, found)
    height = 3.4 if case.axis else 0.8 + 0.32 * len(sides)
    figure = Figure(figsize=(min(4.6 * len(quantities), 16), height), layout="constrained")
    FigureCanvasAgg(figure)
    for column, quantity in enumerate(quantities):
        axes = figure.add_subplot(1, len(quantities), column + 1)
        of_quantity = [one for one in found if one.quantity == quantity.name and one.of_runs]
        if case.axis:
            _lines(axes, results, case, quantity, of_quantity, sides)
        else:
            _bars(axes, results, quantity, of_quantity, sides)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(f"{shown.label(quantity)} ({quantity.better} is better)", fontsize=9, loc="left")
        axes.tick_params(labelsize=8)
    if case.axis:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    figure.suptitle(f"{case.suite}/{case.name}", fontsize=10, x=0.01, ha="left")
    return figure


def _lines(
    axes: Axes, results: Results, case: CaseInfo, quantity: Quantity, found: list[Measurement], sides: list[str]
) -> None:
    """Medians along the axis, with a band from the least to the most of the runs' medians."""
    assert case.axis is not None
    for side in sides:
        series = sorted((one for one in found if one.side == side), key=lambda one: one.at or 0)
        places = [one.at or 0 for one in series]
        style = _style(results, side)
        axes.plot(places, [one.median for one in series], label=side, markersize=4, linewidth=1.4, **style)
        low, high = [min(one.of_runs) for one in series], [max(one.of_runs) for one in series]
        axes.fill_between(places, low, high, color=style["color"], alpha=0.15, linewidth=0)
    places = sorted({one.at or 0 for one in found})
    if places and places[0] > 0 and places[-1] / places[0] >= 8:
        axes.set_xscale("log")
    axes.set_xticks(places, [shown.place(case.axis, at) for at in places], rotation=30, ha="right")
    axes.minorticks_off()
    _scale(axes, [one.median for one in found])
    axes.set_xlabel(case.axis.name, fontsize=8)


def _scale(axes: Axes, values: list[float]) -> None:
    """A logarithmic scale where values lie far apart, with room for zeros if there are any."""
    positive = [value for value in values if value > 0]
    if positive and max(positive) / min(positive) >= 20:
        if min(values) < min(positive):
            axes.set_yscale("symlog", linthresh=min(positive))
            axes.set_ylim(min(-min(positive) / 3, *values), 3 * max(positive))
        else:
            axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(lambda value, _: "")
    elif values:
        axes.set_ylim(bottom=min(0, *values))
    axes.yaxis.set_major_formatter(lambda value, _: shown.number(value))


def _bars(axes: Axes, results: Results, quantity: Quantity, found: list[Measurement], sides: list[str]) -> None:
    """Medians as bars, with whiskers from the least to the most of the runs' medians."""
    by_side = {one.side: one for one in found}
    present = [side for side in sides if side in by_side]
    rows = [by_side[side] for side in present]
    places = list(range(len(rows)))[::-1]
    medians = [one.median for one in rows]
    spread = [
        [one.median - min(one.of_runs) for one in rows],
        [max(one.of_runs) - one.median for one in rows],
    ]
    colours = [_style(results, side)["color"] for side in present]
    axes.barh(places, medians, xerr=spread, color=colours, height=0.7, error_kw={"linewidth": 1, "capsize": 2})
    axes.set_yticks(places, present)
    for y, median, more in zip(places, medians, spread[1], strict=True):
        axes.annotate(
            shown.number(median), (median + more, y), (4, 0), textcoords="offset points", va="center", fontsize=7
        )
    axes.margins(x=0.18)


def _style(results: Results, side: str) -> dict[str, Any]:
    """How a side is drawn: the same in every plot."""
    kinds = {one.name: one.kind for one in results.sides}
    kind = kinds.get(side, "driver")
    alike = sorted(name for name, other in kinds.items() if other == kind and name != _OURS)
    place = alike.index(side) if side in alike else 0
    if kind == "bare":
        return {"color": _BARE, "marker": ".", "linestyle": (":", "-.")[place % 2]}
    if side == _OURS:
        return {"color": _OURS_COLOUR, "marker": "o", "linestyle": "-"}
    line = "-" if kind == "driver" else "--"
    return {"color": _COLOURS[place % len(_COLOURS)], "marker": _MARKS[place % len(_MARKS)], "linestyle": line}
