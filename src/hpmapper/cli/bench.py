"""hpmapper bench: the storage drivers beside each other and beside what people use today."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
from msgspec import to_builtins

from hpmapper.bench import results as forms
from hpmapper.bench.compare import RULE, compare
from hpmapper.bench.harness import SUITES
from hpmapper.bench.report import shown
from hpmapper.cli import output
from hpmapper.cli.groups import NearestGroup
from hpmapper.cli.state import State, json_option, pass_state
from hpmapper.errors import FailedPrecondition, InvalidArgument
from hpmapper.pool.base import parse_size

if TYPE_CHECKING:
    from hpmapper.bench.harness import Case
    from hpmapper.bench.results import Results
    from hpmapper.bench.runner import Wanted


class _RunsByDefault(NearestGroup):
    """A group whose command `run` need not be named."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, "run" if cmd_name in SUITES else cmd_name)


@click.group(cls=_RunsByDefault)
def bench() -> None:
    """Measure storage drivers side by side.

    `hpmapper bench [SUITE…]` is `hpmapper bench run [SUITE…]`.
    """


_no_plots = click.option("--no-plots", is_flag=True, help="Write JSON and Markdown only; needs no matplotlib.")
_out = click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("bench-results"),
    show_default=True,
    metavar="DIR",
    help="Where the results go.",
)


@bench.command()
@click.argument("suites", nargs=-1, metavar="[SUITE]...")
@click.option("--case", "names", multiple=True, metavar="SUITE/CASE", help="Only this case; repeatable.")
@click.option("--drivers", metavar="A,B", help="Only these of our drivers, by name or side; else all.")
@click.option("--peers", default="", metavar="A,B", help='Also these peers; "all".')
@click.option("--runs", type=click.IntRange(1), default=5, show_default=True, help="Of each case on each side.")
@click.option("--size", default="12G", show_default=True, help="Of each side's file system (a sparse file).")
@click.option("--device", type=click.Path(path_type=Path), help="Cut this device up instead. ALL ON IT IS LOST.")
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), help="Scratch space; else in /var/tmp.")
@click.option("--images", type=click.Path(path_type=Path, file_okay=False), help="Where images are kept.")
@click.option("--label", default="host", show_default=True, help="What to call this host in the results.")
@click.option("--short", is_flag=True, help="Small and quick: shows that everything works. No figures to quote.")
@_out
@_no_plots
@json_option
@pass_state
def run(
    state: State,
    suites: tuple[str, ...],
    names: tuple[str, ...],
    drivers: str | None,
    peers: str,
    runs: int,
    size: str,
    device: Path | None,
    work: Path | None,
    images: Path | None,
    label: str,
    short: bool,
    out: Path,
    no_plots: bool,
) -> None:
    """Run SUITEs (all of them by default) and write the results.

    Results that are in DIR already stay, but for what is measured again. Suites: cow, cache, start, ingest, space,
    ops, diff, io, apps.
    """
    from hpmapper.bench import gobuild, opening
    from hpmapper.bench.runner import Runner

    if not no_plots:
        _require_plots()
    cases, sides = _cases(suites, names), opening.chosen(drivers, peers)
    _require_root()
    out.mkdir(parents=True, exist_ok=True)
    found = forms.load(out) if (out / forms.FILE).exists() else forms.Results()
    with _workspace(work) as place:
        kept = images or gobuild.cache() / "images"
        wanted = opening.wanted(place, sides, device, parse_size(size))
        runner = Runner(label, runs, short, kept.absolute(), place, out, found)
        runner.measure(cases, wanted, ["hpmapper", *sys.argv[1:]])
    _write_reports(found, out, plots=not no_plots)
    click.echo(f"results are in {out}", err=True)
    output.show(state, to_builtins(found), lambda: "")


def _cases(suites: Sequence[str], names: Sequence[str]) -> list[Case]:
    """The cases of suites, or those named.

    Raises:
        InvalidArgument: there is no such suite or case.
    """
    from hpmapper.bench import suites as _  # noqa: F401 (registers the cases)
    from hpmapper.bench.harness import CASES
    from hpmapper.drivers.registry import nearest

    for suite in suites:
        if suite not in SUITES:
            raise InvalidArgument(f"there is no suite {suite!r}", hint=nearest(suite, SUITES))
    known = {one.name for one in CASES}
    for name in names:
        if name not in known:
            raise InvalidArgument(f"there is no case {name!r}", hint=nearest(name, known))
    if names:
        return [one for one in CASES if one.name in names]
    return [one for suite in SUITES if not suites or suite in suites for one in CASES if one.info.suite == suite]


