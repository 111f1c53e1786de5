"""Cases: what containerd's own suite for snapshotters checks, by its names (core/snapshots/testsuite).

Here by a forest's calls, for every driver; `tests/clients/test_conformance.py` runs the suite itself over a socket.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpmapper.errors import AlreadyExists, FailedPrecondition, NotFound
from hpmapper.forest import Forest, Info
from hpmapper.model import Kind
from hpmapper.testing import trees
from hpmapper.testing.contract.subject import Case, Subject, refused
from hpmapper.testing.trees import Operation, apply, assert_same, directory, file

_LAYERS = 128

Labels = Mapping[str, str]


class _Snapshotter:
    """A forest with the verbs of the suite's helpers."""

    def __init__(self, subject: Subject) -> None:
        self.forest = Forest(subject.engine, "containerd")
        self._subject = subject

    def prepare(self, key: str, parent: str = "", kind: Kind = Kind.ACTIVE, labels: Labels | None = None) -> Path:
        """A new snapshot's root, mounted."""
        self.forest.first_mounts(self.forest.prepare(key, parent, labels or {}, kind))
        return self._subject.root(self.forest.get(key))

    def view(self, key: str, parent: str = "", labels: Labels | None = None) -> Path:
        return self.prepare(key, parent, Kind.VIEW, labels)

    def commit(self, name: str, key: str, labels: Labels | None = None) -> None:
        """Unmounted first, as the suite does."""
        self._subject.engine.unmount(self.forest.get(key))
        self.forest.commit(name, key, labels or {})

    def written(self, name: str, steps: Sequence[Operation] = (), parent: str = "") -> str:
        """createSnapshot: a committed snapshot in which operations were done; its name."""
        apply(steps, self.prepare(f"{name}-prepare", parent))
        self.commit(name, f"{name}-prepare")
        return name

    def remove(self, key: str) -> None:
        """And free what it occupied, as whoever tidies up does."""
        self.forest.remove(key)
        self._subject.engine.rubbish.free_removed()

    def walked(self) -> dict[str, Info]:
        return {info.key: info for info in self.forest.walk()}


def _check_snapshots(subject: Subject, *layers: Sequence[Operation], name: str = "layer") -> None:
    """checkSnapshots: each layer's operations in a snapshot and in a flat directory; a view shows what that does."""
    snapshotter, flat, parent = _Snapshotter(subject), subject.model(), ""
    for number, layer in enumerate(layers):
        parent = snapshotter.written(f"{name}-{number}", layer, parent)
        apply(layer, flat)
        assert_same(snapshotter.view(f"{parent}-view", parent), flat)
        snapshotter.remove(f"{parent}-view")


def basic(subject: Subject) -> None:
    """Basic: two layers, each seen by Stat, Walk and in mounts; removed children first."""
    snapshotter, flat = _Snapshotter(subject), subject.model()
    first = [file("foo", b"foo\n", 0o777), directory("a"), directory("a/b"), directory("a/b/c")]
    second = [file("bar", b"bar\n", 0o777), trees.remove("foo"), file("foo", b"bar\n", 0o777), trees.remove("a/b")]
    apply(first, flat)
    snapshotter.written("committed", first)
    refused(NotFound, lambda: snapshotter.forest.stat("committed-prepare"))
    root = snapshotter.prepare("next", "committed")
    assert_same(root, flat)
    apply(second, root)
    apply(second, flat)
    assert (snapshotter.forest.stat("next").parent, snapshotter.forest.stat("next").kind) == ("committed", Kind.ACTIVE)
    snapshotter.commit("committed-next", "next")
    refused(NotFound, lambda: snapshotter.forest.stat("next"))
    stats = {key: snapshotter.forest.stat(key) for key in ("committed", "committed-next")}
    assert [(info.parent, info.kind) for info in stats.values()] == [
        ("", Kind.COMMITTED),
        ("committed", Kind.COMMITTED),
    ]
    assert snapshotter.walked() == stats
    assert_same(snapshotter.view("view", "committed-next"), flat)
    snapshotter.remove("view")
    assert "remove" in str(refused(FailedPrecondition, lambda: snapshotter.remove("committed")))
    snapshotter.remove("committed-next")
    snapshotter.remove("committed")


