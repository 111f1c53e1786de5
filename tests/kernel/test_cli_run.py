"""`hpmapper run` with real runtimes: what the container sees, how it ends, and that nothing of it stays."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hpmapper.kernel import mount
from hpmapper.runtime.place import Place
from hpmapper.runtime.run import RUNTIMES

pytestmark = pytest.mark.kernel

TOOLS = ("sh", "cat", "chmod", "dd", "env", "id", "ln", "ls", "mkdir", "mknod", "mv", "rm", "sleep", "stat", "touch")
UNIFIED = Path("/sys/fs/cgroup/unified")
"""Where it has controllers, control groups are hybrid, which crun refuses; hidden, they are of version 1."""


def copied_with_libraries(program: Path, root: Path) -> None:
    libraries = re.findall(r"(/\S+) \(0x", subprocess.run(["ldd", program], capture_output=True, text=True).stdout)
    for file in (program, *map(Path, libraries)):
        target = root / str(file).lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, target)


def small_root(root: Path) -> Path:
    """A root file system out of the host's own programs: busybox where it is, else each with its libraries."""
    busybox = shutil.which("busybox")
    (root / "bin").mkdir(parents=True)
    for tool in TOOLS:
        if busybox:
            (root / "bin" / tool).symlink_to("busybox")
        else:
            program = shutil.which(tool)
            assert program is not None
            copied_with_libraries(Path(program).resolve(), root)
            (root / "bin" / tool).unlink(missing_ok=True)
            shutil.copy2(Path(program).resolve(), root / "bin" / tool)
    if busybox:
        shutil.copy2(Path(busybox).resolve(), root / "bin/busybox")
    (root / "etc").mkdir(exist_ok=True)
    (root / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\napp:x:1000:1001::/home/app:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\napp:x:1001:\nextra:x:55:app\n")
    (root / "data/old").mkdir(parents=True)
    (root / "data/old/file").write_text("old\n")
    (root / "data/large").write_bytes(os.urandom(3 << 20))
    return root


class Cli:
    """`hpmapper` on one root, with one OCI runtime."""

    def __init__(self, root: Path, runtime: str) -> None:
        self.root = root
        self._runtime = runtime
        self._words = ["-m", "hpmapper.cli.main", "--root", str(root), "--storage-opt", "pool.size=1G"]
        self._begun: list[subprocess.Popen[bytes]] = []

    def line(self, *words: str | Path) -> list[str]:
        text = [str(word) for word in words]
        if text[0] == "run":
            text[1:1] = ["--runtime", self._runtime]
        elif text[:2] == ["container", "start"]:
            text[2:2] = ["--runtime", self._runtime]
        return [sys.executable, *self._words, *text]

    def done(self, *words: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.line(*words), input=stdin, capture_output=True, text=True, timeout=120, check=False)

    def __call__(self, *words: str | Path, status: int = 0) -> str:
        done = self.done(*words)
        assert done.returncode == status, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def facts(self, *words: str | Path) -> Any:
        return json.loads(self(*words, "--json"))

    def begun(self, *words: str) -> subprocess.Popen[bytes]:
        """A command that goes on."""
        process = subprocess.Popen(self.line(*words), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._begun.append(process)
        return process

    def started(self, *words: str) -> subprocess.Popen[bytes]:
        """A container that has said READY."""
        process = self.begun("run", *words)
        assert process.stdout is not None
        assert process.stdout.readline() == b"READY\n"
        return process

    def close(self) -> None:
        """End what goes on."""
        for process in self._begun:
            with process:
                process.kill()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tar of a small root file system."""
    top = tmp_path_factory.mktemp("image")
    root = small_root(top / "root")
    with tarfile.open(top / "root.tar", "w") as tar:
        tar.add(root, ".")
    return top / "root.tar"


@pytest.fixture(params=RUNTIMES)
def runtime(request: pytest.FixtureRequest) -> Iterator[str]:
    """A runtime, and control groups that it accepts."""
    name: str = request.param
    if shutil.which(name) is None:
        pytest.fail(f"apt install {name} (./test does)")
    controllers = UNIFIED / "cgroup.controllers"
    if name != "crun" or not controllers.exists() or not controllers.read_text().strip():
        yield name
        return
    mount.filesystem("tmpfs", "no-unified-hierarchy", UNIFIED)
    yield name
    mount.umount(UNIFIED)


@pytest.fixture
def cli(runtime: str, tmp_path: Path, image: Path) -> Iterator[Cli]:
    cli = Cli(tmp_path / "root", runtime)
    cli("image", "import", image, "box", "-c", 'CMD ["sh", "-c", "echo the command"]', "-c", "ENV A=image B=image")
    yield cli
    cli.close()
    for container in cli.facts("container", "ls"):
        cli("container", "rm", "-f", container["name"])
    cli("pool", "rm", "--force")
    assert not cli.root.exists()


def test_the_images_settings_and_those_of_the_user(cli: Cli, tmp_path: Path) -> None:
    assert cli("run", "--rm", "box") == "the command\n"
    (tmp_path / "host").mkdir()
    (tmp_path / "host/file").write_text("the host's\n")
    script = "id -u; id -g; id -G; pwd; echo $A $B $HOME $HOSTNAME; cat /mnt/in/file; touch /mnt/in/x || touch /rw/y"
    words = ["-u", "app", "-w", "/made/here", "-e", "A=user", "--hostname", "machine"]
    volumes = ["-v", f"{tmp_path}/host:/mnt/in:ro", "-v", f"{tmp_path}/host:/rw"]
    (tmp_path / "host").chmod(0o777)
    lines = cli("run", "--rm", *words, *volumes, "box", "sh", "-c", script).splitlines()
    assert lines == [
        "1000",
        "1001",
        "1001 55",
        "/made/here",
        "user image /home/app machine",
        "the host's",
    ]
    assert [path.name for path in sorted((tmp_path / "host").iterdir())] == ["file", "y"]


def test_numbers_for_users_and_an_entrypoint(cli: Cli) -> None:
    assert cli("run", "--rm", "--user", "77:88", "box", "sh", "-c", "id -u; id -G").split() == ["77", "88"]
    assert cli("run", "--rm", "--entrypoint", "cat", "box", "/data/old/file") == "old\n"


@pytest.mark.parametrize("status", [0, 1, 7, 255])
def test_the_exit_status_is_the_containers(cli: Cli, status: int) -> None:
    cli("run", "--rm", "box", "sh", "-c", f"exit {status}", status=status)
    cli("run", "--rm", "box", "sh", "-c", "kill -9 $$; sleep 9 & kill -9 $!; wait $!", status=137)


def test_what_cannot_start_says_so_as_docker_does(cli: Cli) -> None:
    cli("run", "--rm", "box", "no-such-program", status=127)
    cli("run", "--rm", "box", "/etc", status=126)
    cli("run", "--rm", "--user", "nobody-here", "box", status=125)
    cli("run", "--rm", "-w", "/etc/passwd/x", "box", status=125)
    cli("run", "no-such-image", status=125)
    assert cli.facts("container", "ls") == [], "--rm holds after failures too"


def test_the_host_is_out_of_reach(cli: Cli) -> None:
    script = "mknod /disk b 254 0 && dd if=/disk of=/dev/null count=1"
    assert cli.done("run", "--rm", "box", "sh", "-c", script).returncode != 0
    for script in (
        "echo 1 > /proc/sys/vm/drop_caches",
        "touch /sys/x",
        "cat /proc/kcore > /dev/null && ls /proc/kcore/x",
    ):
        assert cli.done("run", "--rm", "box", "sh", "-c", script).returncode != 0, script
    assert cli("run", "--rm", "box", "sh", "-c", "echo $$") == "1\n"


def test_standard_input_only_when_asked(cli: Cli) -> None:
    assert cli.done("run", "--rm", "-i", "box", "cat", stdin="words").stdout == "words"
    assert cli.done("run", "--rm", "box", "cat", stdin="words").stdout == ""


def test_mount_points_are_no_changes(cli: Cli, tmp_path: Path) -> None:
    cli("run", "--name", "c", "-v", f"{tmp_path}:/mnt/deep/in", "box", "cat", "/etc/hosts")
    assert cli("container", "diff", "c") == ""
    committed = cli.facts("container", "commit", "c")
    (layer,) = cli.facts("image", "inspect", committed["id"])[0]["layers"][1:]
    assert layer["entries"] == 0 or layer["size"] <= 10240


def test_changes_committed_run_saved_and_brought_back(cli: Cli, tmp_path: Path) -> None:
    script = "rm /data/old/file; chmod 600 /data/large; mkdir /n; echo x > /n/x; ln /n/x /n/y; mv /data/old /moved"
    cli("run", "--name", "c", "box", "sh", "-c", script)
    assert cli("container", "diff", "c").splitlines() == [
        "C /data",
        "C /data/large",
        "D /data/old",
        "A /moved",
        "A /n",
        "A /n/x",
        "A /n/y",
    ]
    assert cli("container", "start", "c", "cat", "/n/y") == "x\n"
    first = cli.facts("container", "commit", "c", "box:2", "-c", 'CMD ["cat", "/n/x"]')
    assert cli("container", "commit", "c", "box:3", "-c", 'CMD ["cat", "/n/x"]').strip() == first["id"]
    assert cli("run", "--rm", "box:2") == "x\n"
    assert cli("run", "--rm", "box:2", "sh", "-c", "ls /data; stat -c %h /n/x").split() == ["large", "2"]
    before = cli.facts("image", "inspect", "box:2")[0]["config"]["rootfs"]
    cli("image", "save", "-o", tmp_path / "saved", "box:2")
    cli("container", "rm", "c")
    cli("image", "rm", "box", "box:2", "box:3")
    assert cli.facts("info")["objects"] == 0
    cli("image", "import", tmp_path / "saved")
    assert cli.facts("image", "inspect", "box:2")[0]["config"]["rootfs"] == before
    assert cli("run", "--rm", "box:2") == "x\n"
    assert cli("fsck") == "all is well\n"


def test_a_program_without_a_handler_ends_as_any_other_would(cli: Cli) -> None:
    process = cli.started("--rm", "box", "sh", "-c", "echo READY; exec sleep 100")
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM
    assert cli.facts("container", "ls") == []


def test_a_handler_gets_the_signal(cli: Cli) -> None:
    script = 'trap "exit 3" INT TERM; echo READY; while :; do sleep 0.05; done'
    for number in (signal.SIGINT, signal.SIGTERM):
        process = cli.started("--rm", "box", "sh", "-c", script)
        process.send_signal(number)
        assert process.wait(20) == 3


def test_whoever_ignores_signals_is_killed_at_the_third(cli: Cli) -> None:
    process = cli.started("--rm", "box", "sh", "-c", 'trap "" TERM; echo READY; while :; do sleep 0.05; done')
    for _ in range(3):
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM


def test_a_running_container_is_left_alone(cli: Cli) -> None:
    process = cli.started("--name", "c", "box", "sh", "-c", "echo READY; exec sleep 100")
    (listed,) = cli.facts("container", "ls")
    assert listed["running"]
    assert listed["mounted"]
    for words in (
        ["container", "rm", "c"],
        ["container", "umount", "c"],
        ["pool", "detach"],
        ["pool", "rm", "--force"],
    ):
        cli(*words, status=5)
    cli("container", "start", "c", "box", status=125)
    cli("container", "rm", "-f", "c")
    assert process.wait(20) == 137
    assert cli.facts("container", "ls") == []


def test_a_container_whose_hpmapper_was_killed_is_still_guarded(cli: Cli) -> None:
    process = cli.started("--name", "c", "box", "sh", "-c", "echo READY; exec sleep 100")
    process.kill()
    process.wait()
    cli("container", "rm", "c", status=5)
    cli("container", "rm", "-f", "c")
    assert cli.facts("container", "ls") == []


def test_a_container_whose_runtime_was_killed_too_is_ended_before_its_data_goes(cli: Cli) -> None:
    process = cli.started("--name", "c", "box", "sh", "-c", "echo READY; exec sleep 97531")
    (runtime,) = runtimes(process.pid)
    (first,) = children(runtime)
    for pid in (process.pid, runtime):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert is_alive(first)
    cli("container", "rm", "c")
    assert not is_alive(first)


def test_what_a_runtime_forgot_is_ended_too(cli: Cli) -> None:
    process = cli.started("--name", "c", "box", "sh", "-c", "echo READY; exec sleep 97531")
    (runtime,) = runtimes(process.pid)
    (first,) = children(runtime)
    for pid in (process.pid, runtime):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    shutil.rmtree(Place(cli.root, "c").state / "c")
    cli("container", "rm", "c")
    assert not is_alive(first)


def children(pid: int) -> list[int]:
    texts = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(word) for text in texts for word in text.split()]


def runtimes(pid: int) -> list[int]:
    """The OCI runtime among a process's children: another may record the image's first start."""
    return [child for child in children(pid) if Path(f"/proc/{child}/comm").read_text().strip() in RUNTIMES]


def is_alive(pid: int) -> bool:
    try:
        return "sleep" in Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_terminal(cli: Cli) -> None:
    script = 'test -t 0 && test -t 1 && echo "term=$TERM READY"; read word; echo "got $word"; exit 4'
    status, output = on_a_terminal(cli.line("run", "--rm", "-it", "box", "sh", "-c", script), {"READY": "hello\n"})
    assert (status, "term=xterm" in output, "got hello" in output) == (4, True, True), output


def test_ctrl_c_on_the_hosts_terminal_ends_the_container(cli: Cli) -> None:
    line = cli.line("run", "--rm", "box", "sh", "-c", "echo READY; exec sleep 100")
    status, output = on_a_terminal(line, {"READY": "\x03"})
    assert status == 128 + signal.SIGINT, output
    assert cli.facts("container", "ls") == []


def on_a_terminal(line: list[str], answers: dict[str, str]) -> tuple[int, str]:
    """Run `line` on a new terminal, typing an answer once its question was seen."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvp(line[0], line)
    output = b""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if not select.select([terminal], [], [], 0.1)[0]:
            continue
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # EIO: nobody has the other end any more
            break
        output += piece
        for question in [one for one in answers if one.encode() in output]:
            time.sleep(0.3)
            os.write(terminal, answers.pop(question).encode())
    else:
        os.kill(pid, signal.SIGKILL)
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), output.decode(errors="replace")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_import_that_is_ended_leaves_nothing(cli: Cli, image: Path, number: signal.Signals) -> None:
    process = cli.begun("image", "import", "-", "slow")
    assert process.stdin is not None
    process.stdin.write(image.read_bytes()[: 1 << 20])
    process.stdin.flush()
    wait_for(lambda: any((cli.root / "pool/t").iterdir()))
    process.send_signal(number)
    assert process.wait(20) == 128 + number
    assert list((cli.root / "pool/t").iterdir()) == []
    assert len(cli.facts("image", "ls")) == 1
    assert cli("fsck") == "all is well\n"


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
