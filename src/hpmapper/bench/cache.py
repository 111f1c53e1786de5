"""Figures of the cache: what sharing, trimming, profiles and the manager give. All sides of a case in one run.

    python -m hpmapper.bench.cache --work DIR [--web LAYOUT] [--database LAYOUT] [--runs N] [CASE…]

Cases: stat, shared, starts, coldstart, record, pressure. `starts`, `coldstart` and `record` need --web and --database
(`hpmapper.bench.images`). Each is a function here, and its text says what is measured.

Two slow devices: one where each read takes 1 ms, side by side, and all of them 200 MB/s (`hpmapper.bench.slow`: what
dm-delay would give); and one behind the block control group of version 1, 200 MB/s and 1,000 reads a second, whatever
their size, so that reading ahead saves no waiting for requests, but only overlaps it with other work.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from hpmapper.bench import figures
from hpmapper.bench.figures import MIB, Samples, table, take
from hpmapper.bench.layout import silent_bring
from hpmapper.bench.measure import drop_caches, read_all
from hpmapper.bench.slow import slow_device
from hpmapper.cache import duplicates, inventory, start
from hpmapper.cache.beside import Beside, Side
from hpmapper.cache.count import count
from hpmapper.cache.manager import CacheManager, Settings
from hpmapper.cache.start import ImageFiles, StartSettings, starting, store_beside
from hpmapper.cache.stat import cache_stat
from hpmapper.cache.trim import trim
from hpmapper.config import Config
from hpmapper.containers import Containers
from hpmapper.engine import Engine
from hpmapper.errors import Unsupported
from hpmapper.images import Images
from hpmapper.kernel import fanotify, memcg, mount
from hpmapper.kernel.mincore import resident
from hpmapper.kernel.sync import syncfs
from hpmapper.meta.snapshots import Snapshot
from hpmapper.root import open_root

_BLKIO = Path("/sys/fs/cgroup/blkio")
_PAGE = 4096

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


@dataclass(frozen=True)
class Place:
    """An open root of a driver, for a side."""

    name: str
    engine: Engine
    config: Config

    @property
    def home(self) -> Path:
        return self.engine.driver.scratch.parent

    @property
    def device(self) -> str:
        """MAJOR:MINOR of the file system's device."""
        number = self.home.stat().st_dev
        return f"{os.major(number)}:{os.minor(number)}"

    def device_bytes(self) -> int:
        """Bytes read from the device so far."""
        return int(Path("/sys/dev/block", self.device, "stat").read_text().split()[2]) * 512


@contextmanager
def place(root: Path, driver: str, *pool: str) -> Iterator[Place]:
    """A root, removed at the end; `pool`: storage options."""
    config = Config(root=root, driver=driver).with_options(["min_free_space=0", *(pool or ["pool.size=40G"])])
    with open_root(config) as opened:
        try:
            yield Place(driver, opened.engine, config)
        finally:
            opened.engine.detach()
    shutil.rmtree(root)


@contextmanager
def on_xfs(work: Path, *drivers: str) -> Iterator[list[Place]]:
    """Roots of these drivers, each on an XFS of its own in a loop pool."""
    with ExitStack() as stack:
        places = []
        for driver in drivers:
            if driver == "hpmapper":
                places.append(stack.enter_context(place(work / driver, driver)))
            else:
                carrier = stack.enter_context(place(work / f"{driver}-xfs", "hpmapper"))
                places.append(stack.enter_context(place(carrier.home / f"{driver}-root", driver)))
        yield places


def stat(options: argparse.Namespace) -> Samples:
    """Counting 10,000 objects, of which all or none are cached, in s."""
    samples: Samples = {}
    with place(options.work / "stat", "hpmapper", "pool.size=4G") as one:
        take_many(one, 10_000)
        for _ in range(options.runs):
            for side, prepare in (("cached", lambda: read_all(one.home / "o")), ("after dropping all", drop_caches)):
                prepare()
                begin = time.perf_counter()
                found = cache_stat(inventory.take(one.engine.db, one.engine.driver), one.engine.driver)
                samples.setdefault(side, []).append(time.perf_counter() - begin)
                assert len(found.objects) == 10_000
    return samples


