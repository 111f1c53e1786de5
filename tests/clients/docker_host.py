"""Debian 12's Docker with hpmapper as its graph driver plugin, in mounts, processes and a network of their own.

    with DockerHost(programs(), directory, "overlay") as host:
        host.start()
        host.docker("run", "--rm", "image", "true")

The host's own file system is seen as it is, but /run/docker is empty, and everything that runs ends with the `with`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from hpmapper.kernel import loop
from tests.conftest import loops_over

SOURCES = Path(__file__).parents[2] / "src"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hpmapper-tests" / "docker20"
PACKAGES = ("docker.io", "containerd", "tini")
CGROUP = "hpmapper-plugin-tests"
SECONDS = 60.0

_BEGIN = """
mount -t proc proc /proc
mkdir -p /run/docker
mount -t tmpfs -o mode=755 run /run/docker
ip link set lo up
echo ready
trap : TERM
sleep infinity & wait $!
"""


def programs() -> Path:
    """The directory with Docker 20.10's programs, unpacked from Debian's packages; skips where there are none.

    HPMAPPER_DOCKER20 names another directory that has usr/sbin/dockerd.
    """
    given = os.environ.get("HPMAPPER_DOCKER20")
    if given:
        return Path(given)
    if not (CACHE / "usr/sbin/dockerd").exists():
        _unpack(CACHE)
    return CACHE


def _unpack(target: Path) -> None:
    """Download Debian's packages, which must be those of Debian 12, and unpack them."""
    if not shutil.which("apt-get"):
        pytest.skip("NOT RUN: no apt-get here to download Docker 20.10 with; see HPMAPPER_DOCKER20")
    offered = subprocess.run(["apt-cache", "policy", "docker.io"], capture_output=True, text=True, check=True).stdout
    if "Candidate: 20.10" not in offered:
        pytest.skip("NOT RUN: the package docker.io is not Debian 12's Docker 20.10 here; see HPMAPPER_DOCKER20")
    new = target.with_suffix(".new")
    shutil.rmtree(new, ignore_errors=True)
    (new / "deb").mkdir(parents=True)
    subprocess.run(["apt-get", "download", "-qq", *PACKAGES], cwd=new / "deb", check=True, stderr=subprocess.DEVNULL)
    for package in (new / "deb").iterdir():
        subprocess.run(["dpkg-deb", "-x", package, new], check=True)
    shutil.rmtree(new / "deb")
    new.rename(target)


