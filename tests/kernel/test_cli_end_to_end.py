"""The command line as a user types it: an image comes in, containers run with a real OCI runtime, all goes again."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpmapper.kernel import btrfs, mount
from hpmapper.pool.base import MIB, PoolFs
from hpmapper.runtime.run import RUNTIMES
from tests.filesystems import mounted

pytestmark = pytest.mark.kernel

BUSYBOX = Path("/bin/busybox")
HYBRID = Path("/sys/fs/cgroup/unified")


class Cli:
    """`hpmapper` on one root."""

    def __init__(self, root: Path) -> None:
        self.command = [sys.executable, "-m", "hpmapper.cli.main", "--root", str(root), "--storage-opt=pool.size=400M"]

    def run(self, *words: str | Path, status: int = 0) -> str:
        """What it prints; the exit status must be `status`."""
        done = subprocess.run(
            [*self.command, *map(str, words)], capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == status, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def json(self, *words: str | Path) -> object:
        return json.loads(self.run(*words, "--json"))


def busybox_root(directory: Path) -> Path:
    """A root file system with a shell, two users and a large file."""
    for name in ("bin", "etc", "tmp", "proc", "sys", "dev", "data"):
        (directory / name).mkdir(parents=True)
    shutil.copy2(BUSYBOX, directory / "bin/busybox")
    for applet in ("sh", "cat", "echo", "id", "pwd", "env", "dd", "mv", "rm", "ls", "sleep", "chmod"):
        (directory / "bin" / applet).symlink_to("busybox")
    (directory / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\nuser:x:1234:1234::/data:/bin/sh\n")
    (directory / "etc/group").write_text("root:x:0:\nuser:x:1234:\nextra:x:55:user\n")
    (directory / "data/large").write_bytes(hashlib.sha256(b"large").digest() * 65536)
    (directory / "data/small").write_text("small\n")
    return directory


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    assert BUSYBOX.exists(), "apt install busybox-static (./test does)"
    cli = Cli(tmp_path / "root")
    cli.run("image", "import", busybox_root(tmp_path / "busybox"), "box", "--change", 'CMD ["sh"]')
    yield cli
    for one in json.loads(cli.run("container", "ls", "--json")):
        cli.run("container", "rm", "-f", one["name"])
    cli.run("pool", "detach")


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_container_runs_as_asked(cli: Cli, runtime: str, tmp_path: Path) -> None:
    if shutil.which(runtime) is None:
        pytest.fail(f"apt install {runtime} (./test does)")
    if runtime == "crun" and HYBRID.exists():
        # crun gives up on hosts with both versions of cgroups mounted; hpmapper takes runc there of itself.
        cli.run("run", "--rm", "--runtime", runtime, "box", "sh", status=125)
        return
    (tmp_path / "host").mkdir()
    (tmp_path / "host/file").write_text("from the host\n")
    script = "id -u; id -G; pwd; echo $WORD; cat /mnt/file"
    out = cli.run("run", "--rm", "--runtime", runtime, "--user", "user", "-w", "/data", "-e", "WORD=said",
                  "-v", f"{tmp_path}/host:/mnt:ro", "box", "sh", "-c", script)  # fmt: skip
    assert out.split("\n")[:5] == ["1234", "1234 55", "/data", "said", "from the host"]
    cli.run("run", "--rm", "--runtime", runtime, "box", "sh", "-c", "exit 7", status=7)
    assert cli.run("container", "ls", "--json").strip() == "[]"


def test_changes_are_seen_committed_saved_and_brought_back(cli: Cli, tmp_path: Path) -> None:
    script = "echo new > /data/new; rm /data/small; chmod 600 /data/large; mv /tmp /moved"
    cli.run("run", "--name", "one", "box", "sh", "-c", script)
    changes = cli.run("container", "diff", "one").split("\n")
    assert {"C /data", "A /data/new", "D /data/small", "C /data/large", "D /tmp", "A /moved"} <= set(changes)
    cli.run("container", "commit", "one", "box:2")
    assert cli.run("run", "--rm", "box:2", "sh", "-c", "cat /data/new; ls /data").split() == ["new", "large", "new"]
    cli.run("image", "save", "-o", tmp_path / "saved.tar", "box:2")
    before = diff_ids(tmp_path / "saved.tar")
    cli.run("container", "rm", "one")
    cli.run("image", "rm", "box:2", "box")
    cli.run("image", "import", tmp_path / "saved.tar")
    cli.run("image", "save", "-o", tmp_path / "again.tar", "box:2")
    assert diff_ids(tmp_path / "again.tar") == before
    assert cli.run("run", "--rm", "box:2", "cat", "/data/new") == "new\n"
    cli.run("fsck")


def diff_ids(archive: Path) -> list[str]:
    """The DiffIDs in a Docker archive's config."""
    with tarfile.open(archive) as tar:
        manifest = tar.extractfile("manifest.json")
        assert manifest is not None
        config = tar.extractfile(json.load(manifest)[0]["Config"])
        assert config is not None
        return list(json.load(config)["rootfs"]["diff_ids"])


