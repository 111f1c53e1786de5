"""Moving to and from thin pools, and reading a directory of Docker's, which is not changed by a byte."""

from __future__ import annotations

import fcntl
import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hpmapper.check import check
from hpmapper.config import Config
from hpmapper.containers import Containers
from hpmapper.errors import Corrupt, FailedPrecondition, NotFound
from hpmapper.images import Images
from hpmapper.kernel import dm, loop
from hpmapper.meta import snapshots
from hpmapper.migrate.docker import DOCKER_DEVICEMAPPER
from hpmapper.root import DATABASE, open_root, remove_root
from hpmapper.testing import trees
from hpmapper.testing.tars import LINK, SYMLINK, folder, member, tar
from tests import migration, scenario
from tests.dockerdir import DockerDirectory
from tests.migration import migrate

pytestmark = [pytest.mark.kernel, pytest.mark.guest("dm"), pytest.mark.timeout(1800)]

THIN = ["dm.basesize=512M", "dm.loopdatasize=4G", "dm.loopmetadatasize=64M"]


def _config(directory: Path, driver: str, name: str) -> Config:
    config = migration.config(directory, driver, name)
    return config.with_options(THIN) if driver == "devicemapper" else config


@pytest.mark.parametrize(
    ("before", "after"),
    [("devicemapper", "hpmapper"), ("hpmapper", "devicemapper"), ("devicemapper", "overlay"), ("vfs", "devicemapper")],
)
def test_everything_moves(before: str, after: str, tmp_path: Path) -> None:
    source, target = _config(tmp_path, before, "source"), _config(tmp_path, after, "target")
    try:
        migration.stock(source, tmp_path)
        expected = migration.picture(source)
        migrate(source, target)
        found = migration.picture(target)
        assert found.pop("blobs") >= expected["blobs"]
        for one in (found, expected):  # drivers that compare trees tell changes by their times
            one["changes"]["changed"] = [at for at in one["changes"]["changed"] if at.path != migration.UNSEEN]
        for what, value in found.items():
            assert value == expected[what], what
    finally:
        for config in (source, target):
            if (config.root / DATABASE).exists():
                remove_root(config, force=True)


# Docker's directory.

LAYERS = [
    tar(
        folder(b"etc/"),
        member(b"etc/motd", b"hello"),
        member(b"etc/shadow", b"secret", mode=0o600, uid=1, gid=2),
        member(b"etc/hard", kind=LINK, link=b"etc/motd"),
        folder(b"usr/"),
        folder(b"usr/lib/"),
        member(b"lib", kind=SYMLINK, link=b"usr/lib"),
        member(b"usr/lib/data", bytes(range(256)) * 700),
        folder(b"opt/"),
        member(b"opt/gone", b"gone"),
    ),
    tar(folder(b"etc/"), member(b"etc/new", b"n" * 5000), member(b"opt/.wh.gone"), member(b"lib/late", b"late" * 999)),
    tar(member(b"top", b"top")),
]

CHANGES = [
    trees.write("etc/motd", b"HELLO"),
    trees.remove("etc/new"),
    trees.write("usr/lib/data", b"!", 70_000),
    trees.directory("made"),
    trees.symlink("nowhere", "made/link"),
    trees.chown("etc/shadow", 5, 6),
    trees.set_xattr("etc/shadow", "user.note", b"noted"),
]

Docker = DockerDirectory


@pytest.fixture(scope="module", params=["xfs", "ext4"])
def docker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Docker:
    """Docker's directory, with two images that share layers, and containers that stopped well and badly."""
    made = DockerDirectory(tmp_path_factory.mktemp(request.param) / "docker", request.param)
    with made.active():
        made.make_base()
        one = made.add_image(["app:1", "app:latest"], LAYERS[:2], Cmd=["sh"])
        made.add_image(["registry.example.com:5000/team/app:2"], LAYERS)
        made.add_container("stopped", one, CHANGES)
        made.add_container("cut-off", one, [*CHANGES, trees.file("late", b"late" * 5000)], clean=False)
    return made


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Config]:
    config = migration.config(tmp_path, "overlay", "target")
    yield config
    if (config.root / DATABASE).exists():
        remove_root(config, force=True)


def _source(docker: Docker) -> Config:
    return Config(root=docker.root, driver=DOCKER_DEVICEMAPPER)


def _nothing_left(docker: Docker) -> None:
    """The kernel removes devices a moment after their last user has gone."""
    deadline = time.monotonic() + 60
    while left := [name for name in dm.devices() if "import" in name] + [
        str(one.path) for file in docker.files for one in loop.find(file)
    ]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def _assert_moved(target: Config, docker: Docker) -> None:
    with open_root(target) as opened:
        images, containers = Images(opened.engine), Containers(opened.engine)
        names = {name for row in images.all() for name in row.names}
        assert names == {
            "docker.io/library/app:1",
            "docker.io/library/app:latest",
            "registry.example.com:5000/team/app:2",
        }
        for row in images.all():
            config = docker.image / "imagedb/content/sha256" / row.id[7:]
            assert row.config == config.read_bytes()
            assert row.size == sum(len(layer) for layer in LAYERS[: len(images.layers(row))])
            for snapshot in images.layers(row):
                assert snapshot.layer is not None
                layer = snapshots.layer(opened.engine.db, snapshot.layer)
                assert b"".join(opened.engine.read_tar(snapshot)) in LAYERS
                assert layer.diff_id
        assert {row.name for row in containers.all()} == {"stopped", "cut-off"}
        for container in containers.all():
            found = trees.read_tree(containers.mount(container))
            assert found == docker.expected[container.name], container.name
            assert container.created == 1614834367_123456789
            containers.unmount(container)
        assert list(check(opened.engine)) == []