@contextmanager
def _workspace(work: Path | None) -> Iterator[Path]:
    """A directory of our own, empty, gone at the end; in a mount namespace of our own."""
    from hpmapper.kernel import mount

    mount.private_namespace()  # no mount is left, however this ends, and nobody else's namespace keeps one busy
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="hpmapper-bench-", dir=work or "/var/tmp") as path:
        Path(path).chmod(0o755)
        yield Path(path)


def _require_root() -> None:
    import os

    if os.geteuid() != 0:
        raise FailedPrecondition("benchmarks make and mount file systems", hint="run as root")


def _require_plots() -> None:
    from hpmapper.bench.report import plots

    plots.require()


def _write_reports(results: Results, out: Path, *, plots: bool) -> None:
    from hpmapper.bench.report import markdown

    (out / "report.md").write_text(markdown.report(results))
    if plots:
        from hpmapper.bench.report import page
        from hpmapper.bench.report.plots import write_pngs

        (out / "report.html").write_text(page.page(results))
        write_pngs(results, out / "plots")


@bench.command("list")
@json_option
@pass_state
def list_(state: State) -> None:
    """List suites, cases and sides, and what cannot run here."""
    from hpmapper.bench import opening

    cases = _cases((), ())
    found = opening.wanted(Path("/var/tmp"), opening.chosen(None, "all"), None, 0)
    facts = {
        "cases": [to_builtins(one.info) for one in cases],
        "sides": [{"name": one.name, "why_not": one.why_not} for one in found],
    }
    output.show(state, facts, lambda: _list_text(cases, found))


def _list_text(cases: Sequence[Case], sides: Sequence[Wanted]) -> str:
    rows = [(one.name, one.info.text.partition(": ")[0].partition(". ")[0][:90]) for one in cases]
    names = [(one.name, one.why_not or "probed when it is opened") for one in sides]
    return output.table(("CASE", "WHAT"), rows) + "\n\n" + output.table(("SIDE", "HERE"), names)


@bench.command()
@click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
@_no_plots
def report(directory: Path, no_plots: bool) -> None:
    """Write the reports of DIR's results anew."""
    _write_reports(forms.load(directory), directory, plots=not no_plots)


@bench.command()
@click.argument("parts", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RESULTS...")
@_out
@_no_plots
def merge(parts: tuple[Path, ...], out: Path, no_plots: bool) -> None:
    """Join results: runs of the same become more runs of it."""
    whole = forms.merge([forms.load(one) for one in parts])
    out.mkdir(parents=True, exist_ok=True)
    forms.save(whole, out)
    _write_reports(whole, out, plots=not no_plots)


@bench.command("compare")
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@click.option("--all", "everything", is_flag=True, help="Show what did not change, too.")
@json_option
@pass_state
def compare_(state: State, before: Path, after: Path, everything: bool) -> None:
    """Say what changed between two results beyond noise.

    A quantity changed if the ranges of its runs' medians do not overlap and the medians differ by more than 5 %. Watch
    the rows of the bare file system: they say how much the machine itself has changed.
    """
    changes = compare(forms.load(before), forms.load(after))
    facts = {
        "rule": RULE,
        "changes": [
            {
                "host": one.before.host,
                "case": f"{one.before.suite}/{one.before.case}",
                "quantity": one.before.quantity,
                "side": one.before.side,
                "at": one.before.at,
                "before": one.before.median,
                "after": one.after.median,
                "ratio": one.ratio,
                "verdict": one.verdict,
                "by_chance": one.chance,
            }
            for one in changes
        ],
    }

    def text() -> str:
        told = [one for one in changes if everything or one.verdict in ("better", "worse")]
        rows = [
            (
                one.verdict,
                f"{one.before.suite}/{one.before.case}: {one.before.quantity}",
                one.before.side,
                "" if one.before.at is None else f"{one.before.at:g}",
                f"{shown.number(one.before.median)} → {shown.number(one.after.median)}",
                f"× {one.ratio:.2f}",
            )
            for one in told
        ]
        counts = f"{len(changes)} compared, {sum(one.verdict in ('better', 'worse') for one in changes)} changed"
        body = output.table(("", "CASE", "SIDE", "AT", "MEDIANS", "RATIO"), rows) + "\n\n" if rows else ""
        return f"{body}{counts} ({RULE})"

    output.show(state, facts, text)


@bench.command()
def schema() -> None:
    """Print the form of results.json as a JSON Schema."""
    import json

    click.echo(json.dumps(forms.schema(), indent=2))
