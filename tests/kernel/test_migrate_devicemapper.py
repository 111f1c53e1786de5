"""Moving to and from thin pools, and reading a directory of Docker's, which is not changed by a byte."""

from __future__ import annotations

import fcntl
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpmapper.config import Config
from hpmapper.errors import FailedPrecondition, NotFound
from hpmapper.kernel import dm, loop
from hpmapper.migrate.docker import DOCKER_DEVICEMAPPER
from hpmapper.testing import trees
from tests import migration, scenario
from tests.dockerdir import CHANGES, DockerDirectory, assert_moved, fill
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
    with migration.removed(source, target):
        migration.stock(source, tmp_path)
        expected = migration.picture(source)
        migrate(source, target)
        migration.assert_shows(expected, target)


# Docker's directory.

Docker = DockerDirectory


@pytest.fixture(scope="module", params=["xfs", "ext4"])
def docker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Docker:
    """Docker's directory, with two images that share layers, and containers that stopped well and badly."""
    made = DockerDirectory(tmp_path_factory.mktemp(request.param) / "docker", request.param)
    with made.active():
        fill(made)
        made.add_container("cut-off", made.app, [*CHANGES, trees.file("late", b"late" * 5000)], clean=False)
    return made


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Config]:
    config = migration.config(tmp_path, "overlay", "target")
    with migration.removed(config):
        yield config


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


def test_docker_moves(docker: Docker, target: Config) -> None:
    before = docker.digests()
    moved = migrate(_source(docker), target)
    assert (moved.images, moved.containers, moved.snapshots) == (2, 2, 3)
    _nothing_left(docker)
    assert_moved(target, docker)
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
    assert_moved(target, docker)
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
            assert_moved(target, docker)
        finally:
            deadline = time.monotonic() + 60
            while [other for other in dm.devices() if "import" in other] and time.monotonic() < deadline:
                time.sleep(0.1)
            dm.remove(name)
