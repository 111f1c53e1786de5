"""A directory that Docker 20.10 itself has written with its devicemapper driver, beside what it shows of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hpmapper.bench.dockerd import Docker, archive
from hpmapper.config import Config
from hpmapper.containers import Containers
from hpmapper.errors import FailedPrecondition
from hpmapper.images import Images
from hpmapper.kernel import dm, mount
from hpmapper.migrate.docker import DOCKER_DEVICEMAPPER
from hpmapper.root import open_root
from tests import migration
from tests.kernel.test_devicemapper_docker import NAME, OPTIONS, SCRIPT, _exported, _facts, _layers
from tests.kernel.test_devicemapper_lvm import _disk
from tests.migration import migrate

pytestmark = [pytest.mark.kernel, pytest.mark.guest("docker"), pytest.mark.timeout(1800)]

DATA = "var/lib/docker-import"


class Written:
    """What a Docker that has ended left, and what it said before."""

    def __init__(self, root: Path) -> None:
        self.data = root / DATA
        self.exported: dict[str, bytes] = {}
        self.image: dict[str, Any] = {}
        self.refused: list[str] = []

    @property
    def source(self) -> Config:
        return Config(root=self.data, driver=DOCKER_DEVICEMAPPER)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Written]:
    """An image, a container that ran and one that did not, as Docker left them."""
    root = tmp_path_factory.mktemp("docker")
    mount.filesystem("ext4", _disk("docker"), root)
    made = Written(root)
    try:
        with Docker(root, OPTIONS, data=f"/{DATA}") as daemon:
            daemon.load(archive(NAME, _layers()))
            made.image = daemon.ask("GET", f"/images/{NAME}/json")
            for name, command in (("ran", ["sh", "-c", SCRIPT]), ("new", ["true"])):
                body = {"Image": NAME, "Cmd": command, "HostConfig": {"NetworkMode": "none"}}
                container = daemon.ask("POST", f"/containers/create?name={name}", body)["Id"]
                if name == "ran":
                    daemon.ask("POST", f"/containers/{container}/start")
                    assert daemon.ask("POST", f"/containers/{container}/wait")["StatusCode"] == 0, daemon.log()
                made.exported[name] = daemon.call("GET", f"/containers/{container}/export")
            try:
                migrate(made.source, migration.config(root, "vfs", "refused"))
            except FailedPrecondition as error:
                made.refused.append(error.message)
        _end_devices()
        yield made
    finally:
        for one in mount.mounts_below(root):
            mount.umount(one.target, lazy=True)


def _end_devices() -> None:
    """What this Docker leaves active when it ends, an operator removes."""
    deadline = time.monotonic() + 60
    while (left := [name for name in dm.devices() if name.startswith("docker-")]) and time.monotonic() < deadline:
        for name in sorted(left, key=lambda name: name.endswith("-pool")):
            with contextlib.suppress(OSError):
                dm.remove(name)
        time.sleep(0.2)
    assert not left, left


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Config]:
    config = migration.config(tmp_path, "overlay", "target")
    with migration.removed(config):
        yield config


def test_a_docker_that_runs_is_refused(written: Written) -> None:
    assert len(written.refused) == 1
    assert "dockerd is running" in written.refused[0] or "is in use" in written.refused[0]


def test_what_docker_wrote_comes_in(written: Written, target: Config) -> None:
    moved = migrate(written.source, target)
    assert (moved.images, moved.containers, moved.snapshots) == (1, 2, 2)
    with open_root(target) as opened:
        images, containers = Images(opened.engine), Containers(opened.engine)
        (row,) = images.all()
        assert row.id == written.image["Id"]
        assert row.names == (f"docker.io/library/{NAME}",)
        layers = [b"".join(opened.engine.read_tar(snapshot)) for snapshot in images.layers(row)]
        assert layers == _layers(), "the tars come out as they went in"
        for container in containers.all():
            assert _facts(_exported(containers.mount(container))) == _facts(written.exported[container.name])
            containers.unmount(container)
    assert migrate(written.source, target).new == 0
