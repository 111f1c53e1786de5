"""Layers in the forest: read by the differ, written through mounts, turned into maps in the background."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from hpmapper.containerd.api import diff_pb2 as diff_api
from hpmapper.containerd.api.types_pb2 import Mount
from hpmapper.engine import chain_id
from hpmapper.image import oci
from hpmapper.image.opening import SourceOptions
from hpmapper.images import Images
from hpmapper.kernel import mount, mountinfo
from hpmapper.meta import snapshots
from hpmapper.testing import trees
from hpmapper.testing.tars import LINK, SYMLINK, folder, member, tar, zstd_packed
from tests import scenario
from tests.serving import GZIP, TAR, Served, code, eventually, refusal, served, shown

pytestmark = pytest.mark.kernel

Code = grpc.StatusCode
REF = "containerd.io/snapshot.ref"
DIFF_ID = "containerd.io/snapshot/diff-id"

_BIG = bytes(range(256)) * 2000


def _gz(data: bytes, level: int = 9) -> bytes:
    """Compressed, the same at any time."""
    return gzip.compress(data, level, mtime=0)


LOWER = tar(
    folder(b"./", 0o711),
    folder(b"etc/"),
    member(b"etc/small", b"small"),
    member(b"big", _BIG),
    member(b"linked", kind=LINK, link=b"big"),
    member(b"gone", b"gone" * 1000),
    folder(b"dir/"),
    member(b"dir/file", b"d" * 2000),
)
UPPER = tar(
    member(b".wh.gone"),
    member(b"new", b"n" * 6000),
    member(b"again", kind=LINK, link=b"big"),  # into the layer below
    folder(b"dir/"),
    member(b"dir/.wh..wh..opq"),
    member(b"dir/only", b"o"),
    member(b"way", kind=SYMLINK, link=b"etc"),
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A plain directory such as an empty snapshot."""
    path = tmp_path / "model"
    path.mkdir()
    path.chmod(0o755)
    return path


def _diff_id(layer: bytes) -> str:
    return oci.sha256(layer)


# The fast path.


@pytest.mark.parametrize("pack", ["gzip", "zstd", "plain"])
def test_a_blob_becomes_a_layer(here: Served, pack: str, model: Path) -> None:
    packed = {"gzip": _gz(LOWER), "zstd": zstd_packed(LOWER), "plain": LOWER}[pack]
    blob = here.content.add(packed, TAR if pack == "plain" else f"{TAR}+{pack}")
    mounts = here.client.prepare("one")
    sent = (("containerd-namespace", "k8s.io"), ("containerd-lease", "l"))
    applied = here.client.apply(blob, mounts, metadata=sent)
    assert (applied.digest, applied.size, applied.media_type) == (_diff_id(LOWER), len(LOWER), TAR)
    assert set(here.content.metadata) == set(sent), "containerd wants to know whose content that is"
    with shown(here.client.mounts("one"), here.directory / "target") as tree:
        assert (tree / "big").read_bytes() == _BIG, "it is there before the commit, too"
        assert tree.stat().st_mode & 0o777 == 0o711
    here.client.commit("base", "one")
    _plain_lower(model)
    with here.looked_at("base") as tree:
        trees.assert_same(tree, model)


def _plain_lower(model: Path) -> None:
    """What the lower layer gives, made by Python's own tar."""
    with tarfile.open(fileobj=io.BytesIO(LOWER)) as archive:
        archive.extractall(model, filter="fully_trusted")


def test_layers_on_layers(here: Served) -> None:
    lower, upper = (here.content.add(_gz(layer)) for layer in (LOWER, UPPER))
    here.applied("one", lower)
    here.applied("two", upper, "one")
    with here.looked_at("two") as tree:
        assert sorted(path.name for path in tree.iterdir()) == [
            "again", "big", "dir", "etc", "linked", "new", "way",
        ]  # fmt: skip
        assert os.listdir(tree / "dir") == ["only"]
        assert (tree / "again").read_bytes() == _BIG
        assert tree.stat().st_mode & 0o777 == 0o711
    stored = here.client.usage("one")
    assert stored.size > 0


