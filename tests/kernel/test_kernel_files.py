"""Clones, extents, cache residency, names, flags, locks: on a real XFS where it matters."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hpmapper import files
from hpmapper.kernel import cachestat, clone, fiemap, fs, lock, mount, psi, sync
from hpmapper.pool.base import PoolFs
from tests.filesystems import mounted

pytestmark = pytest.mark.kernel

MIB = 1 << 20
PAGE = os.sysconf("SC_PAGESIZE")


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    sync.fdatasync(path)
    return path


def clone_file(source: Path, target: Path) -> Path:
    with open(source, "rb") as one, open(target, "wb") as two:
        clone.clone(one.fileno(), two.fileno())
    return target


def mounted_for_writes(kind: str, directory: Path) -> Path:
    if kind != "tmpfs":
        return mounted(PoolFs(kind), directory, 256 * MIB)
    mount.filesystem("tmpfs", "none", directory)
    return directory


def shared_bytes(fd: int) -> int:
    return sum(extent.length for extent in fiemap.extents(fd) if extent.shared)


def test_a_clone_shares_its_extents_until_written(xfs: Path) -> None:
    source = write(xfs / "source", os.urandom(4 * MIB))
    with open(source, "rb") as file:
        assert shared_bytes(file.fileno()) == 0
    target = clone_file(source, xfs / "target")
    assert target.read_bytes() == source.read_bytes()
    with open(target, "r+b") as file:
        before = list(fiemap.extents(file.fileno()))
        assert all(one.shared and one.placed for one in before)
        file.seek(MIB)
        file.write(bytes(4096))
        file.flush()
        after = list(fiemap.extents(file.fileno(), sync=True))
        assert sum(one.length for one in after if not one.shared) == 4096
        assert [one.logical for one in after if not one.shared] == [MIB]
        assert shared_bytes(file.fileno()) == 4 * MIB - 4096
    with open(source, "rb") as file:
        assert next(fiemap.extents(file.fileno())).physical == before[0].physical


def test_extents_are_listed_beyond_one_batch(xfs: Path) -> None:
    path = xfs / "scattered"
    with open(path, "wb") as file:
        file.truncate(300 * 16384)  # or XFS allocates ahead of a growing end, and the holes are filled
        for number in range(300):
            os.pwrite(file.fileno(), b"x" * 4096, number * 16384)
        os.fsync(file.fileno())
        found = list(fiemap.extents(file.fileno()))
        assert [one.logical for one in found] == [number * 16384 for number in range(300)]
        assert len(list(fiemap.extents(file.fileno(), 16384, 16384))) == 1
        assert list(fiemap.extents(file.fileno(), 400 * 16384)) == []


def test_unwritten_data_has_no_place(xfs: Path) -> None:
    with open(xfs / "dirty", "wb") as file:
        file.write(os.urandom(MIB))
        file.flush()
        assert not any(one.placed for one in fiemap.extents(file.fileno()))
        assert all(one.placed for one in fiemap.extents(file.fileno(), sync=True))


def test_only_equal_ranges_are_deduplicated(xfs: Path) -> None:
    data = os.urandom(MIB)
    source, same, other = (write(xfs / name, data) for name in ("source", "same", "other"))
    write(other, data[:-1] + b"?")
    with open(source, "rb") as one, open(same, "r+b") as two, open(other, "r+b") as three:
        targets = [(two.fileno(), 0), (three.fileno(), 0)]
        equal, different = clone.dedupe_range(one.fileno(), 0, MIB, targets)
        assert equal == clone.Deduped(MIB, True, 0)
        assert not different.same
        assert shared_bytes(two.fileno()) == MIB
    assert other.read_bytes()[-1:] == b"?"


def test_cloning_across_file_systems_fails_with_names(xfs: Path, tmp_path: Path) -> None:
    write(tmp_path / "outside", b"x" * 4096)
    with pytest.raises(OSError, match="cross-device") as caught:
        clone_file(tmp_path / "outside", xfs / "inside")
    assert (caught.value.errno, caught.value.filename) == (errno.EXDEV, str(xfs / "inside"))
    assert caught.value.errno in clone.NOT_CLONEABLE


def test_can_clone_tells_file_systems_apart(xfs: Path, tmp_path: Path) -> None:
    assert clone.can_clone(xfs)
    (tmp_path / "memory").mkdir()
    mount.filesystem("tmpfs", "none", tmp_path / "memory")
    assert not clone.can_clone(tmp_path / "memory")
    mount.umount(tmp_path / "memory")
    assert os.listdir(xfs) == []


def test_cachestat_follows_reading_and_dropping(xfs: Path) -> None:
    path = write(xfs / "file", os.urandom(MIB))
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert cachestat.cachestat(file.fileno()).cached == 0
        file.read()
        assert cachestat.cachestat(path) == (MIB // PAGE, 0, 0, 0, 0)
        assert cachestat.cachestat(path, 0, 2 * PAGE).cached == 2


def test_cachestat_counts_dirty_pages(xfs: Path) -> None:
    (xfs / "file").write_bytes(bytes(8 * PAGE))
    assert cachestat.cachestat(xfs / "file").dirty == 8
    sync.syncfs(xfs)
    assert cachestat.cachestat(xfs / "file").dirty == 0


def test_large_writes_leave_the_page_cache_and_small_ones_stay(xfs: Path) -> None:
    leaves = tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 14)
    sizes = {"large": files.UNCACHED_FROM + 1, "small": files.UNCACHED_FROM - 1}
    for name, size in sizes.items():
        content = os.urandom(size)
        with open(xfs / name, "wb", buffering=0) as file:
            files.write_data(file.fileno(), content)
            files.write_data(file.fileno(), content)
        sync.syncfs(xfs)
        assert cachestat.cachestat(xfs / name).cached == (0 if leaves and name == "large" else -(-2 * size // PAGE))
        assert (xfs / name).read_bytes() == content * 2


@pytest.mark.parametrize("kind", ["tmpfs", "btrfs"])
def test_large_writes_work_whether_the_cache_can_be_left_or_not(tmp_path: Path, kind: str) -> None:
    place = mounted_for_writes(kind, tmp_path)
    content = os.urandom(MIB)
    with open(place / "large", "wb", buffering=0) as file:
        files.write_data(file.fileno(), content)
    assert (place / "large").read_bytes() == content
    mount.umount(place)


def test_writeback_can_be_started_early(xfs: Path) -> None:
    with open(xfs / "file", "wb") as file:
        file.write(bytes(MIB))
        file.flush()
        sync.start_writeback(file.fileno())
        flags = sync.SYNC_FILE_RANGE_WAIT_BEFORE | sync.SYNC_FILE_RANGE_WRITE | sync.SYNC_FILE_RANGE_WAIT_AFTER
        sync.sync_file_range(file.fileno(), 0, 0, flags)
        assert cachestat.cachestat(file.fileno()).dirty == 0


def test_names_are_replaced_or_swapped_only_when_asked(xfs: Path) -> None:
    one, two = write(xfs / "one", b"1"), write(xfs / "two", b"2")
    with pytest.raises(FileExistsError) as caught:
        sync.rename_noreplace(one, two)
    assert caught.value.filename == str(two)
    sync.rename_exchange(one, two)
    assert (one.read_bytes(), two.read_bytes()) == (b"2", b"1")
    sync.rename_noreplace(one, xfs / "three")
    assert not one.exists()
    directory = os.open(xfs, os.O_PATH)
    sync.rename_noreplace("three", "four", source_dir=directory, target_dir=directory)
    os.close(directory)
    assert (xfs / "four").read_bytes() == b"2"


def test_paths_are_resolved_below_a_root(xfs: Path) -> None:
    (xfs / "etc").mkdir()
    write(xfs / "etc/passwd", b"ours")
    (xfs / "link").symlink_to("/etc/passwd")
    (xfs / "up").symlink_to("../../../../etc")
    for path in ("link", "up/passwd", "../../etc/passwd"):
        fd = fs.open_in_root(xfs, path)
        assert os.read(fd, 10) == b"ours"
        os.close(fd)
    fd = fs.open_in_root(xfs, "new", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640)
    os.close(fd)
    assert (xfs / "new").stat().st_mode & 0o777 == 0o640
    with pytest.raises(FileNotFoundError) as caught:
        fs.open_in_root(xfs, "etc/shadow-of-nothing")
    assert caught.value.filename == "etc/shadow-of-nothing"


def test_file_systems_are_named(xfs: Path) -> None:
    assert fs.filesystem_name(xfs) == "xfs"
    assert fs.filesystem_name("/proc") == "proc"
    geometry = fs.xfs_geometry(xfs)
    assert (geometry.size, geometry.reflink, geometry.block_size) == (320 * MIB, True, 4096)
    with pytest.raises(OSError, match="ioctl"):
        fs.xfs_geometry("/proc")


def test_inodes_lie_where_xfs_has_them(xfs: Path) -> None:
    """Every inode on the device begins with "IN", and has its own number in it (struct xfs_dinode)."""
    for directory in range(8):  # new directories go to other allocation groups
        (xfs / f"d{directory}").mkdir()
        for number in range(150):
            (xfs / f"d{directory}" / f"f{number}").touch()
    inodes = {path.stat().st_ino for path in xfs.rglob("*")}
    geometry = fs.xfs_geometry(xfs)
    mount.umount(xfs)
    assert len({geometry.inode_offset(inode) // (geometry.group_blocks * geometry.block_size) for inode in inodes}) > 1
    with xfs.with_suffix(".img").open("rb") as image:
        for inode in inodes:
            image.seek(geometry.inode_offset(inode))
            core = image.read(160)
            assert (core[:2], int.from_bytes(core[152:], "big")) == (b"IN", inode)


def test_flags_and_projects(xfs: Path) -> None:
    path = write(xfs / "file", b"")
    fs.set_flags(path, fs.get_flags(path) | fs.FS_IMMUTABLE_FL)
    with pytest.raises(PermissionError):
        path.unlink()
    fs.set_flags(path, fs.get_flags(path) & ~fs.FS_IMMUTABLE_FL)
    path.unlink()
    (xfs / "directory").mkdir()
    fs.set_project(xfs / "directory", 42)
    write(xfs / "directory/inside", b"")
    assert fs.get_fsxattr(xfs / "directory/inside").projid == 42
    fs.set_fsxattr(xfs / "directory", fs.get_fsxattr(xfs / "directory")._replace(projid=43))
    assert fs.get_fsxattr(xfs / "directory").projid == 43


def test_trimming_gives_blocks_back_to_the_file_below(xfs: Path) -> None:
    image = xfs.parent / "xfs.img"
    write(xfs / "file", os.urandom(32 * MIB))
    before = image.stat().st_blocks
    (xfs / "file").unlink()
    deadline = time.monotonic() + 30
    while image.stat().st_blocks > before - 30 * MIB // 512:  # XFS frees the blocks of deleted files in the background
        assert time.monotonic() < deadline
        sync.syncfs(xfs)
        assert fs.trim(xfs) > 0


def test_entries_have_types(xfs: Path) -> None:
    for number in range(400):
        (xfs / f"{number:0200}").touch()
    assert fs.knows_file_types(xfs)


def test_locks_exclude_threads_and_time_out(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with lock.exclusive(path):
        for timeout in (0, 0.05):
            with pytest.raises(BlockingIOError, match="locked") as caught, lock.exclusive(path, timeout=timeout):
                pass
            assert caught.value.filename == str(path)
        with pytest.raises(BlockingIOError), lock.shared(path, timeout=0):
            pass
        waiting = threading.Thread(target=lambda: lock.exclusive(path).__enter__())
        waiting.start()
        time.sleep(0.05)
        assert waiting.is_alive()
    waiting.join(10)
    assert not waiting.is_alive()


def test_shared_locks_share(tmp_path: Path) -> None:
    with (
        lock.shared(tmp_path),  # a directory
        lock.shared(tmp_path, timeout=0),
        pytest.raises(BlockingIOError),
        lock.exclusive(tmp_path, timeout=0),
    ):
        pass
    directory = os.open(tmp_path, os.O_RDONLY)
    with lock.exclusive(directory), pytest.raises(BlockingIOError), lock.exclusive(tmp_path, timeout=0):
        pass
    os.fstat(directory)
    os.close(directory)


def test_a_killed_process_holds_no_lock(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom hpmapper.kernel import lock\n"
        "with lock.exclusive(sys.argv[1]):\n print('held', flush=True)\n time.sleep(600)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(BlockingIOError), lock.exclusive(tmp_path / "lock", timeout=0):
            pass
        child.send_signal(signal.SIGKILL)
        with lock.exclusive(tmp_path / "lock", timeout=10):
            pass


def test_a_pressure_window_out_of_range_is_refused_with_its_file() -> None:
    refused = pytest.raises(OSError, match="Invalid argument")
    with refused as caught, psi.trigger("memory", stall_us=1000, window_us=100_000):
        pass
    assert caught.value.filename == "/proc/pressure/memory"
