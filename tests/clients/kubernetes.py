"""A Kubernetes node without a kubelet: containerd set up as kubeadm's manual says and then by `hpmapper config`.

Tests are the kubelet. The rest of a node is here: images in the registry on loopback, the pause image among them, and a
network plugin that brings up a loopback device and nothing else.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import tomlkit

from tests.clients import registry
from tests.clients.containerd import CONFIG, NAMESPACE, ROOT, SNAPSHOTTER_SOCKET, SOCKET, Containerd
from tests.clients.cri import Cri
from tests.clients.machine import Failed

KUBERNETES = "k8s.io"
"""The namespace of all that CRI makes."""

DEMO = f"{registry.ADDRESS}/demo:latest"
PAUSE = f"{registry.ADDRESS}/pause:latest"

STATS_SECONDS = 1
"""How often containerd asks the snapshotter what containers have written: ten times as often as it would by itself."""

_HPMAPPER = ("python3", "-m", "hpmapper.cli.main", f"--root={ROOT}", "--storage-opt=pool.kind=directory")

_LOGS = "/data/logs"

_NETWORK = '{"cniVersion": "0.4.0", "name": "none", "plugins": [{"type": "none"}]}'

_NETWORK_PLUGIN = """\
#!/bin/sh
case $CNI_COMMAND in
VERSION) echo '{"cniVersion": "0.4.0", "supportedVersions": ["0.3.1", "0.4.0"]}' ;;
ADD)
    nsenter --net="$CNI_NETNS" ip link set lo up
    device="{\\"name\\": \\"$CNI_IFNAME\\", \\"sandbox\\": \\"$CNI_NETNS\\"}"
    address='{"version": "4", "interface": 0, "address": "127.0.0.1/8"}'
    echo "{\\"cniVersion\\": \\"0.4.0\\", \\"interfaces\\": [$device], \\"ips\\": [$address]}" ;;
esac
"""

Settings = Mapping[str, object]


class Node(Containerd):
    """containerd with its CRI plugin, set up for hpmapper."""

    in_use = KUBERNETES
    cri: Cri

    def configure(self, *, discards: bool = False) -> None:
        """Write containerd's configuration; `discards`: it does not keep the layers that have been unpacked."""
        self._network()
        self._write(CONFIG, _operators(self.machine.run("containerd", "config", "default"), discards))
        differ = [] if self.setup.fast else ["--no-differ"]
        words = ["--file", CONFIG, "--address", SNAPSHOTTER_SOCKET, "--apply", *differ]
        self.machine.run(*_HPMAPPER, "config", "containerd", *words)

    def _network(self) -> None:
        for name in ("none", "loopback"):
            plugin = self.machine.path(f"/usr/lib/cni/{name}")
            plugin.parent.mkdir(exist_ok=True)
            plugin.write_text(_NETWORK_PLUGIN)
            plugin.chmod(0o755)
        folder = self.machine.path("/etc/cni/net.d")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "none.conflist").write_text(_NETWORK)

    def start_daemon(self) -> None:
        super().start_daemon()
        self.cri = Cri(self.machine.path("/"), self.machine.path(SOCKET))
        self.machine.wait(self.daemon, self.cri.answers)

    def restart_daemon(self) -> None:
        """Kill containerd and start it again."""
        self.cri.close()
        self.daemon.stop(signal.SIGKILL)
        self.start_daemon()

    def start_again(self) -> None:
        """Start what a test that failed has left ended."""
        assert self.server is not None
        if self.server.ended:
            self.start_server()
        if self.daemon.ended:
            self.start_daemon()

    def stop(self) -> None:
        self.cri.close()
        super().stop()

    # ------------------------------------------------------------------------------------------ as kubelet does

    def pull_image(self, reference: str) -> str:
        """Pull an image; its id."""
        pulled: str = self.cri("PullImage", image={"image": reference}).image_ref
        return pulled

    def run_pod(self, name: str, security: Settings | None = None) -> Pod:
        """Start a pod without containers; by default on the host's network."""
        context = {"namespace_options": {"network": "NODE"}} if security is None else security
        config = {
            "metadata": {"name": name, "uid": name, "namespace": "default"},
            "log_directory": f"{_LOGS}/{name}",
            "linux": {"cgroup_parent": f"/{NAMESPACE}", "security_context": context},
        }
        return Pod(self, self.cri("RunPodSandbox", config=config).pod_sandbox_id, config)

    @contextmanager
    def pod(self, name: str, security: Settings | None = None) -> Iterator[Pod]:
        """A pod, removed at the end with its containers."""
        pod = self.run_pod(name, security)
        try:
            yield pod
        finally:
            pod.remove()

    def remove_pods(self) -> None:
        for pod in self.cri("ListPodSandbox").items:
            Pod(self, pod.id, {}).remove()

    def remove_all_images(self) -> None:
        """What kubelet's garbage collection does with images nobody uses; the pause image, too, which it would keep."""
        for image in self.cri("ListImages").images:
            self.cri("RemoveImage", image={"image": image.id})