def test_a_layer_that_is_here_is_not_read_again(here: Served) -> None:
    blob = here.content.add(_gz(LOWER))
    here.applied("one", blob)
    here.applied("two", blob)
    assert here.content.reads[blob.digest] == 1
    with here.looked_at("two") as tree:
        assert (tree / "big").read_bytes() == _BIG
    here.client.remove("one")
    here.settle()
    with here.looked_at("two") as tree:
        assert (tree / "big").read_bytes() == _BIG


_BAD = {
    "truncated": (_gz(LOWER)[:-100], Code.DATA_LOSS),
    "damaged": (_gz(LOWER)[:50] + b"\xff" * 50 + _gz(LOWER)[100:], Code.DATA_LOSS),
    "half a member": (_gz(LOWER[:3000]), Code.DATA_LOSS),
    "a path out of the root": (_gz(tar(member(b"../escape", b"x"))), Code.INVALID_ARGUMENT),
    "a link to nothing": (_gz(tar(member(b"x", kind=LINK, link=b"missing"))), Code.DATA_LOSS),
}


@pytest.mark.parametrize("case", _BAD)
def test_a_bad_blob_is_refused_and_the_snapshot_stays_usable(here: Served, case: str) -> None:
    data, expected = _BAD[case]
    mounts = here.client.prepare("one")
    answer, text = refusal(lambda: here.client.apply(here.content.add(data), mounts))
    assert answer is expected, text
    with shown(mounts, here.directory / "target") as tree:
        assert list(tree.iterdir()) == []
    assert here.client.mounts("one") == mounts
    assert here.client.apply(here.content.add(_gz(LOWER)), mounts).digest == _diff_id(LOWER)
    here.client.commit("base", "one")
    with here.looked_at("base") as tree:
        assert (tree / "big").read_bytes() == _BIG


def test_what_is_promised_is_held_against_the_blob(here: Served) -> None:
    blob = here.content.add(_gz(LOWER))
    here.content.blobs[blob.digest] = _gz(UPPER)  # another one under its digest
    mounts = here.client.prepare("one", labels={DIFF_ID: _diff_id(LOWER)})
    assert code(lambda: here.client.apply(blob, mounts)) is Code.DATA_LOSS
    here.content.blobs[blob.digest] = _gz(LOWER)
    blob.size += 1
    assert code(lambda: here.client.apply(blob, mounts)) is Code.DATA_LOSS
    blob.size -= 1
    assert here.client.apply(blob, mounts).digest == _diff_id(LOWER)
    other = here.client.prepare("two", labels={DIFF_ID: _diff_id(UPPER)})
    assert code(lambda: here.client.apply(here.content.add(_gz(tar())), other)) is Code.DATA_LOSS


def test_what_is_not_ours_is_left_to_others(here: Served) -> None:
    client, blob = here.client, here.content.add(_gz(LOWER))
    here.applied("base", blob)
    mine = client.prepare("one")
    (place,) = mine
    foreign: dict[str, list[Any]] = {
        "none": [],
        "two": [place, place],
        "elsewhere": [Mount(type="bind", source="/tmp/1/m")],
        "relative": [Mount(type="bind", source=place.source[1:])],
        "another type": [Mount(type="ext4", source=place.source)],
        "a number that is none of ours": [Mount(type="bind", source=place.source.replace("/a/", "/a/9999"))],
        "a huge number": [Mount(type="bind", source="/" + "9" * 5000 + "/m")],
        "a committed one": [Mount(type="bind", source=os.fspath(here.engine.driver.root(here.forest.get("base").id)))],
        "odd overlay": [Mount(type="overlay", options=["lowerdir", "upperdir="])],
        "a view": client.view("look", "base"),
    }
    wrong = {name: code(lambda mounts=mounts: client.apply(blob, mounts)) for name, mounts in foreign.items()}  # type: ignore[misc]
    assert wrong == dict.fromkeys(foreign, Code.UNIMPLEMENTED)
    encrypted = type(blob)(media_type=f"{GZIP}+encrypted", digest=blob.digest, size=blob.size)
    assert code(lambda: client.apply(encrypted, mine)) is Code.UNIMPLEMENTED
    blob.digest = "sha256:../../etc"
    assert code(lambda: client.apply(blob, mine)) is Code.INVALID_ARGUMENT
    blob.digest = "sha256:" + "0" * 64
    assert code(lambda: client.apply(blob, mine)) is Code.NOT_FOUND
    assert code(lambda: client.diff(foreign["elsewhere"], mine)) is Code.UNIMPLEMENTED
    assert code(lambda: client.diff([], foreign["elsewhere"])) is Code.UNIMPLEMENTED
    assert code(lambda: client.diff([], mine, media_type="application/x-unknown")) is Code.UNIMPLEMENTED


