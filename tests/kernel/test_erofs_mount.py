"""The kernel is the last judge of a map: mount it and compare every attribute of every path."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from hpmapper.erofs import overlay
from hpmapper.model import object_path
from hpmapper.tree import Inode, Xattrs, directory, walk, whiteout
from tests.strategies import EPOCH, SECOND, Sample, object_file, samples, symlink

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root"),
]

KiB, TiB = 1 << 10, 1 << 40


@contextmanager
def mounted(*arguments: str | Path) -> Iterator[bytes]:
    """The last argument is the mount point, which is made here and removed again."""
    point = Path(arguments[-1])
    point.mkdir()
    subprocess.run(["mount", *arguments], check=True)
    try:
        yield os.fsencode(point)
    finally:
        subprocess.run(["umount", point], check=True)
        point.rmdir()


@contextmanager
def mounted_map(sample: Sample, scratch: Path) -> Iterator[bytes]:
    """The sample's map, mounted by EROFS alone."""
    image = scratch / "map"
    image.write_bytes(sample.image())
    try:
        with mounted("-t", "erofs", "-o", "ro", image, scratch / "m") as point:
            yield point
    finally:
        image.unlink()


def compare(sample: Sample, point: bytes) -> None:
    """Everything that EROFS shows of the tree is as the tree says."""
    links = _link_counts(sample.root)
    numbers: dict[int, int] = {}
    paths = dict(walk(sample.root))
    for path, inode in paths.items():
        found = point + b"/" + path if path else point
        status = os.lstat(found)
        size = status.st_size if inode.is_dir else inode.size
        assert (status.st_mode, status.st_uid, status.st_gid) == (inode.mode, inode.uid, inode.gid), path
        assert (status.st_mtime_ns, status.st_size, status.st_rdev) == (inode.mtime_ns, size, inode.rdev), path
        assert status.st_nlink == links[id(inode)], path
        assert numbers.setdefault(status.st_ino, id(inode)) == id(inode), path
        assert _xattrs(found) == _expected_xattrs(inode), path
        _compare_data(sample, inode, found)
    assert len(numbers) == len({id(inode) for inode in paths.values()})
    assert _listing(point) == set(paths)


def _compare_data(sample: Sample, inode: Inode, found: bytes) -> None:
    if stat.S_ISLNK(inode.mode):
        assert os.readlink(found) == inode.target
    elif stat.S_ISREG(inode.mode) and not isinstance(inode.content, bytes):
        with open(found, "rb") as file:
            assert file.read() == (sample.read(inode) if inode.size else b"")
    elif stat.S_ISREG(inode.mode):
        with open(found, "rb") as file:
            assert not file.read(64 * KiB).strip(b"\0")


def _link_counts(root: Inode) -> dict[int, int]:
    counts: dict[int, int] = {}
    for _, inode in walk(root):
        counts[id(inode)] = counts.get(id(inode), 0) + 1
    for _, inode in walk(root):
        if inode.is_dir:
            counts[id(inode)] = 2 + sum(child.is_dir for child in inode.entries().values())
    return counts


def _expected_xattrs(inode: Inode) -> Xattrs:
    digest = inode.content if isinstance(inode.content, bytes) else None
    stored = overlay.written(inode.xattrs, digest, opaque=inode.opaque)
    return tuple(pair for pair in stored if _can_have(inode.mode, pair[0]))


def _can_have(mode: int, name: bytes) -> bool:
    """Linux lists but never gives out user xattrs of other files (fs/xattr.c, xattr_permission)."""
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode) or not name.startswith(b"user.")


def _xattrs(path: bytes) -> Xattrs:
    mode = os.lstat(path).st_mode
    names = [name for name in os.listxattr(path, follow_symlinks=False) if _can_have(mode, os.fsencode(name))]
    return tuple(sorted((os.fsencode(name), os.getxattr(path, name, follow_symlinks=False)) for name in names))


def _listing(point: bytes) -> set[bytes]:
    found = {b""}
    stack = [b""]
    while stack:
        here = stack.pop()
        with os.scandir(os.path.join(point, here)) as entries:
            for entry in entries:
                path = os.path.join(here, entry.name)
                found.add(path)
                if entry.is_dir(follow_symlinks=False):
                    stack.append(path)
    return found


