"""Any tree, written as a tar, brought in and mounted by the kernel, is the same tree; and no tar does harm."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from hpmapper.drivers.base import Driver
from hpmapper.drivers.directory import Dialect, unpack
from hpmapper.drivers.hpmapper import HpmapperDriver
from hpmapper.drivers.overlay import OverlayDriver
from hpmapper.drivers.vfs import VfsDriver
from hpmapper.engine import Engine
from hpmapper.errors import Corrupt, InvalidArgument
from hpmapper.files import Pieces, Segments, write_file
from hpmapper.layer.aufs import BranchView, scan_branch
from hpmapper.layer.build import LayerBuilder, Nothing
from hpmapper.layer.diff import write_tar
from hpmapper.layer.merged import Merged
from hpmapper.layer.recipe import RecipeWriter
from hpmapper.layer.scan import DirectoryView, scan
from hpmapper.layer.stream import Expected, LayerStream
from hpmapper.meta.db import Database
from hpmapper.meta.snapshots import Snapshot
from hpmapper.model import ObjectDigest
from hpmapper.pool.base import MIB, PoolConfig, PoolKind
from hpmapper.pool.floor import Floor
from hpmapper.pool.loop import LoopPool
from hpmapper.testing import tars
from hpmapper.testing.contract import Subject
from hpmapper.testing.trees import Facts, read_tree
from hpmapper.tree import Inode, directory, walk, whiteout
from tests.strategies import names, xattrs

SECOND = 10**9
EXAMPLES = int(os.environ.get("HPMAPPER_EXAMPLES", "60"))
"""How many trees are tried: more for a long hunt."""

_slow_is_fine = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], max_examples=EXAMPLES
)


class Content(NamedTuple):
    """A tree and what its files hold."""

    root: Inode
    data: dict[Inode, bytes]

    def tar(self) -> bytes:
        """The tree as a layer."""
        by_path = dict(walk(self.root))
        out = io.BytesIO()
        write_tar(self.root, lambda path: io.BytesIO(self.data[by_path[path]]), out)
        return out.getvalue()


# Within what XFS and ext4 keep, because the root directory lies there; the others may be anything.
EARLIEST, LATEST = -(2**31 - 2) * SECOND, 2**33 * SECOND
_root_times = st.integers(EARLIEST, LATEST)
_times = _root_times | st.sampled_from([0, -1, -SECOND - 7, 2**40 * SECOND + 1]) | st.integers(-(2**50), 2**62)
_owners = st.sampled_from([0, 1000, 0xFFFF, 0x10000, 2**21, 2**31, 0xFFFFFFFE]) | st.integers(0, 0xFFFFFFFE)
_sizes = st.sampled_from([0, 1, 511, 512, 4095, 4096, 4097, 70_000]) | st.integers(0, 9000)
_targets = st.binary(min_size=1, max_size=60) | st.binary(min_size=200, max_size=4000)
_kinds = st.sampled_from("dddfffflcbp")


@st.composite
def contents(draw: st.DrawFn, deletions: bool = False, max_entries: int = 20) -> Content:
    """A layer: every type, links, directories anywhere; with `deletions` whiteouts and opaque directories too."""
    root = directory(draw(st.integers(0, 0o7777)), draw(_owners), draw(_owners), draw(_root_times))
    content = Content(root, {})
    directories = [root]
    others: list[Inode] = []
    for _ in range(draw(st.integers(0, max_entries))):
        inode = draw(st.sampled_from(others)) if others and draw(st.integers(0, 5)) == 0 else None
        if inode is None:
            inode = whiteout() if deletions and draw(st.integers(0, 4)) == 0 else draw(_inodes(content, deletions))
        name = draw(_names)
        if draw(st.sampled_from(directories)).entries().setdefault(name, inode) is not inode:
            continue
        if inode.is_dir:
            directories.append(inode)
        elif not inode.is_whiteout:
            others.append(inode)
    return content


# Few short names, so that a second layer meets the first one's.
_names = st.sampled_from([b"a", b"b", b"c", b"d"]) | names.filter(lambda name: not name.startswith(b".wh."))


@st.composite
def _inodes(draw: st.DrawFn, content: Content, deletions: bool) -> Inode:
    kind = draw(_kinds)
    inode = _bare(draw, kind, content)
    inode.mode |= 0o777 if kind == "l" else draw(st.integers(0, 0o7777))
    inode.uid, inode.gid, inode.mtime_ns = draw(_owners), draw(_owners), draw(_times)
    kept = [(name, value) for name, value in draw(xattrs) if not name.startswith(b"user.overlay.")]
    if kind not in "df":  # Linux allows user attributes on files and directories only (xattr(7))
        kept = [(name, value) for name, value in kept if not name.startswith(b"user.")]
    inode.xattrs = tuple(kept)
    inode.opaque = kind == "d" and deletions and draw(st.booleans())
    return inode


def _bare(draw: st.DrawFn, kind: str, content: Content) -> Inode:
    if kind == "d":
        return Inode(stat.S_IFDIR)
    if kind == "f":
        inode = Inode(stat.S_IFREG, size=draw(_sizes))
        content.data[inode] = hashlib.shake_128(draw(st.binary(max_size=4))).digest(inode.size)
        return inode
    if kind == "l":
        target = draw(_targets).replace(b"\0", b"0")
        return Inode(stat.S_IFLNK, target=target, size=len(target))
    if kind == "p":
        return Inode(stat.S_IFIFO)
    device = os.makedev(draw(st.integers(0, 511)), draw(st.integers(1, 2**18 - 1)))  # what XFS can copy up
    return Inode(stat.S_IFCHR if kind == "c" else stat.S_IFBLK, rdev=device)


class Model:
    """What stacked layers show, by a rule of its own: paths and facts, nothing else."""

    def __init__(self) -> None:
        self._inodes: dict[bytes, Inode] = {}
        self._data: dict[Inode, bytes] = {}

    def apply(self, layer: Content) -> None:
        """Put a layer on top."""
        self._data |= layer.data
        for path, inode in walk(layer.root):
            there = self._inodes.get(path)
            if there is not None and not (inode.is_dir and there.is_dir and not inode.opaque):
                self._clear(path)
            if not inode.is_whiteout:
                self._inodes[path] = inode

    def _clear(self, path: bytes) -> None:
        if path:
            self._inodes = {
                one: inode for one, inode in self._inodes.items() if one != path and not one.startswith(path + b"/")
            }

    def facts(self) -> dict[bytes, Facts]:
        """As `read_tree` gives them."""
        first: dict[Inode, bytes] = {}
        return {
            path or b".": self._facts(inode, first.setdefault(inode, path or b"."))
            for path, inode in sorted(self._inodes.items(), key=lambda item: item[0] or b".")
        }

    def _facts(self, inode: Inode, first: bytes) -> Facts:
        data = self._data.get(inode)
        return Facts(
            inode.mode,
            inode.uid,
            inode.gid,
            inode.mtime_ns,
            inode.size if data is not None else 0,
            inode.rdev,
            tuple((os.fsdecode(name), value) for name, value in inode.xattrs),
            inode.target,
            hashlib.sha256(data).hexdigest() if data is not None else "",
            first,
        )


def _hpmapper(directory: Path) -> Driver:
    pool = LoopPool(directory, PoolConfig(kind=PoolKind.LOOP, size=600 * MIB))
    pool.create()
    return HpmapperDriver(pool)


DRIVERS: dict[str, Callable[[Path], Driver]] = {
    "hpmapper": _hpmapper,
    "overlay": lambda directory: OverlayDriver(directory / "data"),
    "vfs": lambda directory: VfsDriver(directory / "data"),
}


@contextmanager
def _subject(make: Callable[[Path], Driver], directory: Path) -> Iterator[Subject]:
    driver = make(directory)
    driver.attach()
    engine = Engine(Database(directory / "db"), driver, Floor())
    engine.rubbish.reconcile()
    try:
        yield Subject(engine, directory)
    finally:
        engine.detach()
        engine.close()


@pytest.fixture(scope="module", params=DRIVERS)
def subject(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, private_mounts: None
) -> Iterator[Subject]:
    with _subject(DRIVERS[request.param], tmp_path_factory.mktemp(request.param)) as made:
        yield made


def _shown(subject: Subject, layers: list[Content]) -> dict[bytes, Facts]:
    """What the kernel shows of a stack of layers; each layer gives back its tar."""
    top: Snapshot | None = None
    try:
        for layer in layers:
            tar = layer.tar()
            top = subject.layer(tar, top)
            assert b"".join(subject.engine.read_tar(top)) == tar
        return read_tree(subject.opened(top)[1])
    except InvalidArgument:
        # Only of a driver that keeps layers on a file system with narrower limits than a map's.
        assume(not isinstance(subject.driver, HpmapperDriver))
        assume(False)
        raise
    finally:
        subject.remove_everything()


def _comparable(subject: Subject, facts: dict[bytes, Facts]) -> dict[bytes, Facts]:
    """But for times that the file system below plain directories cannot keep."""
    if isinstance(subject.driver, HpmapperDriver):
        return facts
    return {
        path: one._replace(mtime_ns=one.mtime_ns if EARLIEST <= one.mtime_ns <= LATEST else 0)
        for path, one in facts.items()
    }


@pytest.mark.kernel
@given(contents())
@_slow_is_fine
def test_a_layer_is_mounted_as_it_was_written(subject: Subject, layer: Content) -> None:
    model = Model()
    model.apply(layer)
    found = _shown(subject, [layer])
    assert _comparable(subject, found) == _comparable(subject, model.facts())


@pytest.mark.kernel
@given(contents(), st.lists(contents(deletions=True, max_entries=10), min_size=1, max_size=3))
@_slow_is_fine
def test_stacked_layers_are_mounted_as_a_model_says(subject: Subject, base: Content, more: list[Content]) -> None:
    model = Model()
    for layer in (base, *more):
        model.apply(layer)
    found = _shown(subject, [base, *more])
    assert _comparable(subject, found) == _comparable(subject, model.facts())


def _scanned(place: Path, layers: list[Content], dialect: Dialect) -> Iterator[dict[bytes, tuple[object, ...]]]:
    """What directories in a dialect say of layers: deletions, opaque directories, and facts of all others."""
    view, scan_in = (BranchView, scan_branch) if dialect is Dialect.AUFS else (DirectoryView, _scan_overlay)
    tops: list[bytes] = []
    for number, layer in enumerate(layers):
        work = place / f"work{number}"
        (work / "layer/diff").mkdir(parents=True)
        below = Merged([view(top) for top in tops])
        unpack(io.BytesIO(layer.tar()), below, work, place / str(number), dialect, Expected(), None)
        tops.insert(0, os.fsencode(place / str(number) / "diff"))
        yield {path: _said(inode) for path, inode in walk(scan_in(tops[0])) if path}


def _scan_overlay(top: bytes) -> Inode:
    return scan(top, overlay=True)


def _said(inode: Inode) -> tuple[object, ...]:
    return (
        (inode.is_whiteout, inode.opaque)
        if inode.is_whiteout
        else (
            inode.opaque,
            inode.mode,
            inode.uid,
            inode.gid,
            inode.mtime_ns,
            inode.size,
            inode.rdev,
            inode.target,
            inode.xattrs,
        )
    )


@pytest.mark.kernel
@given(contents(), st.lists(contents(deletions=True, max_entries=10), min_size=1, max_size=3))
@_slow_is_fine
def test_aufs_and_overlay_directories_say_the_same(base: Content, more: list[Content]) -> None:
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        try:
            layers = [base, *more]
            found = list(_scanned(Path(one), layers, Dialect.AUFS))
            expected = list(_scanned(Path(other), layers, Dialect.OVERLAY))
        except InvalidArgument:
            assume(False)
            raise
        assert found == expected


# No tar does harm.


class Memory:
    """A `FileSink` that keeps nothing but counts."""

    inline_below = 4096

    def inline(self, data: bytes) -> int:
        assert 0 < len(data) < self.inline_below
        return 0

    def put(self, pieces: Pieces, size: int, segments: Segments | None) -> tuple[ObjectDigest | int, bytes]:
        with open(os.memfd_create("data"), "wb") as out:
            write_file(out.fileno(), pieces, min(size, 1 << 30), segments)
        return 0, b"0"


def _build(tar: bytes) -> Inode:
    with LayerStream(io.BytesIO(tar)) as stream:
        builder = LayerBuilder(Merged([]), Memory(), RecipeWriter(io.BytesIO()))
        builder.read(stream)
        assert stream.digests.tar_size >= 0
        return builder.root


_segments = ((0, b"begin"), (8192, b"x" * 600))
SEEDS = [
    tars.tar(tars.folder(b"d/"), tars.member(b"d/f", b"data"), tars.member(b"l", kind=tars.LINK, link=b"d/f")),
    tars.tar(tars.gnu_long(b"L", b"n" * 150), tars.member(b"n", b"1"), tars.member(b".wh.x")),
    tars.tar(
        tars.pax({b"path": b"p" * 120, b"mtime": b"1.5", b"SCHILY.xattr.user.x": b"v", b"uid": b"70000"}),
        tars.member(b"x", b"2" * 700),
        tars.member(b"c", kind=tars.CHAR, major=1, minor=3),
        tars.member(b"s", kind=tars.SYMLINK, link=b"d"),
        tars.member(b"s/x", b"through a symlink"),
        tars.folder(b"d/"),
    ),
    tars.sparse_old_gnu(b"o", 10_000, tuple((number * 512, b"o") for number in range(7))) + tars.END,
    tars.sparse_pax_00(b"0", 10_000, _segments) + tars.END,
    tars.sparse_pax_01(b"1", 10_000, _segments) + tars.END,
    tars.sparse_pax_10(b"2", 10_000, _segments) + tars.END,
]


def _sealed(tar: bytes) -> bytes:
    """With right checksums on whatever looks like a header, as an attacker would make them."""
    raw = bytearray(tar)
    for at in range(0, len(raw) - 511, 512):
        if raw[at + 257 : at + 262] == b"ustar":
            raw[at + 148 : at + 156] = b" " * 8
            raw[at + 148 : at + 156] = b"%06o\0 " % sum(raw[at : at + 512])
    return bytes(raw)


@given(st.sampled_from(SEEDS), st.data())
@settings(_slow_is_fine, max_examples=10 * EXAMPLES)
def test_mutated_tars_are_read_or_refused(seed: bytes, data: st.DataObject) -> None:
    raw = bytearray(seed)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(raw) - 1))
        piece = data.draw(
            st.binary(min_size=1, max_size=12) | st.sampled_from([b"9" * 11, b"\xff" * 12, b"../..", b"\0"])
        )
        raw[at : at + len(piece)] = piece
    for tar in (bytes(raw), _sealed(bytes(raw))):
        try:
            _build(tar)
        except (Corrupt, InvalidArgument):
            pass


@given(st.lists(st.sampled_from(SEEDS).map(lambda tar: tar[: -len(tars.END)]), max_size=5), st.integers(0, 9000))
@_slow_is_fine
@example([SEEDS[2]], 512)
def test_joined_and_cut_tars_are_read_or_refused(seeds: list[bytes], keep: int) -> None:
    try:
        _build(b"".join(seeds)[:keep])
    except (Corrupt, InvalidArgument):
        pass


@given(st.binary(max_size=8), st.integers(512, 5000))
def test_noise_is_refused(seed: bytes, size: int) -> None:
    noise = hashlib.shake_128(seed).digest(size)
    with pytest.raises((Corrupt, InvalidArgument)):
        _build(noise)


@given(st.dictionaries(st.sampled_from([b"path", b"linkpath", b"mtime", b"uid", b"size", b"GNU.sparse.map",
                                        b"GNU.sparse.size", b"GNU.sparse.major", b"GNU.sparse.realsize",
                                        b"SCHILY.xattr.user.a", b"LIBARCHIVE.xattr.user.b", b"SCHILY.acl.access"]),
                       st.binary(max_size=30) | st.sampled_from([b"0", b"1", b"99999999999", b"-1", b"a/../b", b"0,5"]),
                       max_size=4), st.sampled_from([tars.FILE, tars.LINK, tars.SYMLINK, tars.DIR]))  # fmt: skip
@settings(_slow_is_fine, max_examples=5 * EXAMPLES)
def test_any_pax_records_are_taken_or_refused(records: dict[bytes, bytes], kind: bytes) -> None:
    try:
        _build(tars.tar(tars.pax(records), tars.member(b"x", b"12345" if kind == tars.FILE else b"", kind, link=b"y")))
    except (Corrupt, InvalidArgument):
        pass


def test_nothing_below_is_nothing() -> None:
    assert Nothing().lookup(b"a") is None
    assert Merged([]).lookup(b"a") is None
    assert Expected() == Expected(None, None, None)