def test_what_was_written_before_is_not_overwritten(here: Served) -> None:
    blob = here.content.add(_gz(LOWER))
    mounts = here.client.prepare("one")
    with shown(mounts, here.directory / "target") as tree:
        (tree / "mine").write_text("mine")
    assert code(lambda: here.client.apply(blob, mounts)) is Code.UNIMPLEMENTED
    with shown(mounts, here.directory / "target") as tree:
        assert os.listdir(tree) == ["mine"]
    here.client.apply(blob, here.client.prepare("twice"))
    assert code(lambda: here.client.apply(blob, here.client.mounts("twice"))) is Code.UNIMPLEMENTED


def test_what_is_written_afterwards_is_committed_as_well(here: Served) -> None:
    client = here.client
    client.apply(here.content.add(_gz(LOWER)), client.prepare("one"))
    with shown(client.mounts("one"), here.directory / "target") as tree:
        (tree / "written").write_text("later")
        (tree / "gone").unlink()
        tree.chmod(0o750)
    client.commit("base", "one")
    assert client.list().keys() == {"base"}
    assert client.stat("base").parent == ""
    with here.looked_at("base") as tree:
        assert (tree / "written").read_text() == "later"
        assert (tree / "big").read_bytes() == _BIG
        assert not (tree / "gone").exists()
        assert tree.stat().st_mode & 0o777 == 0o750


def test_only_the_root_changed_afterwards(here: Served) -> None:
    client = here.client
    client.apply(here.content.add(_gz(LOWER)), client.prepare("one"))
    with shown(client.mounts("one"), here.directory / "target") as tree:
        tree.chmod(0o750)
    client.commit("base", "one")
    with here.looked_at("base") as tree:
        assert tree.stat().st_mode & 0o777 == 0o750


def test_layers_read_side_by_side_are_put_on_each_other_at_commit(here: Served) -> None:
    client = here.client
    here.applied("base", here.content.add(_gz(LOWER)))
    free = tar(folder(b"./"), member(b"new", b"n" * 6000))
    client.apply(here.content.add(_gz(free)), client.prepare("two"))
    if not here.engine.driver.capabilities.shares_layers:
        assert code(lambda: client.commit("top", "two", parent="base")) is Code.FAILED_PRECONDITION
        client.remove("two")
        return
    client.commit("top", "two", parent="base")
    assert client.stat("top").parent == "base"
    with here.looked_at("top") as tree:
        assert (tree / "new").exists()
        assert (tree / "big").read_bytes() == _BIG
    client.apply(here.content.add(_gz(tar(folder(b"./")))), client.prepare("three"))
    assert code(lambda: client.commit("x", "three", parent="missing")) is Code.NOT_FOUND
    client.prepare("four")
    assert code(lambda: client.commit("x", "three", parent="four")) is Code.FAILED_PRECONDITION


def test_a_cancelled_apply_leaves_nothing(here: Served) -> None:
    big = _gz(tar(member(b"random", os.urandom(4 << 20))), 1)
    blob, mounts = here.content.add(big), here.client.prepare("one")
    here.content.reading.clear()
    here.content.hold = threading.Event()
    request = diff_api.ApplyRequest(diff=blob, mounts=mounts)
    call = here.client.future("Apply", request, diff_api.ApplyResponse, service="diff.v1.Diff")
    assert here.content.reading.wait(60)
    call.cancel()
    here.content.hold.set()
    here.content.hold = None
    here.settle()
    assert here.client.apply(here.content.add(_gz(LOWER)), mounts).digest == _diff_id(LOWER)


