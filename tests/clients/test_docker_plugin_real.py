"""Docker with hpmapper as its graph driver plugin: everything that Docker does with layers."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from tests.clients import pools, registry
from tests.clients.docker_host import DockerHost, docker_host

pytestmark = [pytest.mark.kernel, pytest.mark.clients, pytest.mark.timeout(300)]

RELEASES = ("bookworm", "trixie")
"""Docker 20.10 and 26.1, the last that takes plugins."""

DRIVERS = ("hpmapper", "overlay", "btrfs", "vfs")

CASES = [
    ("bookworm", "overlay"),
    ("bookworm", "hpmapper"),
    ("bookworm", "vfs"),
    ("trixie", "hpmapper"),
    ("trixie", "btrfs"),
]
"""Releases, and drivers behind the plugin."""

_numbers = count()
BIG = bytes(range(256)) * 4000


class Layer:
    """A tar in the making."""

    def __init__(self) -> None:
        self._data = io.BytesIO()
        self._tar = tarfile.open(fileobj=self._data, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115

    def add(self, name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **facts: object) -> Layer:
        info = tarfile.TarInfo(name)
        info.type, info.size, info.mtime = kind, len(data), 1_600_000_000
        info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
        for key, value in facts.items():
            setattr(info, key, value)
        self._tar.addfile(info, io.BytesIO(data))
        return self

    def bytes(self) -> bytes:
        self._tar.close()
        return self._data.getvalue()


def layers() -> list[bytes]:
    """Two layers with what layers can have: links, modes, owners, attributes, deletions, opaque directories."""
    busybox = shutil.which("busybox")
    assert busybox, "busybox is not installed: apt install busybox-static"
    base = Layer().add("bin", kind=tarfile.DIRTYPE).add("bin/busybox", Path(busybox).read_bytes(), mode=0o755)
    for name in ("sh", "ls", "cat", "wc", "rm", "chmod", "id", "sleep", "mv", "touch", "true"):
        base.add(f"bin/{name}", kind=tarfile.SYMTYPE, linkname="busybox")
    base.add("etc", kind=tarfile.DIRTYPE).add("etc/passwd", b"root:x:0:0::/:/bin/sh\nbob:x:7:8::/:/bin/sh\n")
    base.add("big", BIG, mtime=1_600_000_000.25).add("big2", kind=tarfile.LNKTYPE, linkname="big")
    base.add("setuid", b"x" * 2000, mode=0o4755, uid=7, gid=8).add("dir", kind=tarfile.DIRTYPE, mode=0o1777)
    base.add("dir/old", b"old").add("hidden", kind=tarfile.DIRTYPE).add("hidden/old", b"old")
    base.add("fifo", kind=tarfile.FIFOTYPE).add("attr", b"a", pax_headers={"SCHILY.xattr.user.note": "kept"})
    upper = (
        Layer()
        .add("dir", kind=tarfile.DIRTYPE, mode=0o1777)
        .add("dir/.wh.old")
        .add("dir/new", b"new")
        .add("hidden", kind=tarfile.DIRTYPE)
    )
    upper.add("hidden/.wh..wh..opq").add("hidden/new", b"n" * 3000).add(".wh.fifo")
    return [base.bytes(), upper.bytes()]


def archive() -> bytes:
    """An image as `docker load` takes it."""
    blobs = layers()
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Cmd": ["/bin/sh"], "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(blob).hexdigest()}" for blob in blobs]},
    }
    names = [f"{number}/layer.tar" for number in range(len(blobs))]
    manifest = [{"Config": "config.json", "RepoTags": ["base:latest"], "Layers": names}]
    files = {"config.json": json.dumps(config).encode(), "manifest.json": json.dumps(manifest).encode()}
    out = Layer()
    for name, data in {**files, **dict(zip(names, blobs, strict=True))}.items():
        out.add(name, data)
    return out.bytes()


@pytest.fixture(scope="module")
def places(pool: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Where each driver's data may lie."""
    with pools.btrfs(tmp_path_factory.mktemp("btrfs")) as btrfs:
        yield {driver: btrfs if driver == "btrfs" else pool for driver in DRIVERS}


