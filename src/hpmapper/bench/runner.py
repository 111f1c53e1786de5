"""Runs cases on sides, in turns, and keeps what was measured.

For each place on a case's axis every side is prepared; then the sides take turns, A B C A B C, so that the machine's
moods hit all alike. Before a turn everything is written out, and for a cold case caches are dropped. A side that fails
in a case is left out of its rest, with the reason in the results. They are saved after each case.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from hpmapper.bench import host, results
from hpmapper.bench.harness import CASES, SUITES, Bench, Case, NotHere, Run, Side, Turn
from hpmapper.bench.measure import drop_caches
from hpmapper.bench.report import shown
from hpmapper.bench.results import Absent, Measurement, Noise, Results, Session, SideInfo, Skipped
from hpmapper.errors import HpmapperError

if TYPE_CHECKING:
    from rich.progress import Progress

log = logging.getLogger(__name__)

Opener = Callable[[], AbstractContextManager[Side]]


@dataclass(frozen=True)
class Wanted:
    """A side that is wanted: how it is opened, and why it cannot be (empty: it can)."""

    name: str
    why_not: str
    open: Opener


@dataclass
class Runner:
    """One call of `hpmapper bench`.

    Attributes:
        label: of this host in the results. runs: of each case, on each side.
        found: what is known already and is added to.
    """

    label: str
    runs: int
    short: bool
    images: Path
    work: Path
    out: Path
    found: Results

    def measure(self, cases: Sequence[Case], wanted: Sequence[Wanted], command: list[str]) -> Results:
        """Open the sides, run the cases, save; what was measured is saved also if this is interrupted."""
        began, interrupted = _now(), True
        results.merge([self.found, Results(hosts={self.label: host.facts(self.work)})])  # refuses other machines
        self.found.hosts[self.label] = host.facts(self.work)
        try:
            with ExitStack() as stack, _progress() as progress:
                sides = self._open(wanted, stack)
                steps = sum(len(self._points(one)) * len(_taking_part(one, sides)) * self._runs(one) for one in cases)
                progress.begin(steps)
                for one in cases:
                    self._case(one, _taking_part(one, sides), progress)
                    results.save(self.found, self.out)
            interrupted = False
        finally:
            session = Session(self.label, began, _now(), command, host.version(), interrupted, self.short)
            self.found.sessions.append(session)
            results.save(self.found, self.out)
        return self.found

    def _open(self, wanted: Sequence[Wanted], stack: ExitStack) -> list[Side]:
        names = {one.name for one in wanted}
        self.found.absent = [one for one in self.found.absent if one.host != self.label or one.side not in names]
        sides = []
        for one in wanted:
            why = one.why_not
            if not why:
                try:
                    side = stack.enter_context(one.open())
                except (HpmapperError, OSError, subprocess.SubprocessError) as error:
                    why = str(error)
                else:
                    sides.append(side)
                    self._tell(SideInfo(side.name, side.kind, side.about, self.label))
                    continue
            self.found.absent.append(Absent(one.name, why, self.label))
            log.info("%s cannot run here: %s", one.name, why)
        return sides

    def _tell(self, side: SideInfo) -> None:
        """Put a side among those known, in its old place if it has one."""
        known = [(one.host, one.name) for one in self.found.sides]
        if (side.host, side.name) in known:
            self.found.sides[known.index((side.host, side.name))] = side
        else:
            self.found.sides.append(side)

    def _points(self, case: Case) -> Sequence[float | None]:
        return case.short_points if self.short else case.points

    def _runs(self, case: Case) -> int:
        return min(self.runs, case.runs or self.runs)

    def _case(self, case: Case, sides: Sequence[Side], progress: _Steps) -> None:
        results.without(self.found, self.label, case.info.suite, case.info.name)
        others = [one for one in self.found.cases if (one.suite, one.name) != _key(case)]
        order = [one.name for suite in SUITES for one in CASES if one.info.suite == suite]
        places = {name: place for place, name in enumerate(order)}
        self.found.cases = sorted([*others, case.info], key=lambda one: places.get(f"{one.suite}/{one.name}", -1))
        for at in self._points(case):
            bench = Bench(self.short, self.images, self.work, len(sides), at)
            with ExitStack() as stack:
                ready: dict[str, tuple[Side, Run]] = {}
                for side in sides:
                    progress.says(_place(case, at), f"preparing {side.name}")
                    with self._noting(case, side, at, progress, self._runs(case)):
                        ready[side.name] = (side, stack.enter_context(self._opened(case, side, bench, progress)))
                for number in range(self._runs(case)):
                    for name, (side, run) in list(ready.items()):
                        progress.says(_place(case, at), name)
                        with self._noting(case, side, at, progress, self._runs(case) - number):
                            self._turn(case, side, run, Turn(number, at))
                            progress.step(1)
                            continue
                        del ready[name]

    @contextmanager
    def _opened(self, case: Case, side: Side, bench: Bench, progress: _Steps) -> Iterator[Run]:
        """The case ready on a side. That its end fails, as it may after a run that failed, ends nothing else."""
        with ExitStack() as stack:
            run = stack.enter_context(case.open(side, bench))
            yield run
            with self._noting(case, side, bench.at, progress, 0):
                stack.close()

    def _turn(self, case: Case, side: Side, run: Run, turn: Turn) -> None:
        if case.info.cold:
            drop_caches()
        else:
            os.sync()
        end = host.watch()
        run(turn)
        noise = end()
        for (quantity, at), values in turn.samples.items():
            self._keep(case, side, quantity, at, values, noise)

    def _keep(self, case: Case, side: Side, quantity: str, at: float | None, values: list[float], noise: Noise) -> None:
        new = Measurement(case.info.suite, case.info.name, quantity, side.name, self.label, [values], [noise], at)
        for one in self.found.measurements:
            if one.key == new.key:
                one.runs.append(values)
                one.noise.append(noise)
                return
        self.found.measurements.append(new)

    @contextmanager
    def _noting(self, case: Case, side: Side, at: float | None, progress: _Steps, steps: int) -> Iterator[None]:
        """Write down that a side does not do a case, or failed in it, instead of ending."""
        try:
            yield
        except Exception as error:  # a peer's client may answer anything; the others go on
            failed = not isinstance(error, NotHere)
            why = _told(error)
            row = Skipped(case.info.suite, case.info.name, side.name, why, self.label, failed, at)
            self.found.skipped.append(row)
            if failed:
                log.warning("%s on %s failed: %s", case.name, side.name, why)
                log.debug("it failed here:", exc_info=error)
            progress.step(steps)


def _told(error: Exception) -> str:
    said = getattr(error, "stderr", None)
    text = said.decode(errors="replace") if isinstance(said, bytes) else str(said or "")
    kind = (
        "" if isinstance(error, (HpmapperError, OSError, subprocess.SubprocessError)) else f"{type(error).__name__}: "
    )
    return f"{kind}{error}{': ' if text.strip() else ''}{'; '.join(text.strip().splitlines()[-3:])}"


def _taking_part(case: Case, sides: Sequence[Side]) -> list[Side]:
    return [side for side in sides if side.kind in case.kinds]


def _key(case: Case) -> tuple[str, str]:
    return case.info.suite, case.info.name


def _place(case: Case, at: float | None) -> str:
    if at is None or case.info.axis is None:
        return case.name
    return f"{case.name}, {case.info.axis.name} {shown.place(case.info.axis, at)}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class _Steps:
    """Shows how far it is: a bar with the time left on a terminal, else a line for each case."""

    def __init__(self, bar: Progress | None) -> None:
        self._bar = bar
        self._last = ""

    def begin(self, steps: int) -> None:
        if self._bar is not None:
            self._task = self._bar.add_task("", total=steps)

    def says(self, where: str, what: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=f"{where}: {what}")
        elif where != self._last:
            self._last = where
            print(f"{datetime.now():%H:%M:%S} {where}", file=sys.stderr, flush=True)

    def step(self, count: int) -> None:
        if self._bar is not None:
            self._bar.advance(self._task, count)


@contextmanager
def _progress() -> Iterator[_Steps]:
    if not sys.stderr.isatty():
        yield _Steps(None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=600) as bar:
        yield _Steps(bar)
