"""The dashboard: taken by Grafana's own types, every panel answered by a real Prometheus that asked a real daemon.

Grafana itself is neither in Debian nor on PyPI or npm, so it is not run. What is: the document goes through the classes
that Grafana generates from its schema; each panel's queries are evaluated by Prometheus as Grafana would ask them; and
what came is drawn, one plot for each panel, into an image that is kept with the test's files.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from hpmapper.bench.gobuild import cache
from tests.cacheroot import MIB, cache_root
from tests.serving import Client, code, eventually

pytestmark = [pytest.mark.kernel, pytest.mark.clients]

DASHBOARD = Path(__file__).parents[2] / "packaging" / "grafana" / "hpmapper.json"

EMPTY_HERE = {"Thin pool in use"}
"""Panels without an answer on a root whose driver is hpmapper."""

_CONFIG = """\
scrape_configs:
  - job_name: hpmapper
    scrape_interval: 1s
    static_configs: [{{targets: ["{target}"]}}]
"""


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return [one for one in found if one["type"] != "row"]


@pytest.fixture(scope="session")
def prometheus() -> str:
    """Debian's Prometheus: the installed one, or its package's, unpacked into the cache."""
    installed = shutil.which("prometheus")
    if installed:
        return installed
    place = cache() / "prometheus"
    program = place / "usr/bin/prometheus"
    if not program.exists():
        place.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["apt-get", "-o", "APT::Sandbox::User=root", "download", "prometheus"],
            cwd=place, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            pytest.fail(f"Prometheus is not installed, and Debian's package cannot be had: {done.stderr}")
        (package,) = place.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", package, place], check=True)
        package.unlink()
    return str(program)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def process(log: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as out:
        running = subprocess.Popen(words, stdout=out, stderr=out)
    try:
        yield running
    finally:
        running.terminate()
        assert running.wait(60) == 0, log.read_text()


class Prometheus:
    def __init__(self, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}/api/v1"

    def ask(self, path: str, **words: object) -> Any:
        with urllib.request.urlopen(f"{self.address}/{path}?{urllib.parse.urlencode(words)}", timeout=30) as answer:
            found = json.load(answer)
        assert found["status"] == "success"
        return found["data"]

    def series(self, expression: str, seconds: int) -> list[dict[str, Any]]:
        """What Grafana is answered for a panel: one series for each set of labels."""
        now = time.time()
        found: list[dict[str, Any]] = self.ask("query_range", query=expression, start=now - seconds, end=now, step=1)[
            "result"
        ]
        return found

    def scrapes(self) -> int:
        found = self.ask("query", query='count_over_time(up{job="hpmapper"}[5m])')["result"]
        return int(float(found[0]["value"][1])) if found else 0


def as_grafana_asks(expression: str) -> str:
    for variable, value in {"$instance": ".*", "$__rate_interval": "5s"}.items():
        expression = expression.replace(variable, value)
    assert "$" not in expression, expression
    return expression


def test_grafanas_own_types_take_the_dashboard() -> None:
    from grafana_foundation_sdk.models.dashboard import Dashboard

    text = json.loads(DASHBOARD.read_text())
    loaded = Dashboard.from_json(text)
    assert (loaded.uid, loaded.title) == ("hpmapper", "hpmapper")
    assert loaded.panels is not None
    assert len(loaded.panels) == len(text["panels"])
    ids = [one["id"] for one in text["panels"]]
    assert len(set(ids)) == len(ids)


def test_no_two_panels_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for one in json.loads(DASHBOARD.read_text())["panels"]:
        at = one["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, one["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_every_panel_is_answered(private_mounts: None, tmp_path: Path, prometheus: str) -> None:
    metrics, port = f"127.0.0.1:{free_port()}", free_port()
    (tmp_path / "prometheus.yml").write_text(_CONFIG.format(target=metrics))
    with cache_root(tmp_path) as root:
        image = root.image("i", {"big": os.urandom(4 * MIB), "other": b"o" * MIB})
        _, place = root.container(image, "worker")
        with (place / "big").open("r+b") as file:
            file.write(b"changed")
        line = [sys.executable, "-m", "hpmapper.cli.main", "--root", str(tmp_path / "root"), "serve"]
        line += ["--address", str(tmp_path / "h.sock"), "--metrics", metrics]
        asking = [
            prometheus, f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/tsdb",
            f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn",
        ]  # fmt: skip
        with process(tmp_path / "daemon.log", *line), process(tmp_path / "prometheus.log", *asking):
            server = Prometheus(port)
            eventually(lambda: (tmp_path / "h.sock").stat())
            client = Client(tmp_path / "h.sock")

            def is_scraped() -> None:
                client.list()  # calls to be counted
                assert code(lambda: client.stat("none")) is grpc.StatusCode.NOT_FOUND
                try:
                    assert server.scrapes() >= 8
                except OSError as error:
                    raise AssertionError("Prometheus does not answer yet") from error

            eventually(is_scraped)
            client.close()
            answers = {
                one["title"]: {
                    target["expr"]: server.series(as_grafana_asks(target["expr"]), 60) for target in one["targets"]
                }
                for one in panels()
            }
    empty = {title for title, found in answers.items() if not any(found.values())}
    assert empty <= EMPTY_HERE, f"panels without data: {sorted(empty)}"
    for title, found in answers.items():
        if title not in EMPTY_HERE:
            assert all(found.values()), f"{title}: no data for {[expr for expr, rows in found.items() if not rows]}"
    drawn = draw(answers, tmp_path / "dashboard.png")
    assert drawn.stat().st_size > 50_000


def draw(answers: Mapping[str, Mapping[str, list[dict[str, Any]]]], target: Path) -> Path:
    """One plot for each panel, at its place on the grid."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = panels()
    height = max(one["gridPos"]["y"] + one["gridPos"]["h"] for one in found)
    figure = Figure(figsize=(24, height / 2))
    FigureCanvasAgg(figure)  # what it is drawn with: no display is needed
    for one in found:
        at = one["gridPos"]
        axes = figure.add_axes(
            (at["x"] / 24 + 0.02, 1 - (at["y"] + at["h"] - 0.8) / height, at["w"] / 24 - 0.03, (at["h"] - 2) / height)
        )
        axes.set_title(one["title"], fontsize=9)
        for target_of, (_, rows) in zip(one["targets"], answers[one["title"]].items(), strict=True):
            for row in rows:
                times, values = zip(*((float(at), float(value)) for at, value in row["values"]), strict=True)
                axes.plot(times, values, label=legend(target_of["legendFormat"], row["metric"]))
        if axes.lines:
            axes.legend(fontsize=6)
    figure.savefig(target)
    return target


def legend(text: str, labels: Mapping[str, str]) -> str:
    for name, value in labels.items():
        text = text.replace("{{" + name + "}}", value)
    return text
