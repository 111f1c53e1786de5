"""Counting calls, and the endpoint that tells metrics."""

from __future__ import annotations

import http.client
import socket
import stat
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from hpmapper.errors import FailedPrecondition, InvalidArgument
from hpmapper.metrics.collect import Collected, call_metrics
from hpmapper.metrics.serve import serving
from hpmapper.rpc.calls import BOUNDS, Calls
from hpmapper.testing.unixhttp import UnixConnection


def asked(connection: http.client.HTTPConnection) -> str:
    connection.request("GET", "/metrics")
    answer = connection.getresponse()
    assert answer.status == 200
    text = answer.read().decode()
    connection.close()
    return text


def found() -> tuple[CollectorRegistry, Calls]:
    calls, registry = Calls(), CollectorRegistry()
    registry.register(Collected(lambda: call_metrics({"containerd": calls})))
    return registry, calls


def test_calls_are_counted_by_method_and_outcome() -> None:
    calls = Calls()
    for seconds in (0.000_05, 0.0001, 0.3, 1000.0):
        calls.count("S/Prepare", "OK", seconds)
    calls.count("S/Prepare", "NOT_FOUND", 0.001)
    tallies = calls.tallies()
    assert tallies.keys() == {("S/Prepare", "OK"), ("S/Prepare", "NOT_FOUND")}
    fine = tallies["S/Prepare", "OK"]
    assert fine.seconds == pytest.approx(1000.30015)
    assert fine.buckets == (2, *(int(bound == 0.5) for bound in BOUNDS[1:]), 1)


def test_histograms_are_cumulative() -> None:
    registry, calls = found()
    calls.count("S/Stat", "OK", 0.0002)
    calls.count("S/Stat", "OK", 0.2)
    labels = {"front_end": "containerd", "method": "S/Stat", "code": "OK"}
    assert registry.get_sample_value("hpmapper_call_seconds_count", labels) == 2
    assert registry.get_sample_value("hpmapper_call_seconds_bucket", labels | {"le": "0.00025"}) == 1
    assert registry.get_sample_value("hpmapper_call_seconds_bucket", labels | {"le": "0.1"}) == 1
    assert registry.get_sample_value("hpmapper_call_seconds_bucket", labels | {"le": "+Inf"}) == 2


def test_metrics_on_a_unix_socket(tmp_path: Path) -> None:
    registry, calls = found()
    path = tmp_path / "run" / "metrics.sock"
    with serving(str(path), registry):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(FailedPrecondition, match="serves"), serving(str(path), registry):
            pass
        calls.count("S/Stat", "OK", 0.1)
        families = {one.name: one for one in text_string_to_metric_families(asked(UnixConnection(path)))}
        assert families["hpmapper_call_seconds"].samples
    assert not path.exists()


def test_the_socket_of_one_that_was_killed_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "metrics.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with serving(str(path), found()[0]):
        assert "hpmapper_call_seconds" in asked(UnixConnection(path))
    path.write_text("a file")
    with pytest.raises(FailedPrecondition, match="not a socket"), serving(str(path), found()[0]):
        pass


def test_metrics_on_loopback() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with serving(f"localhost:{port}", found()[0]):
        assert "hpmapper_call_seconds" in asked(http.client.HTTPConnection("127.0.0.1", port, timeout=30))


@pytest.mark.parametrize(
    "address", ["0.0.0.0:9469", "192.0.2.1:80", "[::]:80", "example.org:80", "9469", "127.0.0.1:70000", "127.0.0.1:x"]
)
def test_other_addresses_are_refused(address: str) -> None:
    with pytest.raises(InvalidArgument, match="metrics"), serving(address, found()[0]):
        pass
