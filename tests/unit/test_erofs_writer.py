"""What a map is made of, in bytes; and which trees cannot become one."""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from hpmapper.erofs import format as fmt
from hpmapper.erofs.dump import dump
from hpmapper.erofs.inodes import decode_device, encode_device
from hpmapper.erofs.reader import Map
from hpmapper.erofs.writer import write_map
from hpmapper.errors import Corrupt, InvalidArgument
from hpmapper.model import ObjectDigest
from hpmapper.tree import Inode, directory, whiteout
from tests.strategies import EPOCH, SECOND, UUID, Sample, fsck, map_facts, object_file, symlink

GOLDEN = Path(__file__).parent.parent / "golden"
GOLDEN_DIGEST = "8265dbfbe1bdc937fd135746bdbda1a67ab75f0087e57bf19a4eb236501658fb"


def small_root() -> Sample:
    """A bit of everything, with data of its own making: the golden tree."""
    sample = Sample()
    for name in (b"bin", b"etc", b"usr", b"usr/lib", b"dev"):
        sample.add(name, directory(mtime_ns=EPOCH))
    capability = (b"security.capability", bytes.fromhex("0100000200200000000000000000000000000000"))
    label = (b"security.selinux", b"system_u:object_r:etc_t:s0")
    sample.add(b"bin/busybox", object_file(0xAB, 1_131_168, (capability,)))
    sample.add(b"bin/sh", sample.root.entries()[b"bin"].entries()[b"busybox"])
    sample.add(b"bin/awk", symlink(b"/bin/busybox"))
    for number in range(5):
        sample.add(b"etc/conf%d" % number, sample.file(b"key = %d\n" % number, 0o600, EPOCH + number, (label,)))
    sample.add(b"etc/big", sample.file(bytes(range(256)) * 24))
    sample.add(b"etc/forged", sample.file(b"x", xattrs=((b"trusted.overlay.redirect", b"/etc/shadow"),)))
    sample.add(b"usr/lib/caf\xe9", sample.file(b""))
    sample.add(b"usr/lib/old", whiteout())
    sample.root.entries()[b"usr"].entries()[b"lib"].opaque = True
    sample.add(b"dev/null", Inode(stat.S_IFCHR | 0o666, 0, 5, -1, rdev=os.makedev(1, 3)))
    sample.add(b"dev/log", Inode(stat.S_IFSOCK | 0o777, 70_000, 70_000, EPOCH))
    for number in range(400):
        sample.add(b"usr/entry-%04d" % number, object_file(number, 4096 + number))
    return sample


def test_golden_dump() -> None:
    image = Map.from_bytes(small_root().image())
    text = "".join(f"{line}\n" for line in dump(image))
    assert text == (GOLDEN / "small-root.dump").read_text("ascii")


def test_golden_bytes() -> None:
    """Maps are content-addressed on registries: the same tree must not change its bytes from version to version."""
    digest = hashlib.sha256(small_root().image()).hexdigest()
    assert digest == GOLDEN_DIGEST, "the bytes of maps changed; if intentional, update"


def test_golden_image_passes_fsck(tmp_path: Path) -> None:
    image = tmp_path / "map"
    image.write_bytes(small_root().image())
    fsck(image)


def test_superblock() -> None:
    image = Map.from_bytes(small_root().image())
    superblock = image.superblock
    assert superblock.magic == fmt.MAGIC
    assert superblock.uuid == UUID
    assert (superblock.epoch, superblock.fixed_nsec) == divmod(EPOCH, SECOND)
    assert superblock.feature_incompat == fmt.INCOMPAT_CHUNKED_FILE
    assert superblock.xattr_block


def test_a_map_without_objects_needs_no_new_kernel() -> None:
    sample = Sample()
    sample.add(b"a", sample.file(b"data"))
    assert Map.from_bytes(sample.image()).superblock.feature_incompat == 0


def test_inodes_are_compact_where_they_fit() -> None:
    sample = Sample()
    cases = {
        b"usual": (Inode(stat.S_IFREG, 0, 0, EPOCH), 32),
        b"largest": (Inode(stat.S_IFREG, 0xFFFF, 0xFFFF, EPOCH), 32),
        b"later": (Inode(stat.S_IFREG, 0, 0, EPOCH + 1), 64),
        b"owner": (Inode(stat.S_IFREG, 0x10000, 0, EPOCH), 64),
        b"group": (Inode(stat.S_IFREG, 0, 0x10000, EPOCH), 64),
    }
    for name, (inode, _) in cases.items():
        sample.add(name, inode)
    image = Map.from_bytes(sample.image())
    found = {name: image.children(image.root)[name].extent for name in cases}
    assert found == {name: size for name, (_, size) in cases.items()}


def test_large_objects() -> None:
    sample = Sample()
    for number, size in enumerate((2**32 - 1, 2**32, 2**43, 2**43 + 1, 2**60)):
        sample.add(b"%d" % size, object_file(number, size))
    image = Map.from_bytes(sample.image())
    assert map_facts(image) == sample.facts()
    assert image.size < 1 << 20


def test_hard_links_beyond_16_bits() -> None:
    sample = Sample()
    twin = sample.file(b"data")
    for number in range(70_000):
        sample.root.entries()[b"%d" % number] = twin
    image = Map.from_bytes(sample.image())
    found = image.lookup(b"69999")
    assert found is not None
    assert found.nlink == 70_000
    assert image.superblock.inodes == 2


def test_deep_nesting() -> None:
    sample = Sample()
    here = sample.root
    for _ in range(20_000):
        here = here.entries().setdefault(b"d", directory(mtime_ns=EPOCH))
    image = Map.from_bytes(sample.image())
    assert image.superblock.inodes == 20_001
    assert image.lookup(b"/".join([b"d"] * 20_000)) is not None


