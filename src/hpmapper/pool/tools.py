"""The one way to run another program: a failure says what it said, a missing one says where to get it."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Collection, Sequence
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
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    except FileNotFoundError:
        package = _PACKAGES.get(command[0], command[0])
        raise Unsupported(f"{command[0]} is not installed", hint=f"apt install {package}") from None
    result = ToolResult(done.returncode, *(raw.decode(errors="replace") for raw in (done.stdout, done.stderr)))
    if result.code not in accept:
        raise HpmapperError(f"{shlex.join(command)} failed with status {result.code}: {_last_words(result)}")
    return result


def _last_words(result: ToolResult) -> str:
    lines = (result.stderr.strip() or result.stdout.strip()).splitlines()
    return "; ".join(line.strip() for line in lines[-_STDERR_LINES:]) or "it said nothing"
