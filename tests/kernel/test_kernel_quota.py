"""Project quota of real file systems. Marked for a guest: many hosts' kernels have none, and say so here."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpmapper.drivers import limits
from hpmapper.drivers.overlay import OverlayDriver
from hpmapper.errors import FailedPrecondition
from hpmapper.kernel import fs, loop, mount, quota
from hpmapper.model import SnapshotId
from hpmapper.pool.base import MIB

pytestmark = [pytest.mark.kernel, pytest.mark.guest("quota", short=True)]

PROJECT = 2**31 + 12345
LIMIT = 8 * MIB
MKFS = {
    "xfs": ["mkfs.xfs", "-q", "-s", "size=4096", "-m", "reflink=1"],
    "ext4": ["mkfs.ext4", "-q", "-b", "4096", "-O", "quota,project", "-E", "quotatype=prjquota"],
}


@pytest.fixture(params=MKFS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A mounted file system that counts projects."""
    image, target = tmp_path / "image", tmp_path / "place"
    target.mkdir()
    image.touch()
    os.truncate(image, 320 * MIB)
    subprocess.run([*MKFS[request.param], os.fspath(image)], check=True)
    with loop.attached(image, block_size=4096) as device:
        try:
            mount.filesystem(request.param, device, target, options={"prjquota": None})
        except OSError as error:
            pytest.skip(f"this kernel has no project quota for {request.param}: {error}")
    yield target
    mount.umount(target)


def test_a_project_is_held_to_its_limit(place: Path) -> None:
    assert quota.project_quota_state(place) == (True, True)
    assert quota.project_quota(place, PROJECT) == (0, 0, 0)
    (place / "limited").mkdir()
    fs.set_project(place / "limited", PROJECT)
    quota.set_project_limit(place, PROJECT, LIMIT)
    (place / "limited/inside").mkdir()
    assert fs.get_fsxattr(place / "limited/inside").projid == PROJECT
    taken = _fill(place / "limited/inside")
    assert LIMIT - MIB < taken <= LIMIT
    os.sync()
    found = quota.project_quota(place, PROJECT)
    assert found.limit == LIMIT
    assert taken <= found.size <= LIMIT
    assert found.inodes == 3
    (place / "beside").mkdir()
    assert _fill(place / "beside") == 2 * LIMIT
    quota.set_project_limit(place, PROJECT, 0)
    assert quota.project_quota(place, PROJECT).limit == 0
    assert _fill(place / "limited") == 2 * LIMIT


def test_what_was_deleted_is_free_again(place: Path) -> None:
    (place / "limited").mkdir()
    fs.set_project(place / "limited", PROJECT)
    quota.set_project_limit(place, PROJECT, LIMIT)
    for _ in range(2):
        assert _fill(place / "limited") > LIMIT - MIB
        (place / "limited/file").unlink()
        os.sync()
    assert quota.project_quota(place, PROJECT).size < MIB


def test_nothing_of_a_limit_is_left(place: Path) -> None:
    drivers = [OverlayDriver(place / name) for name in ("one", "two")]
    projects = set()
    for driver in drivers:
        driver.attach()
        driver.prepare(SnapshotId(1), [], size=LIMIT)
        top = driver.home / "a/1"
        projects.add(fs.get_fsxattr(top).projid)
        assert limits.limit_of(top) == LIMIT == quota.project_quota(place, fs.get_fsxattr(top).projid).limit
    assert len(projects) == 2, "two roots on one file system took the same project"
    assert all(limits.FIRST_PROJECT <= project <= limits.LAST_PROJECT for project in projects)
    for driver in drivers:
        driver.remove(SnapshotId(1))
    assert [quota.project_quota(place, project).limit for project in projects] == [0, 0]


def test_a_project_of_somebody_else_is_not_taken(place: Path) -> None:
    driver = OverlayDriver(place / "data")
    driver.attach()
    driver.prepare(SnapshotId(1), [], size=LIMIT)
    theirs = fs.get_fsxattr(place / "data/a/1").projid + 1
    quota.set_project_limit(place, theirs, LIMIT)
    with pytest.raises(FailedPrecondition, match=str(theirs)):
        driver.prepare(SnapshotId(2), [], size=LIMIT)
    driver.remove(SnapshotId(2))
    driver.prepare(SnapshotId(3), [], size=LIMIT)


def test_a_limit_that_is_not_enforced_any_more_is_not_passed_over(place: Path) -> None:
    driver = OverlayDriver(place / "data")
    driver.attach()
    driver.prepare(SnapshotId(1), [], size=LIMIT)
    quota.set_project_limit(place, fs.get_fsxattr(place / "data/a/1").projid, 0)
    with pytest.raises(FailedPrecondition, match="not enforced any more"):
        driver.mount(SnapshotId(1), [])


def _fill(directory: Path, most: int = 2 * LIMIT) -> int:
    """Write a file as nobody, who has no capability to pass limits (ext4); returns the bytes that were taken."""
    directory.chmod(0o777)
    command = ["dd", "if=/dev/zero", "of=file", "bs=64K", f"count={most >> 16}"]
    done = subprocess.run(command, cwd=directory, user=65534, check=False, capture_output=True)
    refusals = (os.strerror(number).encode() for number in (errno.EDQUOT, errno.ENOSPC))
    assert done.returncode == 0 or any(refusal in done.stderr for refusal in refusals), done.stderr
    return (directory / "file").stat().st_size