class DockerHost:
    """See the module's text.

    Args:
        driver: of hpmapper behind the plugin; None: Docker's own overlay2, to compare with.
    """

    def __init__(self, programs: Path, data: Path, driver: str | None) -> None:
        self.data = data
        self.driver = driver
        self._programs = programs
        self._inside: list[str] = []
        self._running: list[subprocess.Popen[bytes]] = []
        self.plugin: subprocess.Popen[bytes] | None = None
        self.dockerd: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.data.mkdir()
        kinds = ["--mount", "--net", "--pid", "--fork", "--kill-child", "--propagation=private"]
        self._holder = subprocess.Popen(["unshare", *kinds, "sh", "-ec", _BEGIN], stdout=subprocess.PIPE, text=True)
        assert self._holder.stdout
        assert self._holder.stdout.readline() == "ready\n"
        pid = self._holder.pid
        self._first = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]
        self._inside = ["nsenter", f"--target={self._first}", "--mount", "--net", "--pid", "--"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._holder:
            self._holder.kill()  # with its first process the kernel ends all others, and their mounts
        for process in self._running:
            process.wait(SECONDS)
        deadline = time.monotonic() + SECONDS
        while Path(f"/proc/{self._first}").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        for device in loops_over(self.data):  # a pool's: without a mount it is of no use
            loop.detach(device)
        for controller in Path("/sys/fs/cgroup").iterdir():
            _remove_cgroups(controller / CGROUP)

    def start(self) -> None:
        """Start the plugin and dockerd; come back when both answer."""
        if self.driver:
            self.start_plugin()
        self.start_docker()

    def start_docker(self) -> None:
        """Start dockerd, perhaps again."""
        config = self.data / "daemon.json"
        config.write_text(json.dumps(self._config()))
        self.dockerd = self._start("dockerd", "dockerd", f"--config-file={config}")
        self._wait(self.dockerd, lambda: self._run("docker", "version").returncode == 0)

    def start_plugin(self) -> None:
        """Start hpmapper, perhaps again."""
        words = ["--root", self.root, "--storage-driver", str(self.driver), "--storage-opt", "pool.size=600M"]
        sockets = ["--address", f"{self.data}/s.sock", "--docker-plugin", "/run/docker/plugins/hpmapper.sock"]
        command = [sys.executable, "-m", "hpmapper.cli.main", *words, "--storage-opt", "min_free_space=0", "serve"]
        self.plugin = self._start("plugin", *command, *sockets)
        listening = ["sh", "-c", "grep -q /run/docker/plugins/hpmapper.sock /proc/net/unix"]
        self._wait(self.plugin, lambda: self._run(*listening).returncode == 0)

    def kill_plugin(self) -> None:
        """End hpmapper as a crash does."""
        assert self.plugin
        self._signal(self.plugin, signal.SIGKILL)

    def stop(self) -> None:
        """End both as an operator does; each must end well."""
        for process in (self.dockerd, self.plugin):
            if process and process.poll() is None:
                assert self._signal(process, signal.SIGTERM) == 0, self.logs()

    def stop_docker(self) -> None:
        """End dockerd alone."""
        assert self.dockerd
        assert self._signal(self.dockerd, signal.SIGTERM) == 0, self.logs()

    def docker(self, *words: str, buildkit: bool = False, data: bytes | None = None) -> str:
        """What `docker` prints; it must succeed."""
        done = self._run("docker", *words, buildkit=buildkit, data=data)
        assert done.returncode == 0, f"{words}: {done.stderr.decode()}\n{self.logs()}"
        return done.stdout.decode().strip()

    def docker_bytes(self, *words: str) -> bytes:
        """As `docker`, not decoded."""
        done = self._run("docker", *words)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    def hpmapper(self, *words: str) -> str:
        """What a command of ours prints; it must succeed."""
        done = self._run(sys.executable, "-m", "hpmapper.cli.main", "--root", self.root, *words)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode().strip()

    def refused(self, *words: str) -> str:
        """What `docker` says when it must fail."""
        done = self._run("docker", *words)
        assert done.returncode != 0
        return done.stderr.decode()

    def logs(self) -> str:
        """The ends of what the daemons said."""
        return "\n".join(f"{log.name}: {log.read_text()[-3000:]}" for log in sorted(self.data.glob("*.log")))

    @property
    def root(self) -> str:
        """hpmapper's root directory."""
        return f"{self.data}/root"

    def _config(self) -> dict[str, object]:
        return {
            "experimental": True,
            "storage-driver": "hpmapper" if self.driver else "overlay2",
            "data-root": f"{self.data}/data",
            "exec-root": "/run/docker/exec",
            "pidfile": "/run/docker/pid",
            "hosts": ["unix:///run/docker/docker.sock"],
            "iptables": False,
            "ip6tables": False,
            "bridge": "none",
            "userland-proxy": False,
            "live-restore": True,
            "cgroup-parent": CGROUP,
        }

    def _environment(self, buildkit: bool = False) -> dict[str, str]:
        path = f"{self._programs}/usr/bin:{self._programs}/usr/sbin:{os.environ['PATH']}"
        own = {"PATH": path, "PYTHONPATH": str(SOURCES), "DOCKER_HOST": "unix:///run/docker/docker.sock"}
        return os.environ | own | {"DOCKER_BUILDKIT": str(int(buildkit)), "DOCKER_CONFIG": str(self.data)}

    def _run(
        self, *words: str, buildkit: bool = False, data: bytes | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [*self._inside, *words], env=self._environment(buildkit), capture_output=True, input=data, check=False
        )

    def _start(self, name: str, *words: str) -> subprocess.Popen[bytes]:
        with (self.data / f"{name}.log").open("ab") as log:
            process = subprocess.Popen([*self._inside, *words], env=self._environment(), stdout=log, stderr=log)
        self._running.append(process)
        return process

    def _signal(self, process: subprocess.Popen[bytes], number: int) -> int:
        child = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0]  # nsenter's
        os.kill(int(child), number)
        return process.wait(SECONDS)

    def _wait(self, process: subprocess.Popen[bytes], ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not ready():
            assert process.poll() is None, self.logs()
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.05)


def _remove_cgroups(top: Path) -> None:
    """Remove control groups that hold no process any more."""
    if not top.is_dir():
        return
    for path in sorted(top.rglob("*"), reverse=True):
        if path.is_dir():
            path.rmdir()
    top.rmdir()
