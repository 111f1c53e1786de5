"""What the HP-Mapper paper claims (SoCC'19, doi 10.1145/3357223.3362718), beside the same quantities measured.

The paper's abstract gives three figures, and does not say which storage driver each is against.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hpmapper.bench.report.shown import Grid
from hpmapper.bench.results import Measurement, Results

OURS = "hpmapper"
AGAINST = ("devicemapper", "docker-devicemapper", "overlay-ext4", "overlay-xfs", "containerd-overlayfs")

REMARK = (
    "The paper names no baseline; its three problems are those of block-based drivers. Each cell compares two sides of "
    "one host: where that is a guest under emulation, both sides ran on the same emulated processor."
)


class _Pair(NamedTuple):
    """The same quantity of ours and of another, at one place."""

    ours: Measurement
    theirs: Measurement


def table(results: Results) -> Grid | None:
    """The claims, and for each other side what was measured; None if nothing was."""
    hosts = list(results.hosts)
    columns = [(side, host) for host in hosts for side in AGAINST if _measured(results, side, host)]
    if not columns:
        return None
    claims = (
        ("page cache: 65.4 % less on average", _cache),
        ("throughput of real workloads: up to 39.4 % more", _throughput),
        ("start-up: 2.0 × as fast", _start),
    )
    rows = [[claim, *(judge(results, side, host) for side, host in columns)] for claim, judge in claims]
    headers = ["the paper's claim", *(f"against {side} ({host})" for side, host in columns)]
    return Grid("", headers, rows)


def _measured(results: Results, side: str, host: str) -> bool:
    return any(one.side == side and one.host == host for one in results.measurements)


def _pairs(results: Results, side: str, host: str, suites: Sequence[str], quantity: str = "") -> list[_Pair]:
    """Quantities that both sides have."""
    known = {one.key: one for one in results.measurements}
    found = []
    for one in results.measurements:
        if one.side != OURS or one.host != host or one.suite not in suites or quantity not in ("", one.quantity):
            continue
        other = known.get((host, one.suite, one.case, one.quantity, side, one.at))
        if other is not None and other.of_runs and one.of_runs:
            found.append(_Pair(one, other))
    return found


def _last(pairs: Sequence[_Pair]) -> list[_Pair]:
    """Of each case the pair at the last place of its axis."""
    by_case = {pair.ours.case: pair for pair in sorted(pairs, key=lambda pair: pair.ours.at or 0)}
    return list(by_case.values())


def _cache(results: Results, side: str, host: str) -> str:
    pairs = _last(_pairs(results, side, host, ["cache"], "page cache"))
    told = [(1 - pair.ours.median / pair.theirs.median, _what(pair)) for pair in pairs if pair.theirs.median]
    words = [f"{abs(share):.1%} {'less' if share >= 0 else 'more'} ({what})" for share, what in told]
    return "; ".join(words) or "not measured"


def _throughput(results: Results, side: str, host: str) -> str:
    """The largest gain, and the smallest, of applications; where there are none of fio, or else of overwriting."""
    for suite in ("apps", "io", "cow"):
        pairs = [pair for pair in _pairs(results, side, host, [suite]) if _is_rate(results, pair.ours)]
        gains = sorted((pair.ours.median / pair.theirs.median - 1, _what(pair)) for pair in pairs if pair.theirs.median)
        if gains:
            return f"{gains[-1][0]:+.1%} ({gains[-1][1]}) at best, {gains[0][0]:+.1%} ({gains[0][1]}) at worst"
    return "not measured"


def _start(results: Results, side: str, host: str) -> str:
    pairs = _last(_pairs(results, side, host, ["start"], "slowest"))
    told = [f"{pair.theirs.median / pair.ours.median:.2f} × ({_what(pair)})" for pair in pairs if pair.ours.median]
    return "; ".join(told) or "not measured"


def _is_rate(results: Results, one: Measurement) -> bool:
    units = {quantity.name: quantity.unit for quantity in results.case(one.suite, one.case).quantities}
    return units[one.quantity] in ("per second", "MiB/s")


def _what(pair: _Pair) -> str:
    one = pair.ours
    text = f"{one.suite}/{one.case}" + (f": {one.quantity}" if one.suite in ("apps", "io", "cow") else "")
    return text if one.at is None else f"{text}, {one.at:g}"
