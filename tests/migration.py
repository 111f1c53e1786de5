"""A root with one of everything, and a picture of all that a root holds, to be compared with another root's."""

from __future__ import annotations

import io
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hpmapper.config import Config
from hpmapper.containers import Containers
from hpmapper.forest import HIDDEN, Forest
from hpmapper.image.opening import SourceOptions
from hpmapper.images import Images
from hpmapper.layer.stream import Expected
from hpmapper.meta import images as image_rows
from hpmapper.meta import snapshots
from hpmapper.migrate.move import Migration, Moved
from hpmapper.migrate.roots import remove_source, source_of, target_of
from hpmapper.model import Kind
from hpmapper.root import DATABASE, Opened, open_root, remove_root
from hpmapper.testing import trees
from tests import scenario

LIMIT = 64 << 20

UNSEEN = b"/etc/new"
"""A file of the image that a container has written to, and whose time it has set back."""

CHANGES = [
    trees.file("new", b"new" * 5000, mode=0o640),
    trees.directory("made"),
    trees.symlink("../etc", "made/link"),
    trees.file("made/one", b"one"),
    trees.hard_link("made/one", "made/two"),
    trees.node("made/pipe", 0o010644),
    trees.remove("big3"),
    trees.write("big4", b"!" * 100, 70_000),
    trees.write("linked", b"?" * 10, 5),
    trees.chmod("big2", 0o600),
    trees.chown("etc/small", 7, 8),
    trees.set_xattr("etc/small", "user.note", b"noted"),
    trees.chmod("", 0o700),
]


def config(directory: Path, driver: str, name: str) -> Config:
    """A root for tests."""
    size = "1G" if driver == "btrfs" else "400M"
    return Config(root=directory / name, driver=driver).with_options([f"pool.size={size}", "min_free_space=0"])


@contextmanager
def removed(*configs: Config) -> Iterator[None]:
    """At the end these roots are removed, as far as they are there."""
    try:
        yield
    finally:
        for config in configs:
            if (config.root / DATABASE).exists():
                remove_root(config, force=True)


def stock(config: Config, directory: Path) -> None:
    """Make a root with images, containers, and snapshots of containerd's of every kind."""
    scenario.write_layouts(directory / "layouts")
    with open_root(config) as opened:
        _images(opened, directory / "layouts")
        _forest(opened)


def _images(opened: Opened, layouts: Path) -> None:
    images, containers = Images(opened.engine), Containers(opened.engine)
    for name in scenario.IMAGES:
        images.bring(str(layouts / name), SourceOptions(spool=layouts), [name, f"{name}:more"], scenario.Silent())
    changed = containers.create("base", "changed")
    root = containers.mount(changed)
    trees.apply(CHANGES, root)
    _write_unseen(root / UNSEEN[1:].decode())
    with socket.socket(socket.AF_UNIX) as one, suppress(OSError):
        one.bind(str(root / "made/socket"))
    containers.unmount(changed)
    containers.create("third", "untouched")


