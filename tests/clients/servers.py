"""Snapshotters behind a socket that clients are tried with: ours by driver, and containerd's own as the yardstick."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from hpmapper.bench import gobuild

DRIVERS = ("hpmapper", "overlay", "vfs")


@dataclass(frozen=True)
class Server:
    """A server that `command` starts; {root} and {socket} in it stand for places. `name` is for reports."""

    name: str
    command: str


def ours(driver: str, *, python: str = sys.executable) -> Server:
    """`hpmapper serve`, its pool a directory of the file system that the root is on."""
    words = [python, "-m", "hpmapper.cli.main", "--root", "{root}", "--storage-driver", driver]
    words += ["--storage-opt", "pool.kind=directory", "serve", "--address", "{socket}"]
    return Server(driver, shlex.join(words).replace("'", ""))


def stock(kind: str = "overlay") -> Server:
    """containerd's overlayfs, or its native snapshotter, behind the same protocol."""
    program = gobuild.build_tools(gobuild.cache()).snapserver
    return Server(f"stock-{kind}", f"{program} -type {kind} -root {{root}} -address {{socket}}")


def of(name: str) -> Server:
    """A server by its name."""
    return stock(name.removeprefix("stock-")) if name.startswith("stock-") else ours(name)


def size_of(path: Path) -> int:
    """Bytes of a file, 0 if it is not there."""
    return path.stat().st_size if path.exists() else 0
