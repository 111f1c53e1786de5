"""The graph driver plugin, as Docker speaks to it: HTTP on its socket, any driver behind it."""

from __future__ import annotations

import io
import json
import os
import socket
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hpmapper.caretaker import Caretaker
from hpmapper.config import Config
from hpmapper.docker.plugin import serving
from hpmapper.engine import Engine
from hpmapper.errors import FailedPrecondition, InvalidArgument
from hpmapper.kernel.mountinfo import is_mountpoint
from hpmapper.root import open_root
from hpmapper.testing.tars import folder, member, tar
from hpmapper.testing.unixhttp import UnixConnection

pytestmark = pytest.mark.kernel

BIG = bytes(range(256)) * 800
BASE = tar(folder(b"etc/"), member(b"etc/small", b"small"), member(b"big", BIG), member(b"gone", b"x" * 3000))
UPPER = tar(member(b"etc/new", b"new"), member(b".wh.gone"))


class Docker:
    """What dockerd's graphdriver proxy does (moby, daemon/graphdriver/proxy.go): empty strings are left out."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def raw(self, path: str, body: Any = None, method: str = "POST") -> tuple[int, bytes]:
        connection = UnixConnection(self.path)
        try:
            connection.request(
                method,
                path,
                body,
                {"Accept": "application/vnd.docker.plugins.v1.2+json"},
                encode_chunked=not isinstance(body, bytes),
            )
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def ask(self, method: str, **facts: object) -> dict[str, Any]:
        """A call that succeeds."""
        body = json.dumps({key: value for key, value in facts.items() if value}).encode() + b"\n"
        status, answer = self.raw(f"/GraphDriver.{method}", body)
        found: dict[str, Any] = json.loads(answer)
        assert (status, found.get("Err", "")) == (200, ""), found
        return found

    def refused(self, method: str, **facts: object) -> str:
        """A call that fails; what it says."""
        status, answer = self.raw(f"/GraphDriver.{method}", json.dumps(facts).encode())
        found: dict[str, str] = json.loads(answer)
        assert status == 500
        assert found["Err"]
        return found["Err"]

    def apply(self, layer: str, parent: str, data: bytes) -> int:
        """ApplyDiff, in chunks as Go sends it."""
        pieces = (data[at : at + 32768] for at in range(0, len(data), 32768))
        status, answer = self.raw(f"/GraphDriver.ApplyDiff?id={layer}&parent={parent}", pieces)
        found = json.loads(answer)
        assert (status, found["Err"]) == (200, ""), found
        return int(found["Size"])

    def image_layer(self, layer: str, parent: str, data: bytes) -> None:
        self.ask("Create", ID=layer, Parent=parent, MountLabel="", StorageOpt={})
        self.apply(layer, parent, data)

    def diff(self, layer: str, parent: str) -> bytes:
        status, answer = self.raw("/GraphDriver.Diff", json.dumps({"ID": layer, "Parent": parent}).encode())
        assert status == 200, answer
        return answer

    def get(self, layer: str) -> Path:
        return Path(self.ask("Get", ID=layer)["Dir"])


class Behind:
    """What is behind the plugin: an engine whose caretaker works when told to."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.caretaker = Caretaker(engine)


POOLS = {"hpmapper": ["pool.size=400M"], "btrfs": ["pool.size=400M", "pool.fs=btrfs"]}


@pytest.fixture(params=["overlay", "hpmapper", "btrfs", "vfs"])
def behind(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Behind]:
    options = ["min_free_space=0", *POOLS.get(request.param, [])]
    config = Config(root=tmp_path / "root", driver=request.param).with_options(options)
    with open_root(config) as opened:
        yield Behind(opened.engine)
        opened.engine.rubbish.free_removed()
        for info in list(opened.engine.driver.stored().snapshots):
            opened.engine.driver.unmount(info)
        opened.engine.detach()


