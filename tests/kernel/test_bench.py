"""The short form of hpmapper bench on this host: the shape of its results, and what must hold whatever the times."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpmapper.bench import results as forms
from hpmapper.bench.results import Results
from hpmapper.kernel import loop, mount
from tests.conftest import loops_over

pytestmark = pytest.mark.kernel

COMMAND = [
    sys.executable,
    "-m",
    "hpmapper.cli.main",
    "bench",
    "run",
    "--short",
    "--no-plots",
    "--runs",
    "2",
    "--size",
    "2G",
]
SIDES = {"hpmapper", "overlay-xfs", "overlay-ext4", "bare-xfs", "bare-ext4", "vfs"}
SUITES = ("cow", "cache", "start", "ingest", "space", "ops", "diff")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The results of the suites that need neither a network nor fio."""
    place = tmp_path_factory.mktemp("bench")
    words = [*SUITES, "--drivers", "hpmapper,overlay,vfs", "--work", str(place / "work"), "--out", str(place / "out")]
    done = subprocess.run(
        [*COMMAND, *words, "--images", str(place / "images")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not list((place / "work").iterdir())
    assert not loops_over(place)
    return forms.load(place / "out")


def test_every_side_took_part_and_nothing_failed(found: Results) -> None:
    assert {one.name for one in found.sides} == SIDES
    assert not [one for one in found.skipped if one.failed]
    assert {one.suite for one in found.measurements} == set(SUITES)


def test_every_measurement_has_its_runs_and_their_noise(found: Results) -> None:
    for one in found.measurements:
        case = found.case(one.suite, one.case)
        assert one.quantity in {quantity.name for quantity in case.quantities}
        assert len(one.runs) == len(one.noise) == (1 if one.suite == "space" else 2), one.key
        assert (one.at is None) == (case.axis is None)
        assert all(value >= 0 for value in one.samples if one.quantity != "new space"), one.key
        assert all(0 <= noise.waited <= 1 and 0 <= noise.stolen <= 1 for noise in one.noise)


def test_hosts_and_sessions_are_written_down(found: Results) -> None:
    (session,) = found.sessions
    assert session.command[1:3] == ["bench", "run"]
    assert not session.interrupted
    assert {"kernel", "processor", "memory", "disk", "hpmapper"} <= set(found.hosts["host"])


def _median(found: Results, suite: str, case: str, quantity: str, side: str, at: float | None = None) -> float:
    one = found.find(suite, case, quantity, side, at)
    assert one is not None, (suite, case, quantity, side, at)
    return one.median


def test_space_is_what_the_drivers_promise(found: Results) -> None:
    size = 16 << 20
    assert _median(found, "cow", "first-write", "new space", "hpmapper", size) < 1024
    assert _median(found, "cow", "first-write", "new space", "overlay-ext4", size) >= size / 1024
    ours, overlays = (_median(found, "space", "releases", "used", side, 3) for side in ("hpmapper", "overlay-xfs"))
    assert ours < overlays


def test_two_versions_share_their_pages(found: Results) -> None:
    ours, overlays = (_median(found, "cache", "two-versions", "read", side) for side in ("hpmapper", "overlay-xfs"))
    assert ours < overlays


def test_ctrl_c_leaves_nothing_and_keeps_what_there_is(tmp_path: Path) -> None:
    words = ["cow", "cache", "--drivers", "hpmapper", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    with subprocess.Popen([*COMMAND, *words], stderr=subprocess.PIPE, process_group=0) as process:
        assert process.stderr is not None
        while b"overwrite" not in process.stderr.readline():
            assert process.poll() is None
        time.sleep(0.3)  # into the case
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert not list((tmp_path / "work").iterdir())
    assert not loops_over(tmp_path)
    assert not mount.mounts_below(tmp_path)
    kept = forms.load(tmp_path / "out")
    assert kept.sessions[0].interrupted
    assert any(one.case == "first-write" for one in kept.measurements)


def test_a_device_is_cut_up(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.touch()
    os.truncate(disk, 3 << 30)
    words = [
        "--case",
        "ops/limits",
        "--drivers",
        "overlay",
        "--work",
        str(tmp_path / "work"),
        "--out",
        str(tmp_path / "out"),
    ]
    with loop.attached(disk, block_size=4096) as device:
        done = subprocess.run([*COMMAND, *words, "--device", str(device)], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "gives only" in done.stderr, "four sides do not fit"
        words[3] = "overlay-xfs"
        done = subprocess.run([*COMMAND, *words, "--device", str(device)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert {one.side for one in forms.load(tmp_path / "out").measurements} == {"bare-xfs"}
