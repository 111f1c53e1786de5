"""What people use today, through their own clients: containerd with its snapshotters, and containers-storage.

containerd runs out of a tree of Debian sid, whose containerd has the erofs snapshotter; each side has one of its own,
with root, state and socket on the side's file system. The tree is seen through an overlay, so that it stays as it is.
Docker is in `dockerpeer`; composefs and stargz-snapshotter are listed with the reason why they are not measured.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from hpmapper.bench import dockerpeer, gobuild
from hpmapper.bench.ground import Ground
from hpmapper.bench.harness import Cost, NotHere, Side
from hpmapper.bench.images import debootstrap, run
from hpmapper.bench.sides import spent
from hpmapper.engine import chain_id
from hpmapper.errors import HpmapperError, Unsupported
from hpmapper.kernel import mount
from hpmapper.pool.tools import run_tool

PACKAGES = ("containerd", "runc", "erofs-utils", "isal", "ca-certificates")
"""isal brings igzip, with which containerd 2.1 decompresses when it finds it."""

START_SECONDS = 30.0

# Paths as containerd sees them; short ones, since a socket's may have 108 bytes.
_SOCKET = "/run/containerd.sock"
_ROOT = "/srv/containerd"
_MOUNTS = "/srv/mounts"
_NAMESPACE = "bench"
_CONFIG = """\
version = 3
root = "/srv/containerd"
state = "/run/containerd"
disabled_plugins = [
  "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri",
  "io.containerd.nri.v1.nri", "io.containerd.snapshotter.v1.blockfile", "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs",
]
[grpc]
  address = "/run/containerd.sock"
[ttrpc]
  address = "/run/containerd.ttrpc.sock"
[plugins."io.containerd.service.v1.diff-service"]
  default = ["erofs", "walking"]
[plugins."io.containerd.snapshotter.v1.overlayfs"]
  sync_remove = true
"""


def _place() -> Path:
    return gobuild.cache() / "trees" / "peers"


def tree() -> Path:
    """The tree that containerd runs from, made on first use."""
    directory = _place()
    if not (directory / "usr/bin/containerd").exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        stale = ("--aptopt=Acquire::Check-Valid-Until false", "--aptopt=Acquire::Check-Date false")
        debootstrap(directory, "sid", PACKAGES, stale)
    return directory


# --------------------------------------------------------------------------------------------------- containerd


@contextmanager
def _inside(system: Path, place: Path, home: Path) -> Iterator[Path]:
    """The tree with the host's processes and devices, `home` at /srv, and what is written elsewhere in memory."""
    place.mkdir()
    mount.filesystem("tmpfs", "peer", place)
    try:
        for name in ("upper", "work", "root"):
            (place / name).mkdir()
        root = place / "root"
        mount.overlay(root, lowers=[system], upper=place / "upper", work=place / "work")
        for name in ("proc", "sys", "dev"):
            mount.bind(f"/{name}", root / name, recursive=True)
        mount.filesystem("tmpfs", "run", root / "run")
        mount.bind(home, root / "srv")
        yield root
    finally:
        for one in mount.mounts_below(place):
            mount.umount(one.target, lazy=True)
        place.rmdir()


