"""Our sides: the storage drivers, each on a fresh file system, and the bare file systems that they are measured by."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hpmapper.bench.ground import Ground
from hpmapper.bench.harness import Cost, NotHere, Side
from hpmapper.bench.images import layer_blobs, run
from hpmapper.bench.layout import silent_bring
from hpmapper.config import Config
from hpmapper.containers import Containers
from hpmapper.drivers import registry
from hpmapper.engine import Engine
from hpmapper.errors import InvalidArgument, Unsupported
from hpmapper.image.documents import ImportOptions
from hpmapper.images import Images
from hpmapper.kernel.probe import probe_all
from hpmapper.meta import snapshots
from hpmapper.meta.snapshots import Snapshot
from hpmapper.root import open_root


class Bare:
    """A file system as it is: an image is a directory, of which there is one container. What no driver can beat."""

    kind = "bare"

    def __init__(self, name: str, home: Path, about: str) -> None:
        self.name = name
        self.home = home
        self.about = about
        self._images: dict[str, str] = {}

    def bring(self, layout: Path, image: str) -> None:
        top = self.home / image
        top.mkdir()
        for blob in layer_blobs(layout):
            run(["tar", "-xpf", str(blob), "--numeric-owner", "--xattrs", "--xattrs-include=*", "-C", str(top)])

    def ingest(self, layout: Path, image: str) -> Cost:
        (self.home / image).mkdir()
        unpack = 'for blob; do tar -xpf "$blob" --numeric-owner --xattrs --xattrs-include="*" -C "$0"; done'
        return spent(["sh", "-ec", unpack, str(self.home / image), *map(str, layer_blobs(layout))])

    def prepare(self, container: str, image: str) -> None:
        self._images[container] = image

    def mount(self, container: str) -> Path:
        return self.home / self._images[container]

    def commit(self, container: str, image: str) -> None:
        raise NotHere("a file system makes no images")

    def changed(self, container: str) -> int:
        raise NotHere("a file system does not tell changes")

    def usage(self, container: str) -> int:
        raise NotHere("a file system has no containers")

    def remove(self, container: str) -> None:
        """The image's directory stays."""

    def forget(self, image: str) -> None:
        shutil.rmtree(self.home / image)


class DriverSide:
    """A storage driver of ours, called in this process as the command line calls it."""

    kind = "driver"

    def __init__(self, name: str, engine: Engine, config: Config, about: str, work: Path) -> None:
        self.name = name
        self.about = about
        self.engine = engine
        self.config = config
        self.home = engine.driver.scratch.parent
        self._images = Images(engine)
        self._containers = Containers(engine)
        self._work = work

    def bring(self, layout: Path, image: str) -> None:
        silent_bring(self.engine, layout, image, self._work)

    def ingest(self, layout: Path, image: str) -> Cost:
        # An installed command has its bytecode: without it every call would be half a second of compiling.
        command = ["env", "-u", "PYTHONDONTWRITEBYTECODE", sys.executable, "-m", "hpmapper.cli.main"]
        root = ["--root", str(self.config.root), "--storage-opt", "min_free_space=0"]
        return spent([*command, *root, "image", "import", f"oci:{layout}", image])

    def top(self, image: str) -> Snapshot:
        """The uppermost snapshot of an image."""
        number = self._images.find(image).top
        assert number is not None, "benchmarks' images have layers"
        return snapshots.by_id(self.engine.db, number)

    def prepare(self, container: str, image: str) -> None:
        self._containers.create(image, container)

    def mount(self, container: str) -> Path:
        return self._containers.mount(self._containers.get(container))

    def commit(self, container: str, image: str) -> None:
        self._containers.commit(self._containers.get(container), [image], ImportOptions())

    def changed(self, container: str) -> int:
        return sum(1 for _ in self._containers.changes(self._containers.get(container)))

    def usage(self, container: str) -> int:
        return self._containers.usage(self._containers.get(container)).size

    def remove(self, container: str) -> None:
        self._containers.remove(self._containers.get(container))

    def forget(self, image: str) -> None:
        self._images.remove(image)
        self.engine.rubbish.collect()


@dataclass(frozen=True)
class Local:
    """A side to be opened here: a file system, and the driver on it (None: the file system itself)."""

    name: str
    file_system: str
    driver: str | None

    @contextmanager
    def opened(self, ground: Ground) -> Iterator[Side]:
        """The side at work; all of it is gone at the end.

        Raises:
            NotHere: it does not work on this host.
        """
        with ground.file_system(self.file_system, self.name) as home:
            if self.driver is None:
                yield Bare(self.name, home, f"{self.file_system} without anything above it")
                return
            config = self._config(home / "root")
            with _root(config) as engine:
                yield DriverSide(self.name, engine, config, f"driver {self.driver} on {self.file_system}", ground.work)

    def _config(self, root: Path) -> Config:
        assert self.driver is not None
        config = Config(root=root, driver=self.driver).with_options(["min_free_space=0"])
        if registry.by_name(self.driver).needs_pool:
            config = config.with_options(["pool.kind=directory"])
        return config

    def verdict(self, directory: Path) -> str:
        """Why it cannot run on this host; empty if it can."""
        try:
            registered = registry.by_name(self.driver) if self.driver else None
        except InvalidArgument:
            return f"this hpmapper has no driver {self.driver}"
        if registered is None:
            return ""
        # Features of the kernel alone: what depends on the file system, which is not there yet, opening it tells.
        seen = {one.name: one for one in probe_all(directory, [name for group in registered.needs for name in group])}
        missing = [group for group in registered.needs if not any(seen[name].available for name in group)]
        return "; ".join(f"{seen[group[0]].name}: {seen[group[0]].detail}" for group in missing)


@contextmanager
def _root(config: Config) -> Iterator[Engine]:
    with open_root(config) as opened:
        try:
            yield opened.engine
        finally:
            opened.engine.detach()


# In a process of its own: a program's peak of memory counts from its parent's size, and ours is large.
_SPEND = """\
import json, os, resource, subprocess, sys, time
begin = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
wall, used = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([done.returncode, wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024]))
"""


def spent(command: Sequence[str]) -> Cost:
    """Run a program to its end, and tell what it took with all that it waited for.

    Raises:
        Unsupported: it failed; the message has its last words.
    """
    words = [sys.executable, "-S", "-c", _SPEND, *command]
    done = subprocess.run(words, capture_output=True, check=True)
    status, wall, cpu, memory = json.loads(done.stdout)
    if status:
        said = done.stderr.decode(errors="replace").strip()[-500:]
        raise Unsupported(f"{command[0]} failed with status {status}: {said}")
    return Cost(wall, cpu, memory)


LOCALS = (
    Local("bare-xfs", "xfs", None),
    Local("bare-ext4", "ext4", None),
    Local("hpmapper", "xfs", "hpmapper"),
    Local("overlay-xfs", "xfs", "overlay"),
    Local("overlay-ext4", "ext4", "overlay"),
    Local("btrfs", "btrfs", "btrfs"),
    Local("zfs", "zfs", "zfs"),
    Local("aufs", "ext4", "aufs"),
    Local("devicemapper", "xfs", "devicemapper"),
    Local("vfs", "ext4", "vfs"),
)
"""In the order in which they are shown. vfs is on a file system where copies are copies."""
