"""What `hpmapper bench` measured: the form of results.json, and how such files are read, written and joined.

The form is these classes, one JSON object each; `hpmapper bench schema` prints it as a JSON Schema. `VERSION` counts
up whenever a reader of the old form would misread the new one; fields may be added without.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import msgspec

from hpmapper.errors import Corrupt, InvalidArgument, NotFound

SCHEMA = "hpmapper-bench"
VERSION = 1
FILE = "results.json"

Better = Literal["lower", "higher"]


class Quantity(msgspec.Struct, frozen=True):
    """Something that a case measures.

    Attributes:
        name: within its case.
        unit: of the values, such as "ms" or "MiB".
        better: which direction is good.
        floor: the physical limit, in words: what no driver can beat, and which side shows it.
    """

    name: str
    unit: str
    better: Better
    floor: str = ""


class Axis(msgspec.Struct, frozen=True):
    """What a case is repeated for.

    Attributes:
        name: such as "snapshots". unit: such as "bytes", or empty for a number.
        growth: whether cost may not grow faster than in proportion to it.
    """

    name: str
    unit: str = ""
    growth: bool = False


class CaseInfo(msgspec.Struct, frozen=True):
    """A case: what was done.

    Attributes:
        text: what it measures, in words.
        cold: whether caches were dropped before each run.
    """

    suite: str
    name: str
    text: str
    cold: bool
    quantities: list[Quantity]
    axis: Axis | None = None


class SideInfo(msgspec.Struct, frozen=True):
    """Something that was measured beside others. kind: "driver", "peer" or "bare"; about: what it is, with versions."""

    name: str
    kind: str
    about: str
    host: str


class Absent(msgspec.Struct, frozen=True):
    """A side that was wanted and cannot run on that host, and why."""

    side: str
    why: str
    host: str


class Skipped(msgspec.Struct, frozen=True):
    """A case that a side did not do, or in which it failed (`failed`), and why. at: the place on the axis, if any."""

    suite: str
    case: str
    side: str
    why: str
    host: str
    failed: bool = False
    at: float | None = None


class Noise(msgspec.Struct, frozen=True):
    """What else went on during a run.

    Attributes:
        load: the load average of the minute when it began.
        waited: share of the run's time in which some task of the host waited for a CPU (PSI).
        stolen: share of the CPUs' time that the hypervisor took.
    """

    load: float
    waited: float
    stolen: float


class Measurement(msgspec.Struct):
    """One quantity of one case on one side, at one place of the axis: samples by run, and each run's noise."""

    suite: str
    case: str
    quantity: str
    side: str
    host: str
    runs: list[list[float]]
    noise: list[Noise]
    at: float | None = None

    @property
    def key(self) -> tuple[str, str, str, str, str, float | None]:
        return (self.host, self.suite, self.case, self.quantity, self.side, self.at)

    @property
    def samples(self) -> list[float]:
        """All samples of all runs."""
        return [value for run in self.runs for value in run]

    @property
    def of_runs(self) -> list[float]:
        """Each run's median."""
        return [statistics.median(run) for run in self.runs if run]

    @property
    def median(self) -> float:
        """The median of the runs' medians: a slow moment with many samples counts as one run."""
        return statistics.median(self.of_runs)

    def percentile(self, share: float) -> float:
        """The nearest-rank percentile of all samples."""
        ordered = sorted(self.samples)
        return ordered[max(0, math.ceil(len(ordered) * share) - 1)]


class Session(msgspec.Struct, frozen=True):
    """One call of `hpmapper bench`.

    Attributes:
        began, ended: RFC 3339. command: its words. version: of hpmapper.
        short: whether everything was smaller than the cases' texts say.
    """

    host: str
    began: str
    ended: str
    command: list[str]
    version: str
    interrupted: bool = False
    short: bool = False


