"""Files are opened that the kernel knows, and no others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpmapper.cache.count import NOTHING, count
from hpmapper.kernel import loop, mount
from hpmapper.kernel.fs import open_known
from hpmapper.pool.base import PoolFs
from tests.filesystems import mounted

pytestmark = pytest.mark.kernel


def test_a_file_in_use_is_known(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 4096)
    fd = open_known(file, os.O_RDONLY)
    assert fd is not None
    assert os.read(fd, 1) == b"x"
    os.close(fd)
    assert count(file).cached == 4096


def test_errors_are_those_of_open(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("file")
    assert not (tmp_path / "missing").exists()  # now the kernel knows that it is not
    with pytest.raises(FileNotFoundError):
        open_known(tmp_path / "missing", os.O_RDONLY)
    with pytest.raises(OSError, match="link"):
        open_known(tmp_path / "link", os.O_RDONLY | os.O_NOFOLLOW)


def test_a_file_that_nobody_has_asked_for_is_not(private_mounts: None, tmp_path: Path) -> None:
    target = mounted(PoolFs.XFS, tmp_path, 400 << 20)
    (target / "file").write_bytes(b"x" * 4096)
    mount.umount(target)
    with loop.attached(tmp_path / "xfs.img", block_size=4096) as device:
        mount.filesystem("xfs", device, target, options={"nouuid": None})
    try:
        assert open_known(target / "file", os.O_RDONLY) is None
        assert count(target / "file") == NOTHING
        (target / "file").read_bytes()
        assert count(target / "file").cached == 4096
    finally:
        mount.umount(target)
