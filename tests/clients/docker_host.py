"""Docker with hpmapper as its graph driver plugin, in a machine of a Debian release.

with docker_host("bookworm", directory, "overlay") as host:
    host.docker("run", "--rm", "image", "true")
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.clients import trees
from tests.clients.containerd import NAMESPACE
from tests.clients.machine import Daemon, Failed, Machine
from tests.clients.setups import control_groups

ROOT = "/data/root"
"""hpmapper's root directory in the machine."""

PLUGIN = "/run/docker/plugins/hpmapper.sock"


@contextmanager
def docker_host(release: str, data: Path, driver: str | None) -> Iterator[DockerHost]:
    """Docker of a release, at work.

    Args:
        data: a directory that is not there yet, on XFS with reflink: /data in the machine.
        driver: of hpmapper behind the plugin; None: Docker's own overlay2, to compare with.
    """
    tree = trees.made(release)
    if not (tree / "usr/sbin/dockerd").exists():
        pytest.fail(f"{tree} has no Docker: it was made before the list of its packages had it; remove it")
    data.mkdir()
    with control_groups(), Machine(tree, data, trees.python_packages(tree)) as machine:
        host = DockerHost(machine, driver)
        if driver:
            host.start_plugin()
        host.start_docker()
        yield host


class DockerHost:
    """Docker in a machine, and the plugin."""

    def __init__(self, machine: Machine, driver: str | None) -> None:
        self.machine = machine
        self.driver = driver
        self.plugin: Daemon | None = None

    def start_docker(self) -> None:
        """Start dockerd, perhaps again."""
        config = {
            "experimental": True,
            "storage-driver": "hpmapper" if self.driver else "overlay2",
            "data-root": "/data/docker",
            "iptables": False,
            "ip6tables": False,
            "bridge": "none",
            "live-restore": True,
            "cgroup-parent": NAMESPACE,
        }
        self.machine.path("/data/daemon.json").write_text(json.dumps(config))
        self.dockerd = self.machine.start("dockerd", "dockerd", "--config-file=/data/daemon.json")
        self.machine.wait(self.dockerd, lambda: self.docker("version"))

    def start_plugin(self) -> None:
        """Start hpmapper, perhaps again."""
        options = ["--storage-driver", str(self.driver), "--storage-opt", "pool.kind=directory"]
        options += ["--storage-opt", "min_free_space=0"]
        serve = ["serve", "--address", "/run/hpmapper.sock", "--docker-plugin", PLUGIN]
        self.plugin = self.machine.start("plugin", *_hpmapper(*options, *serve))
        self.machine.wait(self.plugin, lambda: self.machine.answers(PLUGIN))

    def kill_plugin(self) -> None:
        """End hpmapper as a crash does."""
        assert self.plugin
        self.plugin.stop(signal.SIGKILL)

    def stop_docker(self) -> None:
        """End dockerd; it must end well."""
        assert self.dockerd.stop() == 0, self.dockerd.log.read_text()[-3000:]

    def stop(self) -> None:
        """End both as an operator does; each must end well."""
        self.stop_docker()
        if self.plugin:
            assert self.plugin.stop() == 0, self.plugin.log.read_text()[-3000:]

    def docker(self, *words: str, buildkit: bool = False) -> str:
        """What `docker` prints; it must succeed."""
        return self.machine.run("docker", *words, environment={"DOCKER_BUILDKIT": str(int(buildkit))}).strip()

    def output(self, *words: str) -> bytes:
        """As `docker`, not decoded."""
        return self.machine.bytes("docker", *words)

    def load(self, archive: bytes) -> None:
        """Load an archive of images."""
        self.machine.path("/data/load.tar").write_bytes(archive)
        self.docker("load", "--input=/data/load.tar")

    def refused(self, *words: str) -> str:
        """What `docker` says when it must fail."""
        with pytest.raises(Failed) as error:
            self.docker(*words)
        return str(error.value)

    def hpmapper(self, *words: str) -> str:
        """What a command of ours prints; it must succeed."""
        return self.machine.run(*_hpmapper(*words)).strip()


def _hpmapper(*words: str) -> list[str]:
    return ["python3", "-m", "hpmapper.cli.main", "--root", ROOT, *words]
