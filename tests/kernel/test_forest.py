"""containerd's snapshotter service, call by call, over a real socket: what happens, and with which code it is refused.

The table of codes is that of containerd's reference implementation (core/snapshots/storage/bolt.go).
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from hpmapper.kernel import mount, sync
from hpmapper.store.workspace import remove_tree
from hpmapper.testing import trees
from tests.serving import Served, code, eventually, refusal, shown

pytestmark = pytest.mark.kernel

Code = grpc.StatusCode
COMMITTED, ACTIVE, VIEW = 3, 2, 1
REF = "containerd.io/snapshot.ref"

FILES = [trees.file("file", b"x" * 5000), trees.directory("etc"), trees.file("etc/motd", b"hello")]


@pytest.fixture
def stocked(here: Served) -> Served:
    """With a committed snapshot "base", an active one "active" and a view "view" on it, and a leaf "leaf"."""
    client = here.client
    here.written("base", FILES)
    client.prepare("active", "base")
    client.view("view", "base")
    client.prepare("to be leaf", "base")
    client.commit("leaf", "to be leaf")
    return here


Attempt = Callable[[Served], object]

_CODES: dict[str, tuple[Attempt, grpc.StatusCode]] = {
    "prepare on nothing known": (lambda s: s.client.prepare("new", "missing"), Code.NOT_FOUND),
    "prepare on an active one": (lambda s: s.client.prepare("new", "active"), Code.INVALID_ARGUMENT),
    "prepare on a view": (lambda s: s.client.prepare("new", "view"), Code.INVALID_ARGUMENT),
    "prepare an active key": (lambda s: s.client.prepare("active"), Code.ALREADY_EXISTS),
    "prepare a view's key": (lambda s: s.client.prepare("view"), Code.ALREADY_EXISTS),
    "prepare a committed key": (lambda s: s.client.prepare("base", "base"), Code.ALREADY_EXISTS),
    "prepare without a key": (lambda s: s.client.prepare(""), Code.INVALID_ARGUMENT),
    "prepare a key that is too long": (lambda s: s.client.prepare("k" * 32769), Code.INVALID_ARGUMENT),
    "prepare with a huge label": (
        lambda s: s.client.prepare("new", labels={"l": "x" * (1 << 20)}),
        Code.INVALID_ARGUMENT,
    ),
    "view of nothing known": (lambda s: s.client.view("new", "missing"), Code.NOT_FOUND),
    "view of an active one": (lambda s: s.client.view("new", "active"), Code.INVALID_ARGUMENT),
    "view with a taken key": (lambda s: s.client.view("view", "base"), Code.ALREADY_EXISTS),
    "view without a key": (lambda s: s.client.view("", "base"), Code.INVALID_ARGUMENT),
    "mounts of nothing known": (lambda s: s.client.mounts("missing"), Code.NOT_FOUND),
    "mounts of a committed one": (lambda s: s.client.mounts("base"), Code.FAILED_PRECONDITION),
    "mounts without a key": (lambda s: s.client.mounts(""), Code.NOT_FOUND),
    "commit to a taken name": (lambda s: s.client.commit("base", "active"), Code.ALREADY_EXISTS),
    "commit to a taken name, without a key": (lambda s: s.client.commit("base", "missing"), Code.ALREADY_EXISTS),
    "commit nothing known": (lambda s: s.client.commit("new", "missing"), Code.NOT_FOUND),
    "commit a view": (lambda s: s.client.commit("new", "view"), Code.FAILED_PRECONDITION),
    "commit a committed one": (lambda s: s.client.commit("new", "base"), Code.FAILED_PRECONDITION),
    "commit without a name": (lambda s: s.client.commit("", "active"), Code.INVALID_ARGUMENT),
    "commit with a huge label": (
        lambda s: s.client.commit("new", "active", {"l": "x" * 4096}),
        Code.INVALID_ARGUMENT,
    ),
    "commit on another parent": (lambda s: s.client.commit("new", "active", parent="leaf"), Code.INVALID_ARGUMENT),
    "commit on nothing known": (lambda s: s.client.commit("new", "active", parent="missing"), Code.NOT_FOUND),
    "remove nothing known": (lambda s: s.client.remove("missing"), Code.NOT_FOUND),
    "remove without a key": (lambda s: s.client.remove(""), Code.NOT_FOUND),
    "remove one with children": (lambda s: s.client.remove("base"), Code.FAILED_PRECONDITION),
    "stat nothing known": (lambda s: s.client.stat("missing"), Code.NOT_FOUND),
    "stat a key that is too long": (lambda s: s.client.stat("k" * 100_000), Code.NOT_FOUND),
    "update nothing known": (lambda s: s.client.update("missing", {"a": "b"}), Code.NOT_FOUND),
    "update the parent": (lambda s: s.client.update("base", {}, ["parent"]), Code.INVALID_ARGUMENT),
    "update the name and labels": (lambda s: s.client.update("base", {}, ["labels", "name"]), Code.INVALID_ARGUMENT),
    "update to a huge label": (lambda s: s.client.update("base", {"l": "x" * 4096}), Code.INVALID_ARGUMENT),
    "usage of nothing known": (lambda s: s.client.usage("missing"), Code.NOT_FOUND),
    "list with half a filter": (lambda s: s.client.list("name=="), Code.INVALID_ARGUMENT),
}


def test_what_is_refused_is_refused_with_its_code_and_changes_nothing(stocked: Served) -> None:
    before = stocked.client.list()
    wrong = {}
    for name, (attempt, expected) in _CODES.items():
        answer, text = refusal(lambda attempt=attempt: attempt(stocked))  # type: ignore[misc]
        # Keys are told as they were given, without what the database has before them.
        if answer is not expected or not text or "containerd:" in text or stocked.client.list() != before:
            wrong[name] = answer, text
    assert not wrong


def test_the_reason_not_to_remove_says_so(stocked: Served) -> None:
    """containerd's own suite looks for the word."""
    assert "remove" in refusal(lambda: stocked.client.remove("base"))[1]


