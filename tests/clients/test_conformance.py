"""containerd's own snapshotter suite, over the socket: a fresh server, with a fresh root, for every subtest.

The suite's name tells it what to expect. As "overlayfs" it leaves out renaming a directory of a lower layer, which
overlayfs refuses unless redirect_dir is on; as "proxy" it asks for everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.clients import conformance, pools, servers, trees
from tests.clients.conformance import SUBTESTS, Verdict

pytestmark = pytest.mark.kernel

HERE = "here"
"""The containerd whose sources the host has: 1.6 on Debian 12."""


@dataclass(frozen=True)
class Case:
    """The suite of a Debian release, a server by name, and the name that the suite is told."""

    debian: str
    server: str
    name: str

    def __str__(self) -> str:
        return f"{self.debian}-{self.server}-{self.name}"


OURS = [Case(HERE, driver, "overlayfs") for driver in (*servers.DRIVERS, "btrfs")]
OTHERS = [
    Case(HERE, "stock-overlay", "overlayfs"),
    *(
        Case(debian, server, name)
        for debian in ("trixie", "sid")
        for server in (*servers.DRIVERS, "btrfs", "stock-overlay")
        for name in ("overlayfs", "proxy")
    ),
]
CASES = [*OURS, *(pytest.param(case, marks=pytest.mark.clients) for case in OTHERS)]

SKIPPED_BY_THE_SUITE = {(HERE, "Rename")}
"""1.6 leaves it out whatever the name."""

WITHOUT_RENAME = ("hpmapper", "overlay", "stock-overlay")
"""Servers whose roots are overlay mounts with redirect_dir off: renaming a directory of a lower layer is EXDEV there,
which programs such as mv answer with a copy. With it on, containerd's differ would lose what is in the directory."""

Judge = Callable[[Case], dict[str, Verdict]]


@pytest.fixture(scope="module")
def btrfs_pool(private_mounts: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A btrfs for the roots of the driver that needs one."""
    with pools.btrfs(tmp_path_factory.mktemp("btrfs")) as mounted:
        yield mounted


Roots = Callable[[Case], Path]


@pytest.fixture(scope="module")
def roots_of(pool: Path, btrfs_pool: Path) -> Roots:
    """Where a case has its roots."""
    return lambda case: (btrfs_pool if case.server == "btrfs" else pool) / str(case)


@pytest.fixture(scope="module")
def judge(roots_of: Roots) -> Judge:
    """Runs a suite against a server once, and remembers what it said."""
    known: dict[Case, dict[str, Verdict]] = {}

    def judged(case: Case) -> dict[str, Verdict]:
        if case not in known:
            binary = conformance.build(None if case.debian == HERE else trees.made(case.debian))
            roots = roots_of(case)
            roots.mkdir()
            known[case] = conformance.run(binary, servers.of(case.server), case.name, roots)
        return known[case]

    return judged


@pytest.mark.parametrize("subtest", SUBTESTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_suite(case: Case, subtest: str, judge: Judge) -> None:
    verdict = judge(case).get(subtest, Verdict("fail", ["the suite did not come to it\n", judge(case)[""].text]))
    if verdict.outcome == "skip":
        assert (case.debian, subtest) in SKIPPED_BY_THE_SUITE, verdict.text
        pytest.skip("the suite of this containerd leaves it out for everybody")
    if (case.name, subtest) == ("proxy", "Rename") and case.server in WITHOUT_RENAME:
        assert verdict.outcome == "pass" or "cross-device link" in verdict.text, verdict.text
        return
    assert verdict.outcome == "pass", verdict.text or judge(case)[""].text


@pytest.mark.parametrize("case", CASES, ids=str)
def test_suite_has_no_other_subtests_and_leaves_nothing(case: Case, judge: Judge, roots_of: Roots) -> None:
    assert {name for name in judge(case) if name} == set(SUBTESTS)
    assert list(roots_of(case).iterdir()) == []
