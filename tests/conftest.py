"""Tests marked `kernel`: real mounts and loop devices, in a mount namespace of their own; nothing may stay behind."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from hpmapper.kernel import loop, mount
from hpmapper.pool.base import MIB, PoolFs
from tests.filesystems import mounted

# CI judges a change, always by the same examples; new ones are found by everybody who runs the tests.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

pytest_plugins = ["tests.vm.plugin"]

pytest.register_assert_rewrite(
    "hpmapper.testing.contract", "tests.scenario"
)  # so that a failed case says what was compared


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--clients", action="store_true", help="also run the tests with other releases' programs")


def pytest_configure() -> None:
    # A shell's background jobs ignore Ctrl-C, and so would all that tests start, Ctrl-C's own tests included.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--clients"):
        left_out = [item for item in items if item.get_closest_marker("clients")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("clients")]
    if os.geteuid() == 0:
        return
    for item in items:
        if item.get_closest_marker("kernel"):
            item.add_marker(pytest.mark.skip(reason="needs root: sudo ./test"))


@pytest.fixture(scope="session", autouse=True)
def private_mounts(request: pytest.FixtureRequest) -> None:
    """No mount made here is seen outside, and all of them end with the test process. (Loop devices do not.)"""
    if os.geteuid() == 0 and any(item.get_closest_marker("kernel") for item in request.session.items):
        mount.private_namespace()


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest, private_mounts: None) -> Iterator[None]:
    """Fail a test that leaves a mount, or a loop device over one of its files; clean up after it in any case."""
    if not request.node.get_closest_marker("kernel"):
        yield
        return
    tmp_path: Path = request.getfixturevalue("tmp_path")
    before = Counter(one.target for one in mount.mounts())
    yield
    mounts = _more_than(before)
    for one in mounts:
        mount.umount(one.target, lazy=True)
    loops = loops_over(tmp_path)
    for device in loops:
        loop.detach(device)
    assert not mounts, f"mounts left: {[one.target for one in mounts]}"
    assert not loops, f"loop devices left: {loops}"


def _more_than(before: Counter[str]) -> list[mount.Mount]:
    """The mounts that were not there before, last mounted first.

    By place, not by number: a pool that a test attached again may have got another one.
    """
    seen: Counter[str] = Counter()
    new = []
    for one in mount.mounts():
        seen[one.target] += 1
        if seen[one.target] > before[one.target]:
            new.append(one)
    return new[::-1]


def loops_over(directory: Path) -> list[str]:
    """Loop devices whose backing file lies (or lay) below `directory`. Other tests' devices are none of ours."""
    found = []
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            backing = entry.read_text(encoding="utf-8", errors="surrogateescape")
        except OSError:
            continue  # freed in between
        if backing.startswith(f"{directory}/"):
            found.append(f"/dev/{entry.parent.parent.name}")
    return found


@pytest.fixture
def xfs(tmp_path: Path) -> Iterator[Path]:
    """A mounted XFS with reflink."""
    target = mounted(PoolFs.XFS, tmp_path, 320 * MIB)
    yield target
    for one in mount.mounts_below(target):
        mount.umount(one.target)