def test_docker_moves(docker: Docker, target: Config) -> None:
    before = docker.digests()
    moved = migrate(_source(docker), target)
    assert (moved.images, moved.containers, moved.snapshots) == (2, 2, 3)
    _nothing_left(docker)
    _assert_moved(target, docker)
    assert docker.digests() == before, "a byte of Docker's pool was changed"
    assert migrate(_source(docker), target).new == 0
    _nothing_left(docker)


def test_the_kernel_takes_read_only_devices_for_a_pool_that_is(docker: Docker) -> None:
    """What reading relies on, shown by itself."""
    data, metadata = docker.files
    with loop.attached(data, read_only=True) as one, loop.attached(metadata, read_only=True) as two:
        words = f"{two} {one} 128 0 2 skip_block_zeroing read_only"
        dm.activate("only-read-pool", [dm.Target(0, data.stat().st_size // 512, "thin-pool", words)])
        try:
            assert " ro " in dm.status("only-read-pool")[0].params
        finally:
            dm.remove("only-read-pool")


def test_killed_and_resumed(docker: Docker, target: Config) -> None:
    before = docker.digests()
    for point in ("migrate.layer-recorded:2", "ingest.synced:1", "migrate.copied:1", "migrate.recorded:1"):
        status = scenario.in_child(lambda: migrate(_source(docker), target), point)
        assert status == -signal.SIGKILL, point
        _nothing_left(docker)
    migrate(_source(docker), target)
    _assert_moved(target, docker)
    assert docker.digests() == before
    _nothing_left(docker)


def test_a_pool_in_use_is_refused(docker: Docker, target: Config) -> None:
    with docker.active(), pytest.raises(FailedPrecondition, match=r"is in use: the device docker-.*-pool is active"):
        migrate(_source(docker), target)


def test_a_running_dockerd_is_refused(docker: Docker, target: Config) -> None:
    file = docker.root / "volumes/metadata.db"
    file.parent.mkdir(exist_ok=True)
    with file.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # as bbolt does
        with pytest.raises(FailedPrecondition, match="dockerd is running"):
            migrate(_source(docker), target)


def test_no_directory_is_told(docker: Docker, target: Config, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no devicemapper directory"):
        migrate(Config(root=tmp_path, driver=DOCKER_DEVICEMAPPER), target)


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
    "a device's size": ("devicemapper/metadata/[0-9a-f]*", _json({"size": 10**9 + 1}), "cannot be"),
    "a device's record": ("devicemapper/metadata/[0-9a-f]*", lambda data: b"{}", "is not understood"),
    "a deleted device": ("devicemapper/metadata/[0-9a-f]*", _json({"deleted": True}), "marked as deleted"),
    "another device": ("devicemapper/metadata/[0-9a-f]*", _json({"device_id": 1}), "the layer's file|not the same"),
    "a container": ("containers/*/config.v2.json", lambda data: data[:-1], "config.v2.json is not understood"),
    "a container's name": ("containers/*/config.v2.json", _json({"Name": "/../x"}), "not a valid container name"),
    "a container's image": ("containers/*/config.v2.json", _json({"Image": "sha256:00"}), "its image sha256:00 is not"),
    "a container's layer": ("image/*/layerdb/mounts/*/parent", lambda data: b"sha256:00", "stands on sha256:00, but"),
}


@pytest.mark.parametrize("what", _SPOILERS)
def test_damage_and_malice_are_refused_by_name(docker: Docker, what: str, target: Config) -> None:
    pattern, spoil, message = _SPOILERS[what]
    if docker.kind == "ext4":
        pytest.skip("what is in these files does not depend on the file system")
    files = {file: file.read_bytes() for file in docker.root.glob(pattern)}
    assert files
    try:
        for file, data in files.items():
            file.write_bytes(spoil(data))
        with pytest.raises(Corrupt, match=message):
            migrate(_source(docker), target)
    finally:
        for file, data in files.items():
            file.write_bytes(data)
    _nothing_left(docker)


def test_without_a_pool_nothing_is_read(docker: Docker, target: Config) -> None:
    data, _ = docker.files
    hidden = data.with_name("hidden")
    data.rename(hidden)
    try:
        with pytest.raises(NotFound, match="not in files"):
            migrate(_source(docker), target)
    finally:
        hidden.rename(data)


def test_a_pool_of_somebody_elses_is_read_where_it_is_active(docker: Docker, target: Config) -> None:
    """dm.thinpooldev: the pool is LVM's, say, and stays active. No message is sent to it."""
    name = "elsewhere-pool"
    with docker.active():
        table = dm.table(f"{docker.prefix}-pool")
    data, metadata = docker.files
    with loop.attached(data) as one, loop.attached(metadata) as two:
        words = table[0].params.split()
        target_line = table[0]._replace(params=" ".join([str(two), str(one), *words[2:]]))
        dm.activate(name, [target_line])
        try:
            before = dm.status(name)[0].params.split()[0]
            migrate(_source(docker).with_options([f"dm.thinpooldev=/dev/mapper/{name}"]), target)
            assert dm.status(name)[0].params.split()[0] == before
            _assert_moved(target, docker)
        finally:
            deadline = time.monotonic() + 60
            while [other for other in dm.devices() if "import" in other] and time.monotonic() < deadline:
                time.sleep(0.1)
            dm.remove(name)