# What happens.


def test_infos(here: Served) -> None:
    client = here.client
    started = time.time_ns()
    client.prepare("one", labels={"a": "1", "none": ""})
    active = client.stat("one")
    assert (active.name, active.parent, active.kind, dict(active.labels)) == ("one", "", ACTIVE, {"a": "1"})
    assert active.created_at == active.updated_at
    assert started <= active.created_at.ToNanoseconds() <= time.time_ns()
    client.commit("done", "one", {"b": "2", "none": ""})
    assert code(lambda: client.stat("one")) is Code.NOT_FOUND
    done = client.stat("done")
    assert (done.parent, done.kind, dict(done.labels)) == ("", COMMITTED, {"b": "2"}), "labels are replaced"
    assert done.created_at == done.updated_at
    assert done.created_at.ToNanoseconds() >= active.created_at.ToNanoseconds()
    client.view("look", "done", {"c": "3"})
    look = client.stat("look")
    assert (look.parent, look.kind, dict(look.labels)) == ("done", VIEW, {"c": "3"})
    client.prepare("two", "done")
    assert client.list() == {name: client.stat(name) for name in ("done", "look", "two")}


_KEYS = [
    "with/slashes/../and/dots",
    "k8s.io/12/extract-665724870-2EIl sha256:9842",
    "new\nline\ttab",
    "nul\0byte",
    "käse 🧀",
    "'; DROP TABLE snapshot; --",
    "%s{0}\\x",
    "k" * 32768,
    " ",
]


def test_any_key_will_do(here: Served) -> None:
    client = here.client
    parent = ""
    for key in _KEYS:
        client.prepare(f"{key[:32000]}!", parent)
        client.commit(key, f"{key[:32000]}!")
        assert client.stat(key).parent == parent
        parent = key
    assert client.list().keys() == set(_KEYS)


