"""What is tried with real clients: releases of Debian, and ways to have a snapshotter in containerd."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from hpmapper.bench import gobuild
from hpmapper.kernel import loop
from hpmapper.root import DATABASE
from hpmapper.store import workspace
from tests.clients import servers, trees
from tests.clients.containerd import ELSEWHERE, NAMESPACE, ROOT, Containerd, Setup
from tests.clients.machine import Machine

RECLAIM_TIMEOUT = 60.0

CGROUPS = Path("/sys/fs/cgroup")

OBJECTS = re.compile(rf"{re.escape(ROOT)}/pool/o/[0-9a-f]{{2}}")

WORKSPACE = re.compile(rf"{re.escape(ROOT)}/.*/t/[0-9a-f]{{16}}")

LASTING = {"setting", "blob", "sqlite_sequence"}
"""Tables whose rows are meant to outlive layers and snapshots."""

BUILDKIT = "docker"
"""The control group that BuildKit in dockerd takes for what it builds."""

SETUPS = {
    "overlayfs": Setup("overlayfs"),
    "peer": Setup("peer", "/data/snapserver -root {root} -address {socket}"),
    **{driver: Setup(driver, servers.ours(driver, python="python3").command) for driver in servers.DRIVERS},
    "hpmapper-fast": Setup("hpmapper", servers.ours("hpmapper", python="python3").command, "hpmapper-diff"),
    "erofs": Setup("erofs", differ="erofs"),
}
"""containerd's overlayfs as it is, and behind a socket; each of our drivers; with our differ; its erofs."""


@dataclass(frozen=True)
class Case:
    """A release, and one of SETUPS by name."""

    release: str
    setup: str

    def __str__(self) -> str:
        return f"{self.release}-{self.setup}"


Kind = TypeVar("Kind", bound=Containerd)


@contextmanager
def running(case: Case, pool: Path, kind: type[Kind]) -> Iterator[Kind]:
    """A machine with containerd, as `kind` starts it, and a snapshotter at work, its data in `pool`."""
    data = pool / str(case)
    data.mkdir()
    shutil.copy2(gobuild.build_tools(gobuild.cache()).snapserver, data / "snapserver")
    tree = trees.made(case.release)
    with control_groups(), Machine(tree, data, trees.python_packages(tree)) as machine:
        containerd = kind(machine, SETUPS[case.setup])
        containerd.start()
        yield containerd
        containerd.stop()


@contextmanager
def control_groups() -> Iterator[None]:
    """Remove the control groups that runtimes leave: those above the containers' own, which nobody else removes."""
    before = _found_groups()
    try:
        yield
    finally:
        for group in sorted(_found_groups() - before, reverse=True):
            _remove_group(group)


def _remove_group(group: Path) -> None:
    """Remove a control group; its last process may not be quite gone yet, and its runtime may be at it, too."""
    deadline = time.monotonic() + RECLAIM_TIMEOUT
    while True:
        try:
            return group.rmdir()
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.05)


def _found_groups() -> set[Path]:
    names = (NAMESPACE, ELSEWHERE, BUILDKIT)
    tops = [top for name in names for top in (*CGROUPS.glob(name), *CGROUPS.glob(f"*/{name}")) if not top.is_symlink()]
    # As os.walk does it: groups of others may go while we look.
    return {*tops, *(Path(here) / name for top in tops for here, below, _ in os.walk(top) for name in below)}


def left(containerd: Containerd) -> set[str]:
    """Mounts, loop devices, directories and rows of the snapshotter; what is in a mount is not looked at.

    Of the directories that objects are spread over, which stay, the objects count; and of a living daemon's workspace,
    which comes with its first layer, what is in it.
    """
    top = containerd.machine.path(ROOT)
    mounts = set(containerd.machine.mounts(ROOT))
    found = {f"mount {target}" for target in mounts} | _loops(top) | _rows(containerd)
    for here, directories, files in os.walk(top):
        inside = ROOT + here.removeprefix(str(top))
        if OBJECTS.fullmatch(inside):
            found.update(f"object {inside}/{name}" for name in files)
            continue
        if not (WORKSPACE.fullmatch(inside) and workspace.is_alive(Path(here).parent, Path(here).name)):
            found.add(f"directory {inside}")
        directories[:] = [name for name in directories if f"{inside}/{name}" not in mounts]
    return found


def _loops(top: Path) -> set[str]:
    """Loop devices whose files lie on the file system of the snapshotter's root, which only machines are on."""
    device = top.stat().st_dev
    statuses = map(loop.status, loop.attached_devices())
    return {f"loop device over inode {one.inode}" for one in statuses if one and one.device == device}


def _rows(containerd: Containerd) -> set[str]:
    """What a database of ours names, but for settings and what is known of blobs, which stay; nothing of a peer's.

    The database by the host's path: SQLite would take /proc/PID/root for the symbolic link that it looks like.
    """
    database = containerd.machine.data / Path(ROOT).relative_to("/data") / DATABASE
    if not database.exists():
        return set()
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as db:
        tables = [name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        rows = {table: db.execute(f"SELECT * FROM {table}").fetchall() for table in set(tables) - LASTING}
    return {f"row of {table}: {row}" for table, found in rows.items() for row in found}


def assert_reclaimed(containerd: Containerd, before: set[str]) -> None:
    """Fail unless nothing is there that was not there before; reclaiming may go on in the background for a while."""
    deadline = time.monotonic() + RECLAIM_TIMEOUT
    while left(containerd) - before and time.monotonic() < deadline:
        time.sleep(0.2)
    more = sorted(left(containerd) - before)
    assert not more, f"{len(more)} are left: {more[:40]}"