class Results(msgspec.Struct):
    """All that results.json holds. hosts: each machine's facts by its label."""

    schema: str = SCHEMA
    version: int = VERSION
    hosts: dict[str, dict[str, str]] = {}
    sessions: list[Session] = []
    sides: list[SideInfo] = []
    absent: list[Absent] = []
    cases: list[CaseInfo] = []
    skipped: list[Skipped] = []
    measurements: list[Measurement] = []

    def case(self, suite: str, name: str) -> CaseInfo:
        """The case of that name."""
        return next(one for one in self.cases if (one.suite, one.name) == (suite, name))

    def find(self, suite: str, case: str, quantity: str, side: str, at: float | None = None) -> Measurement | None:
        """The first measurement that fits, whatever its host; `at` None: at any place."""
        for one in self.measurements:
            if (one.suite, one.case, one.quantity, one.side) == (suite, case, quantity, side) and at in (None, one.at):
                return one
        return None


def schema() -> dict[str, Any]:
    """The form as a JSON Schema (2020-12)."""
    return msgspec.json.schema(Results)


def load(path: Path) -> Results:
    """Read a results file, or the one in a directory.

    Raises:
        NotFound: it is not there. Corrupt: it is no such file. InvalidArgument: its form is newer than we know.
    """
    file = path / FILE if path.is_dir() else path
    try:
        found = msgspec.json.decode(file.read_bytes(), type=Results)
    except FileNotFoundError:
        raise NotFound(f"there are no results at {file}", hint="hpmapper bench --out DIR makes some") from None
    except msgspec.MsgspecError as error:
        raise Corrupt(f"{file} holds no results of hpmapper bench: {error}") from None
    if found.schema != SCHEMA:
        raise Corrupt(f"{file} holds no results of hpmapper bench: its schema is {found.schema!r}")
    if found.version > VERSION:
        raise InvalidArgument(f"{file} has form {found.version}, and this hpmapper knows {VERSION}", hint="upgrade")
    return found


def save(results: Results, directory: Path) -> Path:
    """Write results.json, whole or not at all; returns its path."""
    file = directory / FILE
    new = file.with_suffix(".new")
    new.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n")
    os.replace(new, file)
    return file


def merge(parts: Iterable[Results]) -> Results:
    """Join results: runs of the same thing on the same host become more runs of it.

    Raises:
        InvalidArgument: different machines have the same label.
    """
    whole = Results()
    for part in parts:
        for label, facts in part.hosts.items():
            _require_same(label, whole.hosts.setdefault(label, facts), facts)
        whole.sessions += part.sessions
        _add_new(whole.sides, part.sides)
        _add_new(whole.absent, part.absent)
        _add_new(whole.skipped, part.skipped)
        _add_new(whole.cases, part.cases)
        known = {one.key: one for one in whole.measurements}
        for one in part.measurements:
            if one.key in known:
                known[one.key].runs += one.runs
                known[one.key].noise += one.noise
            else:
                whole.measurements.append(msgspec.structs.replace(one, runs=[*one.runs], noise=[*one.noise]))
    return whole


def _require_same(label: str, ours: dict[str, str], theirs: dict[str, str]) -> None:
    """Raise InvalidArgument if two hosts of one label differ in kernel, processor or memory."""
    for fact in ("kernel", "processor", "processors"):
        if ours.get(fact) != theirs.get(fact):
            raise InvalidArgument(
                f"two hosts are labelled {label!r}: {fact} is {ours.get(fact)!r} and {theirs.get(fact)!r}",
                hint="hpmapper bench --label NAME tells hosts apart",
            )


def _add_new(into: list[Any], more: Iterable[Any]) -> None:
    """Add what is not there yet; a case that is described anew replaces its description."""
    for one in more:
        if isinstance(one, CaseInfo):
            into[:] = [other for other in into if (other.suite, other.name) != (one.suite, one.name)]
        if one not in into:
            into.append(one)


def without(results: Results, host: str, suite: str, case: str) -> None:
    """Forget all that is known of a case on a host: it is measured again."""
    results.measurements = [m for m in results.measurements if (m.host, m.suite, m.case) != (host, suite, case)]
    results.skipped = [s for s in results.skipped if (s.host, s.suite, s.case) != (host, suite, case)]
