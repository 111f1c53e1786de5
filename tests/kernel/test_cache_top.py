"""`hpmapper top` and the metrics of a root: what containers have and do."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from hpmapper.cache.manager import CacheManager
from hpmapper.cache.overview import Observer
from hpmapper.cache.starts import Starts
from hpmapper.engine import Blob
from hpmapper.kernel.sync import syncfs
from hpmapper.layer.stream import Expected
from hpmapper.meta import snapshots
from hpmapper.metrics.collect import registry
from hpmapper.rpc.calls import Calls
from hpmapper.testing.unixhttp import UnixConnection
from tests.cacheroot import MIB, CacheRoot, cache_root
from tests.unit.test_metrics import asked

pytestmark = pytest.mark.kernel

BIG = random.Random(11).randbytes(4 * MIB)


@pytest.fixture
def root(private_mounts: None, tmp_path: Path) -> Iterator[CacheRoot]:
    with cache_root(tmp_path) as found:
        yield found


@contextmanager
def busy_in(place: Path) -> Iterator[None]:
    """A process with that root directory that reads a file over and over, and writes one."""
    pid = os.fork()
    if not pid:
        try:
            os.chroot(place)
            os.chdir("/")
            while True:
                with open("/new", "wb") as out:
                    out.write(b"x" * MIB)
                    out.flush()
                    os.fsync(out.fileno())
                for _ in range(50):
                    with open("/big", "rb", buffering=0) as file:
                        file.readall()
        finally:
            os._exit(1)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_what_a_container_does_is_seen(root: CacheRoot) -> None:
    image = root.image("i", {"big": BIG, "other": BIG[::-1]})
    _, place = root.container(image, "worker")
    root.container(image, "sleeper")
    observer = Observer(root.engine.db, root.engine.driver)
    first = {one.name: one for one in observer.look().containers}
    assert first["worker"].copy_ups == (0, 0)
    with (place / "big").open("r+b") as file:
        file.write(b"changed")
    syncfs(root.home)
    with busy_in(place):
        deadline = time.monotonic() + 60
        while True:
            overview = observer.look()
            seen = {one.name: one for one in overview.containers}
            if seen["worker"].used.written and seen["worker"].used.seconds:
                break
            assert time.monotonic() < deadline
            time.sleep(0.1)
    worker, sleeper = seen["worker"], seen["sleeper"]
    assert (worker.processes, sleeper.processes) == (1, 0)
    assert worker.image == "docker.io/library/i:latest"
    assert worker.copy_ups == (1, len(BIG))
    assert worker.own.cached >= len(BIG)
    assert worker.shown == sleeper.shown
    assert sleeper.used == (0, 0, 0)
    assert overview.private >= len(BIG)


def test_what_a_dead_process_did_is_not_forgotten(root: CacheRoot) -> None:
    image = root.image("i", {"big": BIG})
    _, place = root.container(image, "worker")
    observer = Observer(root.engine.db, root.engine.driver)
    with busy_in(place):
        deadline = time.monotonic() + 60
        while not (used := observer.look().containers[0].used).written:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    after = observer.look().containers[0]
    assert after.processes == 0
    assert after.used == used


def values(found: CollectorRegistry, name: str) -> dict[tuple[str, ...], float]:
    return {
        tuple(sample.labels.values()): sample.value
        for metric in found.collect()
        for sample in metric.samples
        if sample.name == f"hpmapper_{name}"
    }


def test_metrics_of_a_root(root: CacheRoot) -> None:
    image = root.image("i", {"big": BIG})
    root.image("j", {"big": BIG, "more": b"m" * MIB})
    root.image("k", {"big": BIG})  # the same layer
    root.container(image, "worker")
    manager = CacheManager(root.engine.db, root.engine.driver)
    found = registry(root.engine, manager, Starts(root.engine.db, root.engine.driver), {"containerd": Calls()})
    assert values(found, "info").keys() == {("hpmapper", values_version())}
    space = values(found, "pool_bytes")
    assert 0 < space[("free",)] < space[("total",)]
    assert values(found, "objects")[()] == 2
    assert values(found, "snapshots")["hpmapper", "active"] == 1
    assert values(found, "ingest_layers_read_total")[()] == 3  # a bare tar does not say before what it is
    assert values(found, "ingest_bytes_not_written_total")[()] == 2 * len(BIG)
    (snapshot,) = root.images.layers(root.images.find("k"))
    diff_id = snapshots.layer(root.engine.db, snapshot.id).diff_id
    root.engine.take_layers([Blob(Expected(diff_id), io.BytesIO)])
    assert values(found, "ingest_layers_known_total")[()] == 1
    assert values(found, "ingest_bytes_not_unpacked_total")[()] >= len(BIG)
    assert values(found, "cache_manager_rounds_total")[()] == 0
    assert values(found, "container_cache_bytes").keys() == {("worker", "own"), ("worker", "image")}
    assert values(found, "page_cache_bytes")["objects", "cached"] >= 0


def values_version() -> str:
    from importlib.metadata import version

    return version("hpmapper")


def test_the_command(private_mounts: None, tmp_path: Path) -> None:
    with cache_root(tmp_path) as root:
        image = root.image("i", {"big": BIG})
        _, place = root.container(image, "worker")
        (place / "big").open("r+b").close()
        root.containers.create(image, "sleeper")
        line = [sys.executable, "-m", "hpmapper.cli.main", "--root", str(tmp_path / "root"), "top"]
        text = subprocess.run(line, capture_output=True, text=True, check=True, timeout=120).stdout
        assert "worker" in text
        assert "sleeper" not in text
        assert "1 (4.0 MiB)" in text
        told = json.loads(
            subprocess.run([*line, "--all", "--json"], capture_output=True, text=True, check=True, timeout=120).stdout
        )
        assert {one["name"]: one["live"] for one in told["containers"]} == {"worker": True, "sleeper": False}
        assert told["pool"]["total"] > told["pool"]["free"] > 0


def test_the_live_view_ends_with_ctrl_c(private_mounts: None, tmp_path: Path) -> None:
    with cache_root(tmp_path) as root:
        root.container(root.image("i", {"big": BIG}), "worker")
        line = [sys.executable, "-m", "hpmapper.cli.main", "--root", str(tmp_path / "root"), "top", "--interval", "0.2"]
        ours, theirs = os.openpty()
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "160", "LINES": "40"}
        process = subprocess.Popen(line, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
        os.close(theirs)
        seen = b""
        while b"worker" not in seen:
            seen += os.read(ours, 65536)
        process.send_signal(signal.SIGINT)
        try:
            while os.read(ours, 65536):
                pass
        except OSError:
            pass  # the terminal's other side is closed
        assert process.wait(60) == 0
        os.close(ours)


def test_a_daemon_tells_its_metrics(private_mounts: None, tmp_path: Path) -> None:
    with cache_root(tmp_path) as root:
        root.container(root.image("i", {"big": BIG}), "worker")
        line = [sys.executable, "-m", "hpmapper.cli.main", "--root", str(tmp_path / "root"), "serve"]
        line += ["--address", str(tmp_path / "h.sock"), "--metrics", str(tmp_path / "m.sock")]
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen(line, stderr=log)
        try:
            deadline = time.monotonic() + 60
            while not (tmp_path / "m.sock").exists():
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            text = asked(UnixConnection(tmp_path / "m.sock"))
        finally:
            process.terminate()
            assert process.wait(60) == 0
        names = {one.name for one in text_string_to_metric_families(text)}
        assert {"hpmapper_pool_bytes", "hpmapper_call_seconds", "process_cpu_seconds"} <= names
        assert not (tmp_path / "m.sock").exists()