# Diff.


def test_a_diff_applied_again_gives_the_same(here: Served, model: Path) -> None:
    client = here.client
    changes = [
        trees.file("added", b"a" * 5000, xattrs={"user.one": b"1"}),
        trees.write("gone", b"changed", 3000),
        trees.remove("etc/small"),
        trees.chmod("dir/file", 0o600),
        trees.directory("more"),
        trees.symlink("more", "link"),
    ]
    here.applied("base", here.content.add(_gz(LOWER)))
    _plain_lower(model)
    trees.apply(changes, model)
    with shown(client.prepare("work", "base"), here.directory / "target") as tree:
        trees.apply(changes, tree)
    for number, media_type in enumerate((TAR, f"{TAR}+gzip", f"{TAR}+zstd", "")):
        left = client.view(f"base view {number}", "base")
        found = client.diff(left, client.mounts("work"), media_type=media_type, labels={"mine": "1"})
        assert found.media_type == media_type or not media_type
        labels = here.content.labels[found.digest]
        assert labels["mine"] == "1"
        assert found.size == len(here.content.blobs[found.digest])
        applied = client.apply(found, client.prepare(f"again {number}", "base"))
        if media_type != TAR:
            assert labels["containerd.io/uncompressed"] == applied.digest
        client.commit(f"copy {number}", f"again {number}")
        with here.looked_at(f"copy {number}") as tree:
            trees.assert_same(tree, model)
    client.commit("done", "work")
    committed = client.diff(client.view("l", "base"), client.view("r", "done"), media_type=TAR)
    assert committed.digest in here.content.blobs
    client.apply(committed, client.prepare("last", "base"))
    client.commit("last copy", "last")
    with here.looked_at("last copy") as tree:
        trees.assert_same(tree, model)


def test_what_a_diff_writes_is_not_collected_before_it_is_used(here: Served) -> None:
    """containerd tells a differ no lease of its client's; without any its collector may come first."""
    here.applied("base", here.content.add(_gz(LOWER)))
    here.content.leases.clear()
    here.content.metadata.clear()
    mounts = here.client.view("all", "base")
    here.client.diff([], mounts, media_type=TAR, lease="told")
    assert not here.content.leases
    assert ("containerd-lease", "told") in here.content.metadata
    here.client.diff([], mounts, media_type=TAR)
    ((name, labels),) = here.content.leases.items()
    assert ("containerd-lease", name) in here.content.metadata
    left = datetime.fromisoformat(labels["containerd.io/gc.expire"]) - datetime.now(UTC)
    assert timedelta(minutes=30) < left < timedelta(hours=2)


def test_a_diff_of_an_image_is_what_it_came_as(here: Served) -> None:
    client = here.client
    here.applied("base", here.content.add(_gz(LOWER)))
    found = client.diff(client.view("nothing"), client.view("all", "base"), media_type=TAR)
    assert here.content.blobs[found.digest] == LOWER
    here.content.labels.pop(found.digest, None)
    again = client.diff([], client.mounts("all"), media_type=TAR, labels={"later": "1"})
    assert again.digest == found.digest
    assert here.content.labels[found.digest] == {"later": "1"}, "also where the blob was there already"
    client.prepare("other", "base")
    here.applied("stranger", here.content.add(_gz(tar(member(b"s", b"s")))))
    assert code(lambda: client.diff(client.view("v", "stranger"), client.mounts("other"))) is Code.UNIMPLEMENTED


# Layers that are here already.


def _chain(*layers: bytes) -> str:
    key = None
    for layer in layers:
        key = chain_id(key, _diff_id(layer))
    assert key is not None
    return key