def test_updating_labels(here: Served) -> None:
    client = here.client
    client.prepare("one", labels={"a": "1", "b": "2", "with.dots": "3"})
    before = client.stat("one")

    def labels(wanted: dict[str, str], *paths: str) -> dict[str, str]:
        info = client.update("one", wanted, paths)
        assert client.stat("one") == info
        return dict(info.labels)

    assert labels({"b": "new"}, "labels.b") == {"a": "1", "b": "new", "with.dots": "3"}
    assert labels({"with.dots": "4", "a": "ignored"}, "labels.with.dots") == {"a": "1", "b": "new", "with.dots": "4"}
    assert labels({"a": ""}, "labels.a") == {"b": "new", "with.dots": "4"}, "an empty value deletes"
    assert labels({}, "labels.b", "labels.containerd.io/gc.root") == {"with.dots": "4"}, "so does none"
    assert labels({"x": "1", "y": "2", "none": ""}) == {"x": "1", "y": "2"}, "without a mask all are replaced"
    assert labels({"z": "3"}, "labels") == {"z": "3"}
    assert labels({"l" * 96: "x" * 4000}, "labels") == {"l" * 96: "x" * 4000}
    client.update("one", {}, parent="other", kind=COMMITTED)
    after = client.stat("one")
    assert (after.parent, after.kind, dict(after.labels)) == ("", ACTIVE, {}), "nothing else can be changed"
    assert after.created_at == before.created_at
    assert after.updated_at.ToNanoseconds() > before.updated_at.ToNanoseconds()


def test_what_is_written_is_there_for_children(here: Served) -> None:
    client, model = here.client, here.directory / "model"
    model.mkdir(exist_ok=True)
    model.chmod(0o755)
    more = [trees.write("file", b"!", 1000), trees.remove("etc/motd"), trees.chmod("", 0o711)]
    here.written("base", FILES)
    here.written("more", more, "base")
    trees.apply([*FILES, *more], model)
    with here.looked_at("more") as tree:
        trees.assert_same(tree, model)
    client.prepare("child", "more")
    with shown(client.mounts("child"), here.directory / "target") as tree:
        trees.assert_same(tree, model)
    remove_tree(model)


def test_a_view_cannot_be_written_to(here: Served) -> None:
    here.written("base", FILES)
    for parent in ("base", ""):
        with shown(here.client.view(f"view of {parent}", parent), here.directory / "target") as tree:
            for act in (Path.touch, Path.mkdir):
                with pytest.raises(OSError, match="Read-only") as caught:
                    act(tree / "new")
                assert caught.value.errno == errno.EROFS


def test_mounts_that_were_taken_away_are_made_again(here: Served) -> None:
    """As after a reboot: what was written before is still there."""
    client = here.client
    here.written("base", FILES)
    first = client.prepare("one", "base")
    view = client.view("look", "base")
    with shown(first, here.directory / "target") as tree:
        trees.apply([trees.file("new", b"new")], tree)
    for one in mount.mounts_below(here.engine.driver.scratch.parent):
        if one.fstype == "overlay":
            mount.umount(one.target)
    assert client.mounts("one") == first
    assert client.mounts("look") == view
    with shown(first, here.directory / "target") as tree:
        assert (tree / "new").read_bytes() == b"new"
        assert (tree / "etc/motd").read_bytes() == b"hello"
    with shown(view, here.directory / "target") as tree:
        assert (tree / "etc/motd").read_bytes() == b"hello"


def test_storage_that_was_lost_is_made_again(here: Served) -> None:
    """As by a power cut right after Prepare was answered."""
    client = here.client
    here.written("base", FILES)
    mounts = client.prepare("one", "base")
    here.engine.driver.remove(here.forest.get("one").id)
    assert client.mounts("one") == mounts
    with shown(mounts, here.directory / "target") as tree:
        assert (tree / "etc/motd").read_bytes() == b"hello"
    client.prepare("two", "base")
    here.engine.driver.remove(here.forest.get("two").id)
    client.commit("committed", "two")
    with here.looked_at("committed") as tree:
        assert (tree / "etc/motd").read_bytes() == b"hello"


