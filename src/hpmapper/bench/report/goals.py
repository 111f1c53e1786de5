"""What hpmapper promises of itself, judged by results: each goal against the side that it is meant against."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hpmapper.bench.report import shown
from hpmapper.bench.report.shown import Grid
from hpmapper.bench.results import CaseInfo, Measurement, Results

OURS = "hpmapper"


@dataclass(frozen=True)
class Goal:
    """Ours is to be `factor` times as good as another side.

    Attributes:
        text: the goal in words. case: suite/case; an empty name means all of the suite's. quantity: empty means all.
        side: the other one. last: whether it is meant at the axis' last place only;
            at: or at this one.
    """

    text: str
    suite: str
    case: str
    quantity: str
    side: str
    factor: float
    last: bool = False
    at: float | None = None


GOALS = (
    Goal("io: 0.95 of the bare file system", "io", "", "", "bare-xfs", 0.95),
    Goal(
        "cow: 50 × as fast as overlay on ext4 at 512 MiB",
        "cow",
        "first-write",
        "first write",
        "overlay-ext4",
        50,
        at=512 << 20,
    ),
    Goal("cow: 4 × as fast as devicemapper", "cow", "first-write", "first write", "devicemapper", 4),
    Goal("cache: 90 % less than devicemapper", "cache", "same-image", "page cache", "devicemapper", 10, True),
    Goal("start, cold: 2.0 × as fast as devicemapper", "start", "cold", "slowest", "devicemapper", 2),
    Goal("start, warm: as fast as overlay", "start", "warm", "slowest", "overlay-xfs", 1),
    Goal("ingest: 3 × as fast as containerd's overlayfs", "ingest", "", "wall with sync", "containerd-overlayfs", 3),
    Goal("ingest: 2 × as fast as containerd's erofs", "ingest", "", "wall with sync", "containerd-erofs", 2),
    Goal("space: 30 % less than overlay", "space", "", "used", "overlay-xfs", 1 / 0.7, True),
)

FLAT = 1.5
"""How much more the same operation may take among the most snapshots than among the fewest."""


def table(results: Results) -> Grid | None:
    """Each goal that was measured, whether it was reached, and by how much; None if none was."""
    rows = [row for goal in GOALS for row in _judged(results, goal)] + list(_flat(results))
    headers = ("goal", "reached", "times as good, worst to best", "worst at", "host")
    return Grid("", headers, rows) if rows else None


def _judged(results: Results, goal: Goal) -> Iterator[tuple[str, ...]]:
    for host in results.hosts:
        found = sorted(
            (_times_as_good(results, ours, theirs), _place(results, ours))
            for ours, theirs in _pairs(results, goal, host)
        )
        if found:
            worst, best = found[0], found[-1]
            reached = "yes" if worst[0] >= goal.factor else "in part" if best[0] >= goal.factor else "**no**"
            span = f"{worst[0]:.2f}" if worst[0] == best[0] else f"{worst[0]:.2f}–{best[0]:.2f}"
            yield goal.text, reached, span, worst[1], host


def _pairs(results: Results, goal: Goal, host: str) -> list[tuple[Measurement, Measurement]]:
    known = {one.key: one for one in results.measurements if one.of_runs and one.median}
    pairs = []
    for one in known.values():
        if (one.host, one.side, one.suite) != (host, OURS, goal.suite):
            continue
        if goal.case not in ("", one.case) or goal.quantity not in ("", one.quantity):
            continue
        other = known.get((host, one.suite, one.case, one.quantity, goal.side, one.at))
        if other is not None:
            pairs.append((one, other))
    place = max((ours.at or 0 for ours, _ in pairs), default=0) if goal.last else goal.at
    return [pair for pair in pairs if place is None or (pair[0].at or 0) == place]


def _times_as_good(results: Results, ours: Measurement, theirs: Measurement) -> float:
    info = results.case(ours.suite, ours.case)
    better = next(quantity.better for quantity in info.quantities if quantity.name == ours.quantity)
    return theirs.median / ours.median if better == "lower" else ours.median / theirs.median


def _place(results: Results, one: Measurement) -> str:
    case: CaseInfo = results.case(one.suite, one.case)
    where = "" if one.at is None or case.axis is None else f", {case.axis.name} {shown.place(case.axis, one.at)}"
    return f"{one.case}: {one.quantity}{where}"


def _flat(results: Results) -> Iterator[tuple[str, ...]]:
    """The goal that operations take no longer among many snapshots."""
    for host in results.hosts:
        by_quantity: dict[str, list[Measurement]] = {}
        for one in results.measurements:
            if (one.host, one.side, one.suite, one.case) == (host, OURS, "ops", "by-snapshots") and one.of_runs:
                by_quantity.setdefault(one.quantity, []).append(one)
        ratios = []
        for quantity, series in by_quantity.items():
            series.sort(key=lambda one: one.at or 0)
            if len(series) > 1 and series[-1].median:
                ratios.append((series[0].median / series[-1].median, f"{quantity}, {series[-1].at:,g} snapshots"))
        if ratios:
            ratios.sort()
            reached = "yes" if ratios[0][0] >= 1 / FLAT else "in part" if ratios[-1][0] >= 1 / FLAT else "**no**"
            span = f"{ratios[0][0]:.2f}–{ratios[-1][0]:.2f}"
            yield f"ops: flat by snapshots (at most {FLAT} × the time)", reached, span, ratios[0][1], host
