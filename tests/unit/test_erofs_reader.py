"""Reading maps: by path, whole, and damaged in ways that random damage seldom finds."""

from __future__ import annotations

import io
import shutil
import stat
import struct
import subprocess
from pathlib import Path

import pytest

from hpmapper.erofs import format as fmt
from hpmapper.erofs.hashes import crc32c, xxh32
from hpmapper.erofs.reader import Map, MapInode
from hpmapper.errors import Corrupt
from hpmapper.tree import directory, walk
from tests.strategies import EPOCH, Sample, facts, map_facts, object_file, reseal, symlink


def test_hashes() -> None:
    """Check values of the two specifications; EROFS leaves out CRC-32C's last inversion."""
    assert crc32c(b"123456789") ^ 0xFFFFFFFF == 0xE3069283
    assert xxh32(b"", 0) == 0x02CC5D05
    assert xxh32(b"abc", 0) == 0x32D153FF
    assert xxh32(b"Nobody inspects the spammish repetition", 0) == 0xE2293B2F


def many_blocks() -> Sample:
    """A directory of many blocks among others."""
    sample = Sample()
    for number in range(3000):
        sample.add(b"%05d" % (2 * number), object_file(number, 4096))
    sample.add(b"sub", directory())
    sample.add(b"sub/file", sample.file(b"data"))
    sample.add(b"sub/link", symlink(b"file"))
    return sample


def test_lookup() -> None:
    image = Map.from_bytes(many_blocks().image())
    for number in (0, 1, 170, 1500, 2999):
        found = image.lookup(b"%05d" % (2 * number))
        assert found is not None
        assert found.content == number.to_bytes(32, "big")
    for path in (
        b"00001",
        b"!",
        b"~",
        b"sub/none",
        b"sub/file/x",
        b"sub/link/x",
        b"sub/..",
        b".",
        b"sub//file",
        b"/sub",
    ):
        assert image.lookup(path) is None
    assert image.lookup(b"") is not None
    link = image.lookup(b"sub/link")
    assert link is not None
    assert link.target == b"file"


def test_lookup_reads_little() -> None:
    """A path in a directory of 30 blocks costs a few blocks, not all."""

    class Counting:
        name = "map"

        def __init__(self, data: bytes) -> None:
            self.data, self.size, self.read_bytes = data, len(data), 0

        def read(self, offset: int, size: int) -> bytes:
            self.read_bytes += size
            return self.data[offset : offset + size]

        def close(self) -> None:
            """Nothing to do."""

    source = Counting(many_blocks().image())
    image = Map(source)
    source.read_bytes = 0
    assert image.lookup(b"03000") is not None
    assert source.read_bytes < 10 * fmt.BLOCK


def test_names_and_children() -> None:
    image = Map.from_bytes(many_blocks().image())
    sub = image.lookup(b"sub")
    assert sub is not None
    assert image.names(sub) == [b"file", b"link"] == list(image.children(sub))
    file = image.children(sub)[b"file"]
    with pytest.raises(NotADirectoryError):
        image.names(file)
    with pytest.raises(ValueError, match="object"):
        image.read(image.children(image.root)[b"00000"])
    assert image.read(file) == b"data"


def test_data_in_blocks_and_tail() -> None:
    sample = Sample()
    data = bytes(range(256)) * 20
    sample.add(b"a", sample.file(data))
    image = Map.from_bytes(sample.image())
    found = image.lookup(b"a")
    assert found is not None
    assert (found.data_blocks, found.tail_size) == (1, 1024)
    assert image.read(found) == data


def test_large_data_comes_in_pieces() -> None:
    sample = Sample()
    sample.add(b"a", sample.file(bytes(range(250)) * 20_000))
    image = Map.from_bytes(sample.image())
    found = image.lookup(b"a")
    assert found is not None
    pieces = list(image.pieces(found))
    assert max(map(len, pieces)) == 1 << 20
    assert b"".join(pieces) == sample.spool.getvalue()


