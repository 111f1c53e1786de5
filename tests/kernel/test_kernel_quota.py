"""Project quota of real file systems. Marked for a guest: many hosts' kernels have none, and say so here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpmapper.kernel import fs, loop, mount, quota
from hpmapper.pool.base import MIB

pytestmark = [pytest.mark.kernel, pytest.mark.guest]

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


_WRITER = """
import errno
done = 0
try:
    with open("file", "wb", buffering=0) as file:
        while done < {most}:
            done += file.write(bytes(65536))
except OSError as error:
    assert error.errno in (errno.EDQUOT, errno.ENOSPC), error
print(done)
"""


def _fill(directory: Path, most: int = 2 * LIMIT) -> int:
    """Write a file as nobody, who has no capability to pass limits (ext4); returns the bytes that were taken."""
    directory.chmod(0o777)
    command = [sys.executable, "-I", "-c", _WRITER.format(most=most)]
    done = subprocess.run(command, cwd=directory, user=65534, check=True, stdout=subprocess.PIPE)
    return int(done.stdout)
