"""Comparing the roots of containers."""

from __future__ import annotations

from collections.abc import Mapping

from hpmapper.testing.trees import Facts

WITHOUT_TIME = frozenset({b"."})
"""The root's own time is that of its unpacking: no layer of ours has an entry for it."""

SECOND = 10**9


def differences(
    found: Mapping[bytes, Facts],
    expected: Mapping[bytes, Facts],
    without_time: frozenset[bytes] = WITHOUT_TIME,
    whole_seconds: bool = False,
) -> list[str]:
    """What two roots disagree on, a line each.

    Of some paths, times do not count. With `whole_seconds` what is less does not: containerd's differ writes no more.
    """
    lines = [f"{path!r} is missing" for path in sorted(expected.keys() - found.keys())]
    lines += [f"{path!r} should not be there" for path in sorted(found.keys() - expected.keys())]
    for path in sorted(found.keys() & expected.keys()):
        one, other = (_timed(facts[path], path in without_time, whole_seconds) for facts in (found, expected))
        for field, mine, theirs in zip(Facts._fields, one, other, strict=True):
            if mine != theirs:
                lines.append(f"{path!r}: {field} is {mine!r:.300} instead of {theirs!r:.300}")
    return lines


def _timed(facts: Facts, without_time: bool, whole_seconds: bool) -> Facts:
    """With a time that says no more than counts."""
    if without_time:
        return facts._replace(mtime_ns=0)
    return facts._replace(mtime_ns=facts.mtime_ns // SECOND * SECOND) if whole_seconds else facts
