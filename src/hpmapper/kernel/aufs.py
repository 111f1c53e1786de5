"""AUFS: a union of directories ("branches"). No mainline kernel has it; some distributions' once had.

Its options and files are told in its manual page, aufs(5), and its module's Documentation/filesystems/aufs.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from hpmapper.kernel import fscontext
from hpmapper.kernel.mountinfo import unescape
from hpmapper.kernel.syscall import NR_MOUNT, AnyPath, opened, syscall

_MS_RDONLY, _MS_REMOUNT = 1, 32
_PAGE = 4096
_BRANCHES_AT_ONCE = 40
"""AUFS keeps a mount's parsed options in one page too, 48 bytes each."""

_SHM = "/dev/shm"


def is_known() -> bool:
    """Whether the running kernel has AUFS: as a module that is there to be loaded, too."""
    with suppress(OSError), fscontext.fsopen("aufs", "aufs"):  # the attempt loads it
        pass
    return any(line.endswith(b"\taufs") for line in Path("/proc/filesystems").read_bytes().splitlines())


def mount(
    target: AnyPath, *, lowers: Sequence[AnyPath], upper: AnyPath | None = None, options: Sequence[str] = ()
) -> None:
    """Mount a union at `target`.

    Args:
        lowers: nearest first. upper: the branch that is written to; None: a read-only union.
        options: AUFS's, beside those of branches.

    Raises:
        OSError: EINVAL also for an option that this version does not have; the kernel's log has the reason.
    """
    with ExitStack() as stack:
        # As descriptors' names, in which nothing means anything to AUFS: ":", "=" and "," do, and cannot be escaped.
        branches = [f"{_name(stack, one)}=ro+wh" for one in lowers]
        if upper is not None:
            branches.insert(0, f"{_name(stack, upper)}=rw")
        # Where inode numbers are kept; AUFS unlinks it at once. Without, it takes a name in the upper or in /tmp.
        table = f"{_SHM if os.path.isdir(_SHM) else '/tmp'}/.hpmapper-{secrets.token_hex(8)}.xino"
        first, more = _fit(branches, f",xino={table}" + "".join(f",{option}" for option in options))
        _mount(target, first, _MS_RDONLY if upper is None else 0)
        for page in more:
            _mount(target, page, _MS_REMOUNT | (_MS_RDONLY if upper is None else 0))


def _name(stack: ExitStack, path: AnyPath) -> str:
    return f"/proc/self/fd/{stack.enter_context(opened(path, os.O_RDONLY | os.O_DIRECTORY))}"


def _fit(branches: Sequence[str], rest: str) -> tuple[str, list[str]]:
    """The options of the mount, and of as many remounts as its page leaves branches for."""
    first = next(_pages(branches, ":", len("br:") + len(rest)))
    left = [f"append:{branch}" for branch in branches[len(first) :]]
    return "br:" + ":".join(first) + rest, [",".join(page) for page in _pages(left, ",", 0)]


def _pages(words: Sequence[str], separator: str, taken: int) -> Iterator[list[str]]:
    """Words in groups that fill a page, less what is taken of it, at most."""
    page: list[str] = []
    length = taken
    for word in words:
        if page and (length + len(word) + len(separator) >= _PAGE or len(page) == _BRANCHES_AT_ONCE):
            yield page
            page, length = [], taken
        page.append(word)
        length += len(word) + len(separator)
    if page:
        yield page


def _mount(target: AnyPath, page: str, flags: int) -> None:
    syscall(NR_MOUNT, b"aufs", os.fsencode(target), b"aufs", flags, page.encode("ascii"), path=target)


def is_branch(path: AnyPath) -> bool:
    """Whether a union that is mounted anywhere has a directory for a branch (sysfs: fs/aufs/si_*/br*)."""
    wanted = os.path.realpath(os.fsdecode(path))
    return any(branch == wanted for branch in _branches())


def _branches() -> Iterator[str]:
    for file in Path("/sys/fs/aufs").glob("si_*/br[0-9]*"):
        with suppress(OSError):  # unmounted in between
            text = file.read_text(encoding="utf-8", errors="surrogateescape").rstrip("\n")
            yield unescape(text.rpartition("=")[0])
