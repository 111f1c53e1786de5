"""User namespaces as carriers of id mappings, for idmapped mounts (`fscontext.mount_setattr` with MOUNT_ATTR_IDMAP)."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from hpmapper.kernel import fscontext
from hpmapper.kernel.syscall import NR_CLONE, NR_PRCTL, AnyPath, syscall

_CLONE_NEWUSER = 0x10000000
_PR_SET_PDEATHSIG = 1


class IdRange(NamedTuple):
    """`length` ids beginning with `inside` (on disk) appear as ids beginning with `outside`."""

    inside: int
    outside: int
    length: int


class IdMapping(NamedTuple):
    """Which users and groups appear as which others."""

    uids: Sequence[IdRange]
    gids: Sequence[IdRange]


def in_user_namespace() -> bool:
    """Whether this process is not in the first user namespace, or in one like it."""
    return Path("/proc/self/uid_map").read_bytes().split() != [b"0", b"0", b"4294967295"]


@contextmanager
def mapped_tree(path: AnyPath, namespace: int) -> Iterator[int]:
    """A detached copy of the mount that holds `path`, from there on, under a user namespace's mapping; its fd.

    Raises:
        OSError: EINVAL: the file system cannot (overlayfs, vfat before 6.x, …).
    """
    fd = fscontext.open_tree(path)
    try:
        fscontext.mount_setattr(fd, on=fscontext.MOUNT_ATTR_IDMAP, user_namespace=namespace)
        yield fd
    finally:
        os.close(fd)


@contextmanager
def user_namespace(uids: Sequence[IdRange], gids: Sequence[IdRange]) -> Iterator[int]:
    """The fd of a user namespace with these mappings. A mount made with it keeps it alive by itself."""
    # A namespace is born with a process only, and one with several threads cannot unshare. The child does nothing: it
    # waits for the signal that ends it, in a raw clone, so that no Python code runs there.
    child = _clone_paused()
    try:
        process = Path("/proc", str(child))
        _write_map(process / "uid_map", uids)
        _write_map(process / "gid_map", gids)
        fd = os.open(process / "ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    try:
        yield fd
    finally:
        os.close(fd)


def _clone_paused() -> int:
    child = syscall(NR_CLONE, _CLONE_NEWUSER | signal.SIGCHLD, 0, 0, 0, 0, path="user namespace")
    if child == 0:
        syscall(NR_PRCTL, _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        while True:
            signal.pause()
    return child


def _write_map(path: Path, ranges: Sequence[IdRange]) -> None:
    # One write(2): a second is refused.
    path.write_bytes("".join(f"{one.inside} {one.outside} {one.length}\n" for one in ranges).encode())
