"""Changes written into the text of a file whose rest stays as it is, comments included.

tomlkit edits; tomllib, which shares nothing with it, then reads the result: it must say exactly what was planned.
"""

from __future__ import annotations

import itertools
import json
import re
import textwrap
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError
from tomlkit.items import AoT, Array, InlineTable, Table

from hpmapper.configure.draft import Change, Draft, put
from hpmapper.errors import InvalidArgument

_WIDTH = 100


def read_toml(file: Path, text: str) -> dict[str, Any]:
    """The settings of a TOML file.

    Raises:
        InvalidArgument: malformed; the message has the line.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidArgument(f"{file} is no TOML: {error}", hint="correct it first; nothing was changed") from None


def write_toml(file: Path, text: str, draft: Draft) -> str:
    """The text with a draft's changes, each explained in a comment where it is made.

    Raises:
        InvalidArgument: the file is written in a way that cannot be edited without touching the rest.
    """
    try:
        document = tomlkit.parse(text)
        for change in draft.changes:
            _make(document, change)
        result = tomlkit.dumps(document)
        faithful = tomllib.loads(result) == draft.content
    except (TOMLKitError, tomllib.TOMLDecodeError, TypeError, ValueError, KeyError, IndexError) as error:
        raise _uneditable(file, str(error)) from error
    if not faithful:
        raise _uneditable(file, "the edited text would not say what it should")
    return result


def _uneditable(file: Path, why: str) -> InvalidArgument:
    hint = "nothing was changed; make the settings by hand: without --apply they are printed"
    return InvalidArgument(f"{file} cannot be edited automatically: {why}", hint=hint)


def _make(document: tomlkit.TOMLDocument, change: Change) -> None:
    *way, last = change.path
    parent: Any = document
    for number, (key, following) in enumerate(itertools.pairwise(change.path), 1):
        if isinstance(key, str) and key not in parent:
            new: Any = tomlkit.aot() if isinstance(following, int) else tomlkit.table(number < len(way))
            parent.append(key, new)
        parent = parent[key]
    if isinstance(last, int) and last == len(parent):
        _append(parent, change)
    elif isinstance(parent[last] if _has(parent, last) else None, Array):
        _lengthen(parent[last], change.now)
        if change.why:
            parent[last].comment(f"hpmapper: {change.why}")
    else:
        _set(parent, last, change)


def _has(parent: Any, key: str | int) -> bool:
    return isinstance(key, int) or key in parent


def _append(entries: AoT | Array, change: Change) -> None:
    """Add a table to a list of tables."""
    if isinstance(entries, Array):
        inline = tomlkit.inline_table()
        inline.update(change.now)
        entries.append(inline)
        return
    table = tomlkit.table()
    for line in _lines(change.why):
        table.add(tomlkit.comment(line))
    for key, value in change.now.items():
        table.add(key, value)
    entries.append(table)


def _lengthen(array: Array, now: Sequence[Any]) -> None:
    """Make an array say `now`, by additions at its ends where that does."""
    was = array.unwrap()
    size = len(was)
    if was and list(now[-size:]) == was:
        for place, item in enumerate(now[:-size]):
            array.insert(place, item)
    elif was and list(now[:size]) == was:
        array.extend(now[size:])
    else:
        array.clear()
        array.extend(now)


def _set(parent: Any, key: str | int, change: Change) -> None:
    """Set a value: explained in lines above it where it is new in a table of ours, else behind it."""
    exists = _has(parent, key)
    bare = isinstance(parent, (Table, tomlkit.TOMLDocument)) and not exists and not _has_tables(parent)
    if bare:
        for line in _lines(change.why):
            parent.add(tomlkit.comment(line))
        parent.add(key, change.now)
        return
    value = tomlkit.item(change.now)
    if change.why and not isinstance(parent, InlineTable):
        value.comment(f"hpmapper: {change.why}")
    parent[key] = value


def _has_tables(parent: Any) -> bool:
    """A comment after a table would belong to that."""
    return any(isinstance(value, (Table, AoT)) for value in parent.values())


def _lines(why: str) -> list[str]:
    return textwrap.wrap(f"hpmapper: {why}", _WIDTH) if why else []


def remarks(notes: Sequence[str]) -> str:
    """Notes as comments of a file."""
    lines = [
        line for note in notes for line in textwrap.wrap(note, _WIDTH, initial_indent="- ", subsequent_indent="  ")
    ]
    return "".join(f"# {line}\n" for line in lines)


def read_json(file: Path, text: str) -> dict[str, Any]:
    """The settings of a JSON file; an empty one has none.

    Raises:
        InvalidArgument: malformed, a key twice, or no object; the message has the line.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            twice = next(key for key, _ in pairs if sum(other == key for other, _ in pairs) > 1)
            line = text[: text.rfind(json.dumps(twice))].count("\n") + 1
            raise InvalidArgument(f"{file}, line {line}: {twice!r} is there twice", hint="leave one of them")
        return table

    try:
        content = json.loads(text, object_pairs_hook=once) if text.strip() else {}
    except json.JSONDecodeError as error:
        raise InvalidArgument(f"{file} is no JSON: {error}", hint="correct it first; nothing was changed") from None
    if not isinstance(content, dict):
        raise InvalidArgument(f"{file}, line 1: there is no object in it but a {type(content).__name__}")
    return content


def write_json(text: str, draft: Draft) -> str:
    """The settings as JSON, with the file's own order and indentation."""
    content = json.loads(text) if text.strip() else {}
    for change in draft.changes:
        put(content, change.path, change.now)
    found = re.search(r"^([ \t]+)\S", text, re.MULTILINE)
    return json.dumps(content, indent=found[1] if found else 4, ensure_ascii=False) + "\n"
