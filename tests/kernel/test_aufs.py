"""AUFS: its layers against tars and against overlayfs's form on every host; its mounts where the kernel has it."""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hpmapper.drivers import directory
from hpmapper.drivers.aufs import AufsDriver
from hpmapper.drivers.directory import Dialect
from hpmapper.drivers.registry import by_name, probe
from hpmapper.errors import FailedPrecondition, InvalidArgument
from hpmapper.kernel import aufs
from hpmapper.layer.aufs import BranchView, is_untouched, scan_branch
from hpmapper.layer.diff import changes, write_tar
from hpmapper.layer.merged import LayerView, Merged
from hpmapper.layer.scan import DirectoryView, scan
from hpmapper.layer.stream import Expected
from hpmapper.model import SnapshotId
from hpmapper.pool.base import PoolConfig, PoolKind
from hpmapper.testing import contract
from hpmapper.testing.tars import LINK, folder, gnu_long, member, tar
from hpmapper.tree import Inode, walk

pytestmark = pytest.mark.kernel

BASE = tar(
    folder(b"etc/", 0o711),
    member(b"etc/passwd", b"root"),
    member(b"etc/shadow", b"secret"),
    folder(b"var/"),
    folder(b"var/cache/"),
    member(b"var/cache/old", b"1"),
    member(b"twin", b"both"),
    member(b"etc/twin", kind=LINK, link=b"twin"),
)
DELETING = tar(
    folder(b"./"),
    member(b"etc/.wh.shadow"),
    folder(b"var/cache/"),
    member(b"var/cache/.wh..wh..opq"),
    member(b"var/cache/new", b"2"),
    member(b".wh.twin"),
    folder(b".wh..wh.plnk/"),  # as tars have it that were packed from a branch as it lay there
    member(b".wh..wh.plnk/7.8", b"7"),
    member(b"etc/joined", kind=LINK, link=b".wh..wh.plnk/7.8"),
)


class Layers:
    """Layers of one image in a dialect, in directories."""

    def __init__(self, place: Path, dialect: Dialect, view: Callable[[bytes], LayerView]) -> None:
        self._place = place
        self._dialect = dialect
        self._view = view
        self.tops: list[Path] = []

    def add(self, layer: bytes) -> Path:
        """Unpack a tar on top of the others."""
        number = SnapshotId(len(self.tops) + 1)
        work = self._place / f"work{number}"
        (work / "layer/diff").mkdir(parents=True)
        place = self._place / str(number)
        directory.unpack(io.BytesIO(layer), self.merged(), work, place, self._dialect, Expected(), None)
        assert b"".join(directory.read_tar(place)) == layer
        self.tops.insert(0, place / "diff")
        return self.tops[0]

    def merged(self) -> Merged:
        """What they show together."""
        return Merged([self._view(os.fsencode(top)) for top in self.tops])


@pytest.fixture
def layers(tmp_path: Path) -> Layers:
    return Layers(tmp_path, Dialect.AUFS, BranchView)


def _shown(merged: Merged) -> Iterator[tuple[bytes, int, int]]:
    pending = [b""]
    while pending:
        here = pending.pop()
        for name in merged.names(here):
            path = here + b"/" + name if here else name
            inode = merged.lookup(path)
            assert inode is not None, path
            yield path, inode.mode, inode.size
            if inode.is_dir:
                pending.append(path)


def _said(tree: Inode) -> list[tuple[bytes, bool, bool]]:
    return [(path, inode.is_whiteout, inode.opaque) for path, inode in walk(tree)]


def _tar_of(tree: Inode, top: Path) -> bytes:
    out = io.BytesIO()
    write_tar(tree, lambda path: (top / os.fsdecode(path)).open("rb"), out)
    return out.getvalue()


def test_deletions_are_files_with_names_that_aufs_knows(layers: Layers) -> None:
    layers.add(BASE)
    top = layers.add(DELETING)
    assert sorted(str(path.relative_to(top)) for path in top.rglob("*")) == [
        ".wh.twin", "etc", "etc/.wh.shadow", "etc/joined", "var", "var/cache", "var/cache/.wh..wh..opq",
        "var/cache/new",
    ]  # fmt: skip
    assert (top / "etc").stat().st_mode & 0o7777 == 0o711


def test_both_forms_say_the_same(tmp_path: Path, layers: Layers) -> None:
    (tmp_path / "overlay").mkdir()
    overlay = Layers(tmp_path / "overlay", Dialect.OVERLAY, DirectoryView)
    for layer in (BASE, DELETING):
        tops = layers.add(layer), overlay.add(layer)
        assert _said(scan_branch(os.fsencode(tops[0]))) == _said(scan(os.fsencode(tops[1]), overlay=True))
    assert sorted(_shown(layers.merged())) == sorted(_shown(overlay.merged()))
    assert b"etc/shadow" not in {path for path, _, _ in _shown(layers.merged())}


