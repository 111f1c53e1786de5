"""Every command explains itself, and the front door stays quick by importing nothing that it does not need."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from hpmapper.cli.exits import CODES
from hpmapper.cli.main import COMMANDS, cli


def commands(group: click.Group, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield (*words, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*words, name))


@pytest.mark.parametrize("words", [(), *commands(cli)], ids=" ".join)
def test_every_command_has_help(words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(cli, [*words, "--help"])
    assert result.exit_code == 0
    assert result.output.startswith(f"Usage: {' '.join(['hpmapper', *words])} ")
    assert "..." not in result.output.partition("Commands:")[2], "a summary does not fit its line"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_front_doors_summaries_are_the_commands_own(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert command.help is not None
    assert command.get_short_help_str(100) == COMMANDS[name].summary


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from hpmapper.cli.main import cli\n"
        "try: cli(['--help'])\n"
        "except SystemExit: pass\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert "hpmapper.cli.main" in imported
    assert not imported & {"hpmapper.engine", "hpmapper.kernel", "sqlite3", "rich", "msgspec", "blake3"}


def test_the_exit_codes_are_in_the_help() -> None:
    text = " ".join(CliRunner().invoke(cli, ["--help"]).output.split())
    for code, meaning in CODES.values():
        assert f"{code} {meaning}" in text


def test_the_version_is_shown() -> None:
    assert CliRunner().invoke(cli, ["--version"]).output.startswith("hpmapper ")
