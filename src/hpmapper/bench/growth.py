"""How cost grows: the exponent of a power law through medians, by least squares on logarithms."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from dataclasses import dataclass

from hpmapper.bench.results import Measurement, Results

LINEAR = 1.1
"""An exponent above this is worse than linear: what noise does to a straight line is below it."""

RULE = (
    "cost ~ place ^ exponent, by least squares on logarithms of medians; at the end: the least exponent that the runs "
    f"at the last two places allow. Above {LINEAR}, either is worse than linear."
)


@dataclass(frozen=True)
class Growth:
    """How a quantity grows on a side: cost ~ place ** exponent.

    Attributes:
        fit: share of the variance that this explains.
        end: the exponent from the last but one place to the last, from that one's dearest run to this one's cheapest.
    """

    suite: str
    case: str
    quantity: str
    side: str
    host: str
    exponent: float
    fit: float
    end: float
    first: float
    last: float
    points: int

    @property
    def is_worse_than_linear(self) -> bool:
        return max(self.exponent, self.end) > LINEAR


def growths(results: Results) -> list[Growth]:
    """The growth of every quantity whose axis says that it may not be worse than linear; three places or more."""
    series: defaultdict[tuple[str, ...], list[Measurement]] = defaultdict(list)
    for one in results.measurements:
        axis = results.case(one.suite, one.case).axis
        if axis is not None and axis.growth and one.at and one.of_runs and min(one.of_runs) > 0:
            series[one.suite, one.case, one.quantity, one.side, one.host].append(one)
    found = []
    for (suite, case, quantity, side, host), members in series.items():
        if len(members) < 3:
            continue
        members.sort(key=lambda one: one.at or 0)
        better = next(q.better for q in results.case(suite, case).quantities if q.name == quantity)
        costs = [[_cost(value, better) for value in one.of_runs] for one in members]
        places = [one.at or 1 for one in members]
        exponent, fit = power_law(places, [statistics.median(runs) for runs in costs])
        end = math.log(min(costs[-1]) / max(costs[-2])) / math.log(places[-1] / places[-2])
        ends = (members[0].median, members[-1].median)
        found.append(Growth(suite, case, quantity, side, host, exponent, fit, end, *ends, len(members)))
    return found


def _cost(value: float, better: str) -> float:
    return value if better == "lower" else 1 / value


def power_law(places: list[float], costs: list[float]) -> tuple[float, float]:
    """The exponent of cost ~ place ** exponent, and the fit's R squared."""
    x, y = [math.log(place) for place in places], [math.log(cost) for cost in costs]
    slope = statistics.linear_regression(x, y).slope
    if len(set(y)) == 1:
        return 0.0, 1.0
    return slope, statistics.correlation(x, y) ** 2
