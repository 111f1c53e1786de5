"""The peers' side of the ingest benchmark: containerd's unpack of an image, timed alone.

A private containerd runs out of a Debian tree, in a mount namespace of its own, with its own root, state and
socket. The image's blobs are put into its content store first; what is timed is one `ctr snapshots unpack`, from
blobs to committed snapshots, starting each time from no snapshots and from blobs in the page cache.

    with loop_xfs(work / "xfs.img", work / "xfs", gib=16) as root, Containerd(chroot, work, root) as peer:
        peer.unpack(layout, "overlayfs")      # Run(wall=…, cpu=…, sync=…)

Every unpack has a containerd namespace of its own, so that nothing need be removed in between: for five minutes
after a file's removal ext4 steps around its inode (`recently_deleted` in fs/ext4/ialloc.c), one inode at a time,
and an overlayfs unpack after the removal of the last one was seen to take 8 to 14 s instead of 5. Hence also: on
ext4, leave five minutes between two measurements.

`python -m hpmapper.bench.peers --image LAYOUT --work DIR --chroot DIR` prints a table.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn, Self

from hpmapper.bench.images import CHUNK, debootstrap, layer_blobs, run
from hpmapper.errors import FailedPrecondition, HpmapperError, NotFound, Unsupported

SNAPSHOTTERS = ("overlayfs", "erofs")

PACKAGES = ("containerd", "runc", "erofs-utils", "isal", "ca-certificates")
"""isal brings igzip, with which containerd 2.1 decompresses when it finds it."""

HELPERS = ("igzip", "unpigz", "mkfs.erofs")
"""Programs that containerd may start while it unpacks."""

START_TIMEOUT = 30.0

# Inside the tree: the work directory is at /mnt, the file system under test at /srv, /run is a tmpfs. The short
# paths keep sockets within 108 bytes wherever the work directory is.
_ROOT = "hpmapper-bench-containerd"
_CONFIG = """\
version = 3
root = "/srv/{name}"
state = "/run/containerd"
disabled_plugins = [
  "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri",
  "io.containerd.nri.v1.nri", "io.containerd.snapshotter.v1.blockfile", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
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

_ENTER = """\
mount --rbind /proc {chroot}/proc && mount --rbind /sys {chroot}/sys && mount --rbind /dev {chroot}/dev &&
mount -t tmpfs -o mode=755 run {chroot}/run && mount -t tmpfs -o mode=1777 tmp {chroot}/tmp &&
mount --bind {work} {chroot}/mnt && mount --bind {root} {chroot}/srv &&
exec chroot {chroot} env {environment} containerd --config /mnt/containerd.toml --log-level info
"""


@dataclass(frozen=True)
class Run:
    """One unpack: seconds of wall time, of CPU time in user space and system calls, and of a syncfs after it."""

    wall: float
    cpu: float
    sync: float


# ------------------------------------------------------------------------------------------------- surroundings


def build_chroot(directory: Path) -> Path:
    """Make the tree that containerd runs from: Debian sid, whose containerd has the erofs snapshotter."""
    if not (directory / "usr/bin/containerd").exists():
        stale = ("--aptopt=Acquire::Check-Valid-Until false", "--aptopt=Acquire::Check-Date false")
        debootstrap(directory, "sid", PACKAGES, stale)
    return directory


@contextlib.contextmanager
def loop_xfs(image: Path, directory: Path, gib: int) -> Iterator[Path]:
    """A fresh XFS with reflink in a sparse file, mounted on `directory` through a loop device with direct I/O."""
    image.unlink(missing_ok=True)
    with image.open("wb") as file:
        file.truncate(gib << 30)
    directory.mkdir(parents=True, exist_ok=True)
    try:
        run(["mkfs.xfs", "-q", "-m", "reflink=1", str(image)], hint="apt install xfsprogs")
        device = run(["losetup", "--find", "--show", "--direct-io=on", str(image)]).strip()
        try:
            run(["mount", "-t", "xfs", device, str(directory)])
        finally:
            run(["losetup", "--detach", device])  # takes effect at the unmount
        try:
            yield directory
        finally:
            run(["umount", str(directory)])
    finally:
        image.unlink()


# --------------------------------------------------------------------------------------------------- containerd


class Containerd:
    """A private containerd, alive inside a `with`.

    `root` may be on any file system; what containerd keeps there goes with it. Without `igzip` it decompresses
    in its own process, as on a machine where nobody installed that program.
    """

    def __init__(self, chroot: Path, work: Path, root: Path, *, igzip: bool = True) -> None:
        if not (chroot / "usr/bin/containerd").exists():
            raise NotFound(f"no containerd in {chroot}", hint="build_chroot() makes such a tree")
        self.work = work.resolve()
        self.root = root.resolve()
        self.log = self.work / "containerd.log"
        self._chroot = chroot.resolve()
        self._environment = "" if igzip else "CONTAINERD_DISABLE_IGZIP=1"
        self._process: subprocess.Popen[bytes] | None = None
        self._data = self.root / _ROOT
        self._namespaces = itertools.count(1)

    def __enter__(self) -> Self:
        self.work.mkdir(parents=True, exist_ok=True)
        self.root.mkdir(parents=True, exist_ok=True)
        if self._data.exists():
            raise FailedPrecondition(f"{self._data} is there already", hint="left by a killed run? remove it")
        (self.work / "containerd.toml").write_text(_CONFIG.replace("{name}", self._data.name))
        places = {"chroot": self._chroot, "work": self.work, "root": self.root}
        quoted = {name: shlex.quote(str(path)) for name, path in places.items()}
        script = _ENTER.format_map(quoted | {"environment": self._environment})
        command = ["unshare", "--mount", "--propagation=private", "sh", "-ec", script]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End containerd, its mounts with it, and remove what it stored."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(15)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        shutil.rmtree(self._data, ignore_errors=True)

    @property
    def pid(self) -> int:
        if self._process is None:
            raise FailedPrecondition("containerd is not running")
        return self._process.pid

    def unpack(self, layout: Path, snapshotter: str) -> Run:
        """Unpack an OCI layout's image once, from no snapshots and warm blobs."""
        namespace = f"run{next(self._namespaces)}"
        digest = self._import(layout, namespace)
        self._warm()
        os.sync()
        command = self._client(namespace, "snapshots", "unpack", "--snapshotter", snapshotter, digest)
        daemon, start = _cpu_seconds(self.pid), time.perf_counter()
        client = _timed(command)
        wall, cpu = time.perf_counter() - start, _cpu_seconds(self.pid) - daemon + client
        self._check(layout, namespace, snapshotter)
        start = time.perf_counter()
        run(["sync", "--file-system", str(self.root)])
        return Run(wall, cpu, time.perf_counter() - start)

    def helpers(self, layout: Path, snapshotter: str) -> dict[str, str]:
        """The programs that containerd starts while it unpacks, with their command lines: an untimed run."""
        seen: dict[str, str] = {}
        done = threading.Event()
        watcher = threading.Thread(target=_watch, args=(self.pid, done, seen))
        watcher.start()
        try:
            self.unpack(layout, snapshotter)
        finally:
            done.set()
            watcher.join()
        return seen

    def versions(self) -> dict[str, str]:
        """Versions of what is measured, as Debian's package names them."""
        text = run(["dpkg-query", f"--admindir={self._chroot}/var/lib/dpkg", "--show", *PACKAGES[:4]])
        return dict(line.split("\t") for line in text.splitlines())

    def _client(self, namespace: str, *arguments: str) -> list[str]:
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--root", "--wd=/"]
        return [*enter, "ctr", "--address=/run/containerd.sock", f"--namespace={namespace}", *arguments]

    def _import(self, layout: Path, namespace: str) -> str:
        """Put the blobs into the content store, which holds each once; unpack nothing; return the image's digest."""
        client = self._client(namespace, "images", "import", "--no-unpack", "-")
        with subprocess.Popen(["tar", "-C", str(layout), "-cf", "-", "."], stdout=subprocess.PIPE) as archive:
            done = subprocess.run(client, stdin=archive.stdout, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unsupported(f"containerd cannot import {layout}: {done.stderr.strip()}")
        return str(json.loads((layout / "index.json").read_bytes())["manifests"][0]["digest"])

    def _wait(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            try:
                run(self._client("default", "version"))
                return
            except Unsupported as error:
                ended = self._process is None or self._process.poll() is not None
                if ended or time.monotonic() > deadline:
                    last = self.log.read_text(errors="replace").strip().splitlines()[-1:]
                    raise Unsupported(f"containerd did not start: {' '.join(last)}") from error
            time.sleep(0.1)

    def _check(self, layout: Path, namespace: str, snapshotter: str) -> None:
        """See that every layer became a snapshot of the snapshotter meant: ctr has a default for it."""
        rows = run(self._client(namespace, "snapshots", "--snapshotter", snapshotter, "ls")).splitlines()[1:]
        kinds = [row.split()[-1] for row in rows if row.strip()]
        if kinds != ["Committed"] * len(layer_blobs(layout)):
            raise Unsupported(f"containerd did not unpack {layout} with {snapshotter}, it has {kinds}")

    def _warm(self) -> None:
        for blob in (self._data / "io.containerd.content.v1.content/blobs").rglob("*"):
            if blob.is_file():
                with blob.open("rb") as file:
                    while file.read(CHUNK):
                        pass


# ---------------------------------------------------------------------------------------------------- measuring


def _cpu_seconds(pid: int) -> float:
    """CPU time of a process and of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _timed(command: Sequence[str]) -> float:
    """Run a program and return its CPU seconds."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    with process.stderr as stream:
        words = stream.read().strip()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise Unsupported(f"{shlex.join(command[5:])} failed: {words}")
    return usage.ru_utime + usage.ru_stime


def _watch(pid: int, done: threading.Event, seen: dict[str, str]) -> None:
    """Note helpers among a process's children until `done`."""
    while not done.wait(0.005):
        for child in _children(pid):
            with contextlib.suppress(OSError):  # gone already
                words = Path(f"/proc/{child}/cmdline").read_text().rstrip("\0").split("\0")
                name = Path(words[0]).name
                if name in HELPERS:
                    seen[name] = shlex.join(words)


def _children(pid: int) -> Iterator[str]:
    """Children of every thread of a process."""
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # threads come and go
            yield from task.read_text().split()


def measure(peer: Containerd, layout: Path, runs: int) -> dict[str, list[Run]]:
    """Unpack `runs` times with each snapshotter, taking turns so that the machine's moods hit all alike."""
    results: dict[str, list[Run]] = {name: [] for name in SNAPSHOTTERS}
    for _ in range(runs):
        for name, collected in results.items():
            collected.append(peer.unpack(layout, name))
    return results


def table(results: Mapping[str, Sequence[Run]]) -> str:
    """Median, least and most of each figure, one snapshotter a line."""
    lines = [f"{'snapshotter':<12}{'wall s':>22}{'CPU s':>22}{'then syncfs s':>22}{'runs':>6}"]
    for name, runs in results.items():
        columns = ([r.wall for r in runs], [r.cpu for r in runs], [r.sync for r in runs])
        cells = (f"{statistics.median(c):.2f} ({min(c):.2f}–{max(c):.2f})" for c in columns)
        lines.append(f"{name:<12}{''.join(f'{cell:>22}' for cell in cells)}{len(runs):>6}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------- entry


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m hpmapper.bench.peers", description=__doc__.partition("\n")[0])
    parser.add_argument("--image", type=Path, required=True, help="OCI layout directory")
    parser.add_argument("--work", type=Path, required=True, help="directory for containerd's files")
    parser.add_argument("--chroot", type=Path, required=True, help="tree with containerd; made when missing")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--no-igzip", action="store_true", help="let containerd decompress by itself")
    parser.add_argument("--xfs", type=int, default=16, metavar="GIB", help="size of a loop XFS; 0: plain --work")
    return parser.parse_args()


def _report(options: argparse.Namespace, root: Path) -> None:
    with Containerd(options.chroot, options.work, root, igzip=not options.no_igzip) as peer:
        helpers = {name: peer.helpers(options.image, name) for name in SNAPSHOTTERS}
        results = measure(peer, options.image, options.runs)
        print(table(results))
        print("versions:", ", ".join(f"{name} {version}" for name, version in peer.versions().items()))
        for name, seen in helpers.items():
            print(f"{name} started:", "; ".join(seen.values()) or "nothing")
        print("load average:", *(f"{load:.1f}" for load in os.getloadavg()))


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    """Leave by way of every `finally`, so that nothing stays mounted."""
    raise SystemExit(128 + number)


def main() -> None:
    """Measure and print."""
    signal.signal(signal.SIGTERM, _terminated)
    options = _arguments()
    build_chroot(options.chroot)
    options.work.mkdir(parents=True, exist_ok=True)
    if options.xfs:
        with loop_xfs(options.work / "xfs.img", options.work / "xfs", options.xfs) as root:
            _report(options, root)
    else:
        _report(options, options.work / "plain")


if __name__ == "__main__":
    try:
        main()
    except HpmapperError as error:
        raise SystemExit(f"error: {error}") from error
