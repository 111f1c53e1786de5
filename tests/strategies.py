"""Trees for tests: made by hypothesis, by hand, written to images, and compared."""

from __future__ import annotations

import io
import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from hypothesis import strategies as st

from hpmapper.erofs.dirents import is_name
from hpmapper.erofs.hashes import crc32c
from hpmapper.erofs.kept import kept_tree
from hpmapper.erofs.reader import Map
from hpmapper.erofs.writer import extend_map, write_map
from hpmapper.layer.merge import merge
from hpmapper.model import ObjectDigest
from hpmapper.tree import Inode, Xattrs, directory, walk, whiteout

UUID = bytes(range(16))
SECOND = 10**9
EPOCH = 1_700_000_000 * SECOND


@dataclass
class Sample:
    """A tree and the spool with its data."""

    root: Inode = field(default_factory=lambda: directory(mtime_ns=EPOCH))
    spool: io.BytesIO = field(default_factory=io.BytesIO)

    def file(self, data: bytes, mode: int = 0o644, mtime_ns: int = EPOCH, xattrs: Xattrs = ()) -> Inode:
        """A regular file whose data is to lie in the map."""
        offset = self.spool.seek(0, io.SEEK_END)
        self.spool.write(data)
        content = offset if data else None
        return Inode(stat.S_IFREG | mode, 0, 0, mtime_ns, size=len(data), content=content, xattrs=xattrs)

    def add(self, path: bytes, inode: Inode) -> Inode:
        """Put `inode` at `path`, whose directory exists."""
        at = self.root
        *above, name = path.split(b"/")
        for step in above:
            at = at.entries()[step]
        at.entries()[name] = inode
        return inode

    def image(self) -> bytes:
        """The tree's map."""
        out = io.BytesIO()
        size = write_map(self.root, self.spool, out, uuid=UUID)
        assert size == len(out.getvalue())
        return out.getvalue()

    def read(self, inode: Inode) -> bytes:
        """Data of a file in the spool."""
        assert isinstance(inode.content, int)
        return self.spool.getvalue()[inode.content : inode.content + inode.size]

    def facts(self) -> dict[bytes, Facts]:
        """All that a map must keep of the tree."""
        return facts(self.root, self.read)


def object_file(number: int, size: int, xattrs: Xattrs = (), mtime_ns: int = EPOCH) -> Inode:
    """A regular file whose data is an object."""
    digest = ObjectDigest(number.to_bytes(32, "big"))
    return Inode(stat.S_IFREG | 0o644, 0, 0, mtime_ns, size=size, content=digest, xattrs=xattrs)


def symlink(target: bytes) -> Inode:
    return Inode(stat.S_IFLNK | 0o777, 0, 0, EPOCH, size=len(target), target=target)


class Facts(NamedTuple):
    """What two trees must agree on for one path."""

    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int
    rdev: int
    xattrs: Xattrs
    data: bytes
    target: bytes
    opaque: bool
    first_name: bytes


def facts(root: Inode, read: Callable[[Inode], bytes]) -> dict[bytes, Facts]:
    """The facts of each path; `read` gives the data of files whose content is a number."""
    first: dict[int, bytes] = {}
    result = {}
    for path, inode in walk(root):
        content = inode.content
        data = content if isinstance(content, bytes) else read(inode) if content is not None else b""
        first_name = first.setdefault(id(inode), path)
        result[path] = Facts(
            inode.mode, inode.uid, inode.gid, inode.mtime_ns, inode.size, inode.rdev, inode.xattrs, data,
            inode.target, inode.opaque, first_name,
        )  # fmt: skip
    return result


def map_facts(image: Map) -> dict[bytes, Facts]:
    """The facts of a map's tree."""

    def read(inode: Inode) -> bytes:
        assert isinstance(inode.content, int)
        return image.read(image.inode(inode.content))

    return facts(image.tree(), read)


def extended(base: bytes, layers: list[Inode], spool: io.BytesIO) -> tuple[bytes, int]:
    """A map with layers put on it, and the bytes in it that are not used any more."""
    image = Map.from_bytes(base)
    out = io.BytesIO(base)
    root = kept_tree(image)
    merge(layers, root)
    size, wasted = extend_map(root, image, spool, out, uuid=UUID)
    assert size == len(out.getvalue())
    return out.getvalue(), wasted


def strip_marks(root: Inode) -> None:
    """Make of a layer's tree one that has no layers below."""
    for _, inode in list(walk(root)):
        inode.opaque = False
        if inode.children:
            for name in [name for name, child in inode.children.items() if child.is_whiteout]:
                del inode.children[name]


def reseal(image: bytearray) -> bytes:
    """A damaged image under a right checksum, as an attacker would make it."""
    image[1028:1032] = bytes(4)
    image[1028:1032] = crc32c(bytes(image[1024:4096])).to_bytes(4, "little")
    return bytes(image)


