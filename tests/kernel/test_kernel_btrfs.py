"""Subvolumes, trees and quota groups of a real btrfs."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpmapper.kernel import btrfs, mount, qgroup, sync
from hpmapper.kernel.syscall import opened
from hpmapper.pool.base import MIB, PoolFs
from tests.filesystems import mounted

pytestmark = pytest.mark.kernel

GROUP = qgroup.qgroup(1000, 7)


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Path]:
    """A mounted btrfs."""
    target = mounted(PoolFs.BTRFS, tmp_path, 300 * MIB)
    yield target
    mount.umount(target)


def test_a_subvolume_is_made_found_and_deleted(pool: Path) -> None:
    made = pool / "made"
    btrfs.create_subvolume(made)
    (made / "file").write_text("in it")
    assert btrfs.is_subvolume(made)
    assert not btrfs.is_subvolume(made / "file")
    assert btrfs.subvolume(made / "file").id == btrfs.subvolume(made).id
    assert btrfs.subvolume(made).parent == btrfs.subvolume(pool).id == 5
    btrfs.delete_subvolume(made)
    assert os.listdir(pool) == []


def test_a_subvolume_is_told_from_what_looks_like_one(pool: Path, tmp_path: Path) -> None:
    assert not btrfs.is_subvolume(pool), "the top of a mount is not a subvolume that could be deleted"
    assert not btrfs.is_subvolume(tmp_path)
    assert not btrfs.is_subvolume(pool / "missing")
    (pool / "link").symlink_to(".")
    assert not btrfs.is_subvolume(pool / "link")


def test_names_that_exist_or_cannot_exist_are_refused(pool: Path) -> None:
    btrfs.create_subvolume(pool / "made")
    with pytest.raises(FileExistsError):
        btrfs.create_subvolume(pool / "made")
    with pytest.raises(OSError, match="not a subvolume's name"):
        btrfs.create_subvolume(pool / ("n" * 256))
    with pytest.raises(FileNotFoundError):
        btrfs.delete_subvolume(pool / "missing")


def test_a_snapshot_is_as_it_was_and_shares(pool: Path) -> None:
    base, copy, fixed = pool / "base", pool / "copy", pool / "fixed"
    btrfs.create_subvolume(base)
    (base / "file").write_bytes(b"before")
    btrfs.snapshot(base, copy)
    btrfs.snapshot(base, fixed, read_only=True)
    (base / "file").write_bytes(b"after!")
    assert (copy / "file").read_bytes() == (fixed / "file").read_bytes() == b"before"
    assert not btrfs.subvolume(copy).read_only
    assert btrfs.subvolume(fixed).read_only
    with pytest.raises(OSError, match="Read-only") as caught:
        (fixed / "new").touch()
    assert caught.value.errno == errno.EROFS
    btrfs.set_read_only(fixed, False)
    (fixed / "new").touch()


def test_subvolumes_inside_go_too_whatever_their_names(pool: Path) -> None:
    outer = pool / "outer"
    btrfs.create_subvolume(outer)
    (outer / "dir").mkdir()
    btrfs.create_subvolume(os.fsencode(outer / "dir") + b"/\xff\n")
    btrfs.create_subvolume(os.fsencode(outer / "dir") + b"/\xff\n/deeper")
    btrfs.create_subvolume(outer / "other")
    btrfs.set_read_only(outer / "other", True)
    btrfs.create_subvolume(pool / "beside")
    assert len(btrfs.nested(pool, btrfs.subvolume(outer).id)) == 3
    btrfs.delete_subvolume(outer)
    assert os.listdir(pool) == ["beside"]


def test_a_tree_is_read_whole_or_since(pool: Path) -> None:
    base = pool / "base"
    btrfs.create_subvolume(base)
    for number in range(3000):  # more than one buffer holds
        (base / f"{number:050}").touch()
    assert btrfs.count_inodes(base) == 3001
    sync.syncfs(base)
    btrfs.snapshot(base, pool / "copy")
    since = btrfs.subvolume(pool / "copy").born
    (pool / "copy" / "new").touch()
    with opened(pool / "copy") as fd:
        newer = list(btrfs.search(fd, 0, newer_than=since))
    assert 0 < len(newer) < 1000


def test_a_group_holds_its_members_to_the_limit(pool: Path) -> None:
    assert qgroup.mode(pool) is qgroup.Mode.NONE
    qgroup.enable_simple(pool)
    assert qgroup.mode(pool) is qgroup.Mode.SIMPLE
    limited = pool / "limited"
    btrfs.create_subvolume(limited)
    member = btrfs.subvolume(limited).id
    for _ in range(2):  # each may be repeated
        qgroup.create(pool, GROUP)
        qgroup.set_limit(pool, GROUP, 8 * MIB)
        qgroup.join(pool, member, GROUP)
    btrfs.create_subvolume(limited / "inner")
    written = _fill(limited / "inner" / "file") + _fill(limited / "file")
    assert 7 * MIB < written <= 8 * MIB
    os.sync()
    used = qgroup.usage(pool, GROUP)
    assert 7 * MIB < used.exclusive + used.reserved <= 8 * MIB
    for _ in range(2):
        for one in (member, *btrfs.nested(pool, member)):
            qgroup.leave(pool, one, GROUP)
        qgroup.remove(pool, GROUP)
    with pytest.raises(FileNotFoundError):
        qgroup.usage(pool, GROUP)
    assert _fill(limited / "more", 10 * MIB) == 10 * MIB


def _fill(path: Path, most: int = 64 * MIB) -> int:
    """Write until it is refused for quota; returns the bytes that were taken."""
    written = 0
    try:
        with path.open("wb", buffering=0) as file:
            while written < most:
                written += file.write(bytes(256 * 1024))
    except OSError as error:
        if error.errno != errno.EDQUOT:
            raise
    return written
