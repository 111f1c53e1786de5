"""The zfs driver killed at every step, in a guest: see tests.crash.test_kill, whose scenario this is."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpmapper.config import Config
from hpmapper.drivers.zfs import FSNAME
from hpmapper.kernel import mount
from hpmapper.pool.tools import run_tool
from tests import scenario, zpools
from tests.crash.test_kill import _KILLED, Place, _learn, _make_and_remove
from tests.scenario import in_child

pytestmark = [pytest.mark.kernel, pytest.mark.guest("zfs"), pytest.mark.timeout(3000)]


@pytest.fixture
def place(tmp_path: Path, private_mounts: None) -> Iterator[Place]:
    with zpools.dataset(tmp_path) as fsname:
        options = [f"{FSNAME}={fsname}", "min_free_space=0"]
        made = Place(Config(root=tmp_path / "root", driver="zfs").with_options(options), tmp_path)
        scenario.write_layouts(made.layouts)
        yield made
        for one in mount.mounts_below(tmp_path):
            mount.umount(one.target, lazy=True)


def _datasets(config: Config) -> set[str]:
    fsname = config.options[FSNAME]
    listed = run_tool(["zfs", "list", "-H", "-o", "name", "-r", "-t", "all", fsname]).stdout.splitlines()
    return set(listed) - {fsname}


def _points(place: Place, part: int) -> list[str]:
    """Of points that are passed several times, the first and the last; every second of them."""
    hits: dict[str, list[str]] = {}
    for point in place.points():
        hits.setdefault(point.partition(":")[0], []).append(point)
    return [point for _, points in sorted(hits.items()) for point in dict.fromkeys((points[0], points[-1]))][part::2]


@pytest.mark.parametrize("part", [0, 1])
def test_killed_at_every_point(place: Place, part: int) -> None:
    _learn(place)
    chosen = _points(place, part)
    for point in chosen:
        status, states = place.run(point)
        assert status == _KILLED, f"{point} was not reached"
        place.verify(states)
        assert _datasets(place.config) == set(), f"left after {point}"
    print(f"\nkilled at {' '.join(chosen)}")


def test_killed_while_a_root_is_made_or_removed(place: Place) -> None:
    """A root half made is made by the next call, one half removed is removed; the dataset is free for another."""
    steps = place.directory / "points"
    assert in_child(lambda: _make_and_remove(place.config), log=steps) == 0
    points = steps.read_text().split()
    for point in points:
        assert in_child(lambda: _make_and_remove(place.config), point) == _KILLED
        assert in_child(lambda: _make_and_remove(place.config)) == 0, point
        assert not place.config.root.exists()
        assert _datasets(place.config) == set()
    print(f"\nkilled at {len(points)} steps of making and removing a root")


def test_the_machine_stops_without_warning(place: Place) -> None:
    """The pool is imported as its device was at that moment: what was reported is there, the rest leaves nothing."""
    _learn(place)
    pool = place.config.options[FSNAME].partition("/")[0]
    status, states = place.run("image.recorded:2")
    assert status == _KILLED
    file = place.directory / "zpool"
    saved = place.directory / "saved"
    subprocess.run(["cp", "--sparse=always", file, saved], check=True)  # now: exporting would bring more to disk
    for one in mount.mounts_below(place.config.root):
        mount.umount(one.target, lazy=True)
    run_tool(["zpool", "export", "-f", pool])
    saved.rename(file)
    run_tool(["zpool", "import", "-f", "-d", place.directory, pool])
    place.verify(states)