class Containerd:
    """A containerd of a side's own, asked with ctr."""

    def __init__(self, root: Path, log: Path) -> None:
        self._root = root
        self._log = log
        (root / "etc/bench.toml").write_text(_CONFIG)
        with log.open("wb") as out:
            command = ["chroot", str(root), "containerd", "--config", "/etc/bench.toml", "--log-level", "info"]
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=_environment()
            )

    @property
    def pid(self) -> int:
        """Its process, as chroot has become containerd."""
        return self._process.pid

    def wait(self) -> None:
        """Wait until it answers.

        Raises:
            Unsupported: it does not.
        """
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self.ctr("version")
                return
            except HpmapperError as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    last = self._log.read_text(errors="replace").strip().splitlines()[-1:]
                    raise Unsupported(f"containerd did not start: {' '.join(last)}") from error
            time.sleep(0.1)

    def command(self, *words: str) -> list[str]:
        """The command line of ctr."""
        return ["chroot", str(self._root), "ctr", f"--address={_SOCKET}", f"--namespace={_NAMESPACE}", *words]

    def ctr(self, *words: str) -> str:
        """What ctr answers."""
        return run_tool(self.command(*words)).stdout

    def shell(self, script: str) -> None:
        """Run a script where containerd runs."""
        run_tool(["chroot", self._root, "/bin/sh", "-ec", script])

    def outside(self, inside: str) -> Path:
        """Where a path of containerd's is here."""
        return self._root / inside.lstrip("/")

    def cpu(self) -> float:
        """Seconds of CPU, of it and of its children that have ended."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")

    def forget_peak(self) -> None:
        """Count the memory's peak from now on (proc_pid_clear_refs(5))."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def peak(self) -> float:
        """MiB of memory at its peak."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024

    def stop(self) -> None:
        """End it."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}


class ContainerdSide:
    """One of containerd's snapshotters."""

    kind = "peer"

    def __init__(self, name: str, snapshotter: str, containerd: Containerd, home: Path, about: str) -> None:
        self.name = name
        self.home = home
        self.about = about
        self._snapshotter = snapshotter
        self._containerd = containerd
        self._chains: dict[str, list[str]] = {}
        self._references: dict[str, str] = {}
        containerd.shell(f"mkdir -p {_MOUNTS}")

    def bring(self, layout: Path, image: str) -> None:
        self.ingest(layout, image)

    def ingest(self, layout: Path, image: str) -> Cost:
        reference = f"localhost/{image}:latest"
        digest = self._import(layout, reference)
        for blob in self._containerd.outside(f"{_ROOT}/io.containerd.content.v1.content/blobs/sha256").iterdir():
            with suppress(FileNotFoundError):  # containerd is removing those of the case before
                blob.read_bytes()
        os.sync()
        self._containerd.forget_peak()
        before = self._containerd.cpu()
        cost = spent(self._containerd.command("snapshots", "unpack", "--snapshotter", self._snapshotter, digest))
        self._references[image], self._chains[image] = reference, _chain(layout)
        return Cost(cost.wall, cost.cpu + self._containerd.cpu() - before, self._containerd.peak())

    def _import(self, layout: Path, reference: str) -> str:
        """Put the blobs into the content store, and unpack nothing; returns the manifest's digest."""
        words = ["images", "import", "--no-unpack", f"--index-name={reference}", "-"]
        with subprocess.Popen(["tar", "-C", str(layout), "-cf", "-", "."], stdout=subprocess.PIPE) as archive:
            command = self._containerd.command(*words)
            done = subprocess.run(command, stdin=archive.stdout, capture_output=True, text=True, env=_environment())
        if done.returncode:
            raise Unsupported(f"containerd cannot import {layout}: {done.stderr.strip()}")
        return str(json.loads((layout / "index.json").read_bytes())["manifests"][0]["digest"])

    def _ctr(self, *words: str) -> str:
        return self._containerd.ctr("snapshots", "--snapshotter", self._snapshotter, *words)

    def prepare(self, container: str, image: str) -> None:
        self._ctr("prepare", container, self._chains[image][-1])

    def mount(self, container: str) -> Path:
        target = f"{_MOUNTS}/{container}"
        outside = self._containerd.outside(target)
        outside.mkdir()
        command = self._ctr("mounts", target, container)
        words = shlex.split(command)
        if words[:3] == ["mount", "-t", "overlay"]:
            self._overlay(outside, words[-1])  # mount(8) takes no more than 255 characters of layers, containerd does
        else:
            self._containerd.shell(command)
        return outside

    def _overlay(self, target: Path, text: str) -> None:
        """Mount what containerd tells of an overlay."""
        options = dict(option.partition("=")[::2] for option in text.split(","))
        upper, work = (self._containerd.outside(options.pop(name)) for name in ("upperdir", "workdir"))
        lowers = [self._containerd.outside(one) for one in options.pop("lowerdir").split(":")]
        rest = {name: value or None for name, value in options.items()}
        mount.overlay(target, lowers=lowers, upper=upper, work=work, options=rest)

    def commit(self, container: str, image: str) -> None:
        raise NotHere("containerd's client makes a layer, but no image, of a container's changes")

    def changed(self, container: str) -> int:
        raise NotHere("containerd's client does not tell changes")

    def usage(self, container: str) -> int:
        return int(self._ctr("usage", "-b", container).splitlines()[1].split()[1])

    def remove(self, container: str) -> None:
        target = self._containerd.outside(f"{_MOUNTS}/{container}")
        for one in mount.mounts_below(target):
            mount.umount(one.target)
        self._ctr("rm", container)
        target.rmdir()

    def forget(self, image: str) -> None:
        self._containerd.ctr("images", "rm", "--sync", *self._names(self._references.pop(image)))
        for key in reversed(self._chains.pop(image)):  # what `ctr snapshots unpack` has made stays until then
            try:
                self._ctr("rm", key)
            except HpmapperError:
                return  # another image stands on it

    def _names(self, reference: str) -> list[str]:
        """Every name that importing gave to what the reference names."""
        rows = [row.split() for row in self._containerd.ctr("images", "ls").splitlines()[1:]]
        digests = {row[0]: row[2] for row in rows}
        return [name for name, digest in digests.items() if digest == digests[reference] or name == reference]