def stat_active(subject: Subject) -> None:
    """StatActive: what Stat tells of an active snapshot."""
    snapshotter = _Snapshotter(subject)
    (snapshotter.prepare("preparing") / "foo").write_bytes(b"foo\n")
    info = snapshotter.forest.stat("preparing")
    assert (info.key, info.kind, info.parent) == ("preparing", Kind.ACTIVE, "")


def stat_committed(subject: Subject) -> None:
    """StatComitted: what Stat tells of a committed one; committed here while its root is still mounted."""
    snapshotter = _Snapshotter(subject)
    (snapshotter.prepare("preparing") / "foo").write_bytes(b"foo\n")
    snapshotter.forest.commit("committed", "preparing", {})
    info = snapshotter.forest.stat("committed")
    assert (info.key, info.kind, info.parent) == ("committed", Kind.COMMITTED, "")


def transitivity_test(subject: Subject) -> None:
    """TransitivityTest: a parent's parent."""
    snapshotter = _Snapshotter(subject)
    snapshotter.written("a", [file("foo", b"foo\n")])
    snapshotter.written("b", [trees.remove("foo"), file("foo", b"foo bar\n")], "a")
    stat = snapshotter.forest.stat
    assert (stat("a").parent, stat("b").parent, stat(stat("b").parent).parent) == ("", "a", "")


def prepare_view_failing_test(subject: Subject) -> None:
    """PreareViewFailingtest: a key is taken once, whichever of Prepare and View asks for it."""
    snapshotter = _Snapshotter(subject)
    snapshotter.written("a")
    for key, make in (("prepared", snapshotter.prepare), ("viewed", snapshotter.view)):
        make(key, "a")
        refused(AlreadyExists, lambda key=key: snapshotter.prepare(key, "a"))  # type: ignore[misc]
        refused(AlreadyExists, lambda key=key: snapshotter.view(key, "a"))  # type: ignore[misc]


def _base_snapshots(snapshotter: _Snapshotter) -> dict[str, tuple[Kind, str]]:
    """baseTestSnapshots: one of every kind, with parent and without."""
    snapshotter.written("c1")
    snapshotter.written("c2", parent="c1")
    snapshotter.prepare("a1", "c2")
    snapshotter.prepare("a2")
    snapshotter.view("v1", "c2")
    snapshotter.view("v2")
    return {
        "c1": (Kind.COMMITTED, ""),
        "c2": (Kind.COMMITTED, "c1"),
        "a1": (Kind.ACTIVE, "c2"),
        "a2": (Kind.ACTIVE, ""),
        "v1": (Kind.VIEW, "c2"),
        "v2": (Kind.VIEW, ""),
    }


def update(subject: Subject) -> None:
    """Update: new labels, and nothing else but the time of the change. (Field masks are the front end's affair.)"""
    snapshotter = _Snapshotter(subject)
    for key, (kind, parent) in _base_snapshots(snapshotter).items():
        before = snapshotter.forest.stat(key)
        assert (before.kind, before.parent) == (kind, parent)
        labels = {"l1": "v1", "l2": "v2", "l3": "v3"}
        for wanted in (labels, {"l1": "updated", "l3": "v3"}, {"l4": "v4"}):
            after = snapshotter.forest.update(key, lambda _, wanted=wanted: wanted)  # type: ignore[misc]
            assert (after.key, after.kind, after.parent, after.created) == (key, kind, parent, before.created)
            assert after.labels == wanted
            assert after.updated >= before.updated
            assert snapshotter.forest.stat(key) == after


def remove(subject: Subject) -> None:
    """Remove: a key can be used again at once, by another kind and on another parent; so can a name."""
    snapshotter = _Snapshotter(subject)
    snapshotter.written("committed-1")
    snapshotter.prepare("reuse-1", "committed-1")
    snapshotter.forest.remove("reuse-1")
    snapshotter.view("reuse-1", "committed-1")
    snapshotter.forest.remove("reuse-1")
    snapshotter.prepare("reuse-1")
    snapshotter.forest.remove("committed-1")
    snapshotter.commit("committed-1", "reuse-1")