def test_a_container_keeps_no_more_than_it_may(tmp_path: Path) -> None:
    cli = Cli(tmp_path / "root")
    cli.run("pool", "create", "--fs", "btrfs")
    cli.run("image", "import", f"dir:{busybox_root(tmp_path / 'rootfs')}", "busybox")
    cli.run("container", "create", "--name", "limited", "--size", "16M", "busybox")
    fill = ("dd", "if=/dev/zero", "of=/data/new", "bs=1M", "count=40")
    cli.run("container", "start", "limited", *fill, status=1)
    listed = cli.json("container", "ls")
    assert isinstance(listed, list)
    (facts,) = listed
    assert facts["limit"] == 16 << 20
    assert 15 << 20 < facts["size"] <= 16 << 20
    cli.run("container", "rm", "limited")
    cli.run("run", "--rm", "busybox", *fill)
    cli.run("container", "create", "--size", "16", "busybox", status=2)
    assert cli.json("container", "ls") == []
    cli.run("pool", "rm", "--force")


@pytest.mark.parametrize("kind", ["loop", "directory"])
def test_the_btrfs_driver_on_a_pool_of_its_own_and_in_a_directory(kind: str, tmp_path: Path) -> None:
    cli = Cli(tmp_path / "root")
    cli.command.append("--storage-driver=btrfs")
    if kind == "directory":
        place = mounted(PoolFs.BTRFS, tmp_path, 400 * MIB) / "place"
        cli.command.remove("--storage-opt=pool.size=400M")  # it has the size of what it stands on
        cli.run("pool", "create", "--directory", place)
    else:
        cli.run("pool", "create", "--fs", "btrfs")
    cli.run("image", "import", busybox_root(tmp_path / "busybox"), "box")
    cli.run("run", "--name", "one", "box", "sh", "-c", "echo new > /data/new; rm /data/small; mv /tmp /moved")
    changes = cli.run("container", "diff", "one").split("\n")
    assert {"C /data", "A /data/new", "D /data/small", "D /tmp", "A /moved"} <= set(changes)
    cli.run("container", "commit", "one", "box:2")
    assert cli.run("run", "--rm", "box:2", "cat", "/data/new") == "new\n"
    cli.run("fsck")
    cli.run("pool", "rm", "--force")
    if kind == "directory":
        assert btrfs.nested(place.parent, 5) == []
        mount.umount(place.parent)


def test_a_limit_where_there_is_none_is_refused(tmp_path: Path) -> None:
    cli = Cli(tmp_path / "root")
    cli.command += ["--storage-driver=vfs", "--storage-opt=min_free_space=0"]  # the disk is others', too
    cli.run("image", "import", f"dir:{busybox_root(tmp_path / 'rootfs')}", "busybox")
    with_limit = subprocess.run(
        [*cli.command, "run", "--size", "1G", "busybox", "true"], capture_output=True, text=True, check=False
    )
    if with_limit.returncode == 0:
        pytest.skip("the host's own file system has project quota")
    assert with_limit.returncode == 125
    assert "cannot limit sizes" in with_limit.stderr
    assert cli.json("container", "ls") == []
    cli.run("pool", "rm", "--force")


def test_the_pool_grows_while_a_container_runs(cli: Cli) -> None:
    running = subprocess.Popen([*cli.command, "run", "--name", "long", "box", "sleep", "60"])
    try:
        wait_until_running(cli)
        cli.run("pool", "grow", "500M")
        cli.run("container", "rm", "long", status=5)
    finally:
        running.send_signal(signal.SIGTERM)
        assert running.wait(30) != 0
    assert "500" in cli.run("pool", "status")


def wait_until_running(cli: Cli) -> None:
    deadline = time.monotonic() + 30
    while '"mounted": true' not in cli.run("container", "ls", "--json"):
        assert time.monotonic() < deadline, "the container does not start"
        time.sleep(0.1)


def test_an_import_that_is_interrupted_leaves_nothing(cli: Cli) -> None:
    """Ctrl-C reaches both ends of a pipe: the import is interrupted, and its input ends."""
    words = [*cli.command, "image", "import", "-", "slow"]
    importing = subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert importing.stdin is not None
    importing.stdin.write(tar_of(BUSYBOX)[:-4096])
    importing.stdin.flush()
    time.sleep(1)
    importing.send_signal(signal.SIGINT)
    importing.stdin.close()
    assert importing.wait(30) == 130
    cli.run("image", "inspect", "slow", status=3)
    cli.run("fsck")


def tar_of(file: Path) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        tar.add(file, file.name)
    return out.getvalue()
