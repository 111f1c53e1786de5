"""Cases: what Docker's own suite for graph drivers checks, by its names (moby, daemon/graphdriver/graphtest).

graphtest's layers are ours: Create is a snapshot of a committed one, ApplyDiff a layer's tar, Diff the tar of a commit.
What its drivers' own tests check beyond that stands in the tests of ours.
"""

from __future__ import annotations

import io
import os
import stat
import tarfile

from hpmapper.meta.snapshots import Snapshot
from hpmapper.testing import tars
from hpmapper.testing.contract.limits import limited, write_until_refused
from hpmapper.testing.contract.subject import Case, Subject
from hpmapper.testing.trees import Operation, append, apply, assert_same, directory, file, remove

_DEEP = 125
"""Layers of one image, as many as Docker allows (moby, layer/layer.go)."""

_MIB = 1 << 20


def create_empty(subject: Subject) -> None:
    """DriverTestCreateEmpty: a root without parent is an empty directory of root's, 0755; it exists until removed."""
    container, root = subject.opened(None)
    assert subject.driver.has(container.id)
    status = root.stat()
    assert (stat.S_ISDIR(status.st_mode), status.st_mode & 0o7777) == (True, 0o755)
    assert (status.st_uid, status.st_gid) == (0, 0)
    assert os.listdir(root) == []
    subject.engine.unmount(container)
    subject.engine.remove(container)
    assert not subject.driver.has(container.id)


def _base() -> list[Operation]:
    return [directory("a subdir", 0o1705, 1, 2), file("a file", b"Some data", 0o4222)]


def create_base(subject: Subject) -> None:
    """DriverTestCreateBase: odd modes and owners are as they were made, whatever the mask of the process."""
    container, root = subject.opened(None)
    former = os.umask(0)
    try:
        apply(_base(), root)
    finally:
        os.umask(former)
    for _ in range(2):  # graphtest verifies after mounting it again
        _verify_base(root)
        subject.engine.unmount(container)
        root = subject.root(container)


def _verify_base(root: os.PathLike[str]) -> None:
    assert sorted(os.listdir(root)) == ["a file", "a subdir"]
    status = os.stat(os.path.join(root, "a subdir"))
    assert (status.st_mode, status.st_uid, status.st_gid) == (stat.S_IFDIR | 0o1705, 1, 2)
    status = os.stat(os.path.join(root, "a file"))
    assert (status.st_mode, status.st_uid, status.st_gid) == (stat.S_IFREG | 0o4222, 0, 0)


def create_snap(subject: Subject) -> None:
    """DriverTestCreateSnap: a snapshot of the base shows the same two entries, with the same modes and owners."""
    _, root = subject.opened(subject.image(_base()))
    _verify_base(root)
    assert (root / "a file").read_bytes() == b"Some data"


def deep_layer_read(subject: Subject) -> None:
    """DriverTestDeepLayerRead (128LayerRead): a chain of 125 layers, read down to its bottom, and written to.

    Each layer adds a directory that tells its number and its parent's, writes `top-id` anew, and every second one takes
    away what the one below it brought.
    """
    assert subject.driver.capabilities.max_layers >= _DEEP, "Docker's images have up to 125 layers"
    top: Snapshot | None = None
    for number in range(_DEEP):
        top = subject.layer(tars.tar(*_deep_layer(number)), top)
    assert top is not None
    subject.engine.finish(top)
    container, root = subject.opened(top)
    assert (root / "top-id").read_bytes() == b"%d" % (_DEEP - 1)
    for number in range(_DEEP):
        assert (root / f"layer-{number}/parent-id").read_bytes() == b"%d" % (number - 1)
    kept = [number for number in range(_DEEP) if number % 2 or number == _DEEP - 1]
    assert sorted(os.listdir(root / "all"), key=int) == list(map(str, kept))
    apply([append("layer-1/layer-id", b"!")], root)
    assert subject.changes(container) == ["C /layer-1", "C /layer-1/layer-id"]


def _deep_layer(number: int) -> list[bytes]:
    name, text = b"layer-%d/" % number, b"%d" % number
    members = [
        tars.folder(name),
        tars.member(name + b"layer-id", text),
        tars.member(name + b"parent-id", b"%d" % (number - 1)),
        tars.member(b"top-id", text),
        tars.folder(b"all/"),
        tars.member(b"all/%d" % number, text),
    ]
    return members + ([tars.member(b"all/.wh.%d" % (number - 1))] if number % 2 else [])


def diff_apply(subject: Subject) -> None:
    """DriverTestDiffApply: a diff applied to a sibling gives the same tree, of exactly the size that the diff has."""
    base = subject.image(
        [
            *(file(f"f{number}", os.urandom(1 << 12)) for number in range(10)),
            directory("var"),
            directory("var/lib"),
            file("var/lib/in", b"x" * 777),
            file("removed", b"r"),
        ]
    )
    container, root = subject.opened(base)
    written = {f"f{number}": os.urandom(1000 + number) for number in range(10)}
    apply(
        [remove(name) for name in (*written, "removed", "var/lib")]
        + [file(name, data) for name, data in written.items()],
        root,
    )
    diff = subject.diff(container)
    assert subject.diff(container) == diff
    with tarfile.open(fileobj=io.BytesIO(diff)) as members:
        assert sum(member.size for member in members) == sum(map(len, written.values()))
    sibling = subject.layer(diff, base)
    assert subject.size(sibling) == len(diff)
    _, again = subject.opened(sibling)
    assert_same(again, root)
    assert not os.path.lexists(again / "removed")
    assert not os.path.lexists(again / "var/lib")
    subject.assert_whole(sibling)


def changes(subject: Subject) -> None:
    """DriverTestChanges: of 20 files some are modified, some new, some deleted; the exact list."""
    names = [f"a-dir/file-{number:02}" for number in range(20)]
    base = subject.image([directory("a-dir"), *(file(name, name.encode()) for name in names)])
    container, root = subject.opened(base)
    expected = ["C /a-dir"]
    for number, name in enumerate(names):
        if number % 3 == 0:
            apply([append(name, b" modified")], root)
            expected.append(f"C /{name}")
        elif number % 3 == 1:
            apply([file(f"{name}-added", b"new")], root)
            expected.append(f"A /{name}-added")
        else:
            apply([remove(name)], root)
            expected.append(f"D /{name}")
    assert subject.changes(container) == expected


def set_quota(subject: Subject) -> None:
    """DriverTestSetQuota: of 50 MiB, 25 can be written; 50 more cannot."""
    chain = subject.open_chain()
    with limited(subject, chain, 50 * _MIB) as (_, inside):
        assert write_until_refused(inside, "first", 25 * _MIB) == 25 * _MIB
        assert write_until_refused(inside, "second", 50 * _MIB) < 25 * _MIB


CASES: tuple[Case, ...] = (
    create_empty,
    create_base,
    create_snap,
    deep_layer_read,
    diff_apply,
    changes,
)

LIMITS: tuple[Case, ...] = (set_quota,)