def _chain(layout: Path) -> list[str]:
    """The chain IDs of a layout's image, lowest first: the names of its snapshots."""
    blobs = layout / "blobs/sha256"

    def document(digest: str) -> Any:
        return json.loads((blobs / digest.partition(":")[2]).read_bytes())

    manifest = document(json.loads((layout / "index.json").read_bytes())["manifests"][0]["digest"])
    keys: list[str] = []
    for diff_id in document(manifest["config"]["digest"])["rootfs"]["diff_ids"]:
        keys.append(chain_id(keys[-1] if keys else None, diff_id))
    return keys


@contextmanager
def _containerd(ground: Ground, name: str, file_system: str, snapshotter: str) -> Iterator[Side]:
    system = tree()
    with (
        ground.file_system(file_system, name) as home,
        _inside(system, ground.work / f"{name}-root", home) as root,
    ):
        containerd = Containerd(root, ground.work / f"{name}.log")
        try:
            containerd.wait()
            version = run(["dpkg-query", f"--admindir={system}/var/lib/dpkg", "--show", PACKAGES[0]]).split()[1]
            about = f"containerd {version}, {snapshotter} snapshotter, on {file_system}"
            yield ContainerdSide(name, snapshotter, containerd, home, about)
        finally:
            containerd.stop()


# ------------------------------------------------------------------------------------------ containers-storage


class StorageSide:
    """containers-storage, which podman, buildah and CRI-O keep their containers with, asked with its own client."""

    kind = "peer"

    def __init__(self, name: str, home: Path, options: Sequence[str], about: str) -> None:
        self.name = name
        self.home = home
        self.about = about
        self._graph, self._run = home / "graph", home / "run"
        self._options = list(options)

    def _storage(self, *words: str) -> str:
        places = ["--graph", str(self._graph), "--run", str(self._run), "--storage-driver", "overlay"]
        options = [word for option in self._options for word in ("--storage-opt", option)]
        return run_tool(["containers-storage", *places, *options, *words]).stdout

    def bring(self, layout: Path, image: str) -> None:
        self.ingest(layout, image)

    def ingest(self, layout: Path, image: str) -> Cost:
        options = "".join(f",{option}" for option in self._options)
        place = f"[overlay@{self._graph}+{self._run}{':' if options else ''}{options[1:]}]localhost/{image}:latest"
        command = ["skopeo", "--insecure-policy", "copy", "-q", f"oci:{layout}:latest", f"containers-storage:{place}"]
        return spent(command)

    def prepare(self, container: str, image: str) -> None:
        self._storage("create-container", "--name", container, f"localhost/{image}:latest")

    def mount(self, container: str) -> Path:
        return Path(self._storage("mount", container).strip().splitlines()[-1])

    def commit(self, container: str, image: str) -> None:
        raise NotHere("its client makes a layer, but no image, of a container's changes")

    def changed(self, container: str) -> int:
        return len(self._storage("changes", self._layer(container)).splitlines())

    def usage(self, container: str) -> int:
        return int(re.findall(r"\d+", self._storage("diffsize", self._layer(container)))[-1])

    def _layer(self, container: str) -> str:
        (found,) = json.loads(self._storage("container", "--json", container))
        return str(found["layer"])

    def remove(self, container: str) -> None:
        self._storage("unmount", container)
        self._storage("delete-container", container)

    def forget(self, image: str) -> None:
        self._storage("delete-image", f"localhost/{image}:latest")