def test_a_branch_becomes_the_tar_that_makes_it(tmp_path: Path, layers: Layers) -> None:
    layers.add(BASE)
    top = layers.add(DELETING)
    packed = _tar_of(scan_branch(os.fsencode(top)), top)
    (tmp_path / "again").mkdir()
    again = Layers(tmp_path / "again", Dialect.AUFS, BranchView)
    again.add(BASE)
    copy = again.add(packed)
    assert _said(scan_branch(os.fsencode(top))) == _said(scan_branch(os.fsencode(copy)))
    assert packed == _tar_of(scan_branch(os.fsencode(copy)), copy)


def _as_aufs_leaves_it(upper: Path) -> None:
    """What a union's writable branch holds beside a container's files (fs/aufs/whout.c, plink.c)."""
    base = upper / ".wh..wh.aufs"
    base.touch()
    base.chmod(0o444)
    (upper / ".wh..wh.plnk").mkdir(mode=0o700)
    (upper / ".wh..wh.orph").mkdir(mode=0o700)
    (upper / ".wh..wh.orph/.wh.1a").mkdir()


def test_nothing_of_aufs_itself_leaves_a_branch(tmp_path: Path, layers: Layers) -> None:
    layers.add(BASE)
    upper = tmp_path / "upper"
    upper.mkdir()
    _as_aufs_leaves_it(upper)
    assert is_untouched(os.fsencode(upper))
    (upper / ".wh.twin").hardlink_to(upper / ".wh..wh.aufs")
    assert not is_untouched(os.fsencode(upper))
    (upper / "etc").mkdir()
    (upper / "etc/.wh.passwd").hardlink_to(upper / ".wh..wh.aufs")
    (upper / "etc/.wh..wh.group.03ff").write_text("is being renamed")
    (upper / "etc/linked").write_text("1")
    (upper / ".wh..wh.plnk/77.2").hardlink_to(upper / "etc/linked")
    (upper / "var").mkdir()
    (upper / "var/.wh..wh..opq").hardlink_to(upper / ".wh..wh.aufs")
    tree = scan_branch(os.fsencode(upper))
    assert [path for path, _ in walk(tree)] == [b"", b"etc", b"etc/linked", b"etc/passwd", b"twin", b"var"]
    assert [f"{one.kind} {one.path.decode()}" for one in changes(tree, layers.merged())] == [
        "C /etc", "A /etc/linked", "D /etc/passwd", "D /twin", "C /var", "D /var/cache",
    ]  # fmt: skip
    names = [name for name in (b".wh..wh.", b"03ff") if name in _tar_of(tree, upper).replace(b".wh..wh..opq", b"")]
    assert not names


def test_a_name_that_is_deleted_is_not_there_whatever_else_is(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    (tmp_path / ".wh.a").touch()
    view = BranchView(os.fsencode(tmp_path))
    found = view.lookup(b"a")
    assert found is not None
    assert found.is_whiteout
    assert view.names(b"") == [b"a"]
    assert view.lookup(b".wh.a") is None
    assert Merged([view]).names(b"") == []


def test_names_longer_than_aufs_shows_are_refused(layers: Layers) -> None:
    layers.add(tar(gnu_long(b"L", b"n" * 242), member(b"n")))
    with pytest.raises(InvalidArgument, match="longer name than AUFS shows"):
        layers.add(tar(gnu_long(b"L", b"d/" + b"n" * 243), member(b"n")))


def test_options_are_split_over_pages() -> None:
    branches = [f"/proc/self/fd/{number}=ro+wh" for number in range(127)]
    first, more = aufs._fit(branches, ",xino=/dev/shm/x.xino,dio")
    assert first.startswith("br:/proc/self/fd/0=ro+wh:/proc")
    assert first.endswith("=ro+wh,xino=/dev/shm/x.xino,dio")
    assert all(len(page) < 4096 for page in [first, *more])
    words = [word.removeprefix("append:") for page in more for word in page.split(",")]
    named = [*first.removeprefix("br:").partition(",xino")[0].split(":"), *words]
    assert named == branches
    assert all(word.startswith("append:") for word in itertools.chain(*(page.split(",") for page in more)))


def test_where_the_kernel_has_no_aufs_it_is_said_so(tmp_path: Path) -> None:
    if aufs.is_known():
        pytest.skip("this kernel has AUFS")
    verdict = probe(by_name("aufs"), tmp_path, PoolConfig(PoolKind.LOOP), {})
    assert not verdict.works
    assert "/proc/filesystems" in verdict.why
    assert "no mainline kernel" in verdict.reason
    with pytest.raises(FailedPrecondition, match="no AUFS") as caught:
        AufsDriver(tmp_path / "data").attach()
    assert caught.value.hint
    assert os.listdir(tmp_path) == []


@pytest.fixture
def driver(tmp_path: Path) -> AufsDriver:
    if not aufs.is_known():
        pytest.skip("AUFS MOUNTS NOT TESTED: /proc/filesystems has no aufs; boot a kernel that has it")
    return AufsDriver(tmp_path / "data")


@pytest.mark.parametrize("case", contract.CASES, ids=contract.name_of)
def test_contract(driver: AufsDriver, case: contract.Case, tmp_path: Path) -> None:
    with contract.subject(driver, tmp_path) as subject:
        case(subject)
