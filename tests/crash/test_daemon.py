"""The daemon killed, stopped and started again: what it answered as done is there, and nothing is left behind."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from hpmapper.check import check
from hpmapper.kernel import mount
from hpmapper.kernel.mountinfo import mounts_below
from hpmapper.meta import snapshots
from hpmapper.root import open_root
from hpmapper.testing.tars import member, tar
from tests import scenario
from tests.conftest import loops_over
from tests.serving import Client, FakeContent, code, config, eventually, shown

pytestmark = pytest.mark.kernel

_SECONDS = 60
_WORDS = ("--storage-opt=pool.size=600M", "--storage-opt=min_free_space=0")
_LAYER = tar(*(member(b"big%d" % number, b"%d" % number * 5000) for number in range(3)))


class Daemon:
    """`hpmapper serve` on a root of its own, started as often as need be."""

    def __init__(self, directory: Path, driver: str) -> None:
        self.directory = directory
        self.config = config(directory, driver)
        self.address = directory / "h.sock"
        self.content = FakeContent()
        self.log = directory / "log"
        self.process: subprocess.Popen[bytes] | None = None

    def words(self, *more: str) -> list[str]:
        driver = self.config.driver
        root = str(self.config.root)
        return [
            sys.executable, "-m", "hpmapper.cli.main", "--root", root, "--storage-driver", str(driver), *_WORDS, *more
        ]  # fmt: skip

    def start(self, fault: str = "", points: Path | None = None) -> None:
        """Start it; it listens when this returns, unless `fault` has killed it."""
        self.address.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.words("serve", f"--address={self.address}", f"--containerd-address={self.directory}/c.sock"),
                stderr=log,
                env={**os.environ, "HPMAPPER_FAULT": fault, "HPMAPPER_FAULT_LOG": str(points or "")},
            )
        deadline = time.monotonic() + _SECONDS
        while not self.address.exists() and self.process.poll() is None:
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.01)
        assert fault or self.process.poll() is None, self.log.read_text()

    def client(self) -> Client:
        return Client(self.address)

    def end(self, how: signal.Signals) -> int:
        """Send it a signal; its exit status."""
        assert self.process is not None
        self.process.send_signal(how)
        return self.process.wait(_SECONDS)

    def cli(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Another command on the same root."""
        return subprocess.run(self.words(*words), capture_output=True, text=True, check=False, timeout=_SECONDS)

    def verify_empty(self) -> None:
        """Remove everything by the front door, stop, and fail unless nothing at all is left."""
        client = self.client()
        left = client.list()
        while left:
            leaves = left.keys() - {info.parent for info in left.values()}
            for call in [client.start_remove(key) for key in leaves]:
                call.result()
            left = {key: info for key, info in left.items() if key not in leaves}
        client.close()
        assert self.end(signal.SIGTERM) == 0, self.log.read_text()
        with open_root(self.config) as opened:
            engine = opened.engine
            engine.rubbish.collect()
            assert list(check(engine)) == []
            scenario.assert_no_orphans(engine)
            assert snapshots.unfinished(engine.db) == []
            stored = engine.driver.stored()
            assert (stored.snapshots, stored.layers, engine.driver.stored_objects()) == (set(), set(), set())
            engine.detach()
        assert mounts_below(self.config.root) == []
        assert loops_over(self.directory) == []


@pytest.fixture(params=["hpmapper", "overlay"])
def daemon(request: pytest.FixtureRequest, tmp_path: Path, private_mounts: None) -> Iterator[Daemon]:
    made = Daemon(tmp_path, request.param)
    with made.content.served(tmp_path / "c.sock"):
        yield made
        if made.process is not None and made.process.poll() is None:
            made.process.kill()
            made.process.wait()
    for one in mount.mounts_below(tmp_path):
        mount.umount(one.target, lazy=True)


