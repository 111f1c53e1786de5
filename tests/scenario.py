"""What crash tests do to a root: every kind of operation, announced before and reported after; and what must then hold.

A report is a file with a line for each step, "begin image base", "done image base". Whatever was done stays done.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from hpmapper import faults
from hpmapper.check import check
from hpmapper.config import Config
from hpmapper.containers import Containers
from hpmapper.drivers.limits import GROUP_LEVEL
from hpmapper.engine import Engine
from hpmapper.image import oci, platforms
from hpmapper.image.documents import ImportOptions, imported_config
from hpmapper.image.opening import SourceOptions
from hpmapper.images import Images
from hpmapper.kernel import qgroup
from hpmapper.kernel.fs import filesystem_name
from hpmapper.meta import snapshots
from hpmapper.meta.db import Database
from hpmapper.model import Kind
from hpmapper.pool.tools import run_tool
from hpmapper.root import DATABASE, open_root
from hpmapper.testing import trees
from hpmapper.testing.tars import LINK, folder, member, tar

_SECONDS = 600 if "HPMAPPER_GUEST" in os.environ else 60
"""For one process of a scenario; an emulated processor takes a while."""

_BIG = bytes(range(256)) * 1500
_LIMIT = 64 << 20

LAYERS = {
    "a": tar(
        folder(b"./", 0o711),
        folder(b"etc/"),
        member(b"etc/small", b"small"),
        *(member(b"big%d" % number, b"%d" % number + _BIG) for number in range(5)),
        member(b"linked", kind=LINK, link=b"big0"),
    ),
    "b": tar(member(b"etc/new", b"n" * 6000), member(b".wh.big1"), member(b"big2", b"changed" + _BIG)),
    "c": tar(folder(b"opt/"), member(b"opt/tool", b"tool" + _BIG), member(b"opt/readme", b"r")),
    "d": tar(folder(b"./", 0o700), member(b"only", b"only" + _BIG), member(b"big0", b"0" + _BIG)),
}
IMAGES = {"base": "ab", "third": "dc", "other": "ac"}
_EXTRA = [
    trees.file("hello", b"hello" * 5000),
    trees.remove("big3"),
    trees.write("big4", b"!" * 100, 70_000),
    trees.chmod("", 0o755),
]


class Silent:
    """Watches an import without a word."""

    def layer(self, number: int, count: int, size: int | None) -> Callable[[int], None]:
        return lambda _: None

    def layer_done(self, number: int, taken: object) -> None:
        pass


def write_layouts(directory: Path) -> None:
    """Write the scenario's images as OCI layouts."""
    for name, layers in IMAGES.items():
        _write_layout(directory / name, [LAYERS[layer] for layer in layers])


