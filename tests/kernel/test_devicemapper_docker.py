"""The devicemapper driver beside the one it follows: Docker 20.10's, on the same kernel, with the same images.

Docker runs in Debian 12's root file system on a disk of its own (tests.vm.docker). What both show must be the same:
the fields of `docker info`, the layers of an image, a container's files after the same commands, and what changed.
"""

from __future__ import annotations

import io
import stat
import subprocess
import tarfile
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hpmapper.bench.dockerd import Docker, archive
from hpmapper.config import Config
from hpmapper.containers import Containers
from hpmapper.image.opening import SourceOptions
from hpmapper.images import Images
from hpmapper.kernel import mount
from hpmapper.meta import snapshots
from hpmapper.root import Opened, open_root
from hpmapper.testing.tars import FIFO, LINK, SYMLINK, folder, member, tar
from tests.kernel.test_devicemapper_lvm import _disk
from tests.scenario import Silent

pytestmark = [pytest.mark.kernel, pytest.mark.guest("docker"), pytest.mark.timeout(1800)]

OPTIONS = ["dm.basesize=512M", "dm.loopdatasize=2G", "dm.loopmetadatasize=64M", "dm.min_free_space=5%"]
NAME = "compared:1"
_PLACES = ("dev/", "proc/", "sys/", "etc/hosts", "etc/hostname", "etc/resolv.conf", "etc/mtab", ".dockerenv")
"""What Docker puts into every container."""

SCRIPT = """
export PATH=/bin
echo changed > etc/motd
chmod 4711 bin/tool
rm -r var/lib
mv opt/a opt/b
ln etc/issue etc/issue2
ln -s /nowhere etc/dangling
mkdir -p new/deep
echo deep > new/deep/file
chown 12:34 new/deep/file
touch -h -d @1600000001 etc/motd etc/dangling new/deep/file new/deep new opt var etc .
"""
"""Run in a container of each; the times at the end are the same everywhere."""

Facts = dict[str, tuple[Any, ...]]


def _layers() -> list[bytes]:
    busybox = Path("/usr/bin/busybox").read_bytes()
    names = (b"sh", b"touch", b"rm", b"mv", b"ln", b"mkdir", b"chown", b"chmod", b"true")
    base = tar(
        *(folder(name) for name in (b"bin/", b"etc/", b"opt/", b"opt/a/", b"var/", b"var/lib/")),
        member(b"bin/busybox", busybox, mode=0o755),
        *(member(b"bin/" + name, kind=LINK, mode=0o755, link=b"bin/busybox") for name in names),
        member(b"bin/tool", b"#!/bin/sh\n", mode=0o755, uid=5, gid=6),
        member(b"etc/motd", b"hello\n"),
        member(b"etc/issue", b"issue\n", mode=0o600),
        member(b"opt/a/data", bytes(range(256)) * 500),
        member(b"var/lib/gone", b"x"),
        member(b"var/pipe", kind=FIFO),
    )
    upper = tar(
        folder(b"etc/"), member(b"etc/link", kind=SYMLINK, link=b"motd"), member(b"etc/.wh.nothing"),
        folder(b"opt/"), member(b"opt/late", b"late\n"), folder(b"tmp/", mode=0o1777),
    )  # fmt: skip
    return [base, upper]


@pytest.fixture(scope="module")
def docker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Docker]:
    """Docker 20.10 with one image."""
    root = tmp_path_factory.mktemp("docker")
    mount.filesystem("ext4", _disk("docker"), root)
    try:
        with Docker(root, OPTIONS) as daemon:
            daemon.load(archive(NAME, _layers()))
            yield daemon
    finally:
        mount.umount(root)


@pytest.fixture
def ours(tmp_path: Path) -> Iterator[Opened]:
    """Our root with the same image."""
    (tmp_path / "image.tar").write_bytes(archive(NAME, _layers()))
    with open_root(Config(root=tmp_path / "root", driver="devicemapper").with_options(OPTIONS)) as opened:
        _bring(opened, tmp_path / "image.tar", NAME)
        yield opened
        opened.engine.detach()


def _bring(opened: Opened, file: Path, name: str) -> None:
    Images(opened.engine).bring(f"docker-archive:{file}", SourceOptions(spool=file.parent), [name], Silent())


