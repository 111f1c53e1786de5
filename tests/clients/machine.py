"""A Debian release at work beside the host: its tree as root, with mounts, processes and a network of its own.

    with Machine(trees.made("trixie"), data) as machine:
        daemon = machine.start("containerd", "containerd", "--config", "/data/containerd.toml")
        machine.run("ctr", "version")

All that runs in it ends with it, and so do its mounts. The tree stays as it is: changes go to a tmpfs over it. `data`
is /data in the machine, on the host's file system; the sources of hpmapper are at /hpmapper.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Self

SOURCES = Path(__file__).parents[2] / "src"

START_TIMEOUT = 60.0
STOP_TIMEOUT = 60.0
LAST_WORDS = 2000
"""Of a program that failed, characters to show."""

# runc calls pivot_root, which a mere chroot would refuse: the tree has to be the root of its mount namespace.
# A shell as process 1, for it reaps what containers' shims leave behind.
_BEGIN = """\
top=$1 tree=$2 data=$3 sources=$4 packages=$5
mount -t tmpfs -o mode=755 machine "$top"
mkdir "$top/upper" "$top/work" "$top/root"
mount -t overlay -o "lowerdir=$tree,upperdir=$top/upper,workdir=$top/work" machine "$top/root"
cd "$top/root"
mkdir -p data hpmapper packages
mount -t proc proc proc
mount --rbind /sys sys
mount --rbind /dev dev
mount -t tmpfs -o mode=755 run run
mount -t tmpfs -o mode=1777 tmp tmp
mount --bind "$data" data
mount --bind -o ro "$sources" hpmapper
mount --bind -o ro "$packages" packages
mount --make-rprivate .
pivot_root . mnt
cd /
umount --lazy mnt
ip link set lo up
touch etc/resolv.conf && echo "127.0.0.1 localhost" >etc/hosts
echo ready
trap : TERM
sleep infinity & wait $!
"""

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Failed(Exception):
    """A program in a machine failed."""


class Daemon:
    """A program that goes on in a machine. `log` is its output."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self.log = log

    @property
    def pid(self) -> int:
        """The program's number as the host sees it: nsenter's child, for it entered the machine's processes."""
        return int(Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()[0])

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; the exit status, as of subprocess."""
        if not self.ended:
            os.kill(self.pid, number)
        return self._process.wait(STOP_TIMEOUT)


class Machine:
    """See the module's text; alive inside a `with`.

    Args:
        packages: a directory of Python packages for the tree's interpreter, which hpmapper needs there.
    """

    def __init__(self, tree: Path, data: Path, packages: Path) -> None:
        self.data = data
        self._tree = tree
        self._packages = packages
        self._holder: subprocess.Popen[str] | None = None
        self._daemons: list[Daemon] = []
        self._init = 0

    def __enter__(self) -> Self:
        top = self.data / ".machine"
        top.mkdir(parents=True)
        places = map(str, (top, self._tree, self.data, SOURCES, self._packages))
        kinds = ["--mount", "--pid", "--net", "--uts", "--ipc", "--fork", "--kill-child"]
        command = ["unshare", *kinds, "--propagation=private", "sh", "-ec", _BEGIN, "sh", *places]
        self._holder = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "ready\n":
            self._end()
            raise Failed("the machine did not start: see what it said on standard error")
        pid = self._holder.pid
        self._init = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        """End process 1, with which the kernel ends all others, and their mounts."""
        assert self._holder is not None
        with self._holder:
            self._holder.kill()
        for daemon in self._daemons:
            daemon._process.wait(STOP_TIMEOUT)
        (self.data / ".machine").rmdir()

    def _inside(self, words: tuple[str, ...], environment: Mapping[str, str]) -> list[str]:
        enter = ["nsenter", f"--target={self._init}", "--mount", "--pid", "--net", "--uts", "--ipc", "--root"]
        values = {"PATH": _PATH, "HOME": "/root", "LC_ALL": "C.UTF-8", "PYTHONPATH": "/hpmapper:/packages"}
        values |= environment
        return [*enter, "env", "-i", "--chdir=/", *(f"{name}={value}" for name, value in values.items()), *words]

    def run(self, *words: str, stdin: IO[bytes] | None = None, environment: Mapping[str, str] | None = None) -> str:
        """A program's standard output.

        Raises:
            Failed: its status was not 0.
        """
        return self.bytes(*words, stdin=stdin, environment=environment).decode()

    def bytes(self, *words: str, stdin: IO[bytes] | None = None, environment: Mapping[str, str] | None = None) -> bytes:
        command = self._inside(words, environment or {})
        done = subprocess.run(command, stdin=stdin or subprocess.DEVNULL, capture_output=True, check=False)
        if done.returncode:
            said = (done.stdout + done.stderr).decode(errors="replace")[-LAST_WORDS:]
            raise Failed(f"{' '.join(words)}: status {done.returncode}\n{said}")
        return done.stdout

    def start(self, name: str, *words: str, environment: Mapping[str, str] | None = None) -> Daemon:
        """Start a program that goes on; its output goes to `name`.log in the data directory."""
        log = self.data / f"{name}.log"
        with log.open("ab") as out:
            command = self._inside(words, environment or {})
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        daemon = Daemon(process, log)
        self._daemons.append(daemon)
        return daemon

    def wait(self, daemon: Daemon, ready: Callable[[], object]) -> None:
        """Wait until `ready` neither raises `Failed` nor gives something false.

        Raises:
            Failed: the daemon ended, or it took too long.
        """
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            try:
                if ready():
                    return
            except Failed as error:
                last: Failed | None = error
            else:
                last = None
            if daemon.ended or time.monotonic() > deadline:
                words = daemon.log.read_text(errors="replace")[-LAST_WORDS:]
                raise Failed(f"{daemon.log.name} is not ready: {words}") from last
            time.sleep(0.05)

    def answers(self, socket_path: str) -> bool:
        """Whether somebody listens on a unix socket of the machine."""
        with socket.socket(socket.AF_UNIX) as client:
            try:
                client.connect(str(self.path(socket_path)))
            except OSError:
                return False
        return True

    def mounts(self, below: str = "/") -> list[str]:
        """Mount points at and below a path of the machine."""
        table = Path(f"/proc/{self._init}/mountinfo").read_text().splitlines()
        prefix = below.rstrip("/") + "/"
        return [target for target in (line.split()[4] for line in table) if f"{target}/".startswith(prefix)]

    def path(self, inside: str) -> Path:
        """Where the host finds a path of the machine, those below the machine's own /proc included."""
        return Path(f"/proc/{self._init}/root{inside}")
