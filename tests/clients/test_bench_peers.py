"""The peers of hpmapper bench at work: each that can run here is measured, and the others say why not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hpmapper.bench import results as forms
from hpmapper.bench.peers import PEERS
from tests.conftest import loops_over

pytestmark = [pytest.mark.kernel, pytest.mark.clients]

CASES = ("cache/two-versions", "ops/by-layers", "ingest/real-image")


def test_every_peer_is_measured_or_says_why_not(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hpmapper.cli.main", "bench", "run", "--short", "--no-plots", "--runs", "2"]
    command += [word for name in CASES for word in ("--case", name)]
    command += ["--drivers", "overlay-xfs", "--peers", "all", "--size", "2G"]
    command += ["--work", str(tmp_path / "work"), "--images", str(tmp_path / "images"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = forms.load(tmp_path / "out")
    assert not [one for one in found.skipped if one.failed]
    absent = {one.side for one in found.absent}
    assert absent == {peer.name for peer in PEERS if peer.why_not()}
    for peer in {peer.name for peer in PEERS} - absent:
        layers = {one.at for one in found.measurements if (one.side, one.quantity) == (peer, "mount")}
        assert layers == {1.0, 4.0, 8.0}, peer
    unpacked = [
        one
        for one in found.measurements
        if one.quantity == "written" and one.side in ("containerd-overlayfs", "overlay-xfs")
    ]
    for one in unpacked:
        assert min(one.samples) > 0.5 * max(one.samples), "a later run found the image unpacked"
    assert not loops_over(tmp_path)