def walk(subject: Subject) -> None:
    """Walk: everything that there is, with its labels. (Filters are the front end's affair.)"""
    snapshotter = _Snapshotter(subject)
    snapshotter.prepare("a-np")
    snapshotter.written("p")
    snapshotter.prepare("a", "p")
    snapshotter.view("v", "p", {"l": "v"})
    snapshotter.written("p-l")
    snapshotter.forest.update("p-l", lambda _: {"l": "1"})
    snapshotter.prepare("a-l", "p-l", labels={"l": "1"})
    found = {key: (info.kind, info.parent, dict(info.labels)) for key, info in snapshotter.walked().items()}
    assert found == {
        "a-np": (Kind.ACTIVE, "", {}),
        "p": (Kind.COMMITTED, "", {}),
        "a": (Kind.ACTIVE, "p", {}),
        "v": (Kind.VIEW, "p", {"l": "v"}),
        "p-l": (Kind.COMMITTED, "", {"l": "1"}),
        "a-l": (Kind.ACTIVE, "p-l", {"l": "1"}),
    }


def layer_file_update(subject: Subject) -> None:
    """LayerFileupdate: files of one layer written anew in the next, within one second (docker/docker#21555)."""
    profile = b"PATH=/usr/bin"
    for number in range(5):
        _check_snapshots(
            subject,
            [
                directory("etc", 0o700),
                file("etc/hosts", b"mydomain 10.0.0.1"),
                file("etc/profile", profile),
            ],
            [
                trees.remove("etc/hosts"),
                file("etc/hosts", b"mydomain 10.0.0.2"),
                trees.remove("etc/profile"),
                file("etc/profile", profile, 0o666),
                directory("root", 0o700),
                file("root/.bashrc", b"PATH=/usr/sbin:/usr/bin"),
            ],
            name=f"round-{number}",
        )


def remove_directory_in_lower_layer(subject: Subject) -> None:
    """RemoveDirectoryInLowerLayer: what a directory held stays away when it is made again (docker/docker#25244)."""
    _check_snapshots(
        subject,
        [directory("lib", 0o700), file("lib/hidden")],
        [trees.replace_directory("lib", 0o700), file("lib/not-hidden")],
        [file("lib/newfile")],
    )


def chown(subject: Subject) -> None:
    """Chown: owners of directories and of what is in them (docker/docker#20240, #24913, #28391)."""
    names = ["opt", "opt/a", "opt/a/b", "opt/a/b/file.txt"]
    _check_snapshots(
        subject,
        [*(directory(name, 0o700) for name in names[:3]), file(names[3], b"hello")],
        [trees.chown(name, 1, 1) for name in names],
    )


def directory_permission_on_commit(subject: Subject) -> None:
    """DirectoryPermissionOnCommit: owners of directories changed, removed and made again (docker/docker#27298)."""
    _check_snapshots(
        subject,
        [
            *(directory(f"dir{number}", 0o700) for number in range(1, 6)),
            file("dir4/f1", b"..."),
            file("dir5/f1", b"..."),
            *(trees.chown(name, 1, 1) for name in ("dir1", "dir2", "dir3", "dir5", "dir5/f1")),
        ],
        [trees.chown("dir2", 0, 0), trees.remove("dir3"), trees.chown("dir4", 1, 1), trees.chown("dir4/f1", 1, 1)],
        [
            directory("dir3", 0o700),
            trees.chown("dir3", 1, 1),
            trees.replace_directory("dir5", 0o700),
            trees.chown("dir5", 1, 1),
        ],
    )


def remove_intermediate_snapshot(subject: Subject) -> None:
    """RemoveIntermediateSnapshot: refused while something stands on it; then from the top down."""
    snapshotter = _Snapshotter(subject)
    snapshotter.written("base")
    snapshotter.written("inter", parent="base")
    snapshotter.prepare("top", "inter")
    refused(FailedPrecondition, lambda: snapshotter.remove("inter"))
    for key in ("top", "inter", "base"):
        snapshotter.remove(key)


def deleted_files_in_child_snapshot(subject: Subject) -> None:
    """DeletedFilesInChildSnapshot: a deletion holds in a child that does nothing."""
    _check_snapshots(
        subject, [file("foo", b"foo\n", 0o777), file("foobar", b"foobar\n", 0o777)], [trees.remove("foobar")], []
    )


