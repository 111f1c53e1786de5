"""Cold starts of real images: what is read from the device, and how long it takes, with profiles and without.

Two slow devices: one where each read takes 1 ms, side by side, and all of them 200 MB/s (`hpmapper.bench.slow`: what
dm-delay would give); and one behind the block control group of version 1, 200 MB/s and 1,000 reads a second, whatever
their size, so that reading ahead saves no waiting for requests, but only overlaps it with other work.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hpmapper.bench.figures import MIB, Samples
from hpmapper.bench.layout import silent_bring
from hpmapper.bench.measure import drop_caches, remove_group
from hpmapper.bench.roots import Place, on_slow_device, on_xfs
from hpmapper.cache import start
from hpmapper.cache.beside import Beside, Side
from hpmapper.cache.start import ImageFiles, StartSettings, starting, store_beside
from hpmapper.config import Config
from hpmapper.containers import Containers
from hpmapper.errors import Unsupported
from hpmapper.images import Images
from hpmapper.root import open_root

_BLKIO = Path("/sys/fs/cgroup/blkio")

WEB = (
    "/usr/bin/python3",
    "-c",
    "import flask, sqlalchemy, sqlalchemy.orm, sqlite3\n"
    "app = flask.Flask('x')\n"
    "app.add_url_rule('/', 'x', lambda: flask.render_template_string('{{ 1 + 1 }}'))\n"
    "assert app.test_client().get('/').data == b'2'",
)
"""Until a small web application has answered its first request."""

DATABASE = (
    "/bin/su",
    "postgres",
    "-s",
    "/bin/sh",
    "-c",
    "echo 'select count(*) from pg_class' | /usr/lib/postgresql/15/bin/postgres --single "
    "-D /var/lib/postgresql/15/main -c config_file=/etc/postgresql/15/main/postgresql.conf "
    "-c dynamic_shared_memory_type=mmap postgres",
)
"""Until PostgreSQL has recovered and answered its first query."""


class Starter:
    """A process with hpmapper loaded that starts one container when told; its processes may be slowed down."""

    def __init__(self, one: Place, image: str, profile: bool, command: Sequence[str], group: Path | None) -> None:
        words = [sys.executable, "-m", "hpmapper.bench.cache", "--work", str(one.config.root), "--start", image]
        words += ["--driver", one.config.driver or "", *(["--profile"] if profile else []), "--", *command]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if group is not None:
            (group / "cgroup.procs").write_text(str(self._process.pid))
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "READY\n"

    def go(self) -> None:
        """Start."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def seconds(self) -> float:
        """How long it took, once it is done."""
        out, _ = self._process.communicate()
        if self._process.returncode:
            raise Unsupported("the container's command failed")
        return float(out.split()[-1])


def start_when_told(options: argparse.Namespace) -> None:
    """What a `Starter` runs."""
    config = Config(root=options.work, driver=options.driver or None)
    with open_root(config, create=False) as opened:
        containers, images = Containers(opened.engine), Images(opened.engine)
        image = images.find(options.start)
        print("READY", flush=True)
        sys.stdin.readline()
        begin = time.perf_counter()
        settings = StartSettings(replay=options.profile, record=False)
        with starting(opened.engine.db, opened.engine.driver, image.top, settings):
            row = containers.create(image.id)
            root = containers.mount(row)
            status = run_inside(root, options.cases)
        print(time.perf_counter() - begin, flush=True)
        containers.remove(row)
    sys.exit(status)


def run_inside(root: Path, command: Sequence[str], group: Path | None = None) -> int:
    """Run a command with that root directory, without any program of the host's; its exit status.

    `group`: a control group for it.
    """
    pid = os.fork()
    if pid == 0:
        try:
            if group is not None:
                (group / "cgroup.procs").write_text(str(os.getpid()))
            null = os.open(os.devnull, os.O_RDWR)
            os.chroot(root)
            os.chdir("/")
            for standard in (0, 1, *((2,) if "-v" not in sys.argv else ())):
                os.dup2(null, standard)
            os.execve(command[0], list(command), {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "LC_ALL": "C"})
        finally:
            os._exit(127)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def cold_starts(
    one: Place,
    image: str,
    number: int,
    command: Sequence[str],
    profile: bool,
    group: Path | None,
    *,
    cold: bool = True,
) -> float:
    """The longest of `number` simultaneous cold starts, in s; not `cold`: after one that is not counted."""
    if not cold:
        cold_starts(one, image, 1, command, False, None)
    starters = [Starter(one, image, profile, command, group) for _ in range(number)]
    if cold:
        drop_caches()
    for starter in starters:
        starter.go()
    return max(starter.seconds() for starter in starters)