@contextmanager
def _storage(ground: Ground, name: str, options: Sequence[str]) -> Iterator[Side]:
    with ground.file_system("xfs", name) as home:
        version = run(["dpkg-query", "--show", "containers-storage"]).split()[1] if shutil.which("dpkg-query") else ""
        what = f"containers-storage {version}, overlay driver" + (f" with {options[0]}" if options else "") + ", on xfs"
        side = StorageSide(name, home, options, what)
        try:
            yield side
        finally:
            for one in mount.mounts_below(home):
                if one.target != str(home):
                    mount.umount(one.target, lazy=True)


# --------------------------------------------------------------------------------------------------- all of them


@dataclass(frozen=True)
class Peer:
    """A peer by name. why_not: says why it cannot run here, or nothing; open: opens it on a ground."""

    name: str
    why_not: Callable[[], str]
    open: Callable[[Ground], AbstractContextManager[Side]]


def _needs(*programs: str, remark: str = "") -> Callable[[], str]:
    def why_not() -> str:
        missing = [name for name in programs if shutil.which(name) is None]
        return f"{', '.join(missing)} not installed" + (f"; {remark}" if remark else "") if missing else ""

    return why_not


def _needs_tree(has: Callable[[], bool], program: str) -> Callable[[], str]:
    """Of a side that runs out of a Debian tree: it is there, or can be built."""
    needs = _needs("mmdebstrap", remark=f"it builds the Debian tree that {program} runs from")
    return lambda: "" if has() else needs()


def _never(ground: Ground) -> NoReturn:
    raise NotHere("it is installed, but this benchmark does not know its client")


_FUSE = ("overlay.mount_program=/usr/bin/fuse-overlayfs",)


def _snapshotter(kind: str, file_system: str) -> Peer:
    name = f"containerd-{kind}"
    opener = partial(_containerd, name=name, file_system=file_system, snapshotter=kind)
    return Peer(name, _needs_tree(lambda: _place().exists(), "containerd"), opener)


PEERS = (
    _snapshotter("overlayfs", "xfs"),
    _snapshotter("native", "xfs"),
    _snapshotter("btrfs", "btrfs"),
    _snapshotter("erofs", "xfs"),
    Peer(
        "containers-storage",
        _needs("containers-storage", "skopeo"),
        partial(_storage, name="containers-storage", options=()),
    ),
    Peer(
        "fuse-overlayfs",
        _needs("fuse-overlayfs", "containers-storage", "skopeo"),
        partial(_storage, name="fuse-overlayfs", options=_FUSE),
    ),
    Peer(dockerpeer.OVERLAY2, _needs_tree(dockerpeer.has_overlay2_tree, "Docker"), dockerpeer.overlay2),
    Peer(dockerpeer.DEVICEMAPPER, dockerpeer.why_no_devicemapper, dockerpeer.devicemapper),
    Peer("composefs", _needs("mkcomposefs", "mount.composefs"), _never),
    Peer("stargz", _needs("containerd-stargz-grpc"), _never),
)
"""Every peer that was thought of; those that cannot run say why."""
