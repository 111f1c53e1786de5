"""The generated configuration, judged by containerd itself: how it reads the file, and that it starts with it.

Which containerds: those that HPMAPPER_CONTAINERDS names (paths, separated by colons), else the one that is installed;
and with --clients those of other Debian releases.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from hpmapper.cli.main import cli
from hpmapper.cli.state import State
from hpmapper.configure.version import Version, installed
from tests.clients import trees

GIVEN = os.environ.get("HPMAPPER_CONTAINERDS") or shutil.which("containerd")
RELEASES = [pytest.param(release, marks=pytest.mark.clients) for release in ("bookworm", "trixie", "sid")]
DIFF = "io.containerd.service.v1.diff-service"
TRANSFER = "io.containerd.transfer.v1.local"
STARTS = 60.0
"""Seconds after which a containerd that does not answer is taken for one that never will."""


@pytest.fixture(params=[*(GIVEN.split(":") if GIVEN else ["none"]), *RELEASES])
def program(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "none":
        pytest.skip("NOT RUN: there is no containerd here; install it, name some in HPMAPPER_CONTAINERDS, or --clients")
    return str(request.param) if "/" in request.param else _of_release(request.param, tmp_path / "containerd")


def _of_release(release: str, script: Path) -> str:
    """A program that runs a release's containerd, with the release's libraries, on the host's files."""
    tree = trees.made(release)
    loader = next(tree.glob("usr/lib/*-linux-gnu/ld-linux-*.so.*"), None) or next(
        tree.glob("lib/*-linux-gnu/ld-*.so.*")
    )
    places = f"{tree}/usr/{loader.parent.relative_to(tree)}:{loader.parent}"
    script.write_text(f'#!/bin/sh\nexec {loader} --library-path {places} {tree}/usr/bin/containerd "$@"\n')
    script.chmod(0o755)
    return str(script)


def configured(program: str, file: Path, *words: str) -> None:
    result = CliRunner().invoke(
        cli,
        ["config", "containerd", "--program", program, "--file", str(file), "--apply", "--remap-ids", *words],
        obj=State(),
    )
    assert result.exit_code == 0, result.stderr


def output(program: str, *words: str) -> str:
    done = subprocess.run([program, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "unknown key" not in done.stderr.lower(), done.stderr
    return done.stdout


def understood(program: str, file: Path) -> dict[str, Any]:
    """The file as containerd understands it, its defaults included."""
    return tomllib.loads(output(program, "-c", str(file), "config", "dump"))


@pytest.mark.parametrize("start", ["nothing", "defaults"])
def test_containerd_understands_it(program: str, start: str, tmp_path: Path) -> None:
    file, version = tmp_path / "config.toml", installed(program)
    if start == "defaults":
        file.write_text(output(program, "config", "default"))
    before = tomllib.loads(output(program, "config", "default"))
    configured(program, file)
    found = understood(program, file)
    proxy = found["proxy_plugins"]["hpmapper"]
    assert (proxy["type"], proxy["address"]) == ("snapshot", "/run/hpmapper/hpmapper.sock")
    assert _cri(found) == "hpmapper"
    if version >= (1, 7, 23):
        assert proxy["exports"]["root"] == "/var/lib/hpmapper/pool"
        assert "rebase" not in proxy["capabilities"]
        assert "remap-ids" in proxy["capabilities"]
    differs = found["plugins"][DIFF]["default"]
    entries = [
        (entry["snapshotter"], entry["differ"]) for entry in found["plugins"].get(TRANSFER, {}).get("unpack_config", [])
    ]
    if version < (1, 7, 4):
        assert differs == ["walking"]
    else:
        assert differs == ["hpmapper-diff", "walking"]
        assert entries[0] == ("overlayfs", "walking")
    if version >= (2, 0, 0):
        assert entries[-1] == ("hpmapper", "hpmapper-diff")
    for table in ("grpc", "debug", "timeouts", "stream_processors"):
        assert found[table] == before[table]


def _cri(settings: dict[str, Any]) -> str:
    plugins = settings["plugins"]
    if "io.containerd.cri.v1.images" in plugins:
        return str(plugins["io.containerd.cri.v1.images"]["snapshotter"])
    return str(plugins["io.containerd.grpc.v1.cri"]["containerd"]["snapshotter"])


@pytest.mark.kernel
def test_containerd_starts_with_it(program: str, tmp_path: Path) -> None:
    """Every plugin that the file is about loads; containerd asks a proxy nothing before it is used."""
    file = tmp_path / "config.toml"
    version = installed(program)
    file.write_text(
        f'version = 2\nroot = "{tmp_path}/root"\nstate = "{tmp_path}/state"\n'
        # CRI wants a network, and is no business of this test.
        'disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]\n'
        f'[grpc]\naddress = "{tmp_path}/grpc.sock"\n[ttrpc]\naddress = "{tmp_path}/ttrpc.sock"\n'
    )
    configured(program, file)
    with _started(program, file, tmp_path / "grpc.sock") as log:
        pass
    bad = [line for line in log if "failed to load plugin" in line]
    ours = ("hpmapper", "diff-service", "transfer", "service.v1")
    assert not [line for line in bad if any(word in line for word in ours)]
    loaded = "\n".join(line for line in log if "loading plugin" in line)
    assert "io.containerd.snapshotter.v1.hpmapper" in loaded
    assert ("io.containerd.differ.v1.hpmapper-diff" in loaded) == (version >= Version(1, 7, 4))


@contextmanager
def _started(program: str, file: Path, socket: Path) -> Iterator[list[str]]:
    """A containerd that answers; what it logs until it ends is yielded, complete after the block."""
    process = subprocess.Popen([program, "-c", str(file)], stderr=subprocess.PIPE, text=True)
    assert process.stderr
    log: list[str] = []
    reader = threading.Thread(target=log.extend, args=(process.stderr,))
    reader.start()
    try:
        deadline = time.monotonic() + STARTS
        while not any("successfully booted" in line for line in log):
            assert process.poll() is None, "".join(log)
            assert time.monotonic() < deadline, "".join(log)
            time.sleep(0.05)
        assert socket.exists()
        yield log
    finally:
        process.terminate()
        process.wait()
        reader.join()
        process.stderr.close()