@pytest.fixture
def docker(behind: Behind, tmp_path: Path) -> Iterator[Docker]:
    address = tmp_path / "plugins" / "hpmapper.sock"
    with serving(behind.engine, behind.caretaker, address):
        yield Docker(address)
    assert not address.exists()


def names(data: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(data)) as found:
        return sorted(found.getnames())


def assert_not_writable(behind: Behind, root: Path) -> None:
    """A complete layer is looked at, not written; only a driver without mounts cannot prevent it."""
    if behind.engine.driver.capabilities.mounts:
        with pytest.raises(OSError, match="Read-only"):
            (root / "x").touch()


def test_it_begins_as_docker_wants(docker: Docker) -> None:
    assert json.loads(docker.raw("/Plugin.Activate", b"")[1])["Implements"] == ["GraphDriver"]
    docker.ask("Init", Home="/var/lib/docker/hpmapper", Opts=None, UIDMaps=None, GIDMaps=None)
    assert docker.ask("Capabilities")["Capabilities"] == {"ReproducesExactDiffs": True}
    status = docker.ask("Status")["Status"]
    assert status[0][0] == "hpmapper driver"
    assert all(len(pair) == 2 for pair in status)
    assert (docker.path.stat().st_mode & 0o777) == 0o600


def test_an_image_and_a_container(docker: Docker, behind: Behind) -> None:
    """The whole way of `docker load`, `run`, `diff`, `commit` and `rm`."""
    docker.image_layer("base", "", BASE)
    docker.image_layer("upper", "base", UPPER)
    assert docker.ask("Exists", ID="upper")["Exists"]
    assert docker.diff("upper", "base") == UPPER  # what Docker verifies against the DiffID

    docker.ask("CreateReadWrite", ID="c-init", Parent="upper")
    root = docker.get("c-init")
    (root / "etc" / "hostname").touch()
    docker.ask("Put", ID="c-init")
    docker.ask("CreateReadWrite", ID="c", Parent="c-init")
    root = docker.get("c")
    assert sorted(os.listdir(root)) == ["big", "etc"]
    assert sorted(os.listdir(root / "etc")) == ["hostname", "new", "small"]
    assert (root / "big").read_bytes() == BIG

    (root / "etc" / "small").unlink()
    (root / "made").write_bytes(b"m" * 5000)
    with (root / "big").open("r+b") as big:
        big.write(b"changed")
    changes = docker.ask("Changes", ID="c", Parent="c-init")["Changes"]
    assert {(change["Path"], change["Kind"]) for change in changes} == {
        ("/big", 0),
        ("/etc", 0),
        ("/etc/small", 2),
        ("/made", 1),
    }
    assert docker.ask("DiffSize", ID="c", Parent="c-init")["Size"] == 5000 + len(BIG)
    written = docker.diff("c", "c-init")
    assert names(written) == [".", "big", "etc", "etc/.wh.small", "made"]
    assert docker.diff("c", "c-init") == written

    docker.image_layer("committed", "upper", written)
    docker.ask("Put", ID="c")
    seen = docker.get("committed")
    assert (seen / "big").read_bytes()[:8] == b"changed\x07"
    assert_not_writable(behind, seen)
    docker.ask("Put", ID="committed")

    for layer in ("c", "c-init", "committed", "upper", "base"):
        docker.ask("Remove", ID=layer)
        assert not docker.ask("Exists", ID=layer)["Exists"]
    docker.ask("Cleanup")
    assert behind.engine.rubbish.free_removed()
    behind.engine.rubbish.collect()
    stored = behind.engine.driver.stored()
    assert not stored.snapshots
    assert not stored.layers
    assert not behind.engine.driver.stored_objects()