def take_many(one: Place, number: int) -> None:
    """An image of `number` files of 4 KiB."""
    files = {f"f{index}": _PAGE for index in range(number)}
    top = take_in(one, files)
    one.engine.prepare("reader", top)


def take_in(one: Place, files: Mapping[str, int], name: str = "") -> Snapshot:
    """A layer of random files, as `hpmapper.bench.figures.take` makes it."""
    return take(figures.Side(one.name, one.engine), dict(files), name)


def shared(options: argparse.Namespace) -> Samples:
    """Page cache of containers of one image, MiB for each: each reads 200 MiB of the image, writes 100 blocks of 4 KiB
    into a 100 MiB file of it, and reads that file. Plain copies: fewer containers, since each adds the same."""
    samples: Samples = {}
    with on_xfs(options.work, "hpmapper", "overlay", "vfs") as places:
        for run in range(options.runs):
            for one in places:
                containers = options.plain if one.name == "vfs" else options.containers
                _mixed(one, containers, run, samples)
    return samples


def _mixed(one: Place, containers: int, run: int, samples: Samples) -> None:
    top = take_in(one, {"shared": 200 * MIB, "written": 100 * MIB}, f"mixed{run}")
    rows = [one.engine.prepare(f"mixed-{run}-{number}", top) for number in range(containers)]
    drop_caches()
    for number, row in enumerate(rows):
        root = one.engine.mount(row)
        read_all_of(root / "shared")
        blocks = random.Random(number).sample(range(100 * MIB // _PAGE), 100)
        with (root / "written").open("r+b", buffering=0) as file:
            for block in blocks:
                os.pwrite(file.fileno(), b"%016d" % number * 256, block * _PAGE)
            os.fsync(file.fileno())
        read_all_of(root / "written")
    syncfs(one.home)
    _note_cache(samples, f"{one.name}, {containers} containers", one, containers)
    taken = inventory.take(one.engine.db, one.engine.driver)
    begin = time.perf_counter()
    done = trim(duplicates.find(taken), {})
    samples.setdefault(f"{one.name}, seconds of the trim", []).append(time.perf_counter() - begin)
    if done.dropped:
        _note_cache(samples, f"{one.name}, {containers} containers, after trim", one, containers)
    for row in rows:
        one.engine.remove(row)


def _note_cache(samples: Samples, name: str, one: Place, containers: int) -> None:
    total = cache_stat(inventory.take(one.engine.db, one.engine.driver), one.engine.driver).total.cached
    samples.setdefault(name, []).append(total / MIB / containers)


def read_all_of(path: Path) -> None:
    """Read one file."""
    with path.open("rb", buffering=0) as file:
        while file.read(MIB):
            pass


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


def run_inside(root: Path, command: Sequence[str]) -> int:
    """Run a command with that root directory, without any program of the host's; its exit status."""
    pid = os.fork()
    if pid == 0:
        try:
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
    one: Place, image: str, number: int, command: Sequence[str], profile: bool, group: Path | None
) -> float:
    """The longest of `number` simultaneous cold starts, in s."""
    starters = [Starter(one, image, profile, command, group) for _ in range(number)]
    drop_caches()
    for starter in starters:
        starter.go()
    return max(starter.seconds() for starter in starters)


def _images_of(options: argparse.Namespace) -> dict[str, tuple[Path, Sequence[str]]]:
    found = {"web": (options.web, WEB), "database": (options.database, DATABASE)}
    return {name: (layout, command) for name, (layout, command) in found.items() if layout is not None}


def starts(options: argparse.Namespace) -> Samples:
    """MiB read from the device by one cold start, and by 20 at once."""
    samples: Samples = {}
    with on_xfs(options.work, "hpmapper", "overlay", "vfs") as places:
        for image, (layout, command) in _images_of(options).items():
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
        _remove_group(group)


@contextmanager
def on_slow_device(work: Path) -> Iterator[Place]:
    """A root on an XFS on a device with 1 ms of latency."""
    image = work / "slow.img"
    image.touch()
    os.truncate(image, 8 << 30)
    with slow_device(image, work / "slow") as device, place(work / "late", "hpmapper", f"pool.device={device}") as one:
        yield one
    image.unlink()


def coldstart(options: argparse.Namespace) -> Samples:
    """The longest of one or ten simultaneous cold starts, from the request to the command's end, in s."""
    samples: Samples = {}
    with ExitStack() as stack:
        (fast,) = stack.enter_context(on_xfs(options.work, "hpmapper"))
        late = stack.enter_context(on_slow_device(options.work))
        group = stack.enter_context(slowed(fast.device))
        for one in (fast, late):
            for image, (layout, command) in _images_of(options).items():
                silent_bring(one.engine, layout, image, options.work)
                _record(one, image, command)
        devices = {"1 ms": (late, None), "1,000 reads a second": (fast, group), "fast": (fast, None)}
        for _ in range(options.runs):
            for image, (_, command) in _images_of(options).items():
                for number in options.at_once:
                    for where, (one, slow) in devices.items():
                        for profile in (False, True):
                            name = f"{image}, {where}, {number} at once, {'with' if profile else 'without'} profile"
                            seconds = cold_starts(one, image, number, command, profile, slow)
                            samples.setdefault(name, []).append(seconds)
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
        store_beside(one.engine.db.path, files, start.record(files, side, 60, cold=True))

    with Beside(accompany) as helper:
        helper.wait_ready()
        if run_inside(root, command):
            raise Unsupported(f"the command of {image} failed")
    containers.remove(container)
    found = start.load(one.engine.db, row.top)
    assert found is not None
    print(f"profile of {image}: {len(found.objects)} objects, {found.size / MIB:.1f} MiB", file=sys.stderr)


def record(options: argparse.Namespace) -> Samples:
    """Recording a cold start by three methods: ms that looking takes before and after it, ms that the start takes, and
    MiB found to have been read."""
    samples: Samples = {}
    methods: dict[str, Callable[..., None]] = {
        "nothing": _unrecorded,
        "residency before and after": _by_residency,
        "fanotify's reads alone": partial(_by_fanotify, mask=fanotify.FAN_ACCESS, whole=True),
        "fanotify's opens, residency after": partial(_by_fanotify, mask=fanotify.FAN_OPEN, whole=False),
    }
    with on_xfs(options.work, "hpmapper") as (one,):
        for image, (layout, command) in _images_of(options).items():
            silent_bring(one.engine, layout, image, options.work)
            files = ImageFiles(one.engine.db, one.engine.driver, Images(one.engine).find(image).top)
            for _ in range(options.runs):
                for name, method in methods.items():
                    container = Containers(one.engine).create(image)
                    root = Containers(one.engine).mount(container)
                    drop_caches()
                    method(partial(samples_of, samples, f"{image}, {name}"), files, root, command)
                    Containers(one.engine).remove(container)
    return samples


def samples_of(samples: Samples, name: str, what: str, value: float) -> None:
    """Note a value of one method."""
    samples.setdefault(f"{name}: {what}", []).append(value)


Note = Callable[[str, float], None]


def _timed_start(note: Note, root: Path, command: Sequence[str]) -> None:
    begin = time.perf_counter()
    run_inside(root, command)
    note("start, ms", (time.perf_counter() - begin) * 1e3)


def _unrecorded(note: Note, files: ImageFiles, root: Path, command: Sequence[str]) -> None:
    _timed_start(note, root, command)


def _by_residency(note: Note, files: ImageFiles, root: Path, command: Sequence[str]) -> None:
    paths = [files.places.object_file(digest) or "" for digest in files.objects]
    begin = time.perf_counter()
    before = {path: count(path).cached for path in paths}
    looked = time.perf_counter() - begin
    _timed_start(note, root, command)
    begin = time.perf_counter()
    read = sum(max(0, count(path).cached - before[path]) for path in paths)
    note("looking, ms", (looked + time.perf_counter() - begin) * 1e3)
    note("found, MiB", read / MIB)


def _by_fanotify(note: Note, files: ImageFiles, root: Path, command: Sequence[str], *, mask: int, whole: bool) -> None:
    seen: set[str] = set()
    with fanotify.watching(files.places.scratch.parent, mask) as fd:
        _timed_start(note, root, command)
        begin = time.perf_counter()
        for event in _events(fd):
            if event.fd >= 0:
                seen.add("/".join(os.readlink(f"/proc/self/fd/{event.fd}").split("/")[-2:]))
                os.close(event.fd)
    found = 0
    for digest in files.objects:
        path = Path(files.places.object_file(digest) or "")
        if "/".join(path.parts[-2:]) in seen:
            found += path.stat().st_size if whole else _resident_bytes(path)
    note("looking, ms", (time.perf_counter() - begin) * 1e3)
    note("found, MiB", found / MIB)


def _events(fd: int) -> Iterator[fanotify.Event]:
    while events := fanotify.read_events(fd):
        yield from events


def _resident_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return sum(run.end - run.start for run in resident(file.fileno()))


_SET = 96 * MIB
"""A working set."""


def pressure(options: argparse.Namespace) -> Samples:
    """4 KiB reads a second, at random places, by containers in a memory control group of twice their working set.

    "One content": ten containers of ten images that have the same file in layers of their own; each reads it.
    "Idle copies": eight containers have written to the image's file, read it twice, and sleep. Then two others read
    the image's file, and one its own copy, for as long as is measured; the first seconds are what the manager can win.
    """
    samples: Samples = {}
    if not memcg.has_pressure_events(memcg.ROOT):
        raise Unsupported("this host has no memory control groups of version 1")
    with on_xfs(options.work, "hpmapper", "overlay") as places:
        for run in range(options.runs):
            for one in places:
                _one_content(one, run, options.seconds, samples)
            for managed in (False, True):
                _idle_copies(places[0], f"{run}-{managed}", options.seconds, samples, managed=managed)
            _idle_copies(places[1], f"{run}-overlay", options.seconds, samples, managed=False)
    return samples


@contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """A memory control group; whatever is in it at the end is killed."""
    group = memcg.ROOT / f"hpmapper-bench-{os.getpid()}"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(str(limit))
    try:
        yield group
    finally:
        for pid in (group / "cgroup.procs").read_text().split():
            os.kill(int(pid), signal.SIGKILL)
        _remove_group(group)


def _remove_group(group: Path) -> None:
    """Remove a control group, which its last processes may take a moment to leave."""
    for _ in range(200):
        try:
            group.rmdir()
            return
        except OSError:
            time.sleep(0.05)


class Reader:
    """A process in a container and a control group that reads a file; `seconds` 0: twice through, then it sleeps."""

    def __init__(self, group: Path, root: Path, seconds: float, seed: int) -> None:
        self._result, told = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                (group / "cgroup.procs").write_text(str(os.getpid()))
                os.chroot(root)
                fd = os.open("/data", os.O_RDONLY)
                done = _read_for(fd, seconds, seed) if seconds else _read_twice(fd)
                os.write(told, str(done).encode())
                time.sleep(3600 if not seconds else 0)
            finally:
                os._exit(0)
        os.close(told)

    def reads(self) -> int:
        """How many reads it did; waits until it has."""
        answer = os.read(self._result, 64)
        return int(answer or b"0")

    def end(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._result)


def _read_for(fd: int, seconds: float, seed: int) -> int:
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    chosen, pages = random.Random(seed), _SET // _PAGE
    deadline, done = time.monotonic() + seconds, 0
    while time.monotonic() < deadline:
        for _ in range(64):
            os.pread(fd, _PAGE, chosen.randrange(pages) * _PAGE)
        done += 64
    return done


def _read_twice(fd: int) -> int:
    for _ in range(2):
        for offset in range(0, _SET, MIB):
            os.pread(fd, MIB, offset)
    return 1


def _one_content(one: Place, run: int, seconds: float, samples: Samples) -> None:
    tops = [take_in(one, {"data": _SET, f"own{number}": _PAGE}, f"same{run}") for number in range(10)]
    rows = [one.engine.prepare(f"same-{run}-{number}", top) for number, top in enumerate(tops)]
    roots = [one.engine.mount(row) for row in rows]
    drop_caches()
    with memory_group(2 * _SET) as group:
        readers = [Reader(group, root, seconds, number) for number, root in enumerate(roots)]
        total = sum(reader.reads() for reader in readers)
        for reader in readers:
            reader.end()
    samples.setdefault(f"one content, {one.name}", []).append(total / seconds)
    for row in rows:
        one.engine.remove(row)


def _idle_copies(one: Place, run: str, seconds: float, samples: Samples, *, managed: bool) -> None:
    top = take_in(one, {"data": _SET}, f"copies{run}")
    rows = [one.engine.prepare(f"copies-{run}-{number}", top) for number in range(11)]
    roots = [one.engine.mount(row) for row in rows]
    for root in roots[:9]:  # eight will be idle, the ninth works on a copy of its own
        with (root / "data").open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), b"own" * 1000, 0)
            os.fsync(file.fileno())
    drop_caches()
    name = f"idle copies, {one.name}{' and manager' if managed else ''}"
    manager = CacheManager(one.engine.db, one.engine.driver, Settings(dedupe_every=0, round_bytes=1 << 30))
    with ExitStack() as stack:
        group = stack.enter_context(memory_group(2 * _SET))
        if managed:
            manager.start()
            stack.callback(manager.stop)
            time.sleep(0.3)
        idle = [Reader(group, root, 0, 0) for root in roots[:8]]
        for reader in idle:
            reader.reads()
        for phase in ("first seconds", "later"):
            busy = [Reader(group, root, seconds / 2, number) for number, root in enumerate(roots[8:])]
            total = sum(reader.reads() for reader in busy)
            for reader in busy:
                reader.end()
            samples.setdefault(f"{name}, {phase}", []).append(total / (seconds / 2))
        for reader in idle:
            reader.end()
        if managed:
            seen = manager.counters()
            for what in ("trimmed_idle_bytes", "trimmed_busy_bytes"):
                samples.setdefault(f"manager, {what}, MiB", []).append(seen[what] / MIB)
    for row in rows:
        one.engine.remove(row)


CASES: dict[str, Callable[[argparse.Namespace], Samples]] = {
    "stat": stat,
    "shared": shared,
    "starts": starts,
    "coldstart": coldstart,
    "record": record,
    "pressure": pressure,
}


def main() -> None:
    """Run the cases and print their tables."""
    parser = argparse.ArgumentParser(prog="python -m hpmapper.bench.cache")
    parser.add_argument("cases", nargs="*", metavar="CASE")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--web", type=Path)
    parser.add_argument("--database", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--containers", type=int, default=50)
    parser.add_argument("--plain", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--at-once", type=int, nargs="*", default=[1, 10])
    parser.add_argument("--start", help=argparse.SUPPRESS)
    parser.add_argument("--driver", help=argparse.SUPPRESS)
    parser.add_argument("--profile", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        start_when_told(options)
    options.work.mkdir(parents=True, exist_ok=True)
    mount.private_namespace()  # no mount is left, however this ends
    for name in options.cases or CASES:
        if name not in CASES:
            parser.error(f"no case {name!r}; there are {', '.join(CASES)}")
        Console(width=140).print(table(f"{name}: {CASES[name].__doc__}", CASES[name](options)))


if __name__ == "__main__":
    main()
