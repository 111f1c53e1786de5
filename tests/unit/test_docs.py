"""The documents against the code: links, files, modules, command lines, options and names that they mention."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from hpmapper.cli.exits import CODES
from hpmapper.cli.main import cli
from hpmapper.cli.state import State
from hpmapper.config import _KEYS
from hpmapper.drivers.registry import DRIVERS, POOL_OPTIONS
from hpmapper.kernel.probe import FEATURE_NAMES

TOP = Path(__file__).parents[2]
DOCUMENTS = sorted([TOP / "README.md", *(TOP / "docs").glob("*.md")])
OPERATIONS = TOP / "docs" / "operations.md"
CONTAINERD = TOP / "docs" / "containerd.md"

_FENCE = re.compile(r"^```[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_PATH = re.compile(r"(?<![\w/.])(?:src/hpmapper|tests|tools|docs|requirements)/[\w./-]*")
_MODULE = re.compile(r"(?<![\w/.<>-])hpmapper(?:\.[a-z_]+)+")
_NO_MODULES = {"hpmapper.db", "hpmapper.service", "hpmapper.sock", "hpmapper.socket"}
_NOT_IN_SLUGS = re.compile(r"[^\w\- ]")
_PLACEHOLDER = re.compile(r"[A-Z]+|…|\.\.\.")


def _name(document: Path) -> str:
    return document.name


def _slugs(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", document.read_text()), re.MULTILINE)
    return {_NOT_IN_SLUGS.sub("", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=_name)
def test_links_lead_somewhere(document: Path) -> None:
    for link in _LINK.findall(_FENCE.sub("", document.read_text())):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = document.parent / file if file else document
        assert target.exists(), f"{document.name} links to {link}"
        assert not anchor or anchor in _slugs(target), f"{document.name} links to {link}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=_name)
def test_files_and_modules_exist(document: Path) -> None:
    text = document.read_text()
    for path in _PATH.findall(text):
        assert (TOP / path.rstrip(".")).exists(), f"{document.name} names {path}"
    for module in set(_MODULE.findall(text)) - _NO_MODULES:
        place = TOP / "src" / module.replace(".", "/")
        assert place.is_dir() or place.with_suffix(".py").exists(), f"{document.name} names {module}"


def _in_blocks(text: str) -> Iterator[str]:
    """The command lines of code blocks, which are complete."""
    for block in _FENCE.findall(text):
        yield from (line for line in block.splitlines() if line.startswith("hpmapper "))


def _in_sentences(text: str) -> Iterator[str]:
    """Those of sentences, which may lack arguments or have placeholders."""
    for span in re.findall(r"`([^`]+)`", _FENCE.sub("", text)):
        if re.match(r"hpmapper\s", span):
            yield " ".join(span.split())


def _resolved(line: str) -> tuple[click.Context, click.Command, list[str]] | None:
    """The command of a line, its context and its own words; None when a placeholder stands for the command."""
    words = shlex.split(line, comments=True)[1:]
    context, command = click.Context(cli, info_name="hpmapper", obj=State()), cli
    group: click.Command = command
    while isinstance(group, click.Group):
        _, words, _ = group.make_parser(context).parse_args(args=words)
        if not words or _PLACEHOLDER.fullmatch(words[0]):
            return None
        found = group.get_command(context, words[0])
        assert found is not None, f"there is no command {words[0]!r}: {line}"
        context = click.Context(found, info_name=words[0], parent=context)
        group, words = found, words[1:]
    return context, group, words


@pytest.mark.parametrize("line", sorted({*_in_blocks(OPERATIONS.read_text()), *_in_blocks(CONTAINERD.read_text())}))
def test_command_lines_are_taken(line: str) -> None:
    resolved = _resolved(line)
    assert resolved is not None, line
    context, command, words = resolved
    command.make_context(context.info_name, words, parent=context.parent)


@pytest.mark.parametrize("line", sorted(set(_in_sentences(OPERATIONS.read_text()))))
def test_commands_and_options_of_sentences_exist(line: str) -> None:
    resolved = _resolved(line)
    if resolved is not None:
        context, command, words = resolved
        command.make_parser(context).parse_args(args=words)


def test_every_option_is_documented() -> None:
    text = OPERATIONS.read_text() + (TOP / "docs" / "devicemapper.md").read_text()
    names = {*_KEYS, *POOL_OPTIONS, *(option for driver in DRIVERS for option in driver.options)}
    missing = [name for name in names if f"`{name}`" not in text and f"[{name}]" not in text]
    assert not missing


def test_every_command_is_documented() -> None:
    text = OPERATIONS.read_text() + CONTAINERD.read_text()
    lines = [*_in_blocks(text), *_in_sentences(text)]
    shown = {resolved[1] for resolved in map(_resolved, lines) if resolved}
    assert not [" ".join(path) for path, command in _commands(cli, ()) if command not in shown]


def _commands(group: click.Group, above: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from _commands(command, (*above, name))
        else:
            yield (*above, name), command


def test_exit_codes_are_documented() -> None:
    text = OPERATIONS.read_text()
    for code, meaning in CODES.values():
        row = re.search(rf"^\| {code} \| (.*) \|$", text, re.MULTILINE)
        assert row, code
        assert row[1].startswith(meaning.partition(",")[0]), meaning


def test_probed_features_are_documented() -> None:
    text = (TOP / "docs" / "kernel-support.md").read_text()
    assert not [name for name in FEATURE_NAMES if f"`{name}`" not in text]


def test_the_import_rule_is_the_enforced_one() -> None:
    settings = tomllib.loads((TOP / "pyproject.toml").read_text())
    enforced = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    assert "```\n" + "\n".join(enforced) + "\n```" in (TOP / "docs" / "architecture.md").read_text()