def test_a_layer_written_through_its_mount_is_a_layer_too(docker: Docker, behind: Behind) -> None:
    """As BuildKit inside dockerd makes layers: no ApplyDiff, and Diff is asked for before anything is on top."""
    docker.image_layer("base", "", BASE)
    docker.ask("Create", ID="step", Parent="base")
    root = docker.get("step")
    (root / "tool").write_bytes(BIG)
    docker.ask("Put", ID="step")
    written = docker.diff("step", "base")
    docker.ask("Create", ID="next", Parent="step")
    assert docker.diff("step", "base") == written
    root = docker.get("next")
    assert (root / "tool").read_bytes() == BIG
    docker.ask("Put", ID="next")
    assert_not_writable(behind, docker.get("step"))
    docker.ask("Put", ID="step")


def test_a_root_stays_for_its_last_user(docker: Docker, behind: Behind) -> None:
    mounts = behind.engine.driver.capabilities.mounts
    docker.image_layer("base", "", BASE)
    docker.ask("CreateReadWrite", ID="c", Parent="base")
    root = docker.get("c")
    assert docker.get("c") == root
    docker.ask("Put", ID="c")
    assert is_mountpoint(root) == mounts
    docker.ask("Put", ID="c")
    assert not is_mountpoint(root)
    docker.ask("Put", ID="c")  # one too many
    assert docker.get("c") == root
    assert is_mountpoint(root) == mounts
    docker.ask("Cleanup")
    assert not is_mountpoint(root)


def test_a_restart_keeps_what_is_mounted(docker: Docker, behind: Behind, tmp_path: Path) -> None:
    docker.image_layer("base", "", BASE)
    docker.ask("CreateReadWrite", ID="c", Parent="base")
    root = docker.get("c")
    with serving(behind.engine, behind.caretaker, tmp_path / "second.sock"):
        again = Docker(tmp_path / "second.sock")
        assert again.get("c") == root
        again.ask("Put", ID="c")
        assert is_mountpoint(root) == behind.engine.driver.capabilities.mounts  # for the container of before
        again.ask("Put", ID="c")
    assert not is_mountpoint(root)


@pytest.mark.parametrize(
    ("method", "facts", "says"),
    [
        ("Init", {"Opts": ["overlay2.size=1G"]}, "overlay2.size"),
        ("Init", {"UIDMaps": [{"container_id": 0, "host_id": 1, "size": 2}]}, "userns-remap"),
        ("Create", {"ID": ""}, "not a valid layer name"),
        ("Create", {"ID": "../../etc"}, "not a valid layer name"),
        ("Create", {"ID": "new", "Parent": "nobody"}, "does not exist"),
        ("Create", {"ID": "base"}, "exists already"),
        ("CreateReadWrite", {"ID": "new", "StorageOpt": {"speed": "1G"}}, "not supported"),
        ("CreateReadWrite", {"ID": "new", "StorageOpt": {"size": "much"}}, "is not a size"),
        ("CreateReadWrite", {"ID": "new", "StorageOpt": {"size": "1K"}}, "too small"),
        ("CreateReadWrite", {"ID": "new", "MountLabel": "system_u:object_r"}, "SELinux"),
        ("Create", {"ID": 7}, "Expected `str`"),
        ("Get", {"ID": "nobody"}, "does not exist"),
        ("GetMetadata", {}, "does not exist"),
        ("Diff", {"ID": "nobody"}, "does not exist"),
        ("Diff", {"ID": "base", "Parent": "other"}, "stands on nothing"),
        ("Changes", {"ID": "base"}, "an image's"),
    ],
)
def test_what_cannot_be_is_refused(docker: Docker, method: str, facts: dict[str, object], says: str) -> None:
    docker.image_layer("base", "", BASE)
    assert says in docker.refused(method, **facts)
    assert not docker.ask("Exists", ID="new")["Exists"]


def test_removal_asks_for_the_children_first(docker: Docker) -> None:
    docker.image_layer("base", "", BASE)
    docker.image_layer("upper", "base", UPPER)
    assert "made from it" in docker.refused("Remove", ID="base")
    docker.ask("Remove", ID="nobody")