def fsck(image: Path) -> None:
    """Let erofs-utils judge an image. 1.5 knows no xattr filter and no holes above 8 TiB, and ignores both.

    Not with --extract: since 1.8 that reads through holes, and objects may be TiB of them.
    """
    program = shutil.which("fsck.erofs")
    if program:
        done = subprocess.run([program, image], capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


# What trees are made of.

_name_bytes = st.binary(min_size=1, max_size=12) | st.binary(min_size=200, max_size=255)
names = _name_bytes.map(lambda name: name.translate(None, b"/\0")).filter(is_name)
_suffix = st.sampled_from(
    [b"a", b"mime_type", b"overlay.opaque", b"overlay.redirect", b"overlay.overlay.x", b"\xff" * 60]
)
_xattr_names = st.builds(bytes.__add__, st.sampled_from([b"user.", b"trusted.", b"security."]), _suffix)
_values = st.sampled_from([b"", b"y", b"system_u:object_r:bin_t:s0"]) | st.binary(max_size=300)
xattrs = st.dictionaries(_xattr_names, _values, max_size=4).map(lambda pairs: tuple(sorted(pairs.items())))
_times = st.sampled_from([EPOCH, 0, -1, -SECOND - 7]) | st.integers(-(2**33) * SECOND, 2**35 * SECOND)
_owners = st.sampled_from([0, 1000, 0xFFFF, 0x10000, 0xFFFFFFFE]) | st.integers(0, 0xFFFFFFFE)
_modes = st.integers(0, 0o7777)
_data = st.binary(max_size=50) | st.integers(0, 9000).map(lambda size: (bytes(range(251)) * 36)[:size])
_digests = st.binary(min_size=32, max_size=32).map(ObjectDigest)
_object_sizes = st.sampled_from([1, 4096, 2**32 - 1, 2**32, 2**43, 2**43 + 1]) | st.integers(1, 2**44)
_devices = st.builds(os.makedev, st.integers(0, 0xFFF), st.integers(0, 0xFFFFF))
_targets = st.binary(min_size=1, max_size=20) | st.binary(min_size=1, max_size=4095)


@st.composite
def inodes(draw: st.DrawFn, sample: Sample) -> Inode:
    """One inode of any type, its data put into the sample's spool."""
    inode = _make(draw, sample, draw(st.sampled_from("dddffoolscbp")))
    if not stat.S_ISLNK(inode.mode):
        inode.mode |= draw(_modes)
    inode.uid, inode.gid, inode.mtime_ns = draw(_owners), draw(_owners), draw(_times)
    inode.xattrs = draw(xattrs)
    return inode


def _make(draw: st.DrawFn, sample: Sample, kind: str) -> Inode:
    if kind == "d":
        return Inode(stat.S_IFDIR, opaque=draw(st.booleans()))
    if kind == "f":
        return sample.file(draw(_data), mode=0)
    if kind == "o":
        return Inode(stat.S_IFREG, size=draw(_object_sizes), content=draw(_digests))
    if kind == "l":
        return symlink(draw(_targets).replace(b"\0", b"0"))
    if kind in "cb":
        return Inode(stat.S_IFCHR if kind == "c" else stat.S_IFBLK, rdev=draw(_devices))
    return Inode(stat.S_IFSOCK if kind == "s" else stat.S_IFIFO)


@st.composite
def samples(draw: st.DrawFn, max_entries: int = 25) -> Sample:
    """A tree with hard links, and directories anywhere."""
    sample = Sample()
    directories = [sample.root]
    others: list[Inode] = []
    for _ in range(draw(st.integers(0, max_entries))):
        parent = draw(st.sampled_from(directories))
        if others and draw(st.integers(0, 4)) == 0:
            inode = draw(st.sampled_from(others))
        else:
            inode = draw(inodes(sample))
        if parent.entries().setdefault(draw(names), inode) is inode:
            (directories if inode.is_dir else others).append(inode)
    return sample


@st.composite
def layers_on(draw: st.DrawFn, sample: Sample, base: Map) -> Inode:
    """A layer that adds to a map, replaces and deletes what it has; data goes to the sample's spool."""
    root = directory(draw(_modes), mtime_ns=draw(_times))
    below = {path: inode for path, inode in walk(base.tree()) if inode.children is not None}
    others: list[Inode] = []
    for _ in range(draw(st.integers(0, 12))):
        path = draw(st.sampled_from(sorted(below)))
        parent = _made(draw, root, path)
        name = draw(names | st.sampled_from(sorted(below[path].entries()) or [b"new"]))
        match draw(st.sampled_from("addlo")):
            case "d":
                inode = whiteout()
            case "l" if others:
                inode = draw(st.sampled_from(others))
            case "o":
                parent.opaque = parent is not root
                continue
            case _:
                inode = draw(inodes(sample))
        if parent.entries().setdefault(name, inode) is inode and not inode.is_dir and not inode.is_whiteout:
            others.append(inode)
    return root


def _made(draw: st.DrawFn, root: Inode, path: bytes) -> Inode:
    at = root
    for name in path.split(b"/") if path else ():
        made = at.entries().get(name)
        if made is None or not made.is_dir:
            made = directory(draw(_modes), draw(_owners), draw(_owners), draw(_times))
            made.xattrs = draw(st.just(()) | xattrs)
            at.entries()[name] = made
        at = made
    return at
