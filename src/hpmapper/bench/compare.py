"""What changed between two results, beyond noise.

The rule: a quantity changed if no run of one result lies within the range of the other's runs (a run counts by its
median), and the medians differ by more than 5 %. With n runs on each side, chance alone separates the runs with a
probability of 2 / C(2n, n): 10 % with 3, 3 % with 4, 0.8 % with 5. With fewer than 3 nothing is said.

What no change of ours can move, the bare file system, tells how much the machine itself has changed in between.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from hpmapper.bench.results import Measurement, Results

RULE = (
    "changed: the ranges of the runs' medians do not overlap, and the medians differ by more than 5 %; "
    "at least 3 runs on each side"
)
LEAST_RUNS = 3
LEAST_DIFFERENCE = 0.05

Verdict = Literal["better", "worse", "same", "too few runs"]


@dataclass(frozen=True)
class Change:
    """One quantity before and after. ratio: after to before; chance: of runs being so separate by chance."""

    before: Measurement
    after: Measurement
    verdict: Verdict
    ratio: float
    chance: float


def compare(before: Results, after: Results) -> list[Change]:
    """Every quantity that both have, in the order of the first."""
    theirs = {one.key: one for one in after.measurements}
    return [
        _change(one, theirs[one.key], _better(before, one))
        for one in before.measurements
        if one.key in theirs and one.of_runs and theirs[one.key].of_runs
    ]


def _better(results: Results, one: Measurement) -> str:
    info = results.case(one.suite, one.case)
    return next(quantity.better for quantity in info.quantities if quantity.name == one.quantity)


def _change(before: Measurement, after: Measurement, better: str) -> Change:
    a, b = before.of_runs, after.of_runs
    ratio = after.median / before.median if before.median else (1.0 if not after.median else math.inf)
    chance = 2 / math.comb(len(a) + len(b), len(a))
    return Change(before, after, _verdict(a, b, ratio, better), ratio, chance)


def _verdict(a: list[float], b: list[float], ratio: float, better: str) -> Verdict:
    if min(len(a), len(b)) < LEAST_RUNS:
        return "too few runs"
    overlap = min(a) <= max(b) and min(b) <= max(a)
    if overlap or abs(ratio - 1) <= LEAST_DIFFERENCE:
        return "same"
    return "better" if (ratio < 1) == (better == "lower") else "worse"