def test_a_damaged_tar_leaves_the_layer_empty(docker: Docker, behind: Behind) -> None:
    docker.ask("Create", ID="base")
    status, answer = docker.raw("/GraphDriver.ApplyDiff?id=base&parent=", BASE[:300] + b"\xff" * 300 + BASE[600:])
    assert status == 500
    assert "checksum" in json.loads(answer)["Err"]
    assert docker.apply("base", "", BASE)
    assert docker.diff("base", "") == BASE


def test_a_tar_that_breaks_off_is_undone(docker: Docker, behind: Behind) -> None:
    docker.ask("Create", ID="base")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(os.fspath(docker.path))
        client.sendall(
            b"POST /GraphDriver.ApplyDiff?id=base HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"400\r\n" + BASE[:1024] + b"\r\n"
        )
    docker.apply("base", "", BASE)
    assert docker.diff("base", "") == BASE


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (b"nonsense\r\n\r\n", b"400"),
        (b"POST / HTTP/1.1\r\n\r\n", b"400"),  # no Host
        (b"POST /GraphDriver.Get HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", b"400"),
        (b"POST /GraphDriver.Fly HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", b"404"),
        (b"GET /GraphDriver.Status HTTP/1.1\r\nHost: x\r\n\r\n", b"500"),
        (b"POST /GraphDriver.Get HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{]", b"500"),
        (b"POST /GraphDriver.Get HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n\xff\xfe\x00{", b"500"),
    ],
)
def test_nonsense_is_answered_and_nothing_more(docker: Docker, said: bytes, status: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(os.fspath(docker.path))
        client.sendall(said)
        client.shutdown(socket.SHUT_WR)
        assert client.makefile("rb").readline().split()[1] == status
    docker.ask("Status")


def test_a_head_without_end_ends_the_connection(docker: Docker) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(os.fspath(docker.path))
        with pytest.raises(BrokenPipeError):
            client.sendall(b"POST /x HTTP/1.1\r\nHost: x\r\nX: " + b"x" * (8 << 20))
    docker.ask("Status")


def test_too_much_json_is_refused(docker: Docker) -> None:
    assert "bytes of JSON" in docker.refused("Create", ID="x" * (2 << 20))


def test_connections_are_kept_and_ended_in_order(docker: Docker) -> None:
    connection = UnixConnection(docker.path)
    for _ in range(3):
        connection.request("POST", "/GraphDriver.Status", b"{}\n")
        assert connection.getresponse().read()
    connection.close()


def test_many_at_once(docker: Docker) -> None:
    docker.image_layer("base", "", BASE)

    def one(number: int) -> None:
        docker.ask("CreateReadWrite", ID=f"c{number}", Parent="base")
        (docker.get(f"c{number}") / "mine").write_text(str(number))
        docker.ask("Put", ID=f"c{number}")
        docker.ask("Remove", ID=f"c{number}")

    threads = [threading.Thread(target=one, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    docker.ask("Remove", ID="base")


def test_a_socket_has_one_server(docker: Docker, behind: Behind, tmp_path: Path) -> None:
    with (
        pytest.raises(FailedPrecondition, match="serves"),
        serving(behind.engine, behind.caretaker, docker.path),
    ):
        pass
    with (
        pytest.raises(InvalidArgument, match="too long"),
        serving(behind.engine, behind.caretaker, tmp_path / ("x" * 120)),
    ):
        pass
    precious = tmp_path / "precious"
    precious.write_text("precious")
    with (
        pytest.raises(FailedPrecondition, match="is not a socket"),
        serving(behind.engine, behind.caretaker, precious),
    ):
        pass
    assert precious.read_text() == "precious"
    stale = tmp_path / "stale.sock"
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(os.fspath(stale))
    with serving(behind.engine, behind.caretaker, stale):
        Docker(stale).ask("Status")
