"""containerd's filters (pkg/filters): which snapshots a List is about.

    filters  := filter …                          any of them
    filter   := selector ("," selector)*          all of them; "" is everything
    selector := fieldpath [("==" | "!=" | "~=") value]
    fieldpath := field ("." field)*               field := letters, digits and "_", or quoted
    value    := quoted, or visible characters without "," (after "~=" also between slashes or bars)

Without an operator a field has to be there. "!=" holds where there is no such field; "~=" is a regular expression that
may match anywhere, in nothing as well. RE2 is Go's kind of them: its time grows with the text, whatever the expression.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from hpmapper.errors import InvalidArgument
from hpmapper.forest import Info

Filter = Callable[[Info], bool]

_FIELD = re.compile(r"[A-Za-z0-9_]+")
_QUOTED = re.compile(r'"(?:[^"\\\n]|\\.)*"')
_PATTERN = re.compile(r"/((?:[^/\\]|\\.)*)/|\|((?:[^|\\]|\\.)*)\|")
_BARE = re.compile(r"[^\s,\"]+")
_OPERATORS = ("==", "!=", "~=")
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-7]{3}|.)")
_LETTERS = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}


class _Selector(NamedTuple):
    path: tuple[str, ...]
    operator: str
    value: str

    def matches(self, info: Info) -> bool:
        found = _field(info, self.path)
        match self.operator:
            case "":
                return found is not None
            case "==":
                return found == self.value
            case "!=":
                return found != self.value
        return _search(self.value, found or "")


def parse(filters: Iterable[str]) -> Filter:
    """What the filters of a request let through: everything, if there are none.

    Raises:
        InvalidArgument: one of them is malformed; says where.
    """
    alternatives = [_Parser(text).parse() for text in filters]
    if not alternatives:
        return lambda _: True
    return lambda info: any(all(one.matches(info) for one in selectors) for selectors in alternatives)


def _field(info: Info, path: tuple[str, ...]) -> str | None:
    """The field's value, None if there is no such field. A name and a parent are always there, be they empty."""
    match path:
        case ("name",):
            return info.key
        case ("parent",):
            return info.parent
        case ("kind",):
            return str(info.kind)
        case ("labels", *rest) if rest:
            return info.labels.get(".".join(rest))
    return None


def _search(pattern: str, text: str) -> bool:
    import re2  # type: ignore[import-untyped]  # only here: it takes 5 MB, and hardly anybody asks

    options = re2.Options()
    options.log_errors = False
    try:
        return re2.search(pattern, text, options) is not None
    except re2.error:
        return False


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def parse(self) -> list[_Selector]:
        if not self._text:
            return []
        selectors = [self._selector()]
        while self._at < len(self._text):
            self._expect(",")
            selectors.append(self._selector())
        return selectors

    def _selector(self) -> _Selector:
        path = [self._name()]
        while self._text.startswith(".", self._at):
            self._at += 1
            path.append(self._name())
        operator = next((one for one in _OPERATORS if self._text.startswith(one, self._at)), "")
        self._at += len(operator)
        return _Selector(tuple(path), operator, self._value(operator) if operator else "")

    def _name(self) -> str:
        return self._take(_FIELD) or self._quoted() or self._fail("a field's name")

    def _value(self, operator: str) -> str:
        if operator == "~=" and (found := _PATTERN.match(self._text, self._at)):
            self._at = found.end()
            return _unescaped(found[1] if found[1] is not None else found[2])
        quoted = self._quoted()
        if quoted is not None:
            return quoted
        return self._take(_BARE) or self._fail("a value")

    def _quoted(self) -> str | None:
        raw = self._take(_QUOTED)
        return _unquoted(raw) if raw else None

    def _take(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self._text, self._at)
        if not found:
            return ""
        self._at = found.end()
        return found[0]

    def _expect(self, character: str) -> None:
        if not self._text.startswith(character, self._at):
            self._fail(f"{character!r}")
        self._at += 1

    def _fail(self, wanted: str) -> str:
        raise InvalidArgument(f"filter {self._text[:200]!r}: expected {wanted} at character {self._at + 1}")


def _unquoted(raw: str) -> str:
    """A Go string literal's value."""
    return _ESCAPE.sub(lambda found: _character(found[1]), raw[1:-1])


def _character(escape: str) -> str:
    if escape[0] in "xuU" and len(escape) > 1:
        return chr(min(int(escape[1:], 16), 0x10FFFF))
    if len(escape) == 3:
        return chr(int(escape, 8))
    return _LETTERS.get(escape, escape)


def _unescaped(pattern: str) -> str:
    """A pattern between slashes: only the slash itself needs a backslash; all others belong to the expression."""
    return re.sub(r"\\([/|])", r"\1", pattern)
