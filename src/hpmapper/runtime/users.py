"""Who a container runs as: USER[:GROUP] of an image or of --user, looked up in the container's own files.

The rules are Docker's (github.com/moby/sys/user, GetExecUser): numbers count as numbers even if there is a user of
that name; a number need not be in the files; supplementary groups are given unless a group was named.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hpmapper.errors import InvalidArgument, NotFound
from hpmapper.runtime.inside import read_text

_LARGEST_ID = (1 << 32) - 2


@dataclass(frozen=True, slots=True)
class Account:
    """Numbers for the kernel, and the home directory."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


def resolve(root: Path, text: str) -> Account:
    """The account that `text` names below `root`; "" is uid 0.

    Raises:
        NotFound: no such name. InvalidArgument: a number out of range.
    """
    user, colon, group = text.partition(":")
    number = _number(user or "0")
    entry = next((one for one in _entries(root, "/etc/passwd", 6) if _matches(one, user, number)), None)
    if number is None and entry is None:
        raise NotFound(f"the container has no user {user!r}", hint="see its /etc/passwd, or give a number")
    uid = number if number is not None else _id_of(entry or [], 2)
    gid = _id_of(entry, 3) if entry else 0
    home = (entry[5] if entry else "") or "/"
    if colon and group:
        return Account(uid, _group(root, group), (), home)
    return Account(uid, gid, _supplementary(root, entry[0], gid) if entry else (), home)


def _matches(entry: list[str], user: str, number: int | None) -> bool:
    return entry[0] == user if number is None else entry[2] == str(number)


def _group(root: Path, group: str) -> int:
    number = _number(group)
    if number is not None:
        return number
    for entry in _entries(root, "/etc/group", 3):
        if entry[0] == group:
            return _id_of(entry, 2)
    raise NotFound(f"the container has no group {group!r}", hint="see its /etc/group, or give a number")


def _supplementary(root: Path, user: str, gid: int) -> tuple[int, ...]:
    """The user's groups, the primary one among them: else setgid binaries could shed it (CVE-2022-36109)."""
    groups = {gid}
    for entry in _entries(root, "/etc/group", 4):
        if user in entry[3].split(","):
            groups.add(_id_of(entry, 2))
    return tuple(sorted(groups))


def _entries(root: Path, path: str, fields: int) -> Iterator[list[str]]:
    """The lines of passwd(5) or group(5) that have at least so many fields, the third of which is an id."""
    for line in read_text(root, path).splitlines():
        entry = line.strip().split(":")
        if len(entry) >= fields and entry[2].isascii() and entry[2].isdigit():
            yield entry


def _id_of(entry: list[str], field: int) -> int:
    number = _number(entry[field])
    if number is None:
        raise InvalidArgument(f"the container's entry for {entry[0]!r} has no number in field {field + 1}")
    return number


def _number(text: str) -> int | None:
    if not (text.isascii() and text.isdigit()):
        return None
    number = int(text[:11])
    if number > _LARGEST_ID:
        raise InvalidArgument(f"{text[:40]} is not a user or group id", hint=f"they end at {_LARGEST_ID}")
    return number