@dataclass(frozen=True)
class Pod:
    """A pod that runs. `config` is what it was made with."""

    node: Node
    id: str
    config: dict[str, Any]

    def create(self, name: str, image: str, security: Settings | None = None) -> str:
        """Make a container that sleeps; its id."""
        config = {
            "metadata": {"name": name},
            "image": {"image": image},
            "command": ["/bin/sleep", "100000"],
            "log_path": f"{name}.log",
            "linux": {"security_context": security or self.config["linux"]["security_context"]},
        }
        call = {"pod_sandbox_id": self.id, "config": config, "sandbox_config": self.config}
        container: str = self.node.cri("CreateContainer", **call).container_id
        return container

    def run(self, name: str, image: str, security: Settings | None = None) -> PodContainer:
        """Make and start a container that sleeps."""
        container = PodContainer(self.node, self.create(name, image, security))
        self.node.cri("StartContainer", container_id=container.id)
        return container

    def remove(self) -> None:
        """Stop and remove it, and its containers with it."""
        self.node.cri("StopPodSandbox", pod_sandbox_id=self.id)
        self.node.cri("RemovePodSandbox", pod_sandbox_id=self.id)


@dataclass(frozen=True)
class PodContainer:
    """A container of a pod."""

    node: Node
    id: str

    def execute(self, script: str) -> str:
        """Run a shell's script in it and return what it says; it must end with 0."""
        done = self.node.cri("ExecSync", container_id=self.id, cmd=["/bin/sh", "-c", script], timeout=60)
        assert done.exit_code == 0, f"{script}: status {done.exit_code}\n{(done.stdout + done.stderr).decode()}"
        return str(done.stdout.decode())

    def status(self) -> Any:
        return self.node.cri("ContainerStatus", container_id=self.id).status

    def wait_written(self, least: int, most: int) -> None:
        """Wait until kubelet would be told so many bytes."""
        try:
            self.node.machine.wait(self.node.daemon, lambda: least <= self.written()[0] <= most)
        except Failed:
            assert least <= self.written()[0] <= most

    def written(self) -> tuple[int, int]:
        """Bytes and inodes of the writable layer, as kubelet is told them; zeros when that is not known yet."""
        layer = self.node.cri("ContainerStats", container_id=self.id).stats.writable_layer
        return layer.used_bytes.value, layer.inodes_used.value


def _operators(default: str, discards: bool) -> str:
    """containerd's own default configuration with what the operator of a node has in it."""
    content = tomlkit.parse(default)
    content["root"] = "/data/containerd"
    plugins: Any = content["plugins"]
    if content["version"] == 2:
        images = runtime = plugins["io.containerd.grpc.v1.cri"]
        images["sandbox_image"] = PAUSE
        images["containerd"]["discard_unpacked_layers"] = discards
    else:
        images = plugins["io.containerd.cri.v1.images"]
        images["discard_unpacked_layers"] = discards
        images["pinned_images"]["sandbox"] = PAUSE
        runtime = plugins["io.containerd.cri.v1.runtime"]
    images["stats_collect_period"] = STATS_SECONDS
    runtime["restrict_oom_score_adj"] = True  # hosts without CAP_SYS_RESOURCE, as those of CI, cannot protect pods
    return tomlkit.dumps(content)
