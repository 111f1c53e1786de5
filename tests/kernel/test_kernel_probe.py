"""Probing tells the truth, leaves nothing, and survives a machine that allows nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpmapper.kernel import attempts, idmap, loop, mount, probe

pytestmark = pytest.mark.kernel


def test_everything_is_answered_once_and_nothing_stays(tmp_path: Path) -> None:
    namespaces = mount.mounts()
    features = probe.probe_all(tmp_path)
    assert tuple(one.name for one in features) == probe.FEATURE_NAMES
    assert all(one.gives and one.detail for one in features)
    assert [one for one in features if not one.available and not one.how] == []
    assert os.listdir(tmp_path) == []
    assert mount.mounts() == namespaces


def test_the_answers_are_those_of_the_directory(xfs: Path) -> None:
    inside = {one.name: one for one in probe.probe_all(xfs)}
    for name in ("mounting", "reflink", "overlay", "trusted-xattr", "user-xattr", "d_type", "idmapped-mounts"):
        assert inside[name].available, inside[name]
    assert "xfs" in inside["reflink"].detail
    (xfs / "memory").mkdir()
    mount.filesystem("tmpfs", "none", xfs / "memory")
    outside = probe.probe("reflink", xfs / "memory")
    assert not outside.available
    assert "tmpfs" in outside.detail


def test_a_name_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        probe.probe("warp-drive", tmp_path)


def test_a_probe_that_fails_half_way_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(scratch: Path) -> str:
        (scratch / "mounted").mkdir()
        mount.filesystem("tmpfs", "none", scratch / "mounted")
        image = attempts.erofs_image(scratch)
        with loop.attached(image):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(probe, "PROBES", (probe._Probe("test", "", "", fails),))
    (feature,) = probe.probe_all(tmp_path)
    assert (feature.available, feature.detail) == (False, "EIO: Input/output error")
    assert os.listdir(tmp_path) == []


def test_the_smallest_image_is_sound(tmp_path: Path) -> None:
    subprocess.run(["fsck.erofs", attempts.erofs_image(tmp_path)], check=True, capture_output=True)


def test_an_unprivileged_process_gets_answers_too(tmp_path: Path) -> None:
    code = (
        "import json, os, pathlib, sys\n"
        "from hpmapper.kernel import probe\n"
        "os.setgid(65534); os.setgroups([]); os.setuid(65534)\n"
        "print(json.dumps([(f.name, f.available, f.detail) for f in probe.probe_all(pathlib.Path(sys.argv[1]))]))\n"
    )
    # /tmp itself: pytest's directories are closed to others.
    place = Path(subprocess.run(["mktemp", "-d"], check=True, capture_output=True, text=True).stdout.strip())
    try:
        place.chmod(0o777)
        done = subprocess.run([sys.executable, "-c", code, place], check=True, capture_output=True, text=True)
        features = {name: (available, detail) for name, available, detail in json.loads(done.stdout)}
        assert not features["mounting"][0]
        assert features["mounting"][1].startswith("EPERM")
        assert not features["erofs-loop"][0]
        assert features["cachestat"][0]
        assert os.listdir(place) == []
    finally:
        place.rmdir()


def test_a_mapping_outlives_its_process() -> None:
    children = Path("/proc/thread-self/children")
    before = children.read_text()  # the tests' guest may be one
    with idmap.user_namespace([idmap.IdRange(0, 5000, 10)], [idmap.IdRange(0, 6000, 10)]) as fd:
        assert os.readlink(f"/proc/self/fd/{fd}").startswith("user:[")
    assert children.read_text() == before
