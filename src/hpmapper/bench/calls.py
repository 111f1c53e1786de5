"""What containerd's calls cost: `hpmapper serve` beside containerd's own overlayfs behind a Go proxy, in turns.

    python -m hpmapper.bench.calls --work DIRECTORY... [--runs N]

Each directory stands for its file system (one on a disk's, one on tmpfs). Cases: Stat; Prepare + Commit + Remove with
one client and with fifty on one connection, as containerd has it; the same with what Prepare handed out mounted and
unmounted; containerd's benchsuite (16 layers of ten operations each).

The flagship needs a reflink file system: it gets a loop pool of XFS. So that the file systems do not stand for the
drivers, containerd's runs on such an XFS, too. A removed snapshot's storage is freed behind the answer, once containerd
asks for a clean-up, while containerd's own is freed before it: so each rate is also told with all freed, which includes
a quarter of a second of waiting for more.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hpmapper.bench.gobuild import Tools, build_tools, cache
from hpmapper.bench.ground import Ground
from hpmapper.errors import FailedPrecondition
from hpmapper.kernel import mount
from hpmapper.kernel.fs import filesystem_name
from hpmapper.pool.base import GIB

_POOL = 8 * GIB

_READY_SECONDS = 60.0

_RATES = ("per second", "with all freed")

CASES = {
    "Stat, 1 client": ("-mode", "stat", "-count", "4000"),
    "cycle, 1 client": ("-mode", "cycle", "-count", "2000"),
    "cycle, 50 clients": ("-mode", "cycle", "-count", "4000", "-clients", "50"),
    "cycle with mount, 1 client": ("-mode", "cycle", "-count", "1500", "-mount"),
    "cycle with mount, 50 clients": ("-mode", "cycle", "-count", "2000", "-clients", "50", "-mount"),
    "benchsuite": ("-mode", "layers", "-count", "3", "-warmup", "1"),
}
"""What is run, by what rpcbench is told."""


@dataclass
class Side:
    """One server and what was measured of it.

    Attributes:
        command: starts it; {root} and {socket} stand for places.
        snapshots: where in its root each snapshot has a directory.
        on_xfs: its root lies on an XFS in a file, as the flagship's pool does.
        results: of each case, what rpcbench said, run by run.
        resident: its memory after each run, in MiB.
    """

    name: str
    command: list[str]
    snapshots: str
    on_xfs: bool = False
    results: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    resident: list[float] = field(default_factory=list)


def sides(tools: Tools) -> list[Side]:
    """containerd's own, and ours."""
    theirs = [str(tools.snapserver), "-root", "{root}", "-address", "{socket}"]
    serve = [sys.executable, "-m", "hpmapper.cli.main", "--root", "{root}", "--storage-opt", "min_free_space=0"]
    return [
        Side("containerd overlayfs", theirs, "snapshots"),
        Side("containerd overlayfs, XFS", theirs, "snapshots", on_xfs=True),
        Side("overlay", [*serve, "--storage-driver", "overlay", "serve", "--address", "{socket}"], "overlay/a"),
        Side("hpmapper", [*serve, "--storage-opt", f"pool.size={_POOL}", "serve", "--address", "{socket}"], "pool/a"),
    ]


def measure(work: Path, compared: list[Side], tools: Tools, runs: int) -> None:
    """Run every case on every side, side after side, `runs` times."""
    for _ in range(runs):
        for side in compared:
            with _serving(work / "side", side) as (socket, process, root):
                for case, words in CASES.items():
                    line = [str(tools.rpcbench), "-address", str(socket), "-pid", str(process.pid), *words]
                    said = json.loads(subprocess.run(line, check=True, capture_output=True).stdout)
                    freed = _seconds_until_empty(root / side.snapshots)
                    side.results.setdefault(case, []).append(_figures(said, freed))
                side.resident.append(_resident(process.pid))


