"""Pools: made, found again, grown in use, refused when they are not ours."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpmapper.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NoSpace, NotFound, Unsupported
from hpmapper.kernel import clone, fs, loop, mount
from hpmapper.pool import filesystem, open_pool
from hpmapper.pool import loop as loop_pool
from hpmapper.pool.base import GIB, MIB, Pool, PoolConfig, PoolFs, PoolKind
from hpmapper.pool.direct import DirectPool
from hpmapper.pool.loop import LoopPool

pytestmark = pytest.mark.kernel

SIZE = 320 * MIB


@pytest.fixture(params=list(PoolFs))
def kind(request: pytest.FixtureRequest) -> PoolFs:
    return PoolFs(request.param)


@pytest.fixture
def pool(tmp_path: Path, kind: PoolFs) -> Iterator[LoopPool]:
    """A loop pool that has been made but not attached."""
    pool = LoopPool(tmp_path / "root", PoolConfig(PoolKind.LOOP, fs=kind, size=SIZE))
    pool.create()
    yield pool
    pool.destroy()


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """An empty block device."""
    backing = tmp_path / "disk"
    backing.touch()
    os.truncate(backing, SIZE)
    path = loop.attach(backing)
    yield path
    loop.detach(path)


def direct(root: Path, device: Path, kind: PoolFs = PoolFs.XFS) -> DirectPool:
    return DirectPool(root, PoolConfig(PoolKind.DIRECT, fs=kind, device=device))


# --- loop


def test_a_pool_shares_extents_and_is_read_with_direct_io(pool: LoopPool) -> None:
    path = pool.attach()
    assert clone.can_clone(path)
    (device,) = loop.find(pool.image)
    assert (device.direct_io, device.autoclear) == (True, True)
    assert "noatime" in mount.mounts_below(path)[0].options
    assert mount.mounts_below(path)[0].fstype == pool.config.fs
    assert pool.facts()["loop device"] == f"{device.path}, direct I/O on"


def test_settings_come_back_complete(pool: LoopPool) -> None:
    assert pool.config.size == SIZE
    assert PoolConfig.from_dict(pool.config.to_dict()) == pool.config
    found = filesystem.signature(pool.image)
    assert found == (pool.config.fs, pool.config.uuid)


def test_attach_and_detach_may_be_repeated(pool: LoopPool) -> None:
    assert not pool.is_attached()
    pool.detach()
    assert pool.attach() == pool.attach() == pool.path
    assert len(mount.mounts_below(pool.path)) == 1
    pool.detach()
    pool.detach()
    assert not pool.is_attached()
    assert loop.find(pool.image) == []


def test_after_a_reboot_the_next_attach_finds_everything(pool: LoopPool) -> None:
    (pool.attach() / "file").write_text("kept")
    mount.umount(pool.path)  # which frees the loop device too: what a reboot leaves
    assert loop.find(pool.image) == []
    again = open_pool(pool.root, PoolConfig.from_dict(pool.config.to_dict()))
    assert (again.attach() / "file").read_text() == "kept"


def test_a_loop_device_that_is_there_is_used(pool: LoopPool) -> None:
    device = loop.attach(pool.image, block_size=4096)
    pool.attach()
    assert mount.mounts_below(pool.path)[0].source == str(device)
    pool.detach()
    assert loop.find(pool.image) == []


ATTACH = """
import json, sys
from pathlib import Path
from hpmapper.pool import open_pool
from hpmapper.pool.base import PoolConfig
pool = open_pool(Path(sys.argv[1]), PoolConfig.from_dict(json.loads(sys.argv[2])))
print("ready", flush=True)
sys.stdin.readline()
(pool.attach() / sys.argv[3]).touch()
"""


def test_several_processes_attach_one_pool_at_once(pool: LoopPool) -> None:
    command = [sys.executable, "-c", ATTACH, str(pool.root), json.dumps(pool.config.to_dict())]
    children = [
        subprocess.Popen([*command, str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) for number in range(6)
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write(b"\n")
        child.stdin.flush()
    assert [child.communicate() and child.returncode for child in children] == [0] * 6
    assert len(mount.mounts_below(pool.path)) == 1
    assert len(loop.find(pool.image)) == 1
    assert {"0", "1", "2", "3", "4", "5"} <= set(os.listdir(pool.path))


def test_growing_while_a_file_is_open(pool: LoopPool) -> None:
    with open(pool.attach() / "file", "wb") as file:
        before = pool.space()
        config = pool.grow(2 * SIZE)
        assert config.size == pool.image.stat().st_size == 2 * SIZE
        assert pool.space().total - before.total > SIZE * 0.9
        file.write(os.urandom(SIZE))
        file.flush()
        os.fsync(file.fileno())
    assert pool.grow(2 * SIZE) == config  # asked again, after a crash


def test_a_growth_that_was_cut_off_is_finished_by_attaching(pool: LoopPool) -> None:
    pool.attach()
    before = pool.space().total
    pool.detach()
    os.truncate(pool.image, 2 * SIZE)
    pool.attach()
    assert pool.space().total - before > SIZE * 0.9


def test_shrinking_is_refused(pool: LoopPool) -> None:
    with pytest.raises(InvalidArgument, match="cannot shrink"):
        pool.grow(SIZE - MIB)
    assert pool.image.stat().st_size == SIZE


def test_a_pool_in_use_is_not_detached(pool: LoopPool) -> None:
    with open(pool.attach() / "file", "wb"):
        for act in (pool.detach, pool.destroy):
            with pytest.raises(FailedPrecondition, match="in use: files are open"):
                act()
    (pool.path / "below").mkdir()
    mount.filesystem("tmpfs", "none", pool.path / "below")
    with pytest.raises(FailedPrecondition, match="1 mounts below"):
        pool.detach()
    mount.umount(pool.path / "below")
    assert pool.is_attached()


def test_a_pool_mounted_in_another_namespace_is_not_deleted(pool: LoopPool) -> None:
    pool.attach()
    code = (
        "import sys; from hpmapper.kernel import mount; mount.private_namespace(); "
        "print('ready', flush=True); sys.stdin.readline()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        with pytest.raises(FailedPrecondition, match="still uses"):
            pool.destroy()
        assert pool.image.exists()
        child.communicate(b"\n")
    pool.attach()


def test_checks_say_what_they_did(pool: LoopPool) -> None:
    (pool.attach() / "file").write_bytes(bytes(MIB))
    attached = pool.check()
    assert attached.checked
    if pool.config.fs is PoolFs.XFS:
        assert attached.sound is None
        assert "detached" in attached.unchecked
    else:
        assert attached.sound is True
    pool.detach()
    detached = pool.check()
    assert (detached.sound, detached.unchecked, detached.findings) == (True, "", ())


def test_a_damaged_pool_is_reported(tmp_path: Path) -> None:
    pool = LoopPool(tmp_path / "root", PoolConfig(PoolKind.LOOP, size=SIZE))
    pool.create()
    for number in range(200):
        (pool.attach() / f"file-{number}").touch()
    pool.detach()
    with open(pool.image, "r+b") as file:
        file.seek(4096)  # the first allocation group's free-space header
        file.write(os.urandom(4096))
    report = pool.check()
    assert report.sound is False
    assert report.findings
    pool.destroy()


def test_deleted_data_is_given_back_to_the_disk(pool: LoopPool) -> None:
    path = pool.attach() / "file"
    path.write_bytes(os.urandom(64 * MIB))
    os.sync()
    path.unlink()
    pool.trim()
    pool.detach()
    assert pool.image.stat().st_blocks * 512 < 100 * MIB


def test_space_counts_only_what_the_disk_below_can_give(pool: LoopPool, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FailedPrecondition, match="not attached"):
        pool.space()
    pool.attach()
    plain = pool.space()
    real = os.statvfs

    def nearly_full(path: str | os.PathLike[str]) -> os.statvfs_result:
        values = list(real(path))
        if path == pool.root:
            values[4] = 10 * MIB // values[1]  # f_bavail
        return os.statvfs_result(values)

    monkeypatch.setattr(os, "statvfs", nearly_full)
    tight = pool.space()
    assert tight.used == plain.used
    assert tight.free < 120 * MIB < plain.free


def test_what_is_in_the_way_is_not_overwritten(pool: LoopPool) -> None:
    (pool.attach() / "file").touch()
    assert pool.create() == pool.config  # itself is no obstacle, also when it is in use
    other = LoopPool(pool.root, dataclasses.replace(pool.config, uuid=""))
    with pytest.raises(AlreadyExists, match="not this pool"):
        other.create()
    assert (pool.path / "file").exists()
    config = other.create(force=True)
    assert config.uuid != pool.config.uuid
    assert not (other.attach() / "file").exists()
    other.detach()
    with pytest.raises(FailedPrecondition, match="does not carry this pool"):
        pool.attach()


def test_destroying_leaves_nothing_and_may_be_repeated(pool: LoopPool) -> None:
    pool.attach()
    pool.destroy()
    pool.destroy()
    assert os.listdir(pool.root) == ["pool.lock"]
    for act in (pool.attach, pool.check):
        with pytest.raises(NotFound, match="no pool"):
            act()


def test_what_never_was_is_not_found(tmp_path: Path) -> None:
    pool = LoopPool(tmp_path / "root", PoolConfig(PoolKind.LOOP))
    with pytest.raises(NotFound, match="directory does not exist"):
        pool.attach()
    pool.detach()
    pool.destroy()
    assert not pool.root.exists()


def test_a_size_too_small_is_refused_before_anything_is_made(tmp_path: Path, kind: PoolFs) -> None:
    pool = LoopPool(tmp_path / "root", PoolConfig(PoolKind.LOOP, fs=kind, size=100 * MIB))
    with pytest.raises(InvalidArgument, match="too small"):
        pool.create()
    assert os.listdir(pool.root) == ["pool.lock"]


def test_the_smallest_sizes_really_work(tmp_path: Path, kind: PoolFs) -> None:
    pool = LoopPool(tmp_path / "root", PoolConfig(PoolKind.LOOP, fs=kind, size=filesystem.smallest(kind)))
    pool.create()
    pool.attach()
    pool.destroy()


def test_an_unfinished_image_is_swept_by_the_next_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = LoopPool(tmp_path / "root", PoolConfig(PoolKind.LOOP, size=SIZE).with_uuid())
    pool.root.mkdir()
    (pool.root / "pool.img.new").write_text("left by a crash")
    config = pool.create()
    assert config.uuid
    assert sorted(os.listdir(pool.root)) == ["pool.img", "pool.lock"]
    monkeypatch.setattr(filesystem, "make", lambda *_: (_ for _ in ()).throw(NoSpace("full")))
    pool.destroy()
    with pytest.raises(NoSpace):
        pool.create()
    assert os.listdir(pool.root) == ["pool.lock"]


def test_the_default_size_fits_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def free(size: int) -> None:
        values = os.statvfs_result((4096, 4096, 0, 0, size // 4096, 0, 0, 0, 0, 255))
        monkeypatch.setattr(os, "statvfs", lambda _: values)

    free(1000 * GIB)
    assert loop_pool.default_size(tmp_path, 300 * MIB) == 100 * GIB
    free(50 * GIB)
    assert loop_pool.default_size(tmp_path, 300 * MIB) == 45 * GIB
    free(GIB)
    assert loop_pool.default_size(tmp_path, 300 * MIB) == 300 * MIB
    free(100 * MIB)
    with pytest.raises(NoSpace, match="smallest"):
        loop_pool.default_size(tmp_path, 300 * MIB)


# --- direct


def test_a_direct_pool_from_making_to_destroying(tmp_path: Path, device: Path, kind: PoolFs) -> None:
    pool = direct(tmp_path / "root", device, kind)
    config = pool.create()
    assert pool.create() == config
    (pool.attach() / "file").write_text("kept")
    assert clone.can_clone(pool.path)
    pool.detach()
    assert (pool.attach() / "file").read_text() == "kept"
    assert pool.trim() >= 0
    assert pool.check().checked
    pool.destroy()
    pool.destroy()
    assert filesystem.signature(device) is None
    with pytest.raises(FailedPrecondition, match="does not carry this pool"):
        pool.attach()


def test_a_device_with_data_is_refused_unless_forced(tmp_path: Path, device: Path) -> None:
    subprocess.run(["mkfs.ext4", "-q", device], check=True)
    pool = direct(tmp_path / "root", device)
    with pytest.raises(AlreadyExists, match="carries data: ext4"):
        pool.create()
    pool.create(force=True)
    pool.attach()
    pool.destroy()


def test_a_device_with_a_partition_table_is_refused(tmp_path: Path, device: Path) -> None:
    entry = struct.pack("<B3sB3sII", 0, b"", 0x83, b"", 2048, 4096)
    with open(device, "r+b") as file:
        file.write(bytes(446) + entry + bytes(48) + b"\x55\xaa")
    with pytest.raises(AlreadyExists, match="carries data: dos partition table"):
        direct(tmp_path / "root", device).create()


def test_a_device_in_use_is_refused_even_when_forced(tmp_path: Path, device: Path) -> None:
    pool = direct(tmp_path / "root", device)
    pool.create()
    pool.attach()
    with pytest.raises(FailedPrecondition, match="in use"):
        direct(tmp_path / "other", device).create(force=True)
    assert pool.is_attached()
    pool.destroy()


def test_what_is_no_block_device_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "missing", Path("/dev/null")):
        with pytest.raises(InvalidArgument, match="not a block device"):
            direct(tmp_path / "root", path).create()


def test_a_direct_pool_follows_its_growing_device(tmp_path: Path, device: Path, kind: PoolFs) -> None:
    pool = direct(tmp_path / "root", device, kind)
    pool.create()
    pool.attach()
    before = pool.space().total
    with pytest.raises(FailedPrecondition, match="as large as its device"):
        pool.grow(2 * SIZE)
    pool.grow()
    assert pool.space().total == before
    os.truncate(tmp_path / "disk", 2 * SIZE)
    loop.set_capacity(device)
    pool.grow(2 * SIZE)
    assert pool.space().total - before > SIZE * 0.9
    with pytest.raises(InvalidArgument, match="cannot shrink"):
        pool.grow(MIB)
    pool.destroy()


def test_a_disk_under_another_name_is_found_by_its_uuid(tmp_path: Path, device: Path) -> None:
    pool = direct(tmp_path / "root", device)
    config = pool.create()
    (pool.attach() / "file").write_text("kept")
    pool.detach()
    renamed = dataclasses.replace(config, device=Path("/dev/hpmapper-no-such-disk"))
    moved = DirectPool(tmp_path / "root", renamed)
    assert (moved.attach() / "file").read_text() == "kept"
    moved.detach()
    gone = dataclasses.replace(renamed, uuid="6ba7b811-9dad-11d1-80b4-00c04fd430c8")
    with pytest.raises(NotFound, match="is not there"):
        DirectPool(tmp_path / "root", gone).attach()


def test_another_disk_under_the_old_name_is_refused(tmp_path: Path, device: Path) -> None:
    pool = direct(tmp_path / "root", device)
    pool.create()
    subprocess.run(["mkfs.ext4", "-q", "-F", device], check=True)
    for act in (pool.attach, pool.destroy):
        with pytest.raises(FailedPrecondition, match="does not carry this pool"):
            act()


# --- directory


def test_a_directory_pool_on_a_reflink_file_system(xfs: Path, tmp_path: Path) -> None:
    config = PoolConfig(PoolKind.DIRECTORY, directory=xfs / "pool")
    pool: Pool = open_pool(tmp_path / "root", config)
    config = pool.create()
    assert pool.create() == config
    assert pool.attach() == xfs / "pool"
    (pool.path / "o").mkdir()
    (pool.path / "o" / "file").touch()
    assert pool.space().total > 0
    assert pool.check().sound is None
    assert pool.trim() == 0
    pool.detach()
    with pytest.raises(Unsupported, match="as large as the file system"):
        pool.grow(GIB)
    pool.destroy()
    pool.destroy()
    assert os.listdir(xfs / "pool") == []


def test_a_directory_below_the_root_is_the_default(xfs: Path) -> None:
    pool = open_pool(xfs / "root", PoolConfig(PoolKind.DIRECTORY))
    pool.create()
    assert pool.attach() == xfs / "root/pool"
    pool.destroy()
    assert os.listdir(xfs / "root") == ["pool.lock"]


def test_a_file_system_without_reflink_is_refused_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    mount.filesystem("tmpfs", "none", tmp_path / "memory")
    pool = open_pool(tmp_path / "root", PoolConfig(PoolKind.DIRECTORY, directory=tmp_path / "memory/pool"))
    with pytest.raises(Unsupported, match="tmpfs, which cannot share extents") as caught:
        pool.create()
    assert "loop pool" in caught.value.hint
    mount.umount(tmp_path / "memory")


def test_an_empty_mount_point_is_not_taken_for_the_pool(xfs: Path, tmp_path: Path) -> None:
    pool = open_pool(tmp_path / "root", PoolConfig(PoolKind.DIRECTORY, directory=xfs))
    (xfs / "something").touch()
    with pytest.raises(AlreadyExists, match="not empty"):
        pool.create()
    pool.create(force=True)
    mount.umount(xfs)
    with pytest.raises(NotFound, match="is its file system mounted"):
        pool.attach()
    for act in (pool.space, pool.check):
        with pytest.raises(FailedPrecondition, match="not attached"):
            act()


def test_another_pools_directory_is_refused(xfs: Path, tmp_path: Path) -> None:
    config = PoolConfig(PoolKind.DIRECTORY, directory=xfs / "pool")
    open_pool(tmp_path / "root", config).create()
    other = open_pool(tmp_path / "root", config.with_uuid())
    for act in (other.attach, other.destroy):
        with pytest.raises(FailedPrecondition, match="another pool"):
            act()
    assert fs.filesystem_name(xfs) == "xfs"
