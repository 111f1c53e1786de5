"""Killed at every step between two durable states: what was reported stays whole, the rest leaves nothing behind.

The steps are those that call `faults.point`. A clean run lists them; then the scenario is run again for each, dies
there as by SIGKILL, and the root is opened by a new process, checked to the last directory, and used again.
"""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hpmapper.config import Config
from hpmapper.kernel import mount
from hpmapper.root import open_root, remove_root
from tests import scenario
from tests.scenario import Report, in_child

pytestmark = [pytest.mark.kernel]

_KILLED = -signal.SIGKILL


class Place:
    """A root under torture, with what its images show when all goes well."""

    def __init__(self, config: Config, directory: Path) -> None:
        self.config = config
        self.directory = directory
        self.layouts = directory / "layouts"
        self.log = directory / "points"
        self._runs = 0
        self.expected: dict[str, str] = {}

    def run(self, fault: str = "", log: Path | None = None) -> tuple[int, dict[str, bool | None]]:
        """Run the scenario once; its exit status and what it reported."""
        self._runs += 1
        report = Report(self.directory / f"report-{self._runs}")
        status = in_child(lambda: scenario.run(self.config, self.layouts, report), fault, log)
        return status, report.states()

    def verify(self, states: dict[str, bool | None]) -> None:
        """Check the root in a new process; every second time as after a reboot."""
        if self._runs % 2:
            scenario.forget_boot(self.config)
        assert in_child(lambda: scenario.verify(self.config, states, self.expected)) == 0, "see the traceback above"

    def points(self) -> list[str]:
        """Fault points to die at: every hit of each name."""
        hits = Counter(line.partition(":")[0] for line in self.log.read_text().splitlines())
        return [f"{name}:{hit}" for name, count in sorted(hits.items()) for hit in range(1, count + 1)]


def _config(directory: Path, driver: str) -> Config:
    # btrfs frees what a deleted subvolume took some time later, and one run follows the other.
    size = "4G" if driver == "btrfs" else "400M"
    return Config(root=directory / "root", driver=driver).with_options([f"pool.size={size}", "min_free_space=0"])


@pytest.fixture(params=["hpmapper", "overlay", "btrfs", "vfs"])
def place(request: pytest.FixtureRequest, tmp_path: Path, private_mounts: None) -> Iterator[Place]:
    made = Place(_config(tmp_path, request.param), tmp_path)
    scenario.write_layouts(made.layouts)
    yield made
    for one in mount.mounts_below(tmp_path):
        mount.umount(one.target, lazy=True)


def _learn(place: Place) -> None:
    """Run undisturbed: what are the points, and what do the images show?"""
    status, states = place.run("image.recorded:4")  # while all images are there
    assert status == _KILLED
    place.expected = _contents(place)
    assert place.expected.keys() == {"base", "third", "other", "made"}
    place.verify(states)
    status, states = place.run(log=place.log)
    assert status == 0
    place.verify(states)


_FIRST_DEATHS = (
    "ingest.stored:2",
    "ingest.layer-renamed:1",
    "prepare.prepared:1",
    "remove.intended:1",
    "collect.layer-forgotten:1",
)


@pytest.mark.parametrize("first", _FIRST_DEATHS)
def test_killed_again_while_recovering(
    place: Place, first: str, record_property: Callable[[str, object], None]
) -> None:
    """Recovery may be cut short too, at every point of its own, and is simply done again."""
    _learn(place)
    _, states = place.run(first)
    steps = place.directory / "recovery"
    assert in_child(lambda: _recover(place.config), log=steps) == 0
    points = steps.read_text().split()
    place.verify(states)
    for point in points:
        status, states = place.run(first)
        assert status == _KILLED
        assert in_child(lambda: _recover(place.config), point) == _KILLED, f"{point} was not reached"
        place.verify(states)
    record_property("kills", len(points))
    print(f"\n{place.config.driver}: after {first}, killed at {len(points)} steps of recovery")


def _recover(config: Config) -> None:
    scenario.forget_boot(config)
    with open_root(config) as opened:
        opened.engine.rubbish.collect()


def test_killed_while_a_root_is_made_or_removed(place: Place, record_property: Callable[[str, object], None]) -> None:
    """A root half made is made by the next call, one half removed is removed."""
    steps = place.directory / "points"
    assert in_child(lambda: _make_and_remove(place.config), log=steps) == 0
    points = steps.read_text().split()
    for point in points:
        assert in_child(lambda: _make_and_remove(place.config), point) == _KILLED
        assert in_child(lambda: _make_and_remove(place.config)) == 0, point
        assert not place.config.root.exists()
    record_property("kills", len(points))
    print(f"\n{place.config.driver}: killed at {len(points)} steps of making and removing a root")


@pytest.mark.parametrize("place", ["hpmapper"], indirect=True)
@pytest.mark.parametrize("point", ["ingest.object-written:2", "ingest.synced:1", "ingest.stored:1"])
def test_objects_of_a_killed_ingest_are_gone_with_the_next_command(place: Place, point: str) -> None:
    """They lie under their final names from the start; no reboot and no collection is needed to be rid of them."""
    status, states = place.run(point)
    assert status == _KILLED
    assert in_child(lambda: _assert_no_orphans(place.config)) == 0
    place.verify(states)


def _assert_no_orphans(config: Config) -> None:
    with open_root(config) as opened:
        scenario.assert_no_orphans(opened.engine)


def _make_and_remove(config: Config) -> None:
    with open_root(config) as opened:
        opened.engine.prepare(f"by-{os.getpid()}", None)
    remove_root(config, force=True)


def _contents(place: Place) -> dict[str, str]:
    answer = place.directory / "contents"
    assert in_child(lambda: answer.write_text(json.dumps(scenario.contents(place.config)))) == 0
    found: dict[str, str] = json.loads(answer.read_text())
    return found


def test_killed_at_every_point(place: Place, record_property: Callable[[str, object], None]) -> None:
    _learn(place)
    points = place.points()
    for point in points:
        status, states = place.run(point)
        assert status == _KILLED, f"{point} was not reached"
        place.verify(states)
    names = {point.partition(":")[0] for point in points}
    record_property("points", len(names))
    record_property("kills", len(points))
    print(f"\n{place.config.driver}: killed at {len(points)} hits of {len(names)} points: {' '.join(sorted(names))}")