@contextmanager
def _serving(place: Path, side: Side) -> Iterator[tuple[Path, subprocess.Popen[bytes], Path]]:
    """Its socket, process and root."""
    place.mkdir(parents=True)
    socket = place / "s"
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, place)
        top = stack.enter_context(Ground(place, _POOL).file_system("xfs", "xfs")) if side.on_xfs else place
        words = [word.format(root=top / "root", socket=socket) for word in side.command]
        with (place / "log").open("wb") as log:
            process = subprocess.Popen(words, stdout=log, stderr=log)
        stack.callback(_unmount_below, top)
        try:
            deadline = time.monotonic() + _READY_SECONDS
            while not socket.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise FailedPrecondition(f"{side.name} does not serve: {(place / 'log').read_text()[-2000:]}")
                time.sleep(0.05)
            time.sleep(0.2)
            yield socket, process, top / "root"
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def _unmount_below(place: Path) -> None:
    """Unmount what a server left mounted, but not what `place` itself is."""
    for one in mount.mounts_below(place):
        if Path(one.target) != place:
            mount.umount(one.target)


def _seconds_until_empty(snapshots: Path) -> float:
    """How long a server that was told to remove everything goes on with that behind its answers."""
    begin = time.monotonic()
    while snapshots.exists() and any(snapshots.iterdir()):
        if time.monotonic() - begin > _READY_SECONDS:
            raise FailedPrecondition(f"{snapshots} does not become empty")
        time.sleep(0.01)
    return time.monotonic() - begin


def _figures(said: dict[str, object], freed: float) -> dict[str, float]:
    """Rate, the same with what was removed gone `freed` seconds later, the server's CPU time for one repetition in ms,
    and each call's p50 in ms."""
    steps, count = said["steps_us"], said["count"]
    assert isinstance(steps, dict)
    assert isinstance(count, int)
    rate = _number(said["per_second"])
    found = {"per second": rate, "with all freed": count / (count / rate + freed)}
    found["CPU, ms"] = _number(said["server_cpu_seconds"]) * 1e3 / count
    return found | {f"{step}, ms": _number(values["p50"]) / 1e3 for step, values in steps.items()}


def _number(value: object) -> float:
    assert isinstance(value, (int, float))
    return float(value)


def _resident(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


def table(title: str, compared: list[Side]) -> Table:
    """Medians with least and most of the rates, their ratios to the first side, and medians of the rest."""
    grid = Table("case", "side", *(word for rate in _RATES for word in (rate, "to first")), title=title)
    for name in ("CPU, ms", "p50 of each call, ms"):
        grid.add_column(name)
    for case in CASES:
        for side in compared:
            runs = side.results[case]
            middle = {name: statistics.median(one[name] for one in runs) for name in runs[0]}
            steps = " ".join(f"{name.partition(',')[0]} {middle[name]:.2f}" for name in list(middle)[3:])
            rates = [word for rate in _RATES for word in _rate(rate, runs, compared[0].results[case])]
            grid.add_row(case, side.name, *rates, f"{middle['CPU, ms']:.2f}", steps)
    for side in compared:
        grid.add_row("memory, MiB", side.name, f"{max(side.resident):.0f}")
    return grid


def _rate(name: str, runs: list[dict[str, float]], first: list[dict[str, float]]) -> tuple[str, str]:
    """A rate's median with least and most, and its ratio to the first side's."""
    rates = [one[name] for one in runs]
    middle = statistics.median(rates)
    ratio = middle / statistics.median(one[name] for one in first)
    return f"{middle:,.0f} ({min(rates):,.0f}-{max(rates):,.0f})", f"{ratio:.2f}"


def main() -> None:
    """Measure and print a table for each directory."""
    parser = argparse.ArgumentParser(prog="python -m hpmapper.bench.calls")
    parser.add_argument("--work", type=Path, nargs="+", required=True)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    mount.private_namespace()
    tools = build_tools(cache())
    for work in options.work:
        work.mkdir(parents=True, exist_ok=True)
        compared = sides(tools)
        measure(work, compared, tools, options.runs)
        Console(width=200).print(table(f"on {filesystem_name(work)}", compared))


if __name__ == "__main__":
    main()
