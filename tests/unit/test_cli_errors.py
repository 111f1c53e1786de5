"""Errors: one line for people, one object for programs, one exit code for each kind, never a traceback."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from hpmapper import errors
from hpmapper.cli.exits import CODES, guarded
from hpmapper.cli.main import cli
from hpmapper.cli.state import State
from hpmapper.errors import HpmapperError


def hpmapper(*words: str | Path) -> Result:
    return CliRunner().invoke(cli, list(map(str, words)))


def failing(error: BaseException) -> Callable[[], object]:
    def command() -> object:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InvalidArgument, 2),
        (errors.NotFound, 3),
        (errors.AlreadyExists, 4),
        (errors.FailedPrecondition, 5),
        (errors.Unsupported, 6),
        (errors.NoSpace, 7),
        (errors.Corrupt, 8),
        (HpmapperError, 1),
    ],
)
def test_each_kind_of_error_has_its_code(
    error: type[HpmapperError], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(State(), failing(error("it failed", hint="do this"))) == code
    assert capsys.readouterr().err == "hpmapper: it failed\n  hint: do this\n"


def test_no_kind_of_error_was_forgotten() -> None:
    assert set(HpmapperError.__subclasses__()) >= set(CODES)
    own = {kind for kind in HpmapperError.__subclasses__() if kind.__module__ == "hpmapper.errors"}
    assert own == set(CODES)


def test_errors_are_json_when_facts_are(capsys: pytest.CaptureFixture[str]) -> None:
    guarded(State(json=True), failing(errors.NotFound("no such thing", hint="look elsewhere")))
    assert json.loads(capsys.readouterr().err) == {
        "error": {"kind": "NotFound", "message": "no such thing", "hint": "look elsewhere", "exit_code": 3}
    }


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.ENOSPC, 7), (errno.EDQUOT, 7), (errno.EACCES, 5), (errno.EPERM, 5), (errno.EROFS, 5), (errno.EIO, 1)],
)
def test_the_systems_errors_are_translated(number: int, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(State(), failing(OSError(number, os.strerror(number), "/some/where"))) == code
    assert "/some/where" in capsys.readouterr().err


def test_a_bug_is_one_line_and_how_to_see_more(capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(State(), failing(ZeroDivisionError("oh"))) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "hpmapper: ZeroDivisionError: oh"
    assert "--debug" in lines[1]


def test_debug_shows_where_an_error_comes_from(capsys: pytest.CaptureFixture[str]) -> None:
    guarded(State(debug=True), failing(ZeroDivisionError("oh")))
    assert "Traceback" in capsys.readouterr().err


def test_names_from_outside_do_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    guarded(State(), failing(errors.Corrupt("a\x1b[2Jb \udc80")))
    assert capsys.readouterr().err == "hpmapper: a\\x1b[2Jb \\udc80\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ending_signals_unwind(number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    cleaned = []

    def command() -> object:
        try:
            os.kill(os.getpid(), number)
            signal.sigtimedwait([], 5)
            raise AssertionError("the signal did not come")
        finally:
            cleaned.append(True)

    before = signal.getsignal(number)
    assert guarded(State(), command) == 128 + number
    assert cleaned
    assert capsys.readouterr().err == "hpmapper: interrupted\n"
    assert signal.getsignal(number) == before


def test_commands_that_bring_an_exit_status_end_with_it() -> None:
    assert guarded(State(), lambda: 7) == 7
    assert guarded(State(), lambda: None) == 0
    assert guarded(State(failure=125), failing(errors.NotFound("x"))) == 125


def test_click_errors_keep_their_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(State(), failing(click.UsageError("what?"))) == 2
    assert "what?" in capsys.readouterr().err
    assert guarded(State(json=True), failing(click.UsageError("what?"))) == 2
    assert json.loads(capsys.readouterr().err)["error"]["message"] == "what?"


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m hpmapper.cli.main --help | true"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}; :"], capture_output=True, text=True, check=True)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("words", "suggestion"),
    [
        (["imag", "ls"], "'image'"),
        (["image", "lss"], "'ls'"),
        (["pool", "statsu"], "'status'"),
        (["image", "ls", "--jsn"], "--json"),
        (["--storage-opt", "pool.sice=1G", "info"], "'pool.size'"),
        (["--storage-driver", "overley", "info"], "'overlay'"),
    ],
)
def test_what_was_meant_is_suggested(words: list[str], suggestion: str, tmp_path: Path) -> None:
    result = hpmapper("--root", tmp_path / "root", *words)
    assert result.exit_code == 2
    assert suggestion in result.stderr


def test_a_bad_config_file_is_refused_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('\nstorage-drivr = "vfs"\n')
    result = hpmapper("--config", file, "info")
    assert result.exit_code == 2
    assert f"{file}, line 2" in result.stderr
    assert "storage-driver" in result.stderr


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["image", "ls"], 3),
        (["info"], 3),
        (["container", "rm", "x"], 3),
        (["pool", "status"], 3),
        (["gc"], 3),
        (["run", "x"], 125),
        (["run"], 2),
        (["image", "pull"], 2),
        (["image", "save", "x"], 2),
        (["image", "save", "-o", "f", "--format", "zip", "x"], 2),
        (["container", "start"], 2),
        (["run", "-v", "nothing", "x"], 125),
        (["run", "-v", "/:/", "x"], 125),
        (["run", "-v", "/nowhere/at/all:/x", "x"], 125),
        (["run", "-t", "x"], 125),
        (["run", "--runtime", "no-such-runtime", "x"], 125),
    ],
)
def test_nothing_is_made_by_what_fails(words: list[str], code: int, tmp_path: Path) -> None:
    root = tmp_path / "root"
    result = hpmapper("--root", root, *words)
    assert result.exit_code == code
    assert "Traceback" not in result.output
    assert not root.exists()
