"""What programs read: the JSON of every command that prints facts, on a root that needs no privileges (vfs)."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from hpmapper.cli.main import cli

Facts = Callable[..., Any]


def rootfs(path: Path) -> Path:
    """A tar of a root file system whose files belong to whoever runs the test."""
    with tarfile.open(path, "w") as tar:
        for name, data in (("etc/passwd", b"root:x:0:0::/root:/bin/sh\n"), ("big", bytes(5000))):
            entry = tarfile.TarInfo(name)
            entry.size, entry.uid, entry.gid = len(data), os.getuid(), os.getgid()
            tar.addfile(entry, io.BytesIO(data))
    return path


@pytest.fixture
def facts(tmp_path: Path) -> Facts:
    """Runs a command with --json on a root with one image, and returns what it printed."""
    tar = rootfs(tmp_path / "root.tar")

    def run(*words: str | Path, fails: int = 0) -> Any:
        line = ["--root", tmp_path / "root", "--storage-driver", "vfs", "--storage-opt", "min_free_space=0", "--json"]
        result = CliRunner().invoke(cli, list(map(str, [*line, *words])))
        assert result.exit_code == fails, result.output
        return json.loads(result.stderr if fails else result.stdout)

    run("image", "import", tar, "base:1", "-c", "CMD sh")
    return run


def test_import(facts: Facts, tmp_path: Path) -> None:
    (again,) = facts("image", "import", tmp_path / "root.tar", "base:2", "-c", "CMD sh")
    assert again["names"] == ["docker.io/library/base:1", "docker.io/library/base:2"]
    assert again.keys() == {
        "id", "names", "layers_new", "layers_known", "bytes_stored", "bytes_deduplicated", "bytes_not_read",
        "bytes_not_unpacked", "seconds",
    }  # fmt: skip


def test_image_ls(facts: Facts) -> None:
    (image,) = facts("image", "ls")
    assert image.keys() == {"id", "names", "size", "created"}
    assert image["names"] == ["docker.io/library/base:1"]


def test_image_inspect(facts: Facts) -> None:
    (image,) = facts("image", "inspect", "base:1")
    assert image["config"]["config"]["Cmd"] == ["/bin/sh", "-c", "sh"]
    (layer,) = image["layers"]
    assert image["config"]["rootfs"]["diff_ids"] == [layer["diff_id"]] == [layer["chain_id"]]
    assert layer["entries"] == 2
    assert not layer["damaged"]


def test_image_history(facts: Facts) -> None:
    (step,) = facts("image", "history", "base:1")
    assert step["size"] > 5000
    assert step["comment"]


def test_tags_and_removal(facts: Facts, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["--root", str(tmp_path / "root"), "image", "tag", "base:1", "other"])
    assert result.exit_code == 0
    assert facts("image", "rm", "other") == {"images": [{"name": "other", "removed": False}], "bytes_freed": 0}
    gone = facts("image", "rm", "base:1")
    assert gone["images"] == [{"name": "base:1", "removed": True}]
    assert facts("image", "ls") == []


def test_a_container_from_end_to_end(facts: Facts) -> None:
    made = facts("container", "create", "base:1", "--name", "c")
    assert made["name"] == "c"
    assert facts("container", "create", "base:1", "--name", "c", fails=4)["error"]["kind"] == "AlreadyExists"
    path = Path(facts("container", "mount", "c")["path"])
    (path / "etc" / "new \udcff").write_text("x")
    (path / "big").unlink()
    assert facts("container", "diff", "c") == [
        {"kind": "D", "path": "/big"},
        {"kind": "C", "path": "/etc"},
        {"kind": "A", "path": "/etc/new \udcff"},
    ]
    (listed,) = facts("container", "ls")
    assert listed.keys() == {"name", "image", "image_id", "created", "size", "limit", "running", "mounted"}
    assert (listed["image"], listed["running"], listed["mounted"]) == ("base:1", False, False)
    committed = facts("container", "commit", "c", "changed:1", "-m", "why", "-a", "me")
    assert committed["names"] == ["docker.io/library/changed:1"]
    assert facts("image", "rm", "base:1", fails=5)["error"]["hint"].endswith("hpmapper container rm c")
    assert facts("container", "rm", "c") == {"removed": ["c"]}


def test_info(facts: Facts) -> None:
    info = facts("info")
    assert (info["driver"], info["pool"], info["images"], info["containers"]) == ("vfs", None, 1, 0)
    assert info["free"] <= info["total"] - info["used"]
    assert "reflink" in info["features"]
    assert not info["capabilities"]["mounts"]


def test_drivers(facts: Facts) -> None:
    found = facts("drivers")
    assert [one["name"] for one in found] == ["hpmapper", "overlay", "btrfs", "zfs", "aufs", "devicemapper", "vfs"]
    assert [one["name"] for one in found if one["in_use"]] == ["vfs"]
    assert found[-1]["works"]
    assert all(one["why"] for one in found)


def test_doctor(facts: Facts, tmp_path: Path) -> None:
    found = facts("doctor", "--directory", tmp_path)
    assert found["directory"] == str(tmp_path)
    features = {one["name"]: one for one in found["features"]}
    assert {"reflink", "erofs-file", "runc", "crun", "skopeo", "containerd", "docker"} <= features.keys()
    assert all(one["gives"] and one["detail"] for one in features.values())
    assert all(one["how"] for one in features.values() if not one["available"])


def test_gc_and_fsck(facts: Facts) -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    found = facts("gc")
    assert found.pop("bytes") >= 0  # the disk is others', too
    assert found == {"layers": 0, "objects": 0, "waiting": False}
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
    assert facts("fsck") == {"findings": [], "unrepaired": 0}


def test_a_root_without_a_pool_says_so(facts: Facts) -> None:
    assert "its driver is vfs" in facts("pool", "status", fails=3)["error"]["message"]


def test_a_root_keeps_its_driver(facts: Facts, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["--root", str(tmp_path / "root"), "--storage-driver", "overlay", "info"])
    assert result.exit_code == 5


def test_removing_a_root(facts: Facts, tmp_path: Path) -> None:
    assert facts("pool", "rm", fails=5)["error"]["message"] == "the root has 1 image"
    result = CliRunner().invoke(cli, ["--root", str(tmp_path / "root"), "pool", "rm", "--force"])
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "root").exists()
