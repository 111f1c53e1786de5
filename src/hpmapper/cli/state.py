"""What the options before the command say, and the options that several commands share. Cheap to import."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

_Command = TypeVar("_Command", bound=Callable[..., Any])


@dataclass(slots=True)
class State:
    """Filled while the command line is read; None: nobody said.

    `failure`: the exit code of every error of ours, where the usual ones have another meaning.
    """

    root: Path | None = None
    config: Path | None = None
    driver: str | None = None
    options: tuple[str, ...] = ()
    debug: bool = False
    json: bool = False
    failure: int | None = None


pass_state = click.make_pass_decorator(State, ensure=True)


def _set_json(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        ctx.ensure_object(State).json = True


def json_option(command: _Command) -> _Command:
    """--json, on the commands that print facts as well as before them."""
    # Eager: then an error in the words after it is JSON too.
    option = click.option(
        "--json", is_flag=True, expose_value=False, is_eager=True, callback=_set_json, help="Print JSON."
    )
    return option(command)
