"""Loop devices: found by inode, freed by the kernel, made where /dev lacks them."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hpmapper.kernel import fs, loop, mount

pytestmark = pytest.mark.kernel

MIB = 1 << 20


@pytest.fixture
def backing(tmp_path: Path) -> Path:
    path = tmp_path / "backing"
    path.touch()
    os.truncate(path, MIB)
    return path


def test_a_device_lives_as_long_as_its_block(backing: Path) -> None:
    with loop.attached(backing, block_size=4096) as device:
        status = loop.status(device)
        assert status is not None
        assert (status.autoclear, status.direct_io, status.read_only) == (True, True, False)
        assert loop.find(backing) == [status]
        assert fs.device_size(device) == MIB
        assert loop._node(int(device.name[4:])) in loop.attached_devices()
    assert loop.find(backing) == []


def test_a_device_of_a_failed_block_is_freed(backing: Path) -> None:
    with pytest.raises(RuntimeError), loop.attached(backing):
        raise RuntimeError
    assert loop.find(backing) == []


def test_devices_are_found_by_file_not_by_name(backing: Path) -> None:
    device = loop.attach(backing, direct_io=False)
    try:
        other_name = backing.with_name("moved " + "x" * 100)
        backing.rename(other_name)
        backing.write_bytes(b"another file under the old name")
        assert [one.path for one in loop.find(other_name)] == [device]
        assert loop.find(backing) == []
        status = loop.status(device)
        assert status is not None
        assert not status.direct_io
    finally:
        loop.detach(device)
    assert loop.status(device) is None
    loop.detach(device)  # again is no error


def test_a_read_only_device_refuses_writes(backing: Path) -> None:
    with loop.attached(backing, read_only=True) as device:
        with pytest.raises(PermissionError), open(device, "r+b", buffering=0) as file:
            file.write(bytes(512))
        (status,) = loop.find(backing)
        assert status.read_only


def test_the_size_follows_the_file(backing: Path) -> None:
    with loop.attached(backing) as device:
        os.truncate(backing, 3 * MIB)
        assert fs.device_size(device) == MIB
        loop.set_capacity(device)
        assert fs.device_size(device) == 3 * MIB


def test_direct_io_can_be_switched(backing: Path) -> None:
    with loop.attached(backing, direct_io=False, block_size=4096) as device:
        for on in (True, False):
            loop.set_direct_io(device, on)
            (status,) = loop.find(backing)
            assert status.direct_io is on


def test_many_at_once_get_devices_of_their_own(tmp_path: Path) -> None:
    """A file for each turn: `find` opens every device, and one that is looked at outlives its `attached`."""

    def use(number: int) -> None:
        path = tmp_path / f"backing-{number}"
        path.touch()
        os.truncate(path, MIB)
        with loop.attached(path) as device:
            assert [one.path for one in loop.find(path)] == [device]

    with ThreadPoolExecutor(12) as threads:
        assert list(threads.map(use, range(60))) == [None] * 60


def test_a_device_on_its_way_out_is_kept(backing: Path) -> None:
    with loop.attached(backing) as device:
        bystander = os.open(device, os.O_RDONLY)
    try:
        with loop.held(backing) as held:
            os.close(bystander)
            bystander = -1
            assert held == device
            assert [one.path for one in loop.find(backing)] == [held]
        assert loop.find(backing) == []
        with loop.held(backing) as fresh:
            assert [one.path for one in loop.find(backing)] == [fresh]
    finally:
        if bystander >= 0:
            os.close(bystander)


def test_missing_nodes_are_made(backing: Path) -> None:
    """A container's /dev has no loop devices."""
    mount.filesystem("tmpfs", "none", "/dev")
    try:
        with loop.attached(backing) as device:
            assert device.is_block_device()
            assert [one.path for one in loop.find(backing)] == [device]
    finally:
        mount.umount("/dev")


def test_errors_name_what_failed(tmp_path: Path, backing: Path) -> None:
    with pytest.raises(FileNotFoundError) as missing, loop.attached(tmp_path / "missing"):
        pass
    assert missing.value.filename == str(tmp_path / "missing")
    with pytest.raises(OSError, match="ioctl") as wrong:
        loop.set_capacity(backing)
    assert (wrong.value.errno, wrong.value.filename) == (errno.ENOTTY, str(backing))
