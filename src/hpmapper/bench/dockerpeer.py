"""Docker as a side of the benchmark: today's with overlay2, and 20.10 with the devicemapper driver that HP-Mapper's
problems are those of.

The former runs out of a tree of Debian 13, which is made on first use; the latter out of one of Debian 12, which a
guest with device mapper has on a disk (`tests.vm.docker`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hpmapper.bench import gobuild
from hpmapper.bench.dockerd import Docker, archive
from hpmapper.bench.ground import Ground
from hpmapper.bench.harness import Cost, NotHere, Side
from hpmapper.bench.images import debootstrap, layer_blobs
from hpmapper.layer.stream import LayerStream

OVERLAY2, DEVICEMAPPER = "docker-overlay2", "docker-devicemapper"

_PACKAGES = ("docker.io", "containerd", "runc", "ca-certificates")
_DATA = "/srv/docker"


def has_overlay2_tree() -> bool:
    """Whether the tree that today's Docker runs from has been made."""
    return _dockerd(OVERLAY2).exists()


def why_no_devicemapper() -> str:
    """Why Docker's devicemapper cannot run here; empty if it can."""
    if _dockerd(DEVICEMAPPER).exists():
        return ""
    return "Docker 25 and later have no devicemapper driver; a guest has 20.10: see docs/benchmarks.md"


def _tree(name: str) -> Path:
    return gobuild.cache() / "trees" / {OVERLAY2: "docker", DEVICEMAPPER: "docker20"}[name]


def _dockerd(name: str) -> Path:
    return _tree(name) / "usr/sbin/dockerd"


class DockerSide:
    """Docker, asked over its API."""

    kind = "peer"

    def __init__(self, name: str, docker: Docker, home: Path, about: str) -> None:
        self.name = name
        self.home = home
        self.about = about
        self._docker = docker
        self._ids: dict[str, str] = {}
        self._mounted: dict[str, ExitStack] = {}

    def bring(self, layout: Path, image: str) -> None:
        self._docker.load(archive(f"{image}:latest", [_tar(blob) for blob in layer_blobs(layout)]))

    def ingest(self, layout: Path, image: str) -> Cost:
        raise NotHere("it is asked over its API: what its client would take is not measured")

    def prepare(self, container: str, image: str) -> None:
        self._ids[container] = self._docker.create(f"{image}:latest")

    def mount(self, container: str) -> Path:
        stack = self._mounted[container] = ExitStack()
        return stack.enter_context(self._docker.mounted(self._ids[container]))

    def commit(self, container: str, image: str) -> None:
        self._docker.call("POST", f"/commit?container={self._ids[container]}&repo={image}&pause=0")

    def changed(self, container: str) -> int:
        return len(self._docker.ask("GET", f"/containers/{self._ids[container]}/changes") or ())

    def usage(self, container: str) -> int:
        raise NotHere("it tells what containers occupy only by walking all of them")

    def remove(self, container: str) -> None:
        if container in self._mounted:
            self._mounted.pop(container).close()
        self._docker.remove(self._ids.pop(container))

    def forget(self, image: str) -> None:
        self._docker.call("DELETE", f"/images/{image}:latest?force=1")


def _tar(blob: Path) -> bytes:
    with blob.open("rb") as data, LayerStream(data) as stream:
        return b"".join(stream.finish())


@contextmanager
def overlay2(ground: Ground) -> Iterator[Side]:
    """Debian 13's Docker at work, on the file system that Docker recommends."""
    tree = _tree(OVERLAY2)
    if not has_overlay2_tree():
        tree.parent.mkdir(parents=True, exist_ok=True)
        debootstrap(tree, "trixie", _PACKAGES)
    with _opened(ground, OVERLAY2, "ext4", "overlay2") as side:
        yield side


@contextmanager
def devicemapper(ground: Ground) -> Iterator[Side]:
    """Docker 20.10 at work, with loop-lvm on the same file system as ours."""
    with _opened(ground, DEVICEMAPPER, "xfs", "devicemapper") as side:
        yield side


@contextmanager
def _opened(ground: Ground, name: str, file_system: str, driver: str) -> Iterator[Side]:
    with (
        ground.file_system(file_system, name) as home,
        Docker(_tree(name), driver=driver, data=_DATA, home=home) as docker,
    ):
        version = docker.ask("GET", "/version")["Version"]
        yield DockerSide(name, docker, home, f"Docker {version}, {driver} driver, on {file_system}")
