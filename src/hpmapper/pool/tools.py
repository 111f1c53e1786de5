"""The one way to run another program: a failure says what it said, a missing one says where to get it."""

from __future__ import annotations

import os
import shlex
import subprocess
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from hpmapper.errors import HpmapperError, Unsupported

_PACKAGES = {
    "blkid": "util-linux",
    "wipefs": "util-linux",
    "mkfs.xfs": "xfsprogs",
    "xfs_repair": "xfsprogs",
    "mkfs.btrfs": "btrfs-progs",
    "btrfs": "btrfs-progs",
    "zfs": "zfsutils-linux",
    "zpool": "zfsutils-linux",
    "auplink": "aufs-tools",
}
_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
_STDERR_LINES = 6


_starting = threading.Lock()


@contextmanager
def none_starts() -> Iterator[None]:
    """While it lasts, no program is about to start: until it has, it has all files open that any thread has, so that
    what they lie on cannot be unmounted."""
    with _starting:
        yield


class ToolResult(NamedTuple):
    """What a program answered."""

    code: int
    stdout: str
    stderr: str


def run_tool(argv: Sequence[str | os.PathLike[str]], *, accept: Collection[int] = (0,)) -> ToolResult:
    """Run a program to its end, without a shell, in English.

    Args:
        argv: program and arguments.
        accept: exit statuses that are answers, not failures.

    Raises:
        Unsupported: the program is not installed.
        HpmapperError: it failed; the message has the command line and the end of its error output.
    """
    command = [os.fspath(word) for word in argv]
    # A service or cron job may have no sbin in its PATH, and a locale would change what is parsed.
    environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '/usr/bin:/bin')}:{_SBIN}", "LC_ALL": "C"}
    try:
        with _starting:
            started = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
    except FileNotFoundError:
        package = _PACKAGES.get(command[0], command[0])
        raise Unsupported(f"{command[0]} is not installed", hint=f"apt install {package}") from None
    with started:
        said = [raw.decode(errors="replace") for raw in started.communicate()]
    result = ToolResult(started.returncode, *said)
    if result.code not in accept:
        raise HpmapperError(f"{shlex.join(command)} failed with status {result.code}: {_last_words(result)}")
    return result


def _last_words(result: ToolResult) -> str:
    lines = (result.stderr.strip() or result.stdout.strip()).splitlines()
    return "; ".join(line.strip() for line in lines[-_STDERR_LINES:]) or "it said nothing"
