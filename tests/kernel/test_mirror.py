"""One tree made like another: any two trees, whatever they have in common, and with as little written as may be."""

from __future__ import annotations

import os
import random
import stat
import subprocess
from pathlib import Path

import pytest

from hpmapper.errors import InvalidArgument
from hpmapper.kernel import mount
from hpmapper.migrate.mirror import differences, mirror
from hpmapper.testing import trees

pytestmark = pytest.mark.kernel

_NAMES = [b"a", b"b", b"c", b"d/a", b"d/b", b"d/e/a", b"d/e/b", b"f", "\u00fc".encode("latin-1"), b" "]


def _grow(root: Path, seed: int, steps: int) -> None:
    """Do random things to a tree; those that cannot be done are left."""
    chance = random.Random(seed)
    top = os.fsencode(root)
    for _ in range(steps):
        place, other = (top + b"/" + chance.choice(_NAMES) for _ in range(2))
        try:
            _act(chance, place, other)
        except OSError:
            continue


def _act(chance: random.Random, place: bytes, other: bytes) -> None:
    match chance.randrange(14):
        case 0:
            os.mkdir(place)
        case 1:
            os.makedirs(os.path.dirname(place), exist_ok=True)
        case 2 | 3:
            _write(place, chance.randbytes(chance.choice([0, 10, 5000, 20_000])))
        case 4:
            os.symlink(chance.choice([b"a", b"/nowhere", b"d"]), place)
        case 5:
            os.link(other, place, follow_symlinks=False)
        case 6:
            os.mknod(place, chance.choice([stat.S_IFIFO, stat.S_IFCHR, stat.S_IFSOCK]) | 0o600, 0x103)
        case 7:
            os.chmod(place, chance.randrange(0o7777))
        case 8:
            os.chown(place, chance.randrange(9), 3, follow_symlinks=False)
        case 9:
            os.setxattr(place, "user.x", chance.randbytes(3))
        case 10:
            _write(place, b"", chance.randrange(1 << 20))
        case 11:
            os.rename(place, other)
        case 12:
            os.unlink(place)
        case _:
            os.utime(place, ns=(1, chance.randrange(10**18)), follow_symlinks=False)


def _write(place: bytes, data: bytes, size: int | None = None) -> None:
    # Not blocking, and not following: there are pipes, and links to what is outside.
    fd = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        os.ftruncate(fd, len(data) if size is None else size)
        os.write(fd, data)
    finally:
        os.close(fd)


@pytest.mark.parametrize("seed", range(60))
def test_any_tree_becomes_any_other(seed: int, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for one, own in ((source, seed), (target, seed if seed % 2 else -seed)):
        one.mkdir()
        _grow(one, own, 80)
    _grow(source, 1000 + seed, 20)
    mirror(source, target, contents=True)
    assert list(differences(source, target)) == []
    trees.assert_same(target, source)


def test_what_is_the_same_is_not_written(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    trees.apply([trees.file("a", b"a" * 9000), trees.directory("d"), trees.hard_link("a", "d/b")], source)
    subprocess.run(["cp", "-a", source, target], check=True)
    before = {path: path.stat().st_ctime_ns for path in (target, *target.rglob("*"))}
    mirror(source, target)
    assert {path: path.stat().st_ctime_ns for path in (target, *target.rglob("*"))} == before


def test_of_a_large_file_only_what_differs_is_written(tmp_path: Path, xfs: Path) -> None:
    source, target = xfs / "source", xfs / "target"
    for one in (source, target):
        one.mkdir()
    (source / "big").write_bytes(os.urandom(8 << 20))
    subprocess.run(["cp", "--reflink=always", "-p", source / "big", target / "big"], check=True)
    with (source / "big").open("r+b") as file:
        file.seek(3 << 20)
        file.write(b"changed")
    os.sync()
    used = os.statvfs(xfs).f_bfree
    mirror(source, target)
    os.sync()
    assert (used - os.statvfs(xfs).f_bfree) * os.statvfs(xfs).f_bsize < 1 << 20
    assert list(differences(source, target)) == []


def test_data_under_an_old_time_is_found(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for one, data in ((source, b"one"), (target, b"two")):
        one.mkdir()
        trees.apply([trees.file("a", data), trees.utime("a", 5)], one)
    mirror(source, target)
    assert [str(one) for one in differences(source, target)] == ["/a: has other contents"]
    mirror(source, target, contents=True)
    assert list(differences(source, target)) == []


def test_holes_stay_holes(tmp_path: Path, xfs: Path) -> None:
    for name in ("source", "target"):
        (xfs / name).mkdir()
    with (xfs / "source/sparse").open("wb") as file:
        file.truncate(1 << 30)
        file.seek(500 << 20)
        file.write(b"data")
    mirror(xfs / "source", xfs / "target")
    assert list(differences(xfs / "source", xfs / "target")) == []
    assert (xfs / "target/sparse").stat().st_blocks * 512 < 1 << 20


def test_no_symlink_leads_out(tmp_path: Path) -> None:
    source, target, outside = tmp_path / "source", tmp_path / "target", tmp_path / "outside"
    for one in (source, target, outside):
        one.mkdir()
    (outside / "file").write_text("outside")
    (target / "d").symlink_to(outside)
    (target / "f").symlink_to(outside / "file")
    (source / "d").mkdir()
    (source / "d/file").write_text("inside")
    (source / "f").write_text("inside")
    mirror(source, target)
    assert list(differences(source, target)) == []
    assert (outside / "file").read_text() == "outside"


def test_what_a_file_system_cannot_hold_is_named(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for one in (source, target):
        one.mkdir()
    mount.filesystem("ramfs", "none", target)
    try:
        trees.apply([trees.file("attributed", b"x")], source)
        os.setxattr(source / "attributed", "user.x", b"1")
        with pytest.raises(InvalidArgument, match="/attributed cannot be made on the target's file system"):
            mirror(source, target)
    finally:
        mount.umount(target)