def test_usage(here: Served) -> None:
    client = here.client
    with shown(client.prepare("one"), here.directory / "target") as tree:
        empty = client.usage("one")
        trees.apply([trees.file(f"file-{number}", b"%d" % number * 100_000) for number in range(10)], tree)
        sync.syncfs(tree)  # so that what was written takes its blocks
        active = client.usage("one")
    assert active.size >= empty.size + 1_000_000
    assert active.inodes == empty.inodes + 10
    client.commit("base", "one")
    committed = client.usage("base")
    assert committed.size >= 1_000_000
    assert committed.inodes >= 10
    client.view("look", "base")
    assert client.usage("look").size == 0
    if here.engine.driver.capabilities.mounts:
        client.prepare("child", "base")
        assert client.usage("child").size < 100_000, "of itself alone"


def test_list_comes_in_blocks_and_filtered(here: Served) -> None:
    client = here.client
    calls = [
        client.start_prepare(f"n-{number:03}", labels={"even": "yes"} if number % 2 == 0 else {})
        for number in range(250)
    ]
    for call in calls:
        call.result()
    blocks = client.list_blocks()
    assert [len(block) for block in blocks] == [100, 100, 50]
    assert len({info.name for block in blocks for info in block}) == 250
    assert client.list("labels.even==yes").keys() == {f"n-{number:03}" for number in range(0, 250, 2)}
    assert client.list("name==n-001", "name~=/^n-24[0-9]$/,labels.even").keys() == {
        "n-001",
        "n-240",
        "n-242",
        "n-244",
        "n-246",
        "n-248",
    }
    assert client.list("kind==committed") == {}
    assert client.list_blocks("name==nothing") == []


def test_a_key_can_be_used_again_at_once(here: Served) -> None:
    client = here.client
    for number in range(5):
        with shown(client.prepare("one"), here.directory / "target") as tree:
            assert list(tree.iterdir()) == []
            (tree / f"file-{number}").touch()
        client.commit("name", "one")
        client.remove("name")
        client.prepare("one")
        client.remove("one")
        client.view("one")
        client.remove("one")
    client.cleanup()
    assert client.list() == {}


def test_in_a_crowd_each_call_fails_alone(here: Served) -> None:
    """Calls that come together are recorded together; those that are refused take no other with them."""
    client = here.client
    here.written("base", FILES)
    client.prepare("taken")
    for _ in range(2):
        calls = {}
        for number in range(60):
            calls[f"good-{number}"] = client.start_prepare(f"good-{number}", "base")
            calls[f"taken-{number}"] = client.start_prepare("taken", "base")
            calls[f"missing-{number}"] = client.start_prepare(f"orphan-{number}", "missing")
            calls[f"absent-{number}"] = client.start_remove("absent")
        answers = {name: code(lambda call=call: call.result()) for name, call in calls.items()}  # type: ignore[misc]
        expected = {"good": Code.OK, "taken": Code.ALREADY_EXISTS, "missing": Code.NOT_FOUND, "absent": Code.NOT_FOUND}
        assert answers == {name: expected[name.partition("-")[0]] for name in calls}
        good = {name for name in calls if name.startswith("good")}
        assert client.list("kind==active").keys() == {"taken", *good}
        removals = [client.start_remove(name) for name in good]
        assert {code(lambda call=call: call.result()) for call in removals} == {Code.OK}  # type: ignore[misc]
    client.remove("taken")


def test_cleanup_frees_what_was_removed(here: Served) -> None:
    client = here.client
    here.written("base", FILES)
    client.remove("base")
    client.cleanup()

    def freed() -> None:
        assert here.engine.driver.stored().snapshots == set()

    eventually(freed)


def test_moving_onto_a_parent_needs_the_differ(here: Served) -> None:
    """What was written through a mount was written without what lies below: whiteouts would be lost."""
    client = here.client
    here.written("base", FILES)
    client.prepare("one")
    assert code(lambda: client.commit("moved", "one", parent="base")) is Code.FAILED_PRECONDITION
    client.commit("stays", "one")
    assert client.stat("stays").parent == ""
