"""Runs a container in the foreground with crun or runc, and takes away whatever that needed.

    with place.held() as lock:
        status = Runner(find_runtime(None), place, lock).run(root, defaults, options)

The runtime passes signals on to the container's first process. The kernel, however, gives that process no signal that
it has no handler for, where any other process would end (pid_namespaces(7)): that is made up for here.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hpmapper.errors import FailedPrecondition, HpmapperError, Unsupported
from hpmapper.runtime import users
from hpmapper.runtime.inside import Made, make_directories, make_file, unmake
from hpmapper.runtime.place import Place
from hpmapper.runtime.spec import Defaults, Json, Options, encode, make_spec

RUNTIMES = ("crun", "runc")
"""In the order in which they are preferred: crun starts faster."""

_PASSED_ON = frozenset((signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2))
_AWAITED = _PASSED_ON | {signal.SIGCHLD}
_PATIENCE = 3
"""Signals after which a container that does not end is killed, as by `docker run`."""


_START_SECONDS = 5.0


class NotStarted(HpmapperError):
    """The runtime could not start the container. `status`: what a shell would say."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def find_runtime(name: str | None) -> Path:
    """The OCI runtime of that name or path, or the first that is installed.

    Raises:
        Unsupported: there is none.
    """
    for candidate in (name,) if name else RUNTIMES[:: -1 if _is_hybrid() else 1]:
        found = shutil.which(candidate)
        if found:
            return Path(found)
    raise Unsupported(
        f"the OCI runtime {name!r} is not installed" if name else "no OCI runtime is installed",
        hint="apt install crun (or runc)",
    )


def require_terminal(options: Options) -> None:
    """Raise FailedPrecondition if a terminal is wanted where there is none."""
    if options.terminal and not sys.stdin.isatty():
        raise FailedPrecondition("standard input is not a terminal", hint="leave out -t")


def _is_hybrid() -> bool:
    """Whether control groups of both versions have controllers, which crun refuses (crun 1.8, libcrun/cgroup.c)."""
    try:
        return bool(Path("/sys/fs/cgroup/unified/cgroup.controllers").read_text().strip())
    except OSError:
        return False


class Runner:
    """Runs one container once."""

    def __init__(self, runtime: Path, place: Place, lock: int) -> None:
        self._runtime = runtime
        self._place = place
        self._lock = lock

    def run(self, root: Path, defaults: Defaults, options: Options) -> int:
        """Run it on the root file system at `root` until it ends; returns its exit status, 128+N after signal N.

        Raises:
            NotStarted: the runtime refused.
            InvalidArgument, NotFound: the options do not fit the image.
        """
        account = users.resolve(root, options.user if options.user is not None else defaults.user)
        place = self._place
        spec = make_spec(root, (place.name, place.cgroup), defaults, options, account)
        (place.bundle / "config.json").write_bytes(encode(spec))
        _make_workdir(root, spec)
        with _mount_points(root, spec), _terminal_kept(options):
            place.will_use(self._runtime)
            return self._supervised(options)

    def _supervised(self, options: Options) -> int:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _AWAITED)
        try:
            process = self._start(options, before)
            status = self._wait(process)
        finally:
            while signal.sigtimedwait(_AWAITED, 0):
                pass  # meant for a container that has ended
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._raise_if_not_started(status)
        return status

    def _start(self, options: Options, mask: set[int | signal.Signals]) -> subprocess.Popen[bytes]:
        bundle = self._place.bundle
        command: list[str | Path] = [self._runtime, "--root", self._place.state]
        command += ["--log", bundle / "log", "--log-format", "json"]
        command += ["run", "--bundle", bundle, "--pid-file", bundle / "pid", self._place.name]
        return subprocess.Popen(
            command,
            stdin=None if options.interactive or options.terminal else subprocess.DEVNULL,
            pass_fds=(self._lock,),
            preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, mask),  # no threads run here
        )

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        """Wait for the runtime's end, passing signals on meanwhile."""
        received, killed_by = 0, 0
        while process.poll() is None:
            info = signal.sigwaitinfo(_AWAITED)
            if info.si_signo == signal.SIGCHLD:
                continue
            received += 1
            self._await_start(process)
            if not self._handles(info.si_signo) or received >= _PATIENCE:
                killed_by = info.si_signo
                self._kill(process)
            elif info.si_code <= 0:  # sent by a process; a terminal's signal went to the runtime as well
                process.send_signal(info.si_signo)
        status = process.returncode
        return 128 + killed_by if killed_by else 128 - status if status < 0 else status

    def _await_start(self, process: subprocess.Popen[bytes]) -> None:
        """runc says a moment after the start only which process is the first."""
        deadline = time.monotonic() + _START_SECONDS
        while self._first_process() is None and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        if self._first_process() is None:
            process.kill()  # it has not started anything yet, or `Place.held` takes it away
        else:
            self._place.kill()

    def _handles(self, number: int) -> bool:
        """Whether the container's first process has a handler for the signal, or ignores it on purpose."""
        pid = self._first_process()
        if pid is None:
            return False
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except FileNotFoundError:
            return True  # it has just ended
        masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigCgt:", "SigIgn:"))]
        return any(mask >> (number - 1) & 1 for mask in masks)

    def _first_process(self) -> int | None:
        try:
            return int((self._place.bundle / "pid").read_text())
        except (FileNotFoundError, ValueError):
            return None

    def _raise_if_not_started(self, status: int) -> None:
        message = self._complaint() if status else None
        if message is None:
            return
        text = message.lower()
        # runc 1.1.15 finds out itself that a program is a directory; execve(2) says EACCES.
        refused = any(words in text for words in ("permission denied", "not permitted", "is a directory"))
        code = 126 if refused else 127 if "no such file" in text or "executable file not found" in text else 125
        raise NotStarted(f"{self._runtime.name} could not start the container, for the reason that it gave", code)

    def _complaint(self) -> str | None:
        """The last error in the runtime's log."""
        try:
            lines = (self._place.bundle / "log").read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return None
        for line in reversed(lines):
            try:
                entry = json.loads(line)
            except ValueError:
                return line
            if entry.get("level") in ("error", "fatal"):
                return str(entry.get("msg", "")).strip()
        return None


def _make_workdir(root: Path, spec: Json) -> None:
    """Have the working directory exist, which stays then; what lies in a mount is the runtime's to make."""
    path: str = spec["process"]["cwd"]
    if not any(f"{path}/".startswith(f"{mount['destination']}/") for mount in spec["mounts"]):
        make_directories(root, path)


@contextmanager
def _mount_points(root: Path, spec: Json) -> Iterator[None]:
    """Have every mount's target exist, and afterwards not: they are none of the container's changes."""
    targets = [mount["destination"] for mount in spec["mounts"]]
    made: list[Made] = []
    try:
        for mount in spec["mounts"]:
            target = mount["destination"]
            if any(target.startswith(f"{other}/") for other in targets):
                continue  # it lies in another mount, where the runtime makes it
            is_file = mount["type"] == "bind" and not Path(mount["source"]).is_dir()
            made += (make_file if is_file else make_directories)(root, target)
        yield
    finally:
        unmake(root, made)


@contextmanager
def _terminal_kept(options: Options) -> Iterator[None]:
    """A runtime that is killed leaves the terminal in raw mode."""
    if not options.terminal:
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
