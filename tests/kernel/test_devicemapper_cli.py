"""The command line on a root with thin pools: what an operator types, and what it answers."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from hpmapper.cli.main import cli
from hpmapper.kernel import dm, mount
from tests.unit.test_cli_json import rootfs

pytestmark = [pytest.mark.kernel, pytest.mark.guest("dm", short=True), pytest.mark.timeout(1200)]

Run = Callable[..., str]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Docker's daemon.json, as it was written for its devicemapper driver."""
    file = tmp_path / "daemon.json"
    options = ["dm.basesize=512M", "dm.loopdatasize=2G", "dm.loopmetadatasize=64M", "dm.min_free_space=5%"]
    options += ["dm.mountopt=nodiscard", "dm.mountopt=logbsize=32k"]
    file.write_text(json.dumps({"storage-driver": "devicemapper", "storage-opts": options, "debug": True}))
    return file


@pytest.fixture
def run(tmp_path: Path, config: Path) -> Iterator[Run]:
    """Runs a command line; returns what it printed."""

    def invoke(*words: str | Path, status: int = 0) -> str:
        line = ["--root", str(tmp_path / "root"), "--config", str(config), *map(str, words)]
        result = CliRunner().invoke(cli, line)
        assert result.exit_code == status, (words, result.output)
        return result.output

    yield invoke
    invoke("pool", "rm", "--force")
    assert not [name for name in dm.devices() if "hpmapper-" in name]


def _json(run: Run, *words: str | Path, status: int = 0) -> Any:
    return json.loads(run("--json", *words, status=status))


def test_a_root_on_a_thin_pool(run: Run, tmp_path: Path) -> None:
    """Made, looked at, watched, grown, checked, repaired, trimmed; images and containers on it meanwhile."""
    assert "Pool Blocksize" in run("pool", "create")
    run("image", "import", rootfs(tmp_path / "root.tar"), "base:1", "-c", "CMD sh")
    assert run("container", "create", "--name", "one", "base:1") == "one\n"
    root = Path(run("container", "mount", "one").strip())
    assert (root / "etc/passwd").exists()
    assert "logbsize=32k" in next(one.super_options for one in mount.mounts() if one.target == str(root))
    (root / "big2").write_bytes(os.urandom(3 << 20))
    (root / "big").unlink()
    os.sync()
    assert run("container", "diff", "one").splitlines() == ["D /big", "A /big2"]

    cached = _json(run, "cache", "stat")
    assert cached["containers_own"]["cached"] >= 3 << 20  # all of a container's device is its own
    assert cached["devices"]
    assert _json(run, "cache", "duplicates") == []
    assert _json(run, "top")["containers"][0]["name"] == "one"

    info = _json(run, "info")
    assert info["driver"] == "devicemapper"
    assert info["status"]["Base Device Size"] == "536.9MB"
    assert info["status"]["Backing Filesystem"] == "xfs"
    assert "Pool Mode" in run("pool", "status")

    assert run("pool", "watch").startswith("OK: hpmapper-")
    assert run("pool", "watch", "--warning", "0.1", status=1).startswith("WARNING: ")
    assert "data=" in run("pool", "watch", "--critical", "0.1", status=2)
    metrics = run("pool", "watch", "--metrics")
    assert re.search(r'^hpmapper_thinpool_data_used_ratio\{pool="hpmapper-[^"]+"\} 0\.\d+$', metrics, re.MULTILINE)

    rows = {row["owner"]: row for row in _json(run, "pool", "usage")}
    assert rows.keys() == {"base", "layer 1", "snapshot 2"}
    assert rows["snapshot 2"]["exclusive"] >= 3 << 20
    assert rows["snapshot 2"]["changed"] >= 3 << 20
    assert rows["snapshot 2"]["mapped"] > rows["snapshot 2"]["exclusive"]

    grown = _json(run, "pool", "grow", "3G", "--metadata", "80M")
    assert grown == {"data": 3 << 30, "metadata": 80 << 20}
    run("pool", "grow", "1G", status=2)
    run("pool", "grow", "4G", "--add-device", "/dev/null", status=2)

    (root / "big2").unlink()
    os.sync()
    assert _json(run, "pool", "trim")["bytes_trimmed"] > 3 << 20
    assert run("pool", "check").startswith("sound")
    assert (root / "etc/passwd").exists()

    run("container", "umount", "one")
    device = _json(run, "container", "mount", "--as-block", "one")
    assert Path(device["path"]).is_block_device()
    assert (device["filesystem"], device["options"], device["root"]) == ("xfs", "nouuid", "layer/diff")
    run("container", "mount", "one", status=5)
    run("container", "umount", "one")

    run("pool", "detach")
    assert not [name for name in dm.devices() if "hpmapper-" in name]
    assert run("pool", "watch", status=3).startswith("UNKNOWN: ")
    assert run("pool", "check").startswith("sound")
    assert "the metadata is sound" in run("pool", "repair")
    run("pool", "detach")
    run("pool", "activate")
    assert (Path(run("container", "mount", "one").strip()) / "etc/passwd").exists()
    assert run("fsck") == "all is well\n"
    run("container", "umount", "one")


def test_damaged_metadata_is_rebuilt(run: Run, tmp_path: Path) -> None:
    """thin_repair makes the metadata anew from what can be read; the damaged one is kept."""
    run("image", "import", rootfs(tmp_path / "root.tar"), "base:1", "-c", "CMD sh")
    run("pool", "detach")
    metadata = tmp_path / "root/devicemapper/metadata"
    with metadata.open("r+b") as file:  # a space map's index: mappings are found without it
        superblock = file.read(4096)
        file.seek(int.from_bytes(superblock[64 + 16 : 64 + 24], "little") * 4096)
        file.write(os.urandom(4096))
    assert run("pool", "check", status=8).startswith("damaged")
    assert "rebuilt" in run("pool", "repair")
    assert (tmp_path / "root/devicemapper/metadata.damaged").exists()
    run("container", "create", "--name", "one", "base:1")
    assert (Path(run("container", "mount", "one").strip()) / "etc/passwd").exists()
    run("container", "umount", "one")
