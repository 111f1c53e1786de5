"""Which driver a new root gets, and what is said of those it does not get: probed on this machine, as it is."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpmapper.config import Config
from hpmapper.drivers import registry
from hpmapper.errors import FailedPrecondition, Unsupported
from hpmapper.kernel import dm
from hpmapper.root import DATABASE, driver_name, open_root, remove_root

pytestmark = pytest.mark.kernel


@pytest.fixture
def config(tmp_path: Path) -> Iterator[Config]:
    """A root directory that is not there yet."""
    made = Config(root=tmp_path / "root").with_options(["pool.size=400M", "min_free_space=0"])
    yield made
    if (made.root / DATABASE).exists():
        remove_root(made, force=True)


def _left(config: Config, *names: str) -> None:
    for name in names:
        (config.root / name).mkdir(parents=True)


def _chosen(config: Config) -> str:
    with open_root(config):
        return driver_name(config)


def test_a_state_that_is_there_wins_over_the_order(config: Config) -> None:
    _left(config, "overlay/a")
    assert _chosen(config) == "overlay"


def test_an_empty_state_is_none(config: Config) -> None:
    _left(config, "overlay", "devicemapper")
    expected, _ = registry.choose(config.root, config.pool)
    assert _chosen(config) == expected.name


def test_what_vfs_left_is_ignored(config: Config) -> None:
    _left(config, "vfs/a", "vfs/t")
    expected, _ = registry.choose(config.root, config.pool)
    assert expected.name != "vfs"
    assert _chosen(config) == expected.name


def test_several_states_are_refused_by_name(config: Config) -> None:
    _left(config, "overlay/a", "devicemapper/a", "vfs/a")
    with pytest.raises(FailedPrecondition, match="contains several valid graphdrivers: overlay, devicemapper"):
        _chosen(config)
    with open_root(Config(root=config.root, driver="overlay")):
        assert driver_name(config) == "overlay", "naming one decides"


def test_a_state_whose_driver_does_not_work_stops_everything(config: Config) -> None:
    try:
        dm.version()
    except OSError:
        _left(config, "devicemapper/a")
        with pytest.raises(Unsupported, match="devicemapper does not work here"):
            _chosen(config)
    else:
        pytest.skip("this kernel has device-mapper, so there is no driver that does not work")


def test_layers_without_their_database_are_not_taken_over(config: Config) -> None:
    _left(config, "overlay/l/1/diff")
    with pytest.raises(FailedPrecondition, match="no database that knows them"):
        _chosen(config)
    assert (config.root / "overlay/l/1/diff").is_dir()


def test_a_recorded_driver_wins_over_what_lies_about(config: Config) -> None:
    with open_root(Config(root=config.root, driver="vfs")):
        pass
    _left(config, "overlay/a", "devicemapper/a")
    assert _chosen(config) == "vfs"


def _drivers(*words: str) -> dict[str, dict[str, object]]:
    done = subprocess.run(
        [sys.executable, "-m", "hpmapper.cli.main", *words], capture_output=True, text=True, check=True
    )
    return {one["name"]: one for one in json.loads(done.stdout)}


def _text(*words: str) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "hpmapper.cli.main", *words], capture_output=True, text=True, check=True
    )
    return {line.split()[0]: " ".join(line.split()[1:]) for line in done.stdout.splitlines()}


def test_each_driver_is_tried_and_told(tmp_path: Path) -> None:
    words = ("--root", str(tmp_path / "root"), "drivers", "--directory", str(tmp_path))
    facts, text = _drivers(*words, "--json"), _text(*words)
    assert list(facts) == [one.name for one in registry.DRIVERS]
    for name, one in facts.items():
        if one["works"]:
            assert text[name].startswith("works here")
        else:
            assert text[name].startswith("could work: " if one["how"] else "cannot work here: ")
            assert one["why"]
    assert facts["vfs"]["works"]


def test_a_remedy_is_told_where_there_is_one() -> None:
    """A directory pool on tmpfs cannot clone; another directory could."""
    text = _text("--storage-opt=pool.kind=directory", "drivers", "--directory", "/dev/shm")
    assert text["hpmapper"].startswith("could work: use XFS")
    assert "reflink: tmpfs refuses FICLONE" in text["hpmapper"]


def test_what_a_kernel_lacks_is_no_remedy() -> None:
    try:
        dm.version()
    except OSError:
        assert _text("drivers")["devicemapper"].startswith("cannot work here: device-mapper: ")
    else:
        pytest.skip("this kernel has device-mapper")