def test_a_layer_that_is_here_is_not_even_fetched(here: Served) -> None:
    """containerd's remote snapshots: Prepare is refused, and it looks for the label and the parent."""
    client = here.client
    one, two = _chain(LOWER), _chain(LOWER, UPPER)
    assert code(lambda: client.prepare("k8s.io/1/extract-1 x", labels={REF: one})) is Code.OK, "nothing is here yet"
    client.apply(here.content.add(_gz(LOWER)), client.mounts("k8s.io/1/extract-1 x"))
    client.commit("k8s.io/2/one", "k8s.io/1/extract-1 x", {REF: one})
    client.apply(here.content.add(_gz(UPPER)), client.prepare("x", "k8s.io/2/one"))
    client.commit("k8s.io/3/two", "x", {REF: two})
    here.content.reads.clear()
    # The first was committed with the label, and so is found as it is.
    assert code(lambda: client.prepare("new", labels={REF: one})) is Code.ALREADY_EXISTS
    found = client.list(f'labels."{REF}"=={one},parent==""')
    assert found.keys() == {"k8s.io/2/one"}
    assert code(lambda: client.prepare("new", "k8s.io/2/one", labels={REF: two})) is Code.ALREADY_EXISTS
    assert client.list(f'labels."{REF}"=={two},parent=="k8s.io/2/one"').keys() == {"k8s.io/3/two"}
    assert code(lambda: client.prepare("view me", labels={REF: two})) is Code.OK, "not on this parent"
    assert not here.content.reads


def test_a_layer_of_an_image_of_ours_is_used(here: Served, tmp_path: Path) -> None:
    scenario.write_layouts(tmp_path / "layouts")
    images = Images(here.engine)
    images.bring(str(tmp_path / "layouts/base"), SourceOptions(spool=tmp_path / "layouts"), ["base"], scenario.Silent())
    client, layers = here.client, [scenario.LAYERS["a"], scenario.LAYERS["b"]]
    parent = ""
    for attempt in range(2):  # the second finds what the first committed
        parent = ""
        for number in range(2):
            target = _chain(*layers[: number + 1])
            answer = code(lambda target=target, parent=parent: client.prepare("new", parent, {REF: target}))  # type: ignore[misc]
            assert answer is Code.ALREADY_EXISTS
            (parent,) = client.list(f'labels."{REF}"=={target},parent=="{parent}"')
        assert len(client.list()) == 2, f"no more at attempt {attempt}"
    with here.looked_at(parent) as tree:
        assert (tree / "etc/new").read_bytes() == b"n" * 6000
        assert not (tree / "big1").exists()
    images.remove("base")
    here.engine.rubbish.collect()
    with here.looked_at(parent) as tree:
        assert (tree / "etc/new").read_bytes() == b"n" * 6000