def _write_unseen(path: Path) -> None:
    """Change a file's data and set its time back."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"unseen")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _forest(opened: Opened) -> None:
    forest = Forest(opened.engine, "containerd")

    def written(key: str, parent: str, operations: list[trees.Operation]) -> None:
        forest.prepare(key, parent, {"of": key})
        snapshot = forest.get(key)
        trees.apply(operations, opened.engine.mount(snapshot))
        opened.engine.unmount(snapshot)

    def applied(key: str, parent: str, layer: str) -> None:
        forest.prepare(key, parent, {})
        tar = scenario.LAYERS[layer]
        forest.apply(forest.get(key), lambda: io.BytesIO(tar), Expected())

    applied("extract-1", "", "a")
    forest.commit("k8s.io/1/applied", "extract-1", {"containerd.io/gc.root": "now"})
    applied("extract-2", "k8s.io/1/applied", "b")
    snapshot = forest.get("extract-2")
    trees.apply([trees.file("over", b"over what was applied")], opened.engine.mount(snapshot))
    opened.engine.unmount(snapshot)
    forest.commit("k8s.io/2/both", "extract-2", {})
    written("to-seal", "k8s.io/2/both", [trees.file("sealed", b"sealed" * 900), trees.remove("big2")])
    forest.commit("k8s.io/3/sealed", "to-seal", {"x": "y"})
    written(
        "k8s.io/4/active", "k8s.io/3/sealed", [trees.remove("etc"), trees.directory("etc"), trees.file("etc/a", b"")]
    )
    applied("k8s.io/5/unpacking", "k8s.io/3/sealed", "c")
    forest.prepare("k8s.io/6/never-used", "k8s.io/1/applied", {})
    forest.prepare("k8s.io/7/view", "k8s.io/2/both", {}, Kind.VIEW)


def picture(config: Config, *, times: bool = True) -> dict[str, Any]:
    """All that a root holds, without what its driver makes of it."""
    with open_root(config) as opened:
        images, containers = Images(opened.engine), Containers(opened.engine)
        return {
            "images": {row.id: (row.config, row.size, row.names, row.created) for row in images.all()},
            "layers": {row.id: [one.key for one in images.layers(row)] for row in images.all()},
            "containers": {
                row.name: (row.image, row.created if times else 0, containers.limit(row)) for row in containers.all()
            },
            "changes": {row.name: list(containers.changes(row)) for row in containers.all()},
            "snapshots": dict(_snapshots(opened, times)),
            "roots": _roots(opened),
            "blobs": set(snapshots.blobs(opened.engine.db)),
            "tags": {name: row.id for row in image_rows.images(opened.engine.db) for name in row.names},
        }


def assert_shows(expected: dict[str, Any], target: Config, *, by_times: bool = True) -> None:
    """Fail unless a root has what the picture of its source shows.

    `by_times`: one of the two drivers tells changes by their times, and does not see `UNSEEN`.
    """
    found = picture(target)
    assert found.pop("blobs") >= expected["blobs"], "reading the tars has added to what is known"
    if by_times:
        for one in (found, expected):
            one["changes"]["changed"] = [at for at in one["changes"]["changed"] if at.path != UNSEEN]
    for what, value in found.items():
        assert value == expected[what], what


def _snapshots(opened: Opened, times: bool) -> list[tuple[str, tuple[object, ...]]]:
    db = opened.engine.db
    keys = {one.id: _named(one.key, opened) for one in snapshots.walk(db)}
    return [
        (
            keys[one.id],
            (
                one.kind,
                keys[one.parent] if one.parent is not None else None,
                (one.created, one.updated) if times else None,
                snapshots.labels(db, one.id),
                snapshots.chain_id_of(db, one),
                one.applied is not None,
            ),
        )
        for one in snapshots.walk(db)
    ]


def _named(key: str, opened: Opened) -> str:
    """Hidden snapshots are named by numbers, which are each root's own."""
    if not key.startswith(HIDDEN):
        return key
    return HIDDEN + snapshots.by_id(opened.engine.db, int(key.removeprefix(HIDDEN))).key  # type: ignore[arg-type]


def _roots(opened: Opened) -> dict[str, dict[bytes, trees.Facts]]:
    """What each snapshot shows; of committed ones what a view of them does."""
    found = {}
    for one in list(snapshots.walk(opened.engine.db)):
        committed = one.kind is Kind.COMMITTED
        look = opened.engine.prepare(f"look-{one.id}", one, Kind.VIEW) if committed else one
        found[_named(one.key, opened)] = trees.read_tree(opened.engine.mount(look))
        opened.engine.unmount(look)
        if committed:
            opened.engine.remove(look)
    return found


class Silent:
    """Watches a migration without a word."""

    def phase(self, name: str, total: int) -> None:
        pass

    def item(self, name: str) -> None:
        pass

    def advance(self, count: int) -> None:
        pass


def migrate(source: Config, target: Config, *, remove: bool = False, limits: bool = True) -> Moved:
    """As the command does."""
    with source_of(source) as offered, target_of(target, source) as engine:
        moved = Migration(offered, engine, target.floor(), Silent(), limits=limits).run()
    if remove:
        remove_source(source)
    return moved