def _write_layout(layout: Path, layers: list[bytes]) -> None:
    blobs = layout / "blobs/sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes, media_type: str) -> dict[str, Any]:
        digest = oci.sha256(data)
        (blobs / digest.removeprefix("sha256:")).write_bytes(data)
        return {"mediaType": media_type, "digest": digest, "size": len(data)}

    packed = [put(gzip.compress(layer, 1, mtime=0), f"{oci.OCI_LAYER}+gzip") for layer in layers]
    options = ImportOptions(platform=platforms.parse("linux/amd64"))
    config = put(imported_config([oci.sha256(layer) for layer in layers], options), oci.OCI_CONFIG)
    manifest = {"schemaVersion": 2, "mediaType": oci.OCI_MANIFEST, "config": config, "layers": packed}
    entry = put(json.dumps(manifest).encode(), oci.OCI_MANIFEST)
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    (layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')


class Report:
    """The file in which a run says what it is about to do and what it has done."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Announce, let it happen, report."""
        self._say(f"begin {what}")
        yield
        self._say(f"done {what}")

    def _say(self, line: str) -> None:
        with self._path.open("a", encoding="ascii") as out:
            out.write(line + "\n")

    def states(self) -> dict[str, bool | None]:
        """What is known to exist ("image base"): True or False once reported, None while under way."""
        return states_of(self._path.read_text(encoding="ascii") if self._path.exists() else "")


def states_of(text: str) -> dict[str, bool | None]:
    """The states that a report's text tells of; "no image base" reports a removal."""
    states: dict[str, bool | None] = {}
    for line in text.splitlines():
        word, _, what = line.partition(" ")
        bare = what.removeprefix("no ")
        states[bare] = None if word == "begin" else bare == what
    return states


def run(config: Config, layouts: Path, report: Report) -> None:
    """Everything that changes a root, once."""
    with open_root(config) as opened:
        images, containers = Images(opened.engine), Containers(opened.engine)
        for name in IMAGES:
            with report.step(f"image {name}"):
                images.bring(str(layouts / name), SourceOptions(spool=layouts), [name], Silent())
        with report.step("container one"):
            one = containers.create("base", "one")
        trees.apply(_EXTRA, containers.mount(one))
        with report.step("image made"):
            containers.commit(one, ["made"], ImportOptions())
        with report.step("container two"):
            limited = opened.engine.driver.capabilities.size_limits
            two = containers.create("made", "two", size=_LIMIT if limited else None)
        containers.mount(two)
        with report.step("no image other"):  # durable, which the container's making was not
            images.remove("other")
        with report.step("no container two"):
            containers.remove(two)
        opened.engine.rubbish.collect()
        with report.step("no container one"):
            containers.remove(one)
        with report.step("no image made"):
            images.remove("made")
        opened.engine.rubbish.collect()


def contents(config: Config) -> dict[str, str]:
    """A digest of what a container of each image shows."""
    with open_root(config) as opened:
        images = Images(opened.engine)
        return {name: shown(opened.engine, images, name) for name in _names(images)}


def shown(engine: Engine, images: Images, name: str) -> str:
    """A digest of all facts of an image's tree."""
    container = engine.prepare(f"look-{name}", images.top(images.find(name)), Kind.VIEW)
    tree = trees.read_tree(engine.mount(container))
    engine.remove(container)
    return hashlib.sha256(repr(sorted(tree.items())).encode()).hexdigest()


def _names(images: Images) -> set[str]:
    return {name.removeprefix("docker.io/library/").partition(":")[0] for row in images.all() for name in row.names}


def verify(config: Config, states: dict[str, bool | None], expected: dict[str, str] | None = None) -> None:
    """Fail unless a root has what was reported, whole, and nothing else; leaves it empty.

    `expected`: the digests of `contents`, to be compared with.
    """
    with open_root(config) as opened:
        engine = opened.engine
        images, containers = Images(engine), Containers(engine)
        _assert_states(states, "image", _names(images))
        _assert_states(states, "container", {row.name for row in containers.all()})
        assert snapshots.unfinished(engine.db) == [], "something unfinished is visible"
        for name in _names(images):
            _assert_whole(engine, images, name)
            found = shown(engine, images, name)
            assert expected is None or found == expected[name], f"image {name} shows something else"
        for row in containers.all():
            containers.mount(row)
        # What a kill in the middle of collecting left is found by the next collection only.
        assert [finding for finding in check(engine) if finding.invariant != "unnamed"] == []
        engine.rubbish.collect()
        assert list(check(engine)) == []
        assert_no_orphans(engine)
        for row in containers.all():
            containers.remove(row)
        for image in images.all():
            images.remove(image.id)
        engine.rubbish.collect()
        assert_no_orphans(engine)
        stored = engine.driver.stored()
        assert (stored.snapshots, stored.layers, engine.driver.stored_objects()) == (set(), set(), set())
        assert_no_groups(engine.driver.scratch)


def assert_no_groups(place: Path) -> None:
    """Fail if a btrfs has a group of a limit that has gone."""
    if filesystem_name(place) == "btrfs" and qgroup.mode(place) is qgroup.Mode.SIMPLE:
        shown = run_tool(["btrfs", "qgroup", "show", "--raw", place]).stdout.split()
        assert [word for word in shown if word.startswith(f"{GROUP_LEVEL}/")] == []


def _assert_states(states: dict[str, bool | None], kind: str, present: set[str]) -> None:
    known = {what.partition(" ")[2]: state for what, state in states.items() if what.startswith(f"{kind} ")}
    missing = {name for name, state in known.items() if state} - present
    assert not missing, f"{kind} reported and lost: {missing}"
    extra = present - {name for name, state in known.items() if state is not False}
    assert not extra, f"{kind} reported removed, or never begun: {extra}"


def _assert_whole(engine: Engine, images: Images, name: str) -> None:
    """Every layer of an image gives back the tar of its DiffID."""
    for snapshot in images.layers(images.find(name)):
        assert snapshot.layer is not None
        hasher = hashlib.sha256()
        for piece in engine.read_tar(snapshot):
            hasher.update(piece)
        assert f"sha256:{hasher.hexdigest()}" == snapshots.layer(engine.db, snapshot.layer).diff_id


def assert_no_orphans(engine: Engine) -> None:
    """Fail unless what is on disk is what the database names, to the last directory."""
    stored = engine.driver.stored()
    assert stored.snapshots == snapshots.storage_ids(engine.db).snapshots
    layers = {layer.id for layer in snapshots.layers(engine.db)}
    assert stored.layers == layers
    assert engine.driver.stored_objects() == {digest for digest, _ in snapshots.objects(engine.db)}
    assert engine.db.rows("SELECT * FROM lease") == []
    scratch = engine.driver.scratch
    full = [path.name for path in scratch.iterdir() if any(path.iterdir())]
    assert not full, f"workspaces left: {full}"
    assert len(list(scratch.iterdir())) <= 1, "workspaces of the dead are left"
    merged = scratch.parent / "i"
    for image in merged.iterdir() if merged.exists() else ():
        chain = {int(number) for number in (image / "chain").read_text().split(",")}
        assert chain <= layers, f"the merged map {image.name} has layers that are gone"


def forget_boot(config: Config) -> None:
    """Let the next opening believe that the machine was started anew."""
    with closing(Database(config.root / DATABASE)) as db:
        db.set_setting("boot_id", "an earlier boot")


def in_child(act: Callable[[], object], fault: str = "", log: Path | None = None) -> int:
    """Do something in a process of its own; its exit status, negative for a signal."""
    return finished(start(act, fault, log))


def start(act: Callable[[], object], fault: str = "", log: Path | None = None) -> int:
    """Begin something in a forked process, which costs less than a new Python; returns its number."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(_SECONDS)
        os.environ |= {"HPMAPPER_FAULT": fault, "HPMAPPER_FAULT_LOG": str(log or "")}
        importlib.reload(faults)  # reads them
        act()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _too_long(_number: int, _frame: object) -> None:
    raise TimeoutError(f"not done after {_SECONDS} s")


def finished(pid: int) -> int:
    """Wait for a process; its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
