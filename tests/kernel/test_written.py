"""Changes found by the blocks that were written, against reading both trees: on an XFS and a copy of its disk.

A thin snapshot is such a copy, whose pool says which blocks differ. Here they are found by comparing the two files.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from hpmapper.drivers.devicemapper import written
from hpmapper.kernel import fs, loop, mount
from hpmapper.kernel.fscontext import MOUNT_ATTR_RDONLY
from hpmapper.layer.compare import compare
from hpmapper.layer.scan import scan, scan_pair
from hpmapper.pool.base import MIB, PoolFs
from hpmapper.tree import Inode, walk
from tests.filesystems import mounted

pytestmark = [pytest.mark.kernel]

_DIRECTORIES, _FILES, _BLOCK = 20, 40, 64 << 10


@pytest.fixture
def copies(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A file system with many files, read-only, and a writable copy of it; the disks are the files beside them."""
    before, after = mounted(PoolFs.XFS, tmp_path, 320 * MIB), tmp_path / "copy"
    for directory in range(_DIRECTORIES):
        (before / f"d{directory}").mkdir()
        for number in range(_FILES):
            (before / f"d{directory}/f{number}").write_bytes(b"%d" % number * 50)
    mount.umount(before)
    subprocess.run(["cp", "--sparse=always", before.with_suffix(".img"), after.with_suffix(".img")], check=True)
    after.mkdir()
    with _mounted(before, MOUNT_ATTR_RDONLY), _mounted(after):
        yield before, after


@contextmanager
def _mounted(target: Path, attributes: int = 0) -> Iterator[None]:
    with ExitStack() as stack:
        device = stack.enter_context(loop.attached(target.with_suffix(".img")))
        mount.filesystem("xfs", device, target, options={"nouuid": None}, attributes=attributes)
        stack.callback(mount.umount, target)
        yield


def _written_blocks(before: Path, after: Path) -> set[int]:
    """Of the mounted copy, which is frozen meanwhile as a snapshot's origin is."""
    subprocess.run(["fsfreeze", "-f", after], check=True)
    try:
        with before.with_suffix(".img").open("rb") as one, after.with_suffix(".img").open("rb") as other:
            size = os.fstat(one.fileno()).st_size
            return {at for at in range(size // _BLOCK) if one.read(_BLOCK) != other.read(_BLOCK)}
    finally:
        subprocess.run(["fsfreeze", "-u", after], check=True)


def _changes(before: Path, after: Path, is_written: written.IsWritten) -> Inode:
    tops = os.fsencode(before), os.fsencode(after)
    return compare(*scan_pair(*tops, lambda former, entry: written.same(former, entry, is_written)))


def _facts(tree: Inode) -> dict[bytes, tuple[object, ...]]:
    return {
        path: (one.mode, one.uid, one.gid, one.size, one.target, one.xattrs, one.is_whiteout, one.mtime_ns)
        for path, one in walk(tree)
    }


def _do_something(dice: random.Random, root: Path, number: int) -> None:
    """One of the things that containers do to files."""
    paths = sorted(path for path in root.rglob("*") if not path.is_symlink())
    file = dice.choice([path for path in paths if path.is_file()])
    directory = dice.choice([path for path in paths if path.is_dir()])
    act = dice.randrange(10)
    if act == 0:
        file.write_bytes(dice.randbytes(dice.randrange(200)))
    elif act == 1:
        (directory / f"new{number}").write_bytes(b"new")
    elif act == 2:
        file.unlink()
    elif act == 3:
        file.rename(directory / f"moved{number}")
    elif act == 4:
        os.link(file, directory / f"linked{number}")
    elif act == 5:
        file.chmod(dice.choice([0o600, 0o755]))
    elif act == 6:
        os.setxattr(file, "user.x", dice.randbytes(10))
    elif act == 7:
        (directory / f"sub{number}").mkdir()
    elif act == 8:
        os.symlink("somewhere", directory / f"link{number}")
    else:
        shutil.rmtree(directory)
        directory.mkdir()


@pytest.mark.parametrize("seed", range(4))
def test_the_quick_way_finds_what_reading_all_finds(copies: tuple[Path, Path], seed: int) -> None:
    before, after = copies
    dice = random.Random(seed)
    for number in range(dice.choice([1, 5, 40])):
        _do_something(dice, after, number)
    is_written = written.in_blocks(fs.xfs_geometry(after), _written_blocks(before, after), _BLOCK)
    whole = compare(*(scan(os.fsencode(top), overlay=False) for top in copies))
    assert _facts(_changes(before, after, is_written)) == _facts(whole)
    assert _facts(_changes(before, after, written.anywhere)) == _facts(whole)


def test_a_file_whose_times_were_set_back(copies: tuple[Path, Path]) -> None:
    """Neither size nor times of it tell; nor is any other file looked at that lies elsewhere."""
    before, after = copies
    file = after / "d3/f3"
    times, data = file.stat(), file.read_bytes()
    file.write_bytes(bytes(len(data)))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    is_written = written.in_blocks(fs.xfs_geometry(after), _written_blocks(before, after), _BLOCK)
    assert set(_facts(_changes(before, after, is_written))) == {b"", b"d3", b"d3/f3"}
    inodes = [path.stat().st_ino for path in after.rglob("*")]
    assert 0 < sum(map(is_written, inodes)) < len(inodes) / 4
