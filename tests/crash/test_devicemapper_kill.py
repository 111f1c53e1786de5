"""The devicemapper driver killed at every step, in a guest: see tests.crash.test_kill, whose scenario this is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hpmapper.config import Config
from hpmapper.kernel import dm, mount
from hpmapper.root import open_root
from tests import scenario
from tests.crash.test_kill import _KILLED, Place, _learn

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(3000)]

_PARTS = 4

OPTIONS = [
    "dm.basesize=320M",
    "dm.loopdatasize=2G",
    "dm.loopmetadatasize=16M",
    "dm.min_free_space=0%",
    "min_free_space=0",
]


@pytest.fixture
def place(tmp_path: Path, private_mounts: None) -> Iterator[Place]:
    made = Place(Config(root=tmp_path / "root", driver="devicemapper").with_options(OPTIONS), tmp_path)
    scenario.write_layouts(made.layouts)
    yield made
    with open_root(made.config) as opened:
        opened.engine.detach()
    for one in mount.mounts_below(tmp_path):
        mount.umount(one.target, lazy=True)


def _assert_pool_is_what_is_known(config: Config) -> None:
    """No thin device without a record, none lost, and none left active."""
    with open_root(config) as opened:
        devices = opened.engine.driver.devices  # type: ignore[attr-defined]
        with devices.metadata() as (found, root):
            assert found.devices(root).keys() == devices.records.used_ids()
        active = {name for name in dm.devices() if name.startswith(f"{devices.prefix}-")}
        assert active == {devices.pool}


@pytest.mark.parametrize(
    "part", [pytest.param(part, marks=pytest.mark.guest("dm", short=part == 0)) for part in range(_PARTS)]
)
def test_killed_at_every_point(place: Place, part: int) -> None:
    """Of points that are passed several times, at the first and the last; each part takes every fourth."""
    _learn(place)
    hits: dict[str, list[str]] = {}
    for point in place.points():
        hits.setdefault(point.partition(":")[0], []).append(point)
    chosen = [point for _, points in sorted(hits.items()) for point in dict.fromkeys((points[0], points[-1]))][
        part::_PARTS
    ]
    for point in chosen:
        status, states = place.run(point)
        assert status == _KILLED, f"{point} was not reached"
        place.verify(states)
        _assert_pool_is_what_is_known(place.config)
    print(f"\nkilled at {' '.join(chosen)}")