def _outcomes(calls: dict[str, Any]) -> dict[str, grpc.StatusCode]:
    return {name: code(lambda call=call: call.result()) for name, call in calls.items()}  # type: ignore[misc]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_ended_amid_a_crowd_of_calls(daemon: Daemon, how: signal.Signals) -> None:
    daemon.start()
    client = daemon.client()
    client.apply(daemon.content.add(gzip.compress(_LAYER)), client.prepare("x"))
    client.commit("base", "x")
    for call in [client.start_prepare(f"old-{number}", "base") for number in range(70)]:
        call.result()
    prepared = {f"new-{number}": client.start_prepare(f"new-{number}", "base") for number in range(70)}
    removed = {f"old-{number}": client.start_remove(f"old-{number}") for number in range(60)}
    mounted = {f"old-{number}": client.start_mounts(f"old-{number}") for number in range(60, 70)}
    prepared["new-5"].exception()  # some are done, some are not
    status = daemon.end(how)
    prepared_codes, removed_codes, mounted_codes = _outcomes(prepared), _outcomes(removed), _outcomes(mounted)
    client.close()
    assert status == (0 if how is signal.SIGTERM else -signal.SIGKILL), daemon.log.read_text()
    expected = {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND}
    assert {*prepared_codes.values(), *removed_codes.values(), *mounted_codes.values()} <= expected
    daemon.start()
    client = daemon.client()
    there = client.list().keys()
    ok = grpc.StatusCode.OK
    assert {name for name, answer in prepared_codes.items() if answer is ok} <= there
    assert not {name for name, answer in removed_codes.items() if answer is ok} & there
    assert set(mounted) <= there
    for name in sorted(there - {"base"})[:10]:
        with shown(client.mounts(name), daemon.directory / "target") as tree:
            assert (tree / "big1").read_bytes() == b"1" * 5000
            assert (tree.stat().st_mode & 0o777) == 0o755
    client.close()
    daemon.verify_empty()


def _life(daemon: Daemon, client: Client, told: Callable[[str], None]) -> None:
    """Every kind of call once; `told` of what is known to be there ("x"), gone ("-x") or in the balance ("?x")."""
    (daemon.directory / "target").mkdir(exist_ok=True)
    client.prepare("written")
    told("written")
    with shown(client.mounts("written"), daemon.directory / "target") as tree:
        (tree / "file").write_bytes(b"f" * 5000)
    told("?written")
    client.commit("low", "written")
    told("low")
    told("-written")
    mounts = client.prepare("applied", "low")
    client.apply(daemon.content.add(gzip.compress(_LAYER)), mounts)
    client.commit("high", "applied")
    told("high")
    for call in [client.start_prepare(f"many-{number}", "high") for number in range(5)]:
        call.result()
    for number in range(5):
        told(f"many-{number}")
    for number in range(4):
        told(f"?many-{number}")
    for call in [client.start_remove(f"many-{number}") for number in range(4)]:
        call.result()
    for number in range(4):
        told(f"-many-{number}")
    client.view("look", "high")
    told("look")
    told("?look")
    client.remove("look")
    told("-look")
    client.cleanup()
    client.update("high", {"a": "b"})


_KILLED_ELSEWHERE = ("pool.", "root.", "workspace.", "ingest.object", "ingest.map", "ingest.synced", "ingest.layer")
"""Steps at which test_kill.py dies, on the same way."""


def _points(path: Path) -> list[str]:
    names = {line.partition(":")[0] for line in path.read_text().splitlines()}
    return sorted(f"{name}:1" for name in names if not name.startswith(_KILLED_ELSEWHERE))


def test_killed_at_every_step(daemon: Daemon, record_property: Callable[[str, object], None]) -> None:
    """When each step is first passed: while starting, answering and tidying up."""
    steps = daemon.directory / "points"
    daemon.start(points=steps)
    client = daemon.client()
    _life(daemon, client, lambda _: None)
    eventually(lambda: _assert_contains(steps, "collect.objects-forgotten"))
    client.close()
    daemon.verify_empty()
    points = _points(steps)
    for point in points:
        told: list[str] = []
        daemon.start(point)
        client = daemon.client()
        with suppress(grpc.RpcError, FileNotFoundError):
            _life(daemon, client, told.append)
        client.close()
        _mounted_nowhere(daemon)
        assert daemon.process is not None
        if daemon.process.poll() is None:
            # Some steps come later, or in another order, than in the run that listed them.
            daemon.end(signal.SIGKILL)
        daemon.start()
        client = daemon.client()
        there = client.list().keys()
        gone = {name[1:] for name in told if name.startswith("-")}
        present = {name for name in told if name[0] not in "-?"} - {name[1:] for name in told if name[0] in "-?"}
        assert present <= there, f"{point}: lost"
        assert not gone & there, f"{point}: back again"
        for name in there & {"written", "applied", "look", "many-4"}:
            with shown(client.mounts(name), daemon.directory / "target") as tree:
                assert tree.stat().st_mode & 0o777 == 0o755, point
                if name in ("look", "many-4"):
                    assert (tree / "file").read_bytes() == b"f" * 5000, point
                    assert (tree / "big1").read_bytes() == b"1" * 5000, point
        client.close()
        daemon.verify_empty()
    names = {point.partition(":")[0] for point in points}
    record_property("kills", len(points))
    print(f"\n{daemon.config.driver}: killed at {len(points)} hits of {len(names)} steps: {' '.join(sorted(names))}")


