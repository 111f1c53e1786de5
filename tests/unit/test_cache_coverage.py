"""Ranges of the disk: what is covered, and what was covered before."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hpmapper.cache.origins import Blocks, Coverage

RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)).map(lambda one: (one[0], one[0] + one[1])))


def bytes_of(parts: list[Blocks]) -> list[int]:
    return [byte for part in parts for byte in range(*part)]


@given(RANGES, st.tuples(st.integers(0, 60), st.integers(1, 20)))
def test_it_knows_each_byte(ranges: list[tuple[int, int]], asked: tuple[int, int]) -> None:
    coverage, known = Coverage(), set[int]()
    for one in ranges:
        assert bytes_of(coverage.add(*one)) == sorted(known & set(range(*one)))
        known |= set(range(*one))
    start, end = asked[0], asked[0] + asked[1]
    assert bytes_of(coverage.parts(start, end)) == sorted(known & set(range(start, end)))
    assert coverage.covers(start, end) == (set(range(start, end)) <= known)
