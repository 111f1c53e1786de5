"""What hpmapper bench makes of measurements: files, joins, comparisons, growth and reports, from made-up figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from hpmapper.bench import results as forms
from hpmapper.bench.compare import compare
from hpmapper.bench.growth import growths, power_law
from hpmapper.bench.report import markdown, page, plots, shown
from hpmapper.bench.results import Axis, CaseInfo, Measurement, Noise, Quantity, Results, SideInfo, Skipped
from hpmapper.cli.main import cli
from hpmapper.errors import Corrupt, InvalidArgument, NotFound, Unsupported

HOST = {"kernel": "6.18", "processor": "one", "processors": "2"}
QUIET = Noise(0.1, 0.0, 0.0)
FLAT = CaseInfo("cow", "flat", "What is measured.", False, [Quantity("latency", "ms", "lower", "one system call")])
GROWING = CaseInfo(
    "ops",
    "growing",
    "By <snapshots>.",
    True,
    [Quantity("rate", "per second", "higher")],
    Axis("snapshots", growth=True),
)


def measured(*runs: list[float], side: str = "hpmapper", at: float | None = None, case: CaseInfo = FLAT) -> Measurement:
    quantity = case.quantities[0].name
    return Measurement(case.suite, case.name, quantity, side, "host", list(runs), [QUIET] * len(runs), at)


def made(*measurements: Measurement) -> Results:
    sides = [SideInfo("bare-xfs", "bare", "xfs", "host"), SideInfo("hpmapper", "driver", "driver", "host")]
    return Results(hosts={"host": HOST}, sides=sides, cases=[FLAT, GROWING], measurements=list(measurements))


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    found = made(measured([1.0, 2.0], [3.0]), measured([5.0], at=10, case=GROWING))
    forms.save(found, tmp_path)
    assert forms.load(tmp_path) == forms.load(tmp_path / forms.FILE) == found


def test_a_file_says_what_form_it_has(tmp_path: Path) -> None:
    forms.save(made(), tmp_path)
    written = json.loads((tmp_path / forms.FILE).read_text())
    assert (written["schema"], written["version"]) == ("hpmapper-bench", 1)
    (tmp_path / forms.FILE).write_text(json.dumps(written | {"version": 2}))
    with pytest.raises(InvalidArgument, match="form 2"):
        forms.load(tmp_path)
    (tmp_path / forms.FILE).write_text(json.dumps(written | {"schema": "other"}))
    with pytest.raises(Corrupt, match="'other'"):
        forms.load(tmp_path)


@pytest.mark.parametrize("damaged", [b"", b"[]", b"{", b'{"measurements": [{}]}', b'{"measurements": 1}'])
def test_other_files_are_refused(tmp_path: Path, damaged: bytes) -> None:
    (tmp_path / forms.FILE).write_bytes(damaged)
    with pytest.raises(Corrupt, match=r"results\.json holds no results"):
        forms.load(tmp_path)
    with pytest.raises(NotFound, match="no results at"):
        forms.load(tmp_path / "missing")


def test_the_schema_describes_every_part() -> None:
    definitions = forms.schema()["$defs"]
    assert {"Results", "Measurement", "CaseInfo", "Quantity", "Axis", "SideInfo", "Absent", "Skipped"} <= set(
        definitions
    )
    for name in ("Measurement", "Quantity", "Noise", "Session"):
        assert len(definitions[name]["description"]) > 20


def test_merging_joins_runs_and_keeps_the_rest() -> None:
    whole = forms.merge([made(measured([1.0])), made(measured([2.0]), measured([3.0], side="bare-xfs"))])
    assert [(one.side, one.runs) for one in whole.measurements] == [("hpmapper", [[1.0], [2.0]]), ("bare-xfs", [[3.0]])]
    assert len(whole.sides) == len(whole.cases) == 2


def test_different_machines_need_different_labels() -> None:
    other = made()
    other.hosts = {"host": HOST | {"kernel": "5.10"}}
    with pytest.raises(InvalidArgument, match=r"kernel is '6\.18' and '5\.10'"):
        forms.merge([made(), other])


def test_what_is_measured_again_is_forgotten() -> None:
    found = made(measured([1.0]), measured([2.0], at=1, case=GROWING))
    found.skipped.append(Skipped("cow", "flat", "vfs", "why", "host"))
    forms.without(found, "host", "cow", "flat")
    assert [one.case for one in found.measurements] == ["growing"]
    assert not found.skipped


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ([10, 11, 12], [7, 8, 9], "better"),
        ([7, 8, 9], [10, 11, 12], "worse"),
        ([10, 11, 12], [9, 10.5, 11], "same"),  # the ranges overlap
        ([100, 101, 102], [103, 104, 105], "same"),  # by less than 5 %
        ([10, 11], [1, 2], "too few runs"),
    ],
)
def test_a_change_is_beyond_noise_when_the_runs_are_apart(
    before: list[float], after: list[float], verdict: str
) -> None:
    (change,) = compare(made(measured(*([one] for one in before))), made(measured(*([one] for one in after))))
    assert change.verdict == verdict


def test_where_more_is_better_less_is_worse() -> None:
    before, after = ([[value + extra] for extra in range(3)] for value in (10.0, 20.0))
    runs = [made(measured(*some, at=1, case=GROWING)) for some in (before, after)]
    assert [one.verdict for one in compare(*runs)] == ["better"]
    assert [one.verdict for one in compare(*reversed(runs))] == ["worse"]
    assert compare(*runs)[0].chance == pytest.approx(0.1)


def test_the_exponent_is_that_of_the_power_law() -> None:
    places = [1.0, 10.0, 100.0]
    assert power_law(places, [3 * place**1.5 for place in places]) == pytest.approx((1.5, 1.0))
    assert power_law(places, [2.0, 2.0, 2.0]) == (0.0, 1.0)


def test_growth_worse_than_linear_is_told() -> None:
    def rates(exponent: float, side: str) -> list[Measurement]:
        return [measured([1000 / at**exponent], at=at, side=side, case=GROWING) for at in (10, 100, 1000)]

    found = {one.side: one for one in growths(made(*rates(0.0, "hpmapper"), *rates(1.4, "bare-xfs")))}
    assert found["bare-xfs"].exponent == pytest.approx(1.4)
    assert found["bare-xfs"].is_worse_than_linear
    assert not found["hpmapper"].is_worse_than_linear
    text = markdown.report(made(*rates(1.4, "hpmapper")))
    assert "1.40 **worse than linear**" in text


def test_growth_that_begins_at_the_end_is_told_when_the_runs_leave_no_doubt() -> None:
    def series(*last: float) -> list[Measurement]:
        early = [measured([1.0], [1.1], at=at, case=GROWING) for at in (10, 100, 1000)]
        return [*early, measured(*([value] for value in last), at=10_000, case=GROWING)]

    (steep,) = growths(made(*series(0.01, 0.02)))  # a rate: less is dearer
    assert steep.exponent < 1 < steep.end
    assert steep.is_worse_than_linear
    (unclear,) = growths(made(*series(0.01, 0.9)))
    assert not unclear.is_worse_than_linear


def test_a_cell_shows_median_spread_and_tail() -> None:
    assert shown.cell(measured([1.0], [3.0], [2.0])) == "2 (1–3)"
    assert shown.cell(measured([float(n) for n in range(1, 101)])) == "50.5 (1–100), p99 99"
    assert shown.cell(measured([1.0])) == "1"
    assert shown.cell(None) == "–"


def test_a_run_counts_once_however_many_samples_it_has() -> None:
    assert measured([1.0], [2.0], [9.0] * 50).median == 2.0


@pytest.fixture
def found() -> Results:
    found = made(*(measured([at / 10], [at / 5], at=at, case=GROWING) for at in (10, 100, 1000)), measured([1.0]))
    found.skipped.append(Skipped("cow", "flat", "vfs", "a | b", "host", failed=True))
    return found


def test_the_markdown_has_everything(found: Results) -> None:
    text = markdown.report(found)
    for words in ("## cow/flat", "| hpmapper | 1 |", "Physical limit: latency: one system call", "failed: a \\| b"):
        assert words in text


def test_the_page_is_one_file_that_loads_nothing(found: Results) -> None:
    pytest.importorskip("matplotlib")
    text = page.page(found)
    assert text.count("<svg") == text.count("</svg>") == 2
    assert "By &lt;snapshots&gt;." in text
    assert not [word for word in ("<script", "<link", 'src="', "@import") if word in text]


def test_each_case_has_a_picture(found: Results, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = plots.write_pngs(found, tmp_path / "plots")
    assert sorted(path.name for path in paths) == ["cow-flat.png", "ops-growing.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_without_matplotlib_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(Unsupported, match=r"pip install 'hpmapper\[bench\]'"):
        plots.require()


def test_reports_comparisons_and_joins_by_the_command_line(found: Results, tmp_path: Path) -> None:
    forms.save(found, tmp_path)
    run = CliRunner().invoke
    assert run(cli, ["bench", "report", "--no-plots", str(tmp_path)]).exit_code == 0
    assert (tmp_path / "report.md").read_text() == markdown.report(found)
    joined = run(cli, ["bench", "merge", str(tmp_path), str(tmp_path), "--no-plots", "--out", str(tmp_path / "two")])
    assert joined.exit_code == 0, joined.output
    assert len(forms.load(tmp_path / "two").measurements[0].runs) == 4
    compared = run(cli, ["bench", "compare", "--json", str(tmp_path), str(tmp_path / "two")])
    assert {one["verdict"] for one in json.loads(compared.output)["changes"]} == {"too few runs"}
    assert "0 changed" in run(cli, ["bench", "compare", str(tmp_path), str(tmp_path)]).output
    assert json.loads(run(cli, ["bench", "schema"]).output)["$defs"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cwo"], "did you mean 'cow'"),
        (["run", "--case", "cow/first-wriet"], "did you mean 'cow/first-write'"),
        (["cow", "--drivers", "overly"], "did you mean 'overlay'"),
        (["cow", "--peers", "contaynerd-erofs"], "did you mean 'containerd-erofs'"),
    ],
)
def test_a_mistyped_word_is_told_before_anything_is_done(words: list[str], said: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["bench", *words, "--no-plots", "--out", str(tmp_path), "--work", str(tmp_path)])
    assert done.exit_code == 2, done.output
    assert said in done.output
