"""containerd in a machine, with the snapshotter under test as a proxy plugin and its own overlayfs to compare with."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hpmapper.bench.images import architecture
from hpmapper.testing.trees import Facts, read_tree
from tests.clients import registry
from tests.clients.machine import Daemon, Failed, Machine

NAMESPACE, ELSEWHERE = "hpmapper-tests", "hpmapper-elsewhere"
"""Two namespaces of containerd. They share nothing but blobs. Control groups are named by them."""

SOCKET = "/run/containerd/containerd.sock"
ROOT = "/data/snapshotter"
"""Where the snapshotter under test keeps its things, in the machine."""

CONFIG = "/data/containerd.toml"

SNAPSHOTTER_SOCKET = "/run/snapshotter.sock"

_CONFIG = """\
version = {version}
root = "/data/containerd"
state = "/run/containerd"
disabled_plugins = [{disabled}]
[grpc]
  address = "{socket}"
"""

_DISABLED = (
    "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime",
    "io.containerd.nri.v1.nri", "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.opt",
    "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.blockfile", "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
)  # fmt: skip

_PROXY = """\
[proxy_plugins.{name}]
  type = "snapshot"
  address = "{socket}"
"""

_PROXY_DIFFER = """\
[proxy_plugins.{name}]
  type = "diff"
  address = "{socket}"
"""

_DIFFER = """\
[plugins."io.containerd.service.v1.diff-service"]
  default = ["{name}", "walking"]
"""

_UNPACK = """\
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux/{architecture}"
  snapshotter = "{snapshotter}"
  differ = "{differ}"
