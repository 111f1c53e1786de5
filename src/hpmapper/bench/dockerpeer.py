"""Docker 20.10 with its devicemapper driver as a side of the benchmark: what the paper's ideas were measured against.

It runs out of a tree of Debian 12, which a guest with device mapper has on a disk (`tests.vm.docker`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hpmapper.bench import gobuild
from hpmapper.bench.docker20 import Docker, archive
from hpmapper.bench.ground import Ground
from hpmapper.bench.harness import Cost, NotHere, Side
from hpmapper.bench.images import layer_blobs
from hpmapper.layer.stream import LayerStream

NAME = "docker-devicemapper"

_DATA = "/srv/docker"


def why_not() -> str:
    """Why it cannot run here; empty if it can."""
    if (_tree() / "usr/sbin/dockerd").exists():
        return ""
    return "Docker 25 and later have no devicemapper driver; a guest has 20.10: see docs/benchmarks.md"


def _tree() -> Path:
    return gobuild.cache() / "trees" / "docker20"


class DockerSide:
    """Docker, asked over its API."""

    kind = "peer"

    def __init__(self, docker: Docker, home: Path, about: str) -> None:
        self.name = NAME
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
def opened(ground: Ground) -> Iterator[Side]:
    """The side at work, with loop-lvm on the same file system as ours."""
    with ground.file_system("xfs", NAME) as home, Docker(_tree(), data=_DATA, home=home) as docker:
        version = docker.ask("GET", "/version")["Version"]
        yield DockerSide(docker, home, f"Docker {version}, devicemapper driver, on xfs")