def test_tree_into_a_spool() -> None:
    sample = many_blocks()
    spool = io.BytesIO(b"before")
    spool.seek(0, io.SEEK_END)
    tree = Map.from_bytes(sample.image()).tree(spool)
    found = tree.entries()[b"sub"].entries()[b"file"]
    assert isinstance(found.content, int)
    assert spool.getvalue()[found.content :] == b"data"


def test_from_a_file(tmp_path: Path) -> None:
    sample = many_blocks()
    path = tmp_path / "map"
    path.write_bytes(sample.image())
    with Map.open(path) as image:
        assert map_facts(image) == sample.facts()
    path.write_bytes(b"")
    with pytest.raises(Corrupt, match="map"):
        Map.open(path)


def test_a_file_that_shrinks(tmp_path: Path) -> None:
    path = tmp_path / "map"
    path.write_bytes(many_blocks().image())
    with Map.open(path) as image:
        with path.open("r+b") as file:
            file.truncate(20_000)
        with pytest.raises(Corrupt):
            image.tree()


def patched(sample: Sample, path: bytes, offset: int, new: bytes) -> Map:
    """The sample's map with `new` at `offset` of the inode at `path`, under a right checksum."""
    image = bytearray(sample.image())
    inode = Map.from_bytes(bytes(image)).lookup(path)
    assert inode is not None
    at = inode.nid * fmt.SLOT + offset
    image[at : at + len(new)] = new
    return Map.from_bytes(reseal(image))


def test_directory_loop() -> None:
    """An entry that leads back to the root must not be followed for ever."""
    sample = Sample()
    sample.add(b"a", directory(mtime_ns=EPOCH))
    image = bytearray(sample.image())
    loop = Map.from_bytes(bytes(image))
    child = loop.root.nid, loop.children(loop.root)[b"a"].nid
    data = bytes(image).replace(struct.pack("<QHB", child[1], 39, 2), struct.pack("<QHB", child[0], 39, 2))
    assert data != image
    with pytest.raises(Corrupt, match="more names than links"):
        Map.from_bytes(reseal(bytearray(data))).tree()


@pytest.mark.parametrize(
    ("offset", "new", "message"),
    [
        (0, b"\xff\x00", "format"),
        (0, b"\x06\x00", "layout"),
        (2, b"\xff\xff", "outside|xattr"),
        (2, b"\x01\x00", "xattr"),
        (4, b"\x00\x00", "mode"),
        (6, b"\x02\x00", "2 links, 1 names"),
        (8, b"\xff\xff\xff\xff", "outside|cross"),
        (24, b"\xff\xff", None),
    ],
)
def test_damaged_file_inode(offset: int, new: bytes, message: str | None) -> None:
    sample = Sample()
    sample.add(b"a", sample.file(b"data"))
    image = patched(sample, b"a", offset, new)
    if message is None:
        assert image.children(image.root)[b"a"].uid == 0xFFFF
        return
    with pytest.raises(Corrupt, match=message):
        image.tree()


@pytest.mark.parametrize(
    ("size", "message"), [(0, "mode"), (5, "names at"), (0xFFFFFFFF, "outside|cross"), (39, "has the name")]
)
def test_damaged_directory_size(size: int, message: str) -> None:
    sample = Sample()
    sample.add(b"a", sample.file(b"data"))
    with pytest.raises(Corrupt, match=message):
        patched(sample, b"", 8, struct.pack("<I", size)).tree()


def test_wrong_filter_is_found() -> None:
    """A filter that hides the redirect would make the kernel read an object's file as zeros."""
    sample = Sample()
    sample.add(b"a", object_file(1, 4096))
    with pytest.raises(Corrupt, match="filter"):
        patched(sample, b"a", 32, b"\xff\xff\xff\xff").tree()


