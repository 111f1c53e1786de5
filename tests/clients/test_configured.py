"""The whole way of an operator: hpmapper served, containerd and Docker configured by us, started, and used."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients import trees
from tests.clients.machine import Daemon, Failed, Machine
from tests.clients.setups import control_groups
from tests.clients.test_docker_plugin_real import archive

pytestmark = [pytest.mark.kernel, pytest.mark.clients]

PLUGIN = "/run/docker/plugins/hpmapper.sock"
SERVED = "/run/hpmapper/hpmapper.sock"
PLUGIN_WAY = "bookworm"
"""The release whose Docker has no containerd image store yet."""

IMAGE = "localhost/demo:latest"


class Node:
    """A machine whose operator uses the usual places for everything but hpmapper's root."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def hpmapper(self, *words: str) -> str:
        return self.machine.run(*_hpmapper(*words))

    def applied(self, program: str) -> dict[str, Any]:
        """Configure a program: something is missing before, nothing afterwards."""
        with pytest.raises(Failed, match="status 5"):
            self.hpmapper("config", program, "--check")
        facts: dict[str, Any] = json.loads(self.hpmapper("config", program, "--apply", "--json"))
        assert "everything is set" in self.hpmapper("config", program, "--check")
        return facts

    def start(self, name: str, *words: str, ready: str) -> Daemon:
        """Start a program that goes on, and wait until somebody answers at a socket."""
        daemon = self.machine.start(name, *words)
        self.machine.wait(daemon, lambda: self.machine.answers(ready))
        return daemon

    def ctr(self, *words: str) -> str:
        return self.machine.run("ctr", "--namespace=hpmapper-tests", *words)


def _hpmapper(*words: str) -> list[str]:
    return ["python3", "-m", "hpmapper.cli.main", "--root=/data/root", "--storage-opt=pool.kind=directory", *words]


@pytest.fixture(params=["bookworm", "trixie", "sid"])
def node(request: pytest.FixtureRequest, pool: Path, demo: Path) -> Iterator[Node]:
    data = pool / f"configured-{request.param}"
    data.mkdir()
    subprocess.run(["tar", "-C", str(demo), "-cf", str(data / "demo.tar"), "."], check=True)
    tree = trees.made(request.param)
    with control_groups(), Machine(tree, data, trees.python_packages(tree)) as machine:
        node = Node(machine)
        plugin = ["--docker-plugin", PLUGIN] if request.param == PLUGIN_WAY else []
        daemon = node.start("hpmapper", *_hpmapper("serve", *plugin), ready=SERVED)
        yield node
        assert daemon.stop() == 0, daemon.log.read_text()[-3000:]


def test_containerd_and_docker_as_configured(node: Node, request: pytest.FixtureRequest) -> None:
    release = request.node.callspec.params["node"]
    file = node.machine.path("/etc/containerd/config.toml")
    # Its usual place is an overlay here, on which overlayfs cannot work.
    file.write_text(f'root = "/data/containerd"\n{file.read_text()}')
    before = file.read_text()
    facts = node.applied("containerd")
    assert Path(node.machine.path(facts["backup"])).read_text() == before
    containerd = node.start("containerd", "containerd", ready="/run/containerd/containerd.sock")
    assert not [row for row in _plugins(node) if _is_ours(row) and not row.endswith(" ok")]

    node.ctr("images", "import", "--snapshotter=hpmapper", "/data/demo.tar")
    if release != PLUGIN_WAY:  # with the differ layers become objects at once
        assert json.loads(node.hpmapper("info", "--json"))["objects"]
    run = ["run", "--rm", "--net-host"]
    assert "bin" in node.ctr(*run, "--snapshotter=hpmapper", IMAGE, "one", "/bin/ls", "/")
    # What others use works as before.
    node.ctr("images", "import", "--snapshotter=overlayfs", "/data/demo.tar")
    assert "bin" in node.ctr(*run, "--snapshotter=overlayfs", IMAGE, "two", "/bin/ls", "/")

    node.applied("docker")
    elsewhere = ["--data-root=/data/docker", "--bridge=none", "--iptables=false", "--ip6tables=false"]
    system = [] if release == PLUGIN_WAY else ["--containerd=/run/containerd/containerd.sock"]
    dockerd = node.start(
        "dockerd", "dockerd", *elsewhere, *system, "--cgroup-parent=hpmapper-tests", ready="/run/docker.sock"
    )
    assert node.machine.run("docker", "info", "--format={{.Driver}}").strip() == "hpmapper"
    node.machine.path("/data/docker.tar").write_bytes(archive())
    node.machine.run("docker", "load", "--input=/data/docker.tar")
    assert "bin" in node.machine.run("docker", "run", "--rm", "--network=none", "base", "/bin/ls", "/")
    assert dockerd.stop() == 0
    assert containerd.stop() == 0


def _plugins(node: Node) -> list[str]:
    return [" ".join(line.split()) for line in node.ctr("plugins", "ls").splitlines()]


def _is_ours(row: str) -> bool:
    """Whether a plugin is one that the configuration is about."""
    names = ("hpmapper", "diff-service", "io.containerd.transfer", "io.containerd.cri.v1 images", "grpc.v1 cri")
    return any(name in row for name in names)