def _assert_contains(path: Path, word: str) -> None:
    assert word in path.read_text()


def _mounted_nowhere(daemon: Daemon) -> None:
    for one in mount.mounts_below(daemon.directory / "target"):
        mount.umount(one.target, lazy=True)


def test_a_container_outlives_its_daemon(daemon: Daemon) -> None:
    daemon.start()
    client = daemon.client()
    client.apply(daemon.content.add(gzip.compress(_LAYER)), client.prepare("x"))
    client.commit("base", "x")
    mounts = client.prepare("container", "base")
    with shown(mounts, daemon.directory / "target") as tree, (tree / "big0").open("r+b") as file:
        for how in (signal.SIGKILL, signal.SIGTERM):
            client.close()
            daemon.end(how)
            file.write(b"while nobody serves")
            file.flush()
            assert (tree / "big1").read_bytes() == b"1" * 5000
            daemon.start()
            client = daemon.client()
            assert client.mounts("container") == mounts
            (tree / f"after-{how.name}").touch()
        with shown(client.mounts("container"), daemon.directory / "again") as same:
            assert (same / "big0").read_bytes().startswith(b"while nobody serves")
            assert {"after-SIGKILL", "after-SIGTERM"} <= set(os.listdir(same))
    client.close()
    daemon.verify_empty()


def test_one_daemon_for_a_root(daemon: Daemon) -> None:
    daemon.start()
    assert daemon.process is not None
    second = daemon.cli("serve", f"--address={daemon.directory}/other.sock")
    assert second.returncode != 0
    assert f"its pid is {daemon.process.pid}" in second.stderr
    assert not (daemon.directory / "other.sock").exists()
    client = daemon.client()
    client.prepare("still served")
    for words in (("pool", "rm", "--force"), ("pool", "detach")):
        if words[1] == "rm" or daemon.config.driver == "hpmapper":
            done = daemon.cli(*words)
            assert done.returncode != 0
            assert f"its pid is {daemon.process.pid}" in done.stderr
    client.mounts("still served")
    assert daemon.end(signal.SIGTERM) == 0
    refused = daemon.cli("pool", "rm")
    assert refused.returncode != 0, "it is not empty"
    assert "1 snapshot" in refused.stderr
    assert daemon.cli("pool", "rm", "--force").returncode == 0
    assert not daemon.config.root.exists()
    client.close()


def test_other_commands_beside_a_daemon(daemon: Daemon) -> None:
    """Images, containers, collecting and checking on a root that is served; the forest's own are left alone."""
    layouts = daemon.directory / "layouts"
    scenario.write_layouts(layouts)
    daemon.start()
    client = daemon.client()
    client.apply(daemon.content.add(gzip.compress(_LAYER)), client.prepare("x"))
    client.commit("base", "x")
    client.prepare("one", "base")
    running = [client.start_prepare(f"n-{number}", "base") for number in range(50)]
    for words in (
        ("image", "import", str(layouts / "base"), "base"),
        ("container", "create", "base", "--name", "c"),
        ("gc",),
        ("fsck",),
        ("container", "rm", "c"),
        ("image", "rm", "base"),
        ("gc",),
    ):
        done = daemon.cli(*words)
        assert done.returncode == 0, f"{words}: {done.stdout}\n{done.stderr}"
    for call in running:
        call.result()
    with shown(client.mounts("one"), daemon.directory / "target") as tree:
        assert (tree / "big1").read_bytes() == b"1" * 5000
    client.close()
    daemon.verify_empty()