def test_the_mount_table_is_not_read_for_each_layer_that_goes(here: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a thousand mounts it takes a millisecond to read."""
    names = [f"layer-{number}" for number in range(12)]
    for name in names:
        here.written(name, [trees.file("big", _BIG)])
    for name in names:
        here.client.remove(name)
    reads = 0
    read = mountinfo._read

    def counted(fd: int) -> str:
        nonlocal reads
        reads += 1
        return read(fd)

    monkeypatch.setattr(mountinfo, "_read", counted)
    assert len(here.engine.driver.stored().snapshots) == len(names)
    here.engine.rubbish.collect()
    assert not here.engine.driver.stored().snapshots
    assert reads < len(names)


def test_a_damaged_layer_is_read_again(here: Served) -> None:
    client, target, blob = here.client, _chain(LOWER), here.content.add(_gz(LOWER))
    here.applied("one", blob, labels={REF: target})
    layer = here.forest.get("one").layer
    assert layer is not None
    with here.engine.db.transaction() as transaction:
        snapshots.mark_damaged(transaction, layer)
    mounts = client.prepare("new", labels={REF: target})
    client.apply(blob, mounts)
    assert here.content.reads[blob.digest] == 2


# The plain path: what was written through the mounts.


@pytest.fixture(params=["hpmapper"])
def busy(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    """A root whose caretaker reads sealed layers almost at once."""
    with served(tmp_path, request.param, idle_seconds=0.05) as made:
        yield made
        made.clear()


def _sealed(here: Served) -> list[int]:
    return list(snapshots.sealed_layers(here.engine.db))


def test_written_layers_become_maps_while_a_container_is_on_them(busy: Served, model: Path) -> None:
    client = busy.client
    steps: list[list[Any]] = [
        [
            trees.file("big", _BIG),
            trees.file("large", b"l" * 300_000),
            trees.directory("dir"),
            trees.file("dir/file", b"d" * 3000),
            trees.file("gone", b"g"),
        ],
        [trees.hard_link("big", "linked"), trees.remove("gone")],  # into the layer below
        [trees.chmod("large", 0o600), trees.file("copy", _BIG)],  # of a large file: a copy of it
        [trees.rename("dir", "moved"), trees.chmod("", 0o711)],
    ]
    parent = ""
    for number, step in enumerate(steps):
        parent = busy.written(f"layer-{number}", step, parent)
        trees.apply(step, model)
    mounts = client.prepare("container", parent)
    before = busy.engine.below(busy.forest.get("container"))
    with shown(mounts, busy.directory / "target") as tree:
        (tree / "mine").write_text("mine")
        eventually(lambda: _assert(not _sealed(busy)))
        now = busy.engine.below(busy.forest.get("container"))
        assert not set(now) & set(before), "all of its layers were replaced"
        busy.client.cleanup()
        assert (tree / "linked").read_bytes() == _BIG
        assert (tree / "moved/file").read_bytes() == b"d" * 3000
        assert set(before) <= busy.engine.driver.stored().snapshots, "it has the old ones mounted"
    with busy.looked_at(parent) as tree:
        trees.assert_same(tree, model)
    for one in mount.mounts_below(busy.engine.driver.scratch.parent / "a"):
        mount.umount(one.target)
    with shown(client.mounts("container"), busy.directory / "target") as tree:
        assert (tree / "mine").read_text() == "mine"
        assert (tree / "linked").read_bytes() == _BIG

    def freed() -> None:
        busy.client.cleanup()
        assert not set(before) & busy.engine.driver.stored().snapshots

    eventually(freed)
    digests = [digest for digest, size in snapshots.objects(busy.engine.db) if size == len(_BIG)]
    assert len(digests) == 1, "one object, in however many layers"


def _assert(condition: bool) -> None:
    assert condition


def test_a_container_of_a_user_namespace_keeps_its_layers(busy: Served) -> None:
    """The kernel does not tell which directories such an overlay has for layers."""
    if not busy.engine.driver.capabilities.maps_ids:
        pytest.skip("this kernel cannot map the ids of overlay's layers")
    busy.written("low", [trees.file("big", _BIG)])
    ids = "0:100000:65536"
    labels = {f"containerd.io/snapshot/{kind}mapping": ids for kind in ("uid", "gid")}
    layer = busy.forest.get("low").layer
    with shown(busy.client.prepare("container", "low", labels), busy.directory / "target") as tree:
        eventually(lambda: _assert(not _sealed(busy)))
        busy.engine.rubbish.collect()
        assert layer in busy.engine.driver.stored().snapshots
        assert (tree / "big").read_bytes() == _BIG
        assert (tree / "big").stat().st_uid == 100_000


def test_a_layer_that_cannot_be_read_keeps_those_above_it(busy: Served) -> None:
    """What was written to it may be more than a tar can hold; what lies above must not be put on a map then."""
    client = busy.client
    busy.written("low", [trees.file("a", _BIG)])
    with shown(client.prepare("w", "low"), busy.directory / "target") as tree:
        _deep(tree, 1200)
    client.commit("deep", "w", {REF: "sha256:" + "d" * 64})
    busy.written("high", [trees.file("b", b"b" * 5000)], "deep")
    layers = [busy.forest.get(name).layer for name in ("deep", "high")]
    eventually(lambda: _assert(set(layers) <= busy.caretaker._hopeless))
    assert set(_sealed(busy)) == set(layers)
    with busy.looked_at("high") as tree:
        assert (tree / "a").read_bytes() == _BIG
        assert (tree / "b").read_bytes() == b"b" * 5000
    blob = busy.content.add(_gz(tar(member(b"c", b"c"))))
    mounts = client.prepare("x", "high")
    assert code(lambda: client.apply(blob, mounts)) is Code.UNIMPLEMENTED


def _deep(tree: Path, depth: int) -> None:
    """Directories deeper than a path can be long."""
    fd = os.open(tree, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d" * 10, dir_fd=fd)
        inner = os.open("d" * 10, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)


def test_apply_on_written_layers(busy: Served) -> None:
    """A differ's layer on top of written ones: those are read first, if the caretaker has not been there yet."""
    busy.written("low", [trees.file("big", _BIG), trees.file("gone", b"g")])
    busy.applied("top", busy.content.add(_gz(UPPER)), "low")
    with busy.looked_at("top") as tree:
        assert (tree / "again").read_bytes() == _BIG
        assert not (tree / "gone").exists()


@pytest.mark.parametrize("driver", ["hpmapper", "overlay"])
def test_more_than_a_hundred_layers(driver: str, tmp_path: Path, model: Path) -> None:
    with served(tmp_path, driver, idle_seconds=0.3) as here:
        parent = ""
        for number in range(110):
            step = [trees.file(f"file-{number}", b"%d" % number * 1000)]
            if number > 2:
                step.append(
                    trees.remove(f"file-{number - 2}") if number % 2 else trees.chmod(f"file-{number - 1}", 0o600)
                )
            parent = here.written(f"layer-{number}", step, parent)
            trees.apply(step, model)
        with here.looked_at(parent) as tree:
            trees.assert_same(tree, model)
        if not here.engine.driver.capabilities.keeps_sealed:
            eventually(lambda: _assert(not _sealed(here)))
            with here.looked_at(parent) as tree:
                trees.assert_same(tree, model)
        here.clear()


def test_removed_while_it_is_being_read(busy: Served) -> None:
    """The caretaker reads layers that are removed under it, one after the other; nothing is left of any."""
    for round_ in range(8):
        parent = ""
        for number in range(3):
            parent = busy.written(f"{round_}-{number}", [trees.file(f"f{number}", os.urandom(200_000))], parent)
        if round_ % 2:
            eventually(lambda: _assert(len(_sealed(busy)) < 3))
        for number in reversed(range(3)):
            busy.client.remove(f"{round_}-{number}")
        busy.client.cleanup()


def test_an_image_is_merged_once_its_layers_are_maps_and_what_is_no_image_stays(busy: Served) -> None:
    """Docker commits a few files for each container: as maps, they would want an image map for each of them."""
    busy.written("low", [trees.file("big", _BIG)])
    busy.written("high", [trees.file("more", _BIG[::-1])], "low")
    with shown(busy.client.prepare("i", "high"), busy.directory / "target") as tree:
        (tree / "hosts").write_text("mine")
    busy.client.commit("init", "i")
    images = busy.engine.driver.scratch.parent / "i"
    eventually(lambda: _assert(len(os.listdir(images)) == 1))
    with busy.looked_at("init") as tree:
        assert (tree / "hosts").read_text() == "mine"
        assert (tree / "more").read_bytes() == _BIG[::-1]
    assert _sealed(busy) == [busy.forest.get("init").layer]
    assert len(os.listdir(images)) == 1


def test_an_image_that_was_unpacked_without_a_label_becomes_maps_too(busy: Served) -> None:
    """containerd 1.6's own client does that; its keys say what they are."""
    with shown(busy.client.prepare("k8s.io/1/extract-1", ""), busy.directory / "target") as tree:
        (tree / "big").write_bytes(_BIG)
    key = f"k8s.io/2/sha256:{'1f' * 32}"
    busy.client.commit(key, "k8s.io/1/extract-1")
    eventually(lambda: _assert(not _sealed(busy)))
    with busy.looked_at(key) as tree:
        assert (tree / "big").read_bytes() == _BIG
