"""How commands end: every error in one place, and one table of exit codes."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import click

from hpmapper import errors
from hpmapper.cli.state import State
from hpmapper.errors import HpmapperError

GENERAL, USAGE = 1, 2

CODES: dict[type[HpmapperError], tuple[int, str]] = {
    errors.InvalidArgument: (USAGE, "usage, or an argument that makes no sense"),
    errors.NotFound: (3, "not found"),
    errors.AlreadyExists: (4, "exists already"),
    errors.FailedPrecondition: (5, "not in the present state: in use, has children, …"),
    errors.Unsupported: (6, "this host cannot do it"),
    errors.NoSpace: (7, "no space"),
    errors.Corrupt: (8, "damaged or hostile data"),
}
"""The exit code of each kind of error, and its meaning."""

EPILOG = (
    "Exit status: 0 done, 1 other errors, "
    + ", ".join(f"{code} {meaning}" for code, meaning in CODES.values())
    + ", 128+N ended by signal N. `run` and `container start` give the container's own, and as Docker 125 when "
    "hpmapper fails, 126 or 127 when the container's command cannot be run or found."
)

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A signal that means the end: SIGTERM and SIGHUP clean up as Ctrl-C does."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def guarded(state: State, command: Callable[[], object]) -> int:
    """Run a command line to its end; returns the exit code, and says what went wrong."""
    try:
        with _endings_raised():
            result = command()
            sys.stdout.flush()
    except BrokenPipeError:
        _forget_output()
        return GENERAL
    except (click.ClickException, click.Abort, KeyboardInterrupt, HpmapperError, OSError) as error:
        if state.debug:
            traceback.print_exc()
        return _told(state, error)
    except Exception as error:
        return _unexpected(state, error)
    return result if isinstance(result, int) else 0


def exit_code(error: HpmapperError, failure: int | None = None) -> int:
    """The exit code of one of our errors; `failure`: what all have that do not bring their own."""
    own = getattr(error, "status", failure)  # a container that could not be started: as a shell would say it
    if isinstance(own, int):
        return own
    return next((code for kind, (code, _) in CODES.items() if isinstance(error, kind)), GENERAL)


def translated(error: OSError) -> HpmapperError | None:
    """An error of the operating system that the user can do something about, in our words."""
    place = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
    text = f"{place}{error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return errors.NoSpace(text, hint="free some space; hpmapper gc, hpmapper pool grow")
    if error.errno in (errno.EACCES, errno.EPERM):
        hint = "run as root" if os.geteuid() else "root may not do this here: is this a restricted container?"
        return errors.FailedPrecondition(text, hint=hint)
    if error.errno == errno.EROFS:
        return errors.FailedPrecondition(text, hint="name a --root on a file system that can be written to")
    return None


def _told(state: State, error: BaseException) -> int:
    match error:
        case click.Abort() | KeyboardInterrupt():
            cause = error.__cause__ if isinstance(error, click.Abort) else error
            number = cause.number if isinstance(cause, Interrupted) else signal.SIGINT
            return _say(state, HpmapperError("interrupted"), 128 + number)
        case click.ClickException():
            return _usage(state, error)
        case HpmapperError():
            return _say(state, error, exit_code(error, state.failure))
        case OSError():
            ours = translated(error)
            return _say(state, ours, exit_code(ours, state.failure)) if ours else _unexpected(state, error)
    raise AssertionError("unreachable: every kind has a case")


def _usage(state: State, error: click.ClickException) -> int:
    if not state.json:
        error.show()
        return error.exit_code
    return _say(state, HpmapperError(error.format_message()), error.exit_code)


def _unexpected(state: State, error: Exception) -> int:
    if state.debug:
        traceback.print_exception(error)
    hint = "" if state.debug else "this may be a bug; hpmapper --debug … shows where it comes from"
    return _say(state, HpmapperError(f"{type(error).__name__}: {error}", hint=hint), state.failure or GENERAL)


def _say(state: State, error: HpmapperError, code: int) -> int:
    try:
        if state.json:
            kind = type(error).__name__
            facts = {"error": {"kind": kind, "message": error.message, "hint": error.hint, "exit_code": code}}
            click.echo(json.dumps(facts), err=True)
        else:
            click.echo(_printable(f"hpmapper: {error.message}"), err=True)
            if error.hint:
                click.echo(_printable(f"  hint: {error.hint}"), err=True)
    except BrokenPipeError:
        pass  # nobody listens any more
    return code


def _printable(text: str) -> str:
    """Names from images and archives must not steer the terminal, nor fail to be encoded."""
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)


@contextmanager
def _endings_raised() -> Iterator[None]:
    """Signals that mean the end raise `Interrupted` in the main thread, so that everything is cleaned up."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise Interrupted(number)

    before = {number: signal.getsignal(number) for number in _ENDING}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _forget_output() -> None:
    """Whoever read our output has gone: let the interpreter's last flush find somebody."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