def images_of(options: argparse.Namespace) -> dict[str, tuple[Path, Sequence[str]]]:
    found = {"web": (options.web, WEB), "database": (options.database, DATABASE)}
    return {name: (layout, command) for name, (layout, command) in found.items() if layout is not None}


def starts(options: argparse.Namespace) -> Samples:
    """MiB read from the device by one cold start, and by 20 at once."""
    samples: Samples = {}
    with on_xfs(options.work, "hpmapper", "overlay", "vfs") as places:
        for image, (layout, command) in images_of(options).items():
            for one in places:
                silent_bring(one.engine, layout, image, options.work)
                for _ in range(options.runs):
                    for number in (1, 20):
                        before = one.device_bytes()
                        cold_starts(one, image, number, command, False, None)
                        name = f"{image}, {one.name}, {number} at once"
                        samples.setdefault(name, []).append((one.device_bytes() - before) / MIB)
    return samples


@contextmanager
def slowed(device: str) -> Iterator[Path]:
    """A control group whose processes read 200 MB/s and 1,000 times a second from a device."""
    group = _BLKIO / f"hpmapper-bench-{os.getpid()}"
    group.mkdir()
    try:
        (group / "blkio.throttle.read_bps_device").write_text(f"{device} 200000000")
        (group / "blkio.throttle.read_iops_device").write_text(f"{device} 1000")
        yield group
    finally:
        remove_group(group)


def coldstart(options: argparse.Namespace) -> Samples:
    """The longest of one or ten simultaneous cold starts, from the request to the command's end, in s. "Cached": no
    cold ones; nothing that is read ahead can be quicker."""
    samples: Samples = {}
    with ExitStack() as stack:
        (fast,) = stack.enter_context(on_xfs(options.work, "hpmapper"))
        late = stack.enter_context(on_slow_device(options.work))
        group = stack.enter_context(slowed(fast.device))
        for one in (fast, late):
            for image, (layout, command) in images_of(options).items():
                silent_bring(one.engine, layout, image, options.work)
                _record(one, image, command)
        devices = {"1 ms": (late, None), "1,000 reads a second": (fast, group), "fast": (fast, None)}
        for _ in range(options.runs):
            for image, (_, command) in images_of(options).items():
                for number in options.at_once:
                    for where, (one, slow) in devices.items():
                        for profile in (False, True):
                            name = f"{image}, {where}, {number} at once, {'with' if profile else 'without'} profile"
                            seconds = cold_starts(one, image, number, command, profile, slow)
                            samples.setdefault(name, []).append(seconds)
                    seconds = cold_starts(fast, image, number, command, False, None, cold=False)
                    samples.setdefault(f"{image}, cached, {number} at once", []).append(seconds)
    return samples


def _record(one: Place, image: str, command: Sequence[str]) -> None:
    """Record a cold start as `hpmapper profile record` does."""
    row = Images(one.engine).find(image)
    containers = Containers(one.engine)
    container = containers.create(image)
    root = containers.mount(container)
    files = ImageFiles(one.engine.db, one.engine.driver, row.top)
    drop_caches()

    def accompany(side: Side) -> None:
        store_beside(one.engine.db.path, files, start.record_exactly(files, side, 60))

    with Beside(accompany) as helper:
        helper.wait_ready()
        if run_inside(root, command):
            raise Unsupported(f"the command of {image} failed")
    containers.remove(container)
    found = start.load(one.engine.db, row.top)
    assert found is not None
    print(f"profile of {image}: {len(found.objects)} objects, {found.size / MIB:.1f} MiB", file=sys.stderr)