def move_file_from_lower_layer(subject: Subject) -> None:
    """MoveFileFromLowerLayer: by a copy, and by a link whose first name goes."""
    _check_snapshots(
        subject,
        [directory("dir1", 0o700), file("dir1/f1", b"Hello"), directory("dir2", 0o700), file("dir2/f2", b"...")],
        [
            directory("dir3", 0o700),
            file("dir3/f1", b"Hello"),
            trees.remove("dir1"),
            trees.hard_link("dir2/f2", "dir3/f2"),
            trees.remove("dir2/f2"),
        ],
    )


def rename(subject: Subject) -> None:
    """Rename: files over others and to new names, a directory as mv(1) does it (docker/docker#25409)."""
    _check_snapshots(
        subject,
        [
            directory("dir1", 0o700),
            directory("somefiles", 0o700),
            file("somefiles/f1", b"was here first!"),
            file("somefiles/f2", b"nothing interesting"),
        ],
        [
            trees.rename("dir1", "dir2"),
            file("somefiles/f1-overwrite", b"new content 1"),
            trees.rename("somefiles/f1-overwrite", "somefiles/f1"),
            trees.rename("somefiles/f2", "somefiles/f3"),
        ],
    )


def view_readonly(subject: Subject) -> None:
    """ViewReadonly: a view takes no writes, where it is a mount; what it stands on stays as it was in any case."""
    snapshotter = _Snapshotter(subject)
    snapshotter.written("committed")
    root = snapshotter.view("view", "committed")
    if subject.driver.capabilities.mounts:
        assert refused(OSError, (root / "testfile").touch).errno == errno.EROFS
    else:
        (root / "testfile").touch()
    assert os.listdir(snapshotter.view("again", "committed")) == []


def stat_in_walk(subject: Subject) -> None:
    """StatInWalk: Stat can be called while a walk goes on, and says the same."""
    snapshotter = _Snapshotter(subject)
    names = _base_snapshots(snapshotter)
    seen = [info.key for info in snapshotter.forest.walk() if snapshotter.forest.stat(info.key) == info]
    assert sorted(seen) == sorted(names)


def close_twice(subject: Subject) -> None:
    """CloseTwice: giving everything up twice is giving it up once."""
    snapshotter = _Snapshotter(subject)
    snapshotter.written("name")
    snapshotter.remove("name")
    subject.engine.detach()
    subject.engine.detach()
    subject.driver.attach()


def root_permission(subject: Subject) -> None:
    """RootPermission: 0755."""
    assert _Snapshotter(subject).prepare("preparing").stat().st_mode & 0o777 == 0o755


def mount_128_layers(subject: Subject) -> None:
    """128LayersMount: each layer written through its mount and committed as it lies there; the top shows them all.

    As many as the driver stacks: the suite itself leaves aufs out.
    """
    snapshotter, flat, parent = _Snapshotter(subject), subject.model(), ""
    for number in range(min(_LAYERS, subject.driver.capabilities.max_layers)):
        layer = _layer(number)
        root = snapshotter.prepare("preparing", parent)
        if number % 16 == 1:
            assert_same(root, flat)
        for top in (root, flat):
            apply(layer, top)
        snapshotter.commit(f"committed-{number}", "preparing")
        parent = f"committed-{number}"
    assert_same(snapshotter.view("fullview", parent), flat)


def _layer(number: int) -> list[Operation]:
    if number == 0:
        return [
            file("bottom", b"way at the bottom\n", 0o777),
            file("overwriteme", b"FIRST!\n", 0o777),
            directory("ADDHERE"),
            directory("ONLYME"),
            file("ONLYME/bottom", b"bye!\n", 0o777),
        ]
    return [
        trees.remove("overwriteme"),
        file("overwriteme", b"%d WAS HERE!\n" % number, 0o777),
        file(f"ADDHERE/file-{number}", b"same\n", 0o755),
        trees.replace_directory("ONLYME"),
        file(f"ONLYME/file-{number}", b"only me!\n", 0o777),
    ]


CASES: tuple[Case, ...] = (
    basic,
    stat_active,
    stat_committed,
    transitivity_test,
    prepare_view_failing_test,
    update,
    remove,
    walk,
    layer_file_update,
    remove_directory_in_lower_layer,
    chown,
    directory_permission_on_commit,
    remove_intermediate_snapshot,
    deleted_files_in_child_snapshot,
    move_file_from_lower_layer,
    rename,
    view_readonly,
    stat_in_walk,
    close_twice,
    root_permission,
    mount_128_layers,
)