def every_kind() -> Sample:
    """One of each thing that a map can hold, at the edges of their ranges."""
    sample = Sample()
    sample.add(b"empty", sample.file(b""))
    for size in (1, 4000, 4031, 4032, 4064, 4065, 4095, 4096, 4097, 12288, 3 * KiB * KiB + 5):
        sample.add(b"data-%d" % size, sample.file(os.urandom(size)))
    for number, size in enumerate((1, 2**32, 100 * 2**30, 8 * TiB, 8 * TiB + 1, 2**60)):
        sample.add(b"object-%d" % size, object_file(number, size))
    for length in (1, 59, 1000, 4031, 4032, 4095):
        sample.add(b"link-%d" % length, symlink(b"t" * length))
    for name, mode, rdev in (
        (b"block", stat.S_IFBLK, os.makedev(8, 1)),
        (b"character", stat.S_IFCHR, os.makedev(0xFFF, 0xFFFFF)),
        (b"fifo", stat.S_IFIFO, 0),
        (b"socket", stat.S_IFSOCK, 0),
    ):
        sample.add(name, Inode(mode | 0o640, 1, 2, EPOCH, rdev=rdev))
    for time in (0, -1, -SECOND, -(2**33) * SECOND + 1, 2**35 * SECOND + 999_999_999):
        sample.add(b"time%d" % time, Inode(stat.S_IFREG, 0, 0, time))
    for owner in (0xFFFF, 0x10000, 0xFFFFFFFE):
        sample.add(b"owner%d" % owner, Inode(stat.S_IFREG | 0o4755, owner, owner, EPOCH))
    sample.add(b"gone", whiteout())
    opaque = directory(mtime_ns=EPOCH)
    opaque.opaque = True
    sample.add(b"opaque", opaque)
    _add_names(sample)
    _add_xattrs(sample)
    return sample


def _add_names(sample: Sample) -> None:
    names = sample.add(b"names", directory(0o1777, mtime_ns=EPOCH)).entries()
    twin = sample.file(b"twin")
    for name in (b"!before-dots", b"-", b"...", b"..a", b".a", b"\xff\xfe", b"n" * 255, b"a b\n", "ü".encode()):
        names[name] = twin
    deep = sample.root
    for level in range(1500):
        deep = deep.entries().setdefault(b"d", directory(mtime_ns=level))


def _add_xattrs(sample: Sample) -> None:
    label = (b"security.selinux", b"system_u:object_r:bin_t:s0\0")
    capability = (b"security.capability", bytes.fromhex("0100000200200000000000000000000000000000"))
    acl = (b"system.posix_acl_access", bytes.fromhex("02000000 01000600ffffffff 04000400ffffffff 20000400ffffffff"))
    forged = (
        (b"trusted.overlay.metacopy", b""),
        (b"trusted.overlay.overlay.opaque", b"y"),
        (b"trusted.overlay.redirect", overlay.redirect(object_file(1, 1).content)),  # type: ignore[arg-type]
    )
    large = (b"user.large", os.urandom(65535))
    for name, xattrs in {b"label": (label,), b"both": (capability, label), b"acl": (acl,), b"large": (large,)}.items():
        sample.add(name, sample.file(name, xattrs=xattrs))
    sample.add(b"forged", sample.file(b"harmless", xattrs=forged))
    sample.add(b"object-xattrs", object_file(7, 5000, (capability, label, *forged)))
    many = tuple((b"user.%03d" % number, b"v" * 20) for number in range(300))
    for name in (b"many-a", b"many-b"):
        sample.add(name, sample.file(b"x", xattrs=many))


def test_every_kind(tmp_path: Path) -> None:
    sample = every_kind()
    with mounted_map(sample, tmp_path) as point:
        compare(sample, point)


def test_large_directory(tmp_path: Path) -> None:
    sample = Sample()
    for number in range(120_000):
        sample.root.entries()[b"%d" % number] = object_file(number, 4096, mtime_ns=number)
    with mounted_map(sample, tmp_path) as point:
        assert len(os.listdir(point)) == 120_000
        for number in (0, 1, 99_999, 119_999):
            assert os.lstat(point + b"/%d" % number).st_mtime_ns == number
        assert not os.path.lexists(point + b"/120000")


@given(sample=samples())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_tree(sample: Sample, tmp_path_factory: pytest.TempPathFactory) -> None:
    scratch = tmp_path_factory.mktemp("map")
    with mounted_map(sample, scratch) as point:
        compare(sample, point)
    scratch.rmdir()


def test_overlay_understands(tmp_path: Path) -> None:
    """Through overlayfs an object's file has its data, and forged xattrs are only xattrs.

    The lower layer's file is one that the opaque directory and the whiteout must hide.
    """
    sample = every_kind()
    data = os.urandom(5000)
    content = sample.root.entries()[b"object-xattrs"].content
    assert isinstance(content, bytes)
    target = tmp_path / "objects" / object_path(content)
    target.parent.mkdir(parents=True)
    target.write_bytes(data)
    for name in ("opaque/hidden", "gone/hidden"):
        (tmp_path / "lower" / name).parent.mkdir(parents=True)
        (tmp_path / "lower" / name).touch()
    with mounted_map(sample, tmp_path) as point:
        layers = f"lowerdir={os.fsdecode(point)}:{tmp_path}/lower::{tmp_path}/objects"
        options = f"ro,metacopy=on,redirect_dir=on,{layers}"
        with mounted("-t", "overlay", "-o", options, "overlay", tmp_path / "o") as merged:
            assert Path(os.fsdecode(merged), "object-xattrs").read_bytes() == data
            assert Path(os.fsdecode(merged), "forged").read_bytes() == b"harmless"
            for path in (b"object-xattrs", b"forged"):
                assert _xattrs(merged + b"/" + path) == sample.root.entries()[path].xattrs
            assert os.listdir(merged + b"/opaque") == []
            assert not os.path.lexists(merged + b"/gone")
            with pytest.raises(FileNotFoundError):
                Path(os.fsdecode(merged), "object-1").read_bytes()