"""


@dataclass(frozen=True)
class Setup:
    """What is tried.

    Attributes:
        name: of the snapshotter, as containerd is told it: a proxy, or one of containerd's own.
        command: starts the server of a proxy; {root} and {socket} in it stand for places.
        differ: what applies and makes layers. If it is not "walking", the server of a proxy does so (the fast path).
    """

    name: str
    command: str = ""
    differ: str = "walking"

    @property
    def fast(self) -> bool:
        """Whether the server of a proxy also applies and makes layers."""
        return bool(self.command) and self.differ != "walking"

    def __str__(self) -> str:
        return f"{self.name}-fast" if self.fast else self.name


def config(setup: Setup, version: int) -> str:
    """containerd's configuration for a setup; `version`: containerd's first number."""
    disabled = ", ".join(f'"{name}"' for name in _DISABLED)
    text = _CONFIG.format(version=3 if version > 1 else 2, disabled=disabled, socket=SOCKET)
    if setup.command:
        text += _PROXY.format(name=setup.name, socket=SNAPSHOTTER_SOCKET)
    if setup.fast:
        text += _PROXY_DIFFER.format(name=setup.differ, socket=SNAPSHOTTER_SOCKET)
    if setup.differ != "walking":
        text += _DIFFER.format(name=setup.differ)
    if version > 1:  # the transfer service unpacks for snapshotters that it is told of, and no others
        for snapshotter, with_differ in {"overlayfs": "walking", setup.name: setup.differ}.items():
            text += _UNPACK.format(architecture=architecture(), snapshotter=snapshotter, differ=with_differ)
    return text


class Containerd:
    """containerd, the snapshotter and a registry at work in a machine."""

    in_use = NAMESPACE
    """The namespace that tests have containers in."""

    def __init__(self, machine: Machine, setup: Setup) -> None:
        self.machine = machine
        self.setup = setup
        self.server: Daemon | None = None
        self.version = int(re.findall(r"(\d+)\.\d+\.\d+", machine.run("containerd", "--version"))[0])

    @property
    def tells_namespaces(self) -> bool:
        """Whether proxies are told callers' namespaces and leases: those of Debian 13, patched, keep them back."""
        return self.version > 1

    def start(self) -> None:
        self.start_server()
        self.configure()
        self.start_daemon()
        registry.start(self.machine)

    def configure(self) -> None:
        """Write containerd's configuration."""
        self._write(CONFIG, config(self.setup, self.version))

    def start_daemon(self) -> None:
        """Start containerd itself, and wait until it answers."""
        self.daemon = self.machine.start("containerd", "containerd", "--config", CONFIG)
        self.machine.wait(self.daemon, lambda: self.ctr("version"))

    def start_server(self) -> None:
        """Start the server of the snapshotter, if it is a proxy."""
        self.machine.path(ROOT).mkdir(mode=0o700, exist_ok=True)
        if not self.setup.command:
            return
        words = self.setup.command.format(root=ROOT, socket=SNAPSHOTTER_SOCKET).split()
        self.server = self.machine.start("server", *words)
        self.machine.wait(self.server, lambda: self.machine.answers(SNAPSHOTTER_SOCKET))

    def restart_server(self) -> None:
        """Start the server again, and wait until containerd, which tries less and less often, has found it."""
        self.start_server()
        words = ("snapshots", "--snapshotter", self.setup.name, "usage")
        self.machine.wait(self.daemon, lambda: self.ctr(*words, namespace=self.in_use))

    def kill_server(self) -> None:
        """End the server as power loss would, but for what the kernel keeps."""
        assert self.server is not None
        self.server.stop(signal.SIGKILL)

    def stop(self) -> None:
        """End containerd and then the server, which both must do so properly."""
        for one in filter(None, (self.daemon, self.server)):
            status = one.stop()
            assert status == 0, f"status {status}\n{one.log.read_text()}"

    def _write(self, inside: str, text: str) -> None:
        self.machine.path(inside).write_text(text)

    def ctr(self, *words: str, namespace: str = NAMESPACE, stdin: Path | None = None) -> str:
        return self.ctr_bytes(*words, namespace=namespace, stdin=stdin).decode()

    def ctr_bytes(self, *words: str, namespace: str = NAMESPACE, stdin: Path | None = None) -> bytes:
        line = ["ctr", f"--address={SOCKET}", f"--namespace={namespace}", *words]
        if stdin is None:
            return self.machine.bytes(*line)
        with stdin.open("rb") as file:
            return self.machine.bytes(*line, stdin=file)

    # ------------------------------------------------------------------------------------------------- images

    def push(self, layout: Path, name: str, namespace: str) -> str:
        """Push an OCI layout's image to the registry by way of `namespace`, and forget it; return its reference."""
        archive = layout.with_suffix(".tar")
        subprocess.run(["tar", "-C", str(layout), "-cf", str(archive), "."], check=True)
        self.ctr("images", "import", "--no-unpack", "-", namespace=namespace, stdin=archive)
        reference = f"{registry.ADDRESS}/{name}:latest"
        self.ctr("images", "tag", f"localhost/{name}:latest", reference, namespace=namespace)
        self.ctr("images", "push", "--plain-http", reference, namespace=namespace)
        self.remove_images(namespace)
        return reference

    def pull(self, reference: str, snapshotter: str, namespace: str = NAMESPACE) -> None:
        self.ctr("images", "pull", "--plain-http", "--snapshotter", snapshotter, reference, namespace=namespace)

    def images(self, namespace: str = NAMESPACE) -> list[str]:
        return self.ctr("images", "ls", "--quiet", namespace=namespace).split()

    def remove_images(self, namespace: str = NAMESPACE) -> None:
        """Remove all images, and wait until containerd has collected what only they had."""
        if names := self.images(namespace):
            self.ctr("images", "rm", "--sync", *names, namespace=namespace)

    def snapshots(self, snapshotter: str, namespace: str = NAMESPACE) -> list[str]:
        rows = self.ctr("snapshots", "--snapshotter", snapshotter, "ls", namespace=namespace).splitlines()[1:]
        return [row.split()[0] for row in rows if row.strip()]

    # --------------------------------------------------------------------------------------------- containers

    @contextmanager
    def container(self, reference: str, snapshotter: str, name: str, namespace: str = NAMESPACE) -> Iterator[Container]:
        """A container that sleeps, removed at the end."""
        words = ["run", "--detach", "--net-host", "--snapshotter", snapshotter]
        self.ctr(*words, reference, name, "/bin/sleep", "100000", namespace=namespace)
        try:
            yield Container(self, name, namespace)
        finally:
            self.ctr("task", "kill", "--signal", "SIGKILL", name, namespace=namespace)
            self._wait_stopped(name, namespace)
            self.ctr("task", "rm", name, namespace=namespace)
            self.ctr("containers", "rm", name, namespace=namespace)

    def remove_containers(self, namespace: str = NAMESPACE) -> None:
        """Remove what failed starts have left; none of them may run."""
        for row in self.ctr("task", "ls", namespace=namespace).splitlines()[1:]:
            self.ctr("task", "rm", "--force", row.split()[0], namespace=namespace)
        for name in self.ctr("containers", "ls", "--quiet", namespace=namespace).split():
            self.ctr("containers", "rm", name, namespace=namespace)

    def _wait_stopped(self, name: str, namespace: str) -> None:
        def stopped() -> bool:
            rows = self.ctr("task", "ls", namespace=namespace).splitlines()
            return any(row.split()[0] == name and row.split()[2] == "STOPPED" for row in rows)

        self.machine.wait(self.daemon, stopped)


@dataclass(frozen=True)
class Container:
    """A running container."""

    containerd: Containerd
    name: str
    namespace: str

    def execute(self, *words: str) -> str:
        line = ["task", "exec", "--exec-id", f"e{abs(hash(words))}", self.name, *words]
        return self.containerd.ctr(*line, namespace=self.namespace)

    def pid(self) -> int:
        for row in self.containerd.ctr("task", "ls", namespace=self.namespace).splitlines()[1:]:
            if row.split()[0] == self.name:
                return int(row.split()[1])
        raise Failed(f"no task {self.name}")

    def root(self) -> dict[bytes, Facts]:
        """The root as the container sees it, without what is mounted on it."""
        return root_of(self.containerd.machine, self.pid())


def root_of(machine: Machine, pid: int) -> dict[bytes, Facts]:
    """The root of a process of a machine, without what is mounted on it.

    A bind of a root has none of the mounts below it. It is made in the process's own mounts, below /dev/shm, which is
    the runtime's tmpfs and no part of the root.
    """
    enter = ["nsenter", f"--target={pid}", "--mount", "--root", "/bin/busybox"]
    machine.run(*enter, "mkdir", "/dev/shm/root")
    machine.run(*enter, "mount", "-o", "bind", "/", "/dev/shm/root")
    try:
        return read_tree(machine.path(f"/proc/{pid}/root/dev/shm/root"))
    finally:
        machine.run(*enter, "umount", "/dev/shm/root")
        machine.run(*enter, "rmdir", "/dev/shm/root")