def test_recurring_xattrs_are_kept_once() -> None:
    sample = Sample()
    label = ((b"security.selinux", b"system_u:object_r:bin_t:s0" * 10),)
    for number in range(1000):
        sample.add(b"%d" % number, sample.file(b"", xattrs=label))
    assert len(sample.image()) < 1000 * (64 + len(label[0][1]) // 4)


def test_full_blocks_leave_little_room() -> None:
    """First fit over several open blocks: files whose tails do not pair up must not cost a block each."""
    sample = Sample()
    for number in range(2000):
        sample.add(b"%04d" % number, sample.file(bytes(number * 7919 % 3001 + 1)))
    used = sum(inode.size + 32 for inode in sample.root.entries().values())
    assert len(sample.image()) < used * 1.1


def _bad_name(name: bytes) -> Callable[[Sample], object]:
    def put(sample: Sample) -> None:
        sample.root.entries()[b"here"] = directory()
        sample.root.entries()[b"here"].entries()[name] = sample.file(b"x")

    return put


def _bad(inode: Inode) -> Callable[[Sample], object]:
    return lambda sample: sample.add(b"here", inode)


def _xattr(name: bytes, value: bytes = b"") -> Callable[[Sample], object]:
    return _bad(Inode(stat.S_IFREG, xattrs=((name, value),)))


REFUSED: dict[str, Callable[[Sample], object]] = {
    "empty name": _bad_name(b""),
    "dot": _bad_name(b"."),
    "dot dot": _bad_name(b".."),
    "slash": _bad_name(b"a/b"),
    "NUL": _bad_name(b"a\0b"),
    "256 bytes of name": _bad_name(b"n" * 256),
    "no type": _bad(Inode(0o644)),
    "unknown type": _bad(Inode(0o170644)),
    "mode too large": _bad(Inode(0o1100644)),
    "negative owner": _bad(Inode(stat.S_IFREG, uid=-1)),
    "owner that is none": _bad(Inode(stat.S_IFREG, uid=0xFFFFFFFF)),
    "group too large": _bad(Inode(stat.S_IFREG, gid=1 << 32)),
    "year 300 billion": _bad(Inode(stat.S_IFREG, mtime_ns=SECOND << 63)),
    "negative size": _bad(Inode(stat.S_IFREG, size=-1)),
    "file too large": _bad(object_file(1, (1 << 60) + 1)),
    "size without data": _bad(Inode(stat.S_IFREG, size=1)),
    "short digest": _bad(Inode(stat.S_IFREG, size=1, content=ObjectDigest(b"short"))),
    "symlink with data": _bad(Inode(stat.S_IFLNK, content=0, target=b"a")),
    "empty target": _bad(symlink(b"")),
    "long target": _bad(symlink(b"t" * 4096)),
    "target with NUL": _bad(symlink(b"a\0b")),
    "major too large": _bad(Inode(stat.S_IFCHR, rdev=os.makedev(1 << 12, 0))),
    "minor too large": _bad(Inode(stat.S_IFBLK, rdev=os.makedev(0, 1 << 20))),
    "xattr of no namespace": _xattr(b"com.apple.quarantine"),
    "system xattr": _xattr(b"system.nfs4_acl"),
    "xattr without name": _xattr(b"user."),
    "xattr with long name": _xattr(b"user." + b"n" * 251),
    "xattr that is too long when escaped": _xattr(b"trusted.overlay." + b"n" * 239 + b"n" * 1),
    "xattr of 64 KiB": _xattr(b"user.a", bytes(65536)),
    "xattrs of 260 KiB": _bad(Inode(stat.S_IFREG, xattrs=tuple((b"user.%d" % n, bytes(65000)) for n in range(5)))),
    "xattr twice": _bad(Inode(stat.S_IFREG, xattrs=((b"user.a", b"1"), (b"user.a", b"2")))),
}


@pytest.mark.parametrize("spoil", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_stored_is_refused_with_its_path(spoil: Callable[[Sample], object]) -> None:
    sample = Sample()
    spoil(sample)
    with pytest.raises(InvalidArgument, match="/here"):
        sample.image()


def test_directory_under_two_names() -> None:
    sample = Sample()
    twice = sample.add(b"a", directory())
    sample.add(b"b", twice)
    with pytest.raises(InvalidArgument, match="b: one directory under two names"):
        sample.image()
    del sample.root.entries()[b"b"]
    twice.entries()[b"loop"] = sample.root
    with pytest.raises(InvalidArgument, match="loop"):
        sample.image()


def test_root_must_be_a_directory() -> None:
    with pytest.raises(InvalidArgument, match="root"):
        write_map(Inode(stat.S_IFREG), io.BytesIO(), io.BytesIO(), uuid=UUID)


def test_uuid_must_have_16_bytes() -> None:
    with pytest.raises(InvalidArgument, match="uuid"):
        write_map(directory(), io.BytesIO(), io.BytesIO(), uuid=b"short")


@pytest.mark.parametrize("size", [100, 5000])
def test_short_spool(size: int) -> None:
    sample = Sample()
    sample.add(b"a", sample.file(bytes(size)))
    sample.spool.truncate(size - 1)
    with pytest.raises(Corrupt, match="spool"):
        sample.image()


@pytest.mark.parametrize("device", [(0, 0), (1, 3), (0xFFF, 0xFFFFF), (8, 256), (259, 0)])
def test_device_numbers(device: tuple[int, int]) -> None:
    rdev = os.makedev(*device)
    assert decode_device(encode_device(rdev)) == rdev


def test_device_number_as_linux_writes_it() -> None:
    assert encode_device(os.makedev(0x123, 0xABCDE)) == 0xABC123DE