@pytest.fixture(params=CASES, ids="-".join)
def host(request: pytest.FixtureRequest, places: dict[str, Path]) -> Iterator[DockerHost]:
    release, driver = request.param
    with docker_host(release, places[driver] / f"{next(_numbers)}", driver) as host:
        host.load(archive())
        yield host


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("release", RELEASES)
def test_an_image_is_pulled_from_a_registry(places: dict[str, Path], release: str, driver: str) -> None:
    """Pushed, pulled by a Docker that has nothing of it, run, committed, pushed on top, and pulled again."""
    name, second = f"{registry.ADDRESS}/base:latest", f"{registry.ADDRESS}/second:latest"
    with docker_host(release, places[driver] / f"{next(_numbers)}", driver) as host:
        registry.start(host.machine)
        host.load(archive())
        wanted = diff_ids(host, "base")
        host.docker("tag", "base", name)
        host.docker("push", "--quiet", name)
        host.docker("rmi", "base", name)

        host.docker("pull", "--quiet", name)
        assert diff_ids(host, name) == wanted
        assert (
            host.docker("run", "--rm", "--network=none", name, "cat", "/hidden/new", "/dir/new") == "n" * 3000 + "new"
        )
        host.docker("run", "--name=one", "--network=none", name, "sh", "-c", "rm -r /hidden && cat /big > /copy")
        host.docker("commit", "one", second)
        host.docker("push", "--quiet", second)  # Docker makes the new layer's tar from the plugin's diff
        host.docker("rm", "one")
        host.docker("rmi", second)

        host.docker("pull", "--quiet", second)  # one new layer on two that are here
        assert diff_ids(host, second)[:2] == wanted
        seen = host.docker("run", "--rm", "--network=none", second, "sh", "-c", "ls / && cat /copy /big | wc -c")
        assert "hidden" not in seen.split()
        assert seen.split()[-1] == str(2 * len(BIG))
        host.docker("rmi", second, name)
        host.stop()
        assert_empty(host)


def diff_ids(host: DockerHost, image: str) -> list[str]:
    found: list[str] = json.loads(host.docker("image", "inspect", image))[0]["RootFS"]["Layers"]
    return found


def members(data: bytes) -> dict[str, tuple[object, ...]]:
    """What is in a tar: attributes, and the digest of the data."""
    found: dict[str, tuple[object, ...]] = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for one in tar:
            file = tar.extractfile(one) if one.isreg() else None
            digest = hashlib.sha256(file.read()).hexdigest() if file else ""
            xattrs = tuple(sorted(item for item in one.pax_headers.items() if "xattr" in item[0]))
            mtime = 0 if one.isdir() or one.name in _MADE_AT_START else int(one.mtime)
            found[one.name] = (one.type, one.mode, one.uid, one.gid, one.size, one.linkname, mtime, xattrs, digest)
    return found


_MADE_AT_START = {".dockerenv", "dev/console", "etc/hosts", "etc/hostname", "etc/resolv.conf", "etc/mtab"}


def test_containers_and_images(host: DockerHost) -> None:
    """run, diff, commit, run what was committed, save, load, rm, rmi; at the end nothing is left."""
    assert "Storage Driver: hpmapper" in host.docker("info")
    assert host.docker("run", "--rm", "--network=none", "base", "cat", "/dir/new", "/hidden/new") == "new" + "n" * 3000
    assert host.docker("run", "--rm", "--network=none", "-u", "bob", "base", "id", "-u") == "7"
    script = (
        "cat /big > /copy && rm /big && chmod 700 /dir && cat /dir/new >> /etc/passwd && rm -r /hidden && mv /big2 /b"
    )
    host.docker("run", "--name=one", "--network=none", "base", "sh", "-c", script)
    changes = set(host.docker("diff", "one").splitlines())
    assert {"A /copy", "A /b", "D /big", "D /big2", "D /hidden", "C /dir", "C /etc", "C /etc/passwd"} == changes
    assert "2.05MB" in host.docker("ps", "--all", "--size", "--format={{.Size}}")

    host.docker("commit", "one", "second")
    assert diff_ids(host, "second")[:2] == diff_ids(host, "base")
    seen = host.docker("run", "--rm", "--network=none", "second", "sh", "-c", "ls /; ls -ld /dir /b")
    assert "hidden" not in seen
    assert "drwx------" in seen

    saved = host.output("save", "second")  # Docker verifies each layer's digest here
    before = diff_ids(host, "second")
    host.docker("rm", "one")
    host.docker("rmi", "second", "base")
    host.load(saved)
    assert diff_ids(host, "second") == before
    host.docker("rmi", "second")
    host.stop()
    assert_empty(host)


