"""Docker with the containerd image store, on the containerd of a machine."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from hpmapper.testing.trees import Facts
from tests.clients.containerd import NAMESPACE, SOCKET, Containerd, root_of
from tests.clients.machine import Daemon

DATA = "/data/docker"

MOBY = "moby"
"""dockerd's namespace in containerd."""


class Docker:
    """dockerd with a snapshotter of a containerd that is at work and no bridge."""

    def __init__(self, containerd: Containerd) -> None:
        self.containerd = containerd
        self.machine = containerd.machine

    def start(self) -> Daemon:
        self.machine.path("/data/daemon.json").write_text(json.dumps(self._config()))
        self.daemon = self.machine.start("dockerd", "dockerd", "--config-file=/data/daemon.json")
        self.machine.wait(self.daemon, lambda: self("version"))
        return self.daemon

    def _config(self) -> dict[str, object]:
        return {
            "features": {"containerd-snapshotter": True},
            "storage-driver": self.containerd.setup.name,
            "containerd": SOCKET,
            "data-root": DATA,
            "iptables": False,
            "ip6tables": False,
            "bridge": "none",
            "cgroup-parent": NAMESPACE,
        }

    def stop(self) -> None:
        assert self.daemon.stop() == 0, self.daemon.log.read_text()

    def __call__(self, *words: str, stdin: Path | None = None, buildkit: bool = False) -> str:
        environment = {"DOCKER_BUILDKIT": "1" if buildkit else "0"}
        if stdin is None:
            return self.machine.run("docker", *words, environment=environment)
        with stdin.open("rb") as file:
            return self.machine.run("docker", *words, stdin=file, environment=environment)

    def load(self, layout: Path) -> str:
        """Load an OCI layout; returns its image's reference."""
        archive = layout.with_suffix(".tar")
        subprocess.run(["tar", "-C", str(layout), "-cf", str(archive), "."], check=True)
        return self("load", "--quiet", stdin=archive).rpartition("Loaded image: ")[2].strip()

    def root(self, container: str) -> dict[bytes, Facts]:
        """The root as a running container sees it, without what is mounted on it."""
        return root_of(self.machine, int(self("inspect", "--format", "{{.State.Pid}}", container)))
