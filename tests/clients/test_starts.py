"""containerd's containers: the first start of an image is recorded, and the next cold one is read ahead."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hpmapper.cache.count import count_open
from hpmapper.kernel.sync import syncfs
from tests.clients.containerd import NAMESPACE, ROOT, Containerd
from tests.clients.setups import SETUPS, Case, running
from tests.serving import eventually

pytestmark = [pytest.mark.kernel, pytest.mark.clients]

CASES = [Case("bookworm", "hpmapper"), Case("trixie", "hpmapper"), Case("trixie", "hpmapper-fast")]
"""Debian 12's containerd unpacks itself, through a mount; Debian 13's does that, or has our differ do it."""

_WINDOW = ("--profile-window", "5")


@pytest.fixture(params=CASES, ids=str)
def containerd(request: pytest.FixtureRequest, pool: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Containerd]:
    setup = SETUPS[request.param.setup]
    command = f"{setup.command} {' '.join(_WINDOW)}"
    monkeypatch.setitem(SETUPS, request.param.setup, dataclasses.replace(setup, command=command))
    with running(request.param, pool, Containerd) as found:
        yield found
        found.remove_images()


def ours(containerd: Containerd, *words: str) -> Any:
    line = ["python3", "-m", "hpmapper.cli.main", "--json", "--root", ROOT, *words]
    return json.loads(containerd.machine.run(*line) or "null")


def objects(containerd: Containerd) -> list[Path]:
    return [path for path in containerd.machine.path(f"{ROOT}/pool/o").rglob("*") if path.is_file()]


def make_cold(containerd: Containerd) -> None:
    syncfs(containerd.machine.path(f"{ROOT}/pool"))
    for path in objects(containerd):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert not any(cached(path) for path in objects(containerd))


def cached(path: Path) -> int:
    """Bytes in the page cache. (`count` asks only for files that the kernel knows, and below /proc it never does.)"""
    with path.open("rb") as file:
        return count_open(file.fileno()).cached


def large(containerd: Containerd) -> Path:
    """The object of the image's large file, which the container reads."""
    return max(objects(containerd), key=lambda path: path.stat().st_size)


def ingested(containerd: Containerd) -> None:
    """What containerd unpacked itself has become objects, and nothing is about to change any more."""
    assert objects(containerd)
    layers = containerd.machine.path(f"{ROOT}/pool/a")
    assert not any(
        (layers / name / "u").is_dir() and any((layers / name / "u").iterdir()) for name in os.listdir(layers)
    )


def test_a_start_is_recorded_and_read_ahead(containerd: Containerd, demo: Path) -> None:
    name = containerd.setup.name
    reference = containerd.push(demo, "demo", NAMESPACE)
    containerd.pull(reference, name)
    eventually(lambda: ingested(containerd))
    make_cold(containerd)
    with containerd.container(reference, name, "first") as container:
        container.execute("/bin/sh", "-c", "cat /data/large >/dev/null")
        eventually(lambda: recorded(containerd))
    (found,) = ours(containerd, "profile", "ls")
    assert found["cold"]
    shown = ours(containerd, "profile", "show", "--files", found["chain_id"])
    assert any(one["path"] == "/data/large" for one in shown["files"])

    make_cold(containerd)
    containerd.ctr("snapshots", "--snapshotter", name, "prepare", "probe", found["chain_id"])
    eventually(lambda: is_read_ahead(containerd))
    containerd.ctr("snapshots", "--snapshotter", name, "rm", "probe")

    containerd.machine.run("python3", "-m", "hpmapper.cli.main", "--root", ROOT, "profile", "save",
                           found["chain_id"], "/data/profile.tar")  # fmt: skip
    ours(containerd, "profile", "drop", found["chain_id"])
    assert ours(containerd, "profile", "ls") == []
    assert ours(containerd, "profile", "load", "/data/profile.tar")["objects"] == found["objects"]


def recorded(containerd: Containerd) -> None:
    assert ours(containerd, "profile", "ls")


def is_read_ahead(containerd: Containerd) -> None:
    assert cached(large(containerd)) == -(-large(containerd).stat().st_size // 4096) * 4096
