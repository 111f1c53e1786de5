"""Where a running container's files are: /run/hpmapper/ROOT/…, ROOT being a digest of the root directory's path.

    b/NAME     the bundle: config.json, the runtime's log, the process's number; locked (flock) while it is in use
    state      the OCI runtime's own state directory

The lock is also held by the runtime itself, which inherits it: a container whose hpmapper was killed stays "running"
until its own end. Nothing in the kernel says so: the runtime pivots into its own mount namespace, whose overlay keeps
working after ours is unmounted and its upper directory deleted.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hpmapper.errors import FailedPrecondition
from hpmapper.kernel import lock
from hpmapper.kernel.fs import filesystem_name

_BASE = Path("/run/hpmapper")
_CGROUP = Path("/sys/fs/cgroup")
_USED_RUNTIME = "runtime"
_ENDING_SECONDS = 10.0


class Place:
    """The place of one container of one root."""

    def __init__(self, root: Path, name: str) -> None:
        self.name = name
        self._root = _of_root(root)
        self.bundle = self._root / "b" / name
        self.state = self._root / "state"

    @property
    def cgroup(self) -> str:
        """Its control group: two roots may have containers of one name."""
        return f"/hpmapper-{self._root.name}-{self.name}"

    def is_running(self) -> bool:
        """Whether a runtime, or somebody who is about to start one, has the container."""
        try:
            fd = os.open(self.bundle, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            with lock.exclusive(fd, timeout=0):
                return False
        except BlockingIOError:
            return True
        finally:
            os.close(fd)

    @contextmanager
    def held(self, *, force: bool = False) -> Iterator[int]:
        """Have the container to oneself, with an empty bundle directory; yields the lock's descriptor.

        What a runtime left that was killed, its container included, is taken away first. With `force`, a
        container that is running is killed.

        Raises:
            FailedPrecondition: it is running.
        """
        self.bundle.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if force:
            self.kill()
        while True:
            self.bundle.mkdir(mode=0o700, exist_ok=True)
            with self._locked(_ENDING_SECONDS if force else 0) as fd:
                if not self._is_current(fd):
                    continue  # its last user has just removed it
                try:
                    self._clear()
                    yield fd
                finally:
                    self._clear()
                    shutil.rmtree(self.bundle)
                return

    def will_use(self, runtime: Path) -> None:
        """Write down which runtime gets the container, for whoever has to clear up."""
        (self.bundle / _USED_RUNTIME).write_bytes(os.fsencode(runtime))

    @contextmanager
    def _locked(self, timeout: float) -> Iterator[int]:
        try:
            with lock.exclusive(self.bundle, timeout=timeout) as fd:
                yield fd
        except BlockingIOError:
            raise FailedPrecondition(
                f"container {self.name!r} is running", hint=f"stop it first, or: hpmapper container rm -f {self.name}"
            ) from None

    def _is_current(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), self.bundle.stat())
        except FileNotFoundError:
            return False

    def kill(self) -> None:
        """Kill the container; it ends a moment later. Does nothing when it does not run."""
        self._ask("kill", self.name, "KILL")

    def _clear(self) -> None:
        """Take away what the runtime did not, killing what may still run."""
        if (self.state / self.name).exists():
            self._ask("delete", "--force", self.name)
        self._end_group()
        for entry in self.bundle.iterdir():
            entry.unlink()

    def _end_group(self) -> None:
        """Kill what is still in its control groups: a runtime killed while it starts a container forgets it (runc 1.1).

        Raises:
            FailedPrecondition: it does not end.
        """
        found = [*_CGROUP.glob(f"*{self.cgroup}"), *_CGROUP.glob(self.cgroup.lstrip("/"))]
        groups = [group for group in found if filesystem_name(group) in ("cgroup", "cgroup2")]
        deadline = time.monotonic() + _ENDING_SECONDS
        while groups := [group for group in groups if not _is_removed(group)]:
            if time.monotonic() > deadline:
                raise FailedPrecondition(f"what is in {groups[0]} does not end", hint="does it wait for a disk?")
            time.sleep(0.01)

    def _ask(self, *words: str) -> None:
        """Run the runtime that has the container, if any has; what it cannot do has been done already."""
        try:
            runtime = os.fsdecode((self.bundle / _USED_RUNTIME).read_bytes())
        except FileNotFoundError:
            return
        command = [runtime, "--root", str(self.state), *words]
        subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)


def _is_removed(group: Path) -> bool:
    """Try to remove a control group, killing what is in it."""
    try:
        for pid in (group / "cgroup.procs").read_text().split():
            os.kill(int(pid), signal.SIGKILL)
        group.rmdir()
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.ESRCH, errno.ENODEV):
            raise
        return False
    return True


def running(root: Path) -> list[str]:
    """The names of the root's running containers."""
    try:
        names = sorted(entry.name for entry in (_of_root(root) / "b").iterdir())
    except FileNotFoundError:
        return []
    return [name for name in names if Place(root, name).is_running()]


def forget(root: Path) -> None:
    """Remove the empty directories of a root that is no more."""
    shutil.rmtree(_of_root(root), ignore_errors=True)


def _of_root(root: Path) -> Path:
    return _BASE / hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:12]
