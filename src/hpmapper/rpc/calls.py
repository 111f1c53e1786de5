"""How many calls of which kind there were, how they ended, and how long they took: for metrics.

Counting must cost next to nothing beside a call of 40 µs. So there are no names to look up and no objects to make: a
list of numbers for each method and outcome, and one lock that nobody holds for long.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from typing import NamedTuple

BOUNDS = (0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.1, 0.5, 2.5, 10.0, 60.0)
"""Upper bounds of the histogram's buckets in seconds; above the last one there is one more."""


class Tally(NamedTuple):
    """Calls of one method that ended alike: seconds in all, and how many in each bucket."""

    seconds: float
    buckets: tuple[int, ...]


class Calls:
    """The tallies of one server; for use by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tallies: dict[tuple[str, str], list[float]] = {}

    def count(self, method: str, outcome: str, seconds: float) -> None:
        """Note the end of a call."""
        key = method, outcome
        with self._lock:
            tally = self._tallies.get(key)
            if tally is None:
                tally = self._tallies[key] = [0.0] * (len(BOUNDS) + 2)
            tally[0] += seconds
            tally[1 + bisect_left(BOUNDS, seconds)] += 1

    def tallies(self) -> dict[tuple[str, str], Tally]:
        """By method and outcome."""
        with self._lock:
            return {key: Tally(one[0], tuple(map(int, one[1:]))) for key, one in self._tallies.items()}
