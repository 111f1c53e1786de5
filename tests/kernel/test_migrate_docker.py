"""What is said of images, layers and containers in Docker's directory: taken as it is meant, and refused if it lies.

Devices are directories here; tests/kernel/test_migrate_devicemapper.py has the real ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hpmapper.config import Config
from hpmapper.errors import Corrupt
from hpmapper.image import oci
from hpmapper.migrate.docker import DockerDevicemapper
from hpmapper.migrate.move import Migration, Moved
from hpmapper.root import open_root
from hpmapper.testing import trees
from tests import migration
from tests.dockerdir import CHANGES, LAYERS, PlainDirectory, assert_moved, fill
from tests.migration import Silent

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def docker(tmp_path_factory: pytest.TempPathFactory) -> PlainDirectory:
    made = PlainDirectory(tmp_path_factory.mktemp("docker") / "docker")
    fill(made)
    made.add_container("other", made.app, [*CHANGES, trees.file("more", b"more")])
    return made


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Config]:
    config = migration.config(tmp_path, "overlay", "target")
    with migration.removed(config):
        yield config


def _migrate(docker: PlainDirectory, target: Config) -> Moved:
    with open_root(target) as opened:
        roots = cast(Any, SimpleNamespace(root=docker.root_of))
        return Migration(DockerDevicemapper(docker.root, roots), opened.engine, target.floor(), Silent()).run()


def test_all_of_it_comes_in(docker: PlainDirectory, target: Config) -> None:
    moved = _migrate(docker, target)
    assert (moved.images, moved.containers, moved.snapshots) == (2, 2, 3)
    assert_moved(target, docker)
    assert _migrate(docker, target).new == 0


def test_a_container_of_another_driver_stays_behind(docker: PlainDirectory, target: Config) -> None:
    place = docker.root / "containers" / ("0" * 64)
    place.mkdir()
    facts = {"ID": "0" * 64, "Name": "/x", "Image": "sha256:00", "Driver": "overlay2"}
    (place / "config.v2.json").write_text(json.dumps(facts))
    try:
        assert _migrate(docker, target).containers == 2
    finally:
        (place / "config.v2.json").unlink()
        place.rmdir()


def _json(change: dict[str, object]) -> Callable[[bytes], bytes]:
    return lambda data: json.dumps(json.loads(data) | change).encode()


_SPOILERS: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "names": ("image/*/repositories.json", lambda data: b"[]", "repositories.json is not understood"),
    "a name": (
        "image/*/repositories.json",
        lambda data: data.replace(b"app:latest", b"../../x:1"),
        "repositories.json",
    ),
    "a config": (
        "image/*/imagedb/content/sha256/*",
        lambda data: data.replace(b"amd64", b"arm64"),
        "is not the configuration that its name says",
    ),
    "a DiffID": ("image/*/layerdb/sha256/*/diff", lambda data: b"sha256:" + b"0" * 64, "but the image's layer is"),
    "a cache id": ("image/*/layerdb/sha256/*/cache-id", lambda data: b"../../../etc/passwd", "no name of a device"),
    "a size": ("image/*/layerdb/sha256/*/size", lambda data: b"-1", "size has no number"),
    "records": ("image/*/layerdb/sha256/*/tar-split.json.gz", lambda data: data[:-20], "layer sha256:.*is damaged"),
    "a device": ("devicemapper/metadata/[0-9a-f]*", _json({"device_id": 4711}), "no thin device 4711"),
    "a device's size": ("devicemapper/metadata/[0-9a-f]*", _json({"size": 10**9 + 1}), "no thin device"),
    "a device's record": ("devicemapper/metadata/[0-9a-f]*", lambda data: b"{}", "is not understood"),
    "a deleted device": ("devicemapper/metadata/[0-9a-f]*", _json({"deleted": True}), "marked as deleted"),
    "another device": ("devicemapper/metadata/[0-9a-f]*", _json({"device_id": 1}), "the layer's file|not the same"),
    "a container": ("containers/*/config.v2.json", lambda data: data[:-1], "config.v2.json is not understood"),
    "a container's name": ("containers/*/config.v2.json", _json({"Name": "/../x"}), "not a valid container name"),
    "a container's image": ("containers/*/config.v2.json", _json({"Image": "sha256:00"}), "its image sha256:00 is not"),
    "a container's layer": ("image/*/layerdb/mounts/*/parent", lambda data: b"sha256:00", "stands on sha256:00, but"),
}


@pytest.mark.parametrize("what", _SPOILERS)
def test_damage_and_malice_are_refused_by_name(docker: PlainDirectory, what: str, target: Config) -> None:
    pattern, spoil, message = _SPOILERS[what]
    files = {file: file.read_bytes() for file in docker.root.glob(pattern)}
    assert files
    try:
        for file, data in files.items():
            file.write_bytes(spoil(data))
        with pytest.raises(Corrupt, match=message):
            _migrate(docker, target)
    finally:
        for file, data in files.items():
            file.write_bytes(data)


def test_a_changed_file_of_a_layer_is_told_by_its_digest(docker: PlainDirectory, target: Config) -> None:
    places = docker.root.glob("image/*/layerdb/sha256/*/diff")
    (second,) = (place for place in places if place.read_text() == oci.sha256(LAYERS[1]))
    cache = second.with_name("cache-id").read_text()
    with docker.root_of(docker._number(cache), 512 << 20, "rootfs") as root:
        before = (root / "etc/new").read_bytes()
        (root / "etc/new").write_bytes(b"N" + before[1:])
        try:
            with pytest.raises(Corrupt, match=r"layer sha256:.*DiffID is sha256"):
                _migrate(docker, target)
        finally:
            (root / "etc/new").write_bytes(before)
