"""Cases: each claim of a driver's `Capabilities`, proven or held against it."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

from hpmapper.engine import Blob
from hpmapper.errors import InvalidArgument
from hpmapper.kernel import mount
from hpmapper.kernel.cachestat import cachestat
from hpmapper.kernel.mountinfo import is_mountpoint
from hpmapper.kernel.sync import rename_exchange, syncfs
from hpmapper.layer.stream import Expected
from hpmapper.meta.snapshots import Snapshot
from hpmapper.testing.contract.subject import Case, Subject, refused
from hpmapper.testing.tars import LINK, folder, member, tar
from hpmapper.testing.trees import append, apply, assert_same

_MIB = 1 << 20
_LARGE = 64 * _MIB
_PAGE = os.sysconf("SC_PAGE_SIZE")


def mounts(subject: Subject) -> None:
    """`mounts`: a root is a mount, there only between `mount` and `unmount`; without, nothing is ever mounted."""
    before = {one.id for one in mount.mounts()}
    container, root = subject.opened(subject.layer(tar(member(b"f"))))
    claimed = subject.driver.capabilities.mounts
    assert is_mountpoint(root) is claimed
    assert bool({one.id for one in mount.mounts()} - before) is claimed
    subject.engine.unmount(container)
    assert not is_mountpoint(root)


def stacks_as_many_as_it_says(subject: Subject) -> None:
    """`max_layers`: one more is refused with a clear error; the engine asks, so the driver need not.

    What a driver without a real limit claims cannot be tried: its claim is made smaller, and is kept then.
    """
    claimed = subject.driver.capabilities
    limit = claimed.max_layers if claimed.max_layers <= 500 else 130
    top = None
    for number in range(limit):
        top = subject.layer(tar(member(b"%d" % number)), top)
    assert len(os.listdir(subject.opened(top)[1])) == limit
    subject.driver.capabilities = replace(claimed, max_layers=limit)
    try:
        refused(InvalidArgument, lambda: subject.layer(tar(member(b"more")), top))
    finally:
        subject.driver.capabilities = claimed


def shares_layers(subject: Subject) -> None:
    """`shares_layers`: a layer that stands on one chain is adopted by another, not read again; it is right on both."""
    layer = tar(folder(b"new/"), member(b"new/f", b"f" * 9000))
    diff_id = f"sha256:{hashlib.sha256(layer).hexdigest()}"
    lower = [subject.layer(tar(member(name, name))) for name in (b"one", b"two")]
    taken = [subject.engine.take_layer(base, Blob(Expected(diff_id), lambda: io.BytesIO(layer))) for base in lower]
    assert taken[0].ingested is not None
    assert (taken[1].ingested is None) is subject.driver.capabilities.shares_layers
    for one, name in zip(taken, ("one", "two"), strict=True):
        root = subject.opened(one.snapshot)[1]
        assert sorted(os.listdir(root)) == sorted(["new", name])
        assert (root / "new/f").read_bytes() == b"f" * 9000
        subject.assert_whole(one.snapshot)


def bound_layers_are_not_shared(subject: Subject) -> None:
    """A layer that took something from the chain below it is made anew for another chain."""
    layer = tar(member(b"d/f", b"f"))
    diff_id = f"sha256:{hashlib.sha256(layer).hexdigest()}"
    for mode in (0o700, 0o711):
        base = subject.layer(tar(folder(b"d/", mode)))
        taken = subject.engine.take_layer(base, Blob(Expected(diff_id), lambda: io.BytesIO(layer)))
        assert (subject.opened(taken.snapshot)[1] / "d").stat().st_mode & 0o7777 == mode


def copies_extents(subject: Subject) -> None:
    """`copies_extents`: 4 KiB written into 64 MiB of the image take less than 1 MiB; without, one copy and no more.

    The rest reads as before, in this container and in others.
    """
    most = _MIB if subject.driver.capabilities.copies_extents else _LARGE + _MIB
    container, root = subject.opened(_large_image(subject))
    used = _used(subject, root)
    with (root / "large").open("r+b") as data:
        data.seek(_LARGE // 2)
        data.write(b"!" * 4096)
    grown = _used(subject, root) - used
    assert grown < most, f"4 KiB took {grown} bytes"
    assert subject.engine.usage(container).size < most
    _, other = subject.opened(_large_image(subject))
    with (root / "large").open("rb") as changed, (other / "large").open("rb") as original:
        for offset in range(0, _LARGE, _MIB):
            expected = original.read(_MIB)
            expected = b"!" * 4096 + expected[4096:] if offset == _LARGE // 2 else expected
            assert changed.read(_MIB) == expected


def _used(subject: Subject, root: Path) -> int:
    syncfs(root)
    syncfs(subject.driver.scratch)
    return subject.driver.space().used


def shares_cache(subject: Subject) -> None:
    """`shares_cache`: five containers that read the same 64 MiB have it in the page cache about once; else, once each.

    Counted on every file of the driver's storage, whatever their number, but not on block devices.
    """
    shares = subject.driver.capabilities.shares_cache
    image = _large_image(subject)
    expected = hashlib.sha256(_large()).digest()
    roots = [subject.opened(image)[1] for _ in range(5)]
    syncfs(subject.driver.scratch)
    _drop_caches()
    before = _cached_bytes(subject)
    for root in roots:
        with (root / "large").open("rb") as data:
            assert hashlib.file_digest(data, "sha256").digest() == expected
    cached = _cached_bytes(subject) - before
    least, most = (0.9, 1.1) if shares else (0, 5.5)
    assert least * _LARGE <= cached <= most * _LARGE, f"{cached >> 20} MiB are cached of {_LARGE >> 20} MiB"


def _drop_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("1")


def _cached_bytes(subject: Subject) -> int:
    """Page cache of all files in the driver's storage, those in containers' roots left out: they are the same."""
    home = subject.driver.scratch.parent
    pages = 0
    for here, directories, files in os.walk(home):
        directories[:] = [name for name in directories if not is_mountpoint(os.path.join(here, name))]
        pages += sum(cachestat(os.path.join(here, name)).cached for name in files)
    return pages * _PAGE


def changes_from_upper(subject: Subject) -> None:
    """`changes_from_upper`: the changes are found without reading the whole tree; without, by reading all of it.

    Seen by counting the directories that are listed meanwhile, of an image that has hundreds.
    """
    image = subject.layer(tar(*(member(b"d%03d/f" % number) for number in range(400))))
    container, root = subject.opened(image)
    apply([append("d007/f", b"x")], root)
    with listings() as listed:
        assert subject.changes(container) == ["C /d007", "C /d007/f"]
    claimed = subject.driver.capabilities.changes_from_upper
    assert (len(listed) < 40) is claimed, f"{len(listed)} directories were listed"


_watchers: list[list[object]] = []


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    if _watchers and event in ("os.scandir", "os.listdir"):
        _watchers[-1].append(arguments[0])


@cache
def _watch_once() -> None:
    sys.addaudithook(_watch)  # cannot be taken away again


@contextmanager
def listings() -> Iterator[list[object]]:
    """The directories that this process lists meanwhile."""
    _watch_once()
    listed: list[object] = []
    _watchers.append(listed)
    try:
        yield listed
    finally:
        _watchers.pop()


def _large_image(subject: Subject) -> Snapshot:
    return subject.layer(tar(member(b"large", _large())))


def _large() -> bytes:
    return random.Random(1).randbytes(_LARGE)


def renames_directories(subject: Subject) -> None:
    """`renames_directories`: a directory of the image takes another name, or another's place; without, EXDEV.

    Nothing has happened then, and mv(1) copies it; its own directories a container can always rename.
    """
    container, root = subject.opened(subject.layer(tar(member(b"one/f", b"1"), member(b"two/g", b"2"))))
    (root / "own").mkdir()
    (root / "own").rename(root / "one/own")
    claimed = subject.driver.capabilities.renames_directories
    attempts: tuple[Callable[[], object], ...] = (
        lambda: rename_exchange(root / "one", root / "two"),
        lambda: os.rename(root / "two", root / "three"),
    )
    for attempt in attempts:
        if claimed:
            attempt()
        else:
            assert refused(OSError, attempt).errno == errno.EXDEV
    shown = sorted(os.path.relpath(path, root) for path in root.rglob("*"))
    moved = ["one", "one/g", "three", "three/f", "three/own"]
    assert shown == (moved if claimed else ["one", "one/f", "one/own", "two", "two/g"])
    _, again = subject.opened(subject.commit(container))
    assert_same(again, root)


def keeps_links(subject: Subject) -> None:
    """`keeps_links`: what is written to a linked file of the image is seen under all its names; else under this one."""
    linked = [member(b"a", b"old"), *(member(name, kind=LINK, link=b"a") for name in (b"b", b"c"))]
    container, root = subject.opened(subject.layer(tar(*linked)))
    (root / "a").write_bytes(b"new")
    others = b"new" if subject.driver.capabilities.keeps_links else b"old"
    assert [(root / name).read_bytes() for name in "abc"] == [b"new", others, others]
    assert os.path.samefile(root / "b", root / "c")
    _, again = subject.opened(subject.commit(container))
    assert_same(again, root)


CASES: tuple[Case, ...] = (
    mounts,
    stacks_as_many_as_it_says,
    shares_layers,
    bound_layers_are_not_shared,
    copies_extents,
    shares_cache,
    changes_from_upper,
    renames_directories,
    keeps_links,
)