def _facts(data: bytes) -> Facts:
    """What an exported root has, by name, without what Docker adds to every container."""
    found: Facts = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as exported:
        for entry in exported:
            name = entry.name.removeprefix("./")
            if f"{name}/".startswith(_PLACES) or name in (".", "", *_PLACES):
                continue
            content = exported.extractfile(entry).read() if entry.isreg() else b""  # type: ignore[union-attr]
            # Of several names of one file each side writes another one first.
            kind = tarfile.REGTYPE if entry.islnk() else entry.type
            mode = stat.S_IMODE(entry.mode)  # Docker writes the type into it, too, now and then
            found[name] = (kind, mode, entry.uid, entry.gid, int(entry.mtime), entry.issym() and entry.linkname)
            if entry.isreg() or entry.islnk():
                target = exported.getmember(entry.linkname) if entry.islnk() else entry
                found[name] += (exported.extractfile(target).read() if entry.islnk() else content,)  # type: ignore[union-attr]
    return found


def _exported(root: Path) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as packed:
        packed.add(root, arcname=".")
    return out.getvalue()


def _no_trace(changes: set[tuple[str, str]]) -> set[tuple[str, str]]:
    return {(kind, path) for kind, path in changes if not f"{path[1:]}/".startswith(_PLACES) and path != "/dev"}


def _run_in_docker(docker: Docker) -> str:
    container = docker.create(NAME, ["sh", "-c", SCRIPT])
    docker.ask("POST", f"/containers/{container}/start")
    assert docker.ask("POST", f"/containers/{container}/wait")["StatusCode"] == 0, docker.log()
    return container


def test_info(docker: Docker, ours: Opened) -> None:
    """Docker's labels in Docker's order; those that do not depend on the moment have its values, too."""
    theirs = dict(docker.ask("GET", "/info")["DriverStatus"])
    shown = ours.engine.driver.status()
    assert [label for label in shown if label != "Pool Mode"] == list(theirs)
    for label in (
        "Pool Blocksize", "Base Device Size", "Backing Filesystem", "Data Space Total", "Metadata Space Total",
        "Thin Pool Minimum Free Space", "Deferred Removal Enabled", "Deferred Deletion Enabled",
        "Deferred Deleted Device Count",
    ):  # fmt: skip
        assert shown[label] == theirs[label], label


def test_layers(docker: Docker, ours: Opened) -> None:
    images = Images(ours.engine)
    layers = [layer.layer for layer in images.layers(images.find(NAME))]
    assert [snapshots.layer(ours.engine.db, layer).diff_id for layer in layers if layer] == docker.ask(
        "GET", f"/images/{NAME}/json"
    )["RootFS"]["Layers"]


def test_contents_and_changes(docker: Docker, ours: Opened) -> None:
    container = _run_in_docker(docker)
    containers = Containers(ours.engine)
    mine = containers.create(NAME, "mine")
    root = containers.mount(mine)
    subprocess.run(["chroot", root, "/bin/sh", "-c", SCRIPT], check=True)
    assert _facts(_exported(root)) == _facts(docker.call("GET", f"/containers/{container}/export"))
    kinds = {0: "C", 1: "A", 2: "D"}
    theirs = {(kinds[one["Kind"]], one["Path"]) for one in docker.ask("GET", f"/containers/{container}/changes")}
    changed = {(change.kind.value, change.path.decode()) for change in containers.changes(mine)}
    # Docker's driver names a directory whose entries alone changed only sometimes: it compares whole seconds.
    assert _no_trace(theirs) <= changed
    assert {path for kind, path in changed - _no_trace(theirs) if kind != "C"} == set()
    containers.remove(mine)
    docker.remove(container)


def test_an_image_committed_by_docker(docker: Docker, ours: Opened, tmp_path: Path) -> None:
    """What Docker wrote through its driver comes out of ours with every attribute."""
    container = _run_in_docker(docker)
    docker.ask("POST", f"/commit?container={container}&repo=made&tag=1", {})
    saved = tmp_path / "saved.tar"
    saved.write_bytes(docker.call("GET", f"/images/{urllib.parse.quote('made:1', safe='')}/get"))
    _bring(ours, saved, "made:1")
    containers = Containers(ours.engine)
    mine = containers.create("made:1", "mine")
    assert _facts(_exported(containers.mount(mine))) == _facts(docker.call("GET", f"/containers/{container}/export"))
    containers.remove(mine)
    docker.remove(container)