def assert_empty(host: DockerHost) -> None:
    """The daemon has ended: what it left for later is done by whoever opens the root next."""
    host.hpmapper("gc")
    facts = json.loads(host.hpmapper("info", "--json"))
    assert (facts["layers"], facts["objects"]) == (0, 0)
    assert host.hpmapper("fsck") == "all is well"


@pytest.mark.parametrize("buildkit", [False, True], ids=["classic", "buildkit"])
def test_builds(host: DockerHost, buildkit: bool) -> None:
    context = host.machine.path("/data/context")
    context.mkdir()
    (context / "file").write_bytes(BIG[:5000])
    (context / "Dockerfile").write_text(
        "FROM base\nRUN rm /big && touch /made\nCOPY file /copied\nRUN mv /copied /moved && chmod 600 /setuid\n"
    )
    host.docker("build", "--network=none", "--tag=built", "/data/context", buildkit=buildkit)
    assert len(diff_ids(host, "built")) == 5
    seen = host.docker("run", "--rm", "--network=none", "built", "ls", "/", "/dir")
    assert {"made", "moved", "new", "big2"} <= set(seen.split())
    assert not {"big", "copied", "old"} & set(seen.split())
    saved = host.output("save", "built")
    host.docker("rmi", "built")
    host.docker("builder", "prune", "--all", "--force")
    host.load(saved)
    assert host.docker("run", "--rm", "--network=none", "built", "ls", "/made") == "/made"


def test_containers_outlive_the_plugin(host: DockerHost) -> None:
    """hpmapper is killed and started again; what runs goes on, and everything can be done as before."""
    script = "touch /before; while ! ls /after; do sleep 0.1; cat /big > /during; done; sleep 1000"
    host.docker("run", "--detach", "--name=one", "--network=none", "base", "sh", "-c", script)
    host.kill_plugin()
    host.start_plugin()
    host.docker("exec", "one", "touch", "/after")
    assert host.docker("diff", "one").splitlines() == ["A /after", "A /before", "A /during"]
    host.docker("cp", "one:/big", "/data/big")  # mounts and unmounts the root once more
    assert host.machine.path("/data/big").read_bytes() == BIG
    host.docker("exec", "one", "ls", "/before", "/during", "/after")
    host.docker("commit", "one", "second")
    host.docker("rm", "--force", "one")
    assert host.docker("run", "--rm", "--network=none", "second", "ls", "/during") == "/during"


def test_containers_outlive_docker(host: DockerHost) -> None:
    host.docker("run", "--detach", "--name=one", "--network=none", "base", "sleep", "1000")
    host.stop_docker()
    host.start_docker()
    host.docker("exec", "one", "ls", "/dir/new")
    host.docker("rm", "--force", "one")
    host.docker("rmi", "base")


def test_limits_are_refused_not_ignored(host: DockerHost) -> None:
    assert "limit" in host.refused("run", "--network=none", "--storage-opt=size=1G", "base", "true")


def test_the_root_is_as_with_overlay2(host: DockerHost, pool: Path, request: pytest.FixtureRequest) -> None:
    """Attribute by attribute: what `docker export` says of a container's root."""
    host.docker("create", "--name=one", "base")
    ours = members(host.output("export", "one"))
    host.stop()
    with docker_host(request.node.callspec.params["host"][0], pool / f"{next(_numbers)}", None) as own:
        own.load(archive())
        own.docker("create", "--name=one", "base")
        theirs = members(own.output("export", "one"))
        own.stop()
    assert ours == theirs
    assert "hidden/old" not in ours
    assert ours["setuid"][2:4] == (7, 8)
