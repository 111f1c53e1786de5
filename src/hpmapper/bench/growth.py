"""How cost grows: the exponent of a power law through medians, by least squares on logarithms."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from dataclasses import dataclass

from hpmapper.bench.results import Measurement, Results

LINEAR = 1.1
"""An exponent above this is worse than linear: what noise does to a straight line is below it."""


@dataclass(frozen=True)
class Growth:
    """How a quantity grows on a side: cost ~ place ** exponent. fit: share of the variance that this explains."""

    suite: str
    case: str
    quantity: str
    side: str
    host: str
    exponent: float
    fit: float
    first: float
    last: float
    points: int

    @property
    def is_worse_than_linear(self) -> bool:
        return self.exponent > LINEAR


def growths(results: Results) -> list[Growth]:
    """The growth of every quantity whose axis says that it may not be worse than linear; three places or more."""
    series: defaultdict[tuple[str, ...], list[Measurement]] = defaultdict(list)
    for one in results.measurements:
        axis = results.case(one.suite, one.case).axis
        if axis is not None and axis.growth and one.at and one.of_runs and one.median > 0:
            series[one.suite, one.case, one.quantity, one.side, one.host].append(one)
    found = []
    for (suite, case, quantity, side, host), members in series.items():
        if len(members) < 3:
            continue
        members.sort(key=lambda one: one.at or 0)
        better = next(q.better for q in results.case(suite, case).quantities if q.name == quantity)
        costs = [one.median if better == "lower" else 1 / one.median for one in members]
        exponent, fit = power_law([one.at or 1 for one in members], costs)
        found.append(
            Growth(
                suite, case, quantity, side, host, exponent, fit, members[0].median, members[-1].median, len(members)
            )
        )
    return found


def power_law(places: list[float], costs: list[float]) -> tuple[float, float]:
    """The exponent of cost ~ place ** exponent, and the fit's R squared."""
    x, y = [math.log(place) for place in places], [math.log(cost) for cost in costs]
    slope = statistics.linear_regression(x, y).slope
    if len(set(y)) == 1:
        return 0.0, 1.0
    return slope, statistics.correlation(x, y) ** 2
