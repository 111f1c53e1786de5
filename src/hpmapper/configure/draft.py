"""A file's settings against what they should be: the differences, and what stands in the way."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Any

Key = str | int
"""A name in a table, or a place in a list."""

Path = tuple[Key, ...]

ABSENT: Any = None
"""What a setting that is not there has for its value: neither TOML nor daemon.json need null."""


@dataclass(frozen=True, slots=True)
class Change:
    """One setting that is to be made. `was` is `ABSENT` where there is none yet; `why` is for people."""

    path: Path
    was: Any
    now: Any
    why: str

    def __str__(self) -> str:
        before = "" if self.was is ABSENT else f" (was {json.dumps(self.was)})"
        return f"{dotted(self.path)} = {json.dumps(self.now)}{before}"


@dataclass(slots=True)
class Draft:
    """What a file is to say. Rules ask for settings with `want` and its relatives; nothing is written here.

    Attributes:
        content: the settings, with all changes so far.
        changes: what has to be made, in order; each builds on those before it.
        conflicts: what somebody decided otherwise, and we do not overrule.
        notes: what is left as it is, and why.
    """

    content: dict[str, Any]
    changes: list[Change] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.content = copy.deepcopy(self.content)

    def get(self, path: Path) -> Any:
        """The value at a path, or `ABSENT`; also when a part of the path is no table."""
        value: Any = self.content
        for key in path:
            try:
                value = value[key]
            except (KeyError, IndexError, TypeError):
                return ABSENT
        return value

    def set(self, path: Path, value: Any, why: str) -> None:
        """Make a setting whatever is there, unless it is that already, or the way to it is blocked."""
        was = self.get(path)
        if was == value and type(was) is type(value):
            return
        if not self._is_free(path):
            return
        put(self.content, path, copy.deepcopy(value))
        self.changes.append(Change(path, was, value, why))

    def want(self, path: Path, value: Any, why: str, *, instead_of: Container[Any] = (), hint: str = "") -> None:
        """Make a setting where there is none, or one of `instead_of`; any other value is somebody's decision."""
        was = self.get(path)
        if was is ABSENT or was == value or was in instead_of:
            self.set(path, value, why)
            return
        more = f"; {hint}" if hint else ""
        self.conflicts.append(f"{dotted(path)} is {json.dumps(was)}, not {json.dumps(value)}{more}")

    def words(self, path: Path) -> list[str] | None:
        """A list of strings, None when there is none. Anything else is a conflict, and None as well."""
        value = self.get(path)
        if value is ABSENT:
            return None
        if isinstance(value, list) and all(isinstance(word, str) for word in value):
            return list(value)
        self.conflicts.append(f"{dotted(path)} is {json.dumps(value, default=str)}, not a list of strings")
        return None

    def note(self, text: str) -> None:
        """Say what is left out, and why."""
        self.notes.append(text)

    def _is_free(self, path: Path) -> bool:
        """Whether only tables (and lists, for numbers) are on the way; else that is a conflict."""
        for length in range(1, len(path)):
            value = self.get(path[:length])
            if value is not ABSENT and not isinstance(value, (list if isinstance(path[length], int) else dict)):
                self.conflicts.append(f"{dotted(path[:length])} is {json.dumps(value, default=str)}, not a table")
                return False
        return True


def put(content: Any, path: Path, value: Any) -> None:
    """Set the value at a path of plain tables and lists, making what is missing on the way."""
    for key, following in itertools.pairwise(path):
        if isinstance(key, str):
            content = content.setdefault(key, [] if isinstance(following, int) else {})
        else:
            if key == len(content):
                content.append({})
            content = content[key]
    last = path[-1]
    if isinstance(last, int) and last == len(content):
        content.append(value)
    else:
        content[last] = value


def dotted(path: Sequence[Key]) -> str:
    """A path as TOML writes it: plugins."io.containerd.service.v1.diff-service".default."""
    text = ""
    for key in path:
        if isinstance(key, int):
            text += f"[{key}]"
        else:
            bare = key.replace("-", "").replace("_", "").isalnum() and key.isascii()
            text += ("." if text else "") + (key if bare else json.dumps(key))
    return text