def test_an_object_file_has_no_data_of_its_own() -> None:
    sample = Sample()
    sample.add(b"a", object_file(1, 4096))
    found = Map.from_bytes(sample.image()).lookup(b"a")
    assert found is not None
    with pytest.raises(Corrupt, match="chunks of data"):
        patched(sample, b"a", found.tail - found.nid * fmt.SLOT, b"\0\0\0\0").tree()


def test_overlapping_directories_end() -> None:
    """Many directories that share one block of entries: small image, endless work, were it not bounded."""
    sample = Sample()
    for number in range(40):
        sample.add(b"%02d" % number, directory(mtime_ns=EPOCH))
    sample.add(b"big", directory(mtime_ns=EPOCH))
    for number in range(2000):
        sample.add(b"big/%04d" % number, directory(mtime_ns=EPOCH))
    image = bytearray(sample.image())
    before = Map.from_bytes(bytes(image))
    big = before.children(before.root)[b"big"]
    record = bytes(image[big.nid * fmt.SLOT :][:32])
    for number in range(40):
        nid = before.children(before.root)[b"%02d" % number].nid
        image[nid * fmt.SLOT : nid * fmt.SLOT + 32] = record
    with pytest.raises(Corrupt):
        Map.from_bytes(reseal(image)).tree()


@pytest.mark.parametrize(
    ("offset", "new", "message"),
    [
        (0, b"\0", "magic"),
        (4, b"\0\0\0\0", "checksum"),
        (8, b"\x02", "no checksum"),
        (12, b"\x0d", "block size"),
        (13, b"\x01", "newer"),
        (32, b"\xff\xff\xff\xff", "nanoseconds"),
        (36, b"\xff\xff\xff\x7f", "announced"),
        (80, b"\x01", "newer"),
        (86, b"\x01", "newer"),
    ],
)
def test_damaged_superblock(offset: int, new: bytes, message: str) -> None:
    image = bytearray(many_blocks().image())
    at = fmt.SUPERBLOCK_OFFSET + offset
    image[at : at + len(new)] = new
    with pytest.raises(Corrupt, match=message):
        Map.from_bytes(bytes(image))


@pytest.mark.skipif(shutil.which("mkfs.erofs") is None, reason="needs erofs-utils: apt install erofs-utils")
def test_reads_what_mkfs_writes(tmp_path: Path) -> None:
    """The format as others understand it; 1.5 writes neither filters nor objects, so only the rest is judged."""
    source = tmp_path / "source"
    (source / "a/b").mkdir(parents=True)
    (source / "a/b/small").write_bytes(b"data")
    (source / "a/big").write_bytes(bytes(range(256)) * 100)
    (source / "a/link").symlink_to("b/small")
    (source / "a/twin").hardlink_to(source / "a/big")
    for number in range(800):
        (source / f"entry-{number}").touch()
    image = tmp_path / "image"
    subprocess.run(["mkfs.erofs", image, source], check=True, capture_output=True)
    with Map.open(image) as opened:
        tree = opened.tree()
        found = map_facts(opened)
    assert set(found) == {bytes(path.relative_to(source)) for path in source.rglob("*")} | {b""}
    assert found[b"a/b/small"].data == b"data"
    assert found[b"a/big"].data == found[b"a/twin"].data == bytes(range(256)) * 100
    assert found[b"a/twin"].first_name == b"a/big"
    assert found[b"a/link"].target == b"b/small"
    for path, inode in walk(tree):
        status = (source / path.decode()).lstat()
        assert (inode.mode, inode.uid) == (status.st_mode, status.st_uid)
        assert isinstance(inode, MapInode)
        assert inode.nlink == status.st_nlink
        assert not stat.S_ISREG(inode.mode) or inode.size == status.st_size


def test_facts_see_differences() -> None:
    """The comparison that the tests stand on."""
    sample, other = many_blocks(), many_blocks()
    assert sample.facts() == other.facts()
    other.add(b"sub/link", symlink(b"filf"))
    assert sample.facts() != facts(other.root, other.read)
