"""How much one snapshot may keep: limits on what lies in a directory, by what its file system has for them.

    XFS, ext4   a project of project quota         btrfs   a group of simple quotas
    ZFS         a dataset's quota (hpmapper.drivers.zfs.limits)

Whoever writes beyond a limit gets ENOSPC or EDQUOT, also in a mount that has the directory for its upper one. A limit
is in force before anything else is in the directory. Its file `size` says how many bytes it has, so that no mount
passes over a limit that the file system has stopped to enforce.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Protocol

from hpmapper.errors import FailedPrecondition, InvalidArgument, Unsupported
from hpmapper.kernel import btrfs, fs, qgroup, quota
from hpmapper.model import SnapshotId, Usage
from hpmapper.pool.base import MIB, format_size

SMALLEST = MIB
"""Bytes below which a limit would not even hold what an empty root takes on btrfs (64 KiB) and some files."""

FIRST_PROJECT, LAST_PROJECT = 1 << 31, (1 << 32) - 2
"""Projects that limits take; /etc/projid, Docker and Kubernetes count from small numbers up. 2**32 - 1 is none."""

GROUP_LEVEL = 0x6870
"""The level of the groups that limits take: L/ID holds the subvolume ID, and those that are made inside it."""

_FREED_SECONDS = 2.0

_MARK = "size"


class Limits(Protocol):
    """What a file system has for limits. Everything may be asked again after it was cut short."""

    available: bool
    """Whether there is anything: else only `check`, `make` and `lift` may be called."""

    def check(self, size: int) -> None:
        """Refuse a limit that cannot be.

        Raises:
            Unsupported: the file system has no limits; the hint says how to get them.
            InvalidArgument: the size is too small.
        """

    def make(self, top: Path, snapshot: SnapshotId, size: int) -> None:
        """Make the directory `top`, which can hold `size` bytes; raises as `check`."""

    def is_in_force(self, top: Path) -> bool:
        """Whether the file system holds a directory to the limit that `make` gave it, or another since."""

    def usage(self, top: Path) -> Usage:
        """What counts against a directory's limit. The bytes are there in constant time."""

    def lift(self, top: Path) -> None:
        """Let a directory go without limit, and forget that there was one. `top` may be missing, or have none."""


def limits_of(home: Path, *, ours: bool = False) -> Limits:
    """What the file system of `home` has for limits; `ours`: its quotas may be switched on."""
    match fs.filesystem_name(home):
        case "btrfs":
            return _of_btrfs(home, ours)
        case "xfs":
            how = "mount it with prjquota (a root file system: rootflags=prjquota), on a kernel with CONFIG_XFS_QUOTA"
        case "ext4":
            how = "tune2fs -O project,quota -Q prjquota DEVICE, on a kernel with CONFIG_QFMT_V2; mount it with prjquota"
        case other:
            return _No(home, f"{other} counts nothing by directory", "use XFS, ext4 or btrfs")
    try:
        enforcing = quota.project_quota_state(home).enforcing
    except OSError as error:
        return _No(home, f"it has no project quota ({error.strerror})", how)
    return _Projects(home) if enforcing else _No(home, "it does not enforce project quota", how)


def _of_btrfs(home: Path, ours: bool) -> Limits:
    mode = qgroup.mode(home)
    if mode is qgroup.Mode.SIMPLE or (ours and mode is qgroup.Mode.NONE and qgroup.knows_simple()):
        return _Groups(home)
    if not qgroup.knows_simple():
        return _No(home, "this kernel's btrfs has no simple quotas", "Linux 6.7 or newer")
    why = "quotas are off" if mode is qgroup.Mode.NONE else "its quotas are full ones"
    how = "btrfs quota enable --simple" if mode is qgroup.Mode.NONE else "btrfs quota disable, then enable --simple"
    return _No(home, why, f"{how} {home}; from then on it cannot be mounted by Linux before 6.7")


def require_in_force(limits: Limits, top: Path | str) -> None:
    """Refuse what is limited, but not held to it.

    Raises:
        FailedPrecondition: so it is.
    """
    size = limit_of(top)
    if size is not None and not (limits.available and limits.is_in_force(Path(top))):
        raise FailedPrecondition(
            f"the limit of {format_size(size)} on {top} is not enforced any more",
            hint="mount its file system with quotas again, as when the limit was set; or commit and make a new one",
        )


def require_default(limits: Limits, option: str, size: int | None) -> None:
    """Refuse a default limit where there are none, when the driver is attached rather than at each container.

    Raises:
        Unsupported, InvalidArgument: as `Limits.check`.
    """
    if size is None:
        return
    try:
        limits.check(size)
    except Unsupported as error:
        raise Unsupported(
            f"Storage option {option} not supported. Filesystem does not support Project Quota: {error.message}",
            hint=error.hint,
        ) from None


def limit_of(top: Path | str) -> int | None:
    """The size that a directory was limited to, in bytes; None: without limit."""
    mark = f"{top}/{_MARK}"
    if not os.access(mark, os.F_OK):  # every start asks, and exists() and open take four times as long to say no
        return None
    with open(mark, encoding="ascii") as file:
        return int(file.read())


def note(top: Path, size: int) -> None:
    """Write down in a directory how much it may hold."""
    unfinished = top / f"{_MARK}.new"
    unfinished.write_text(f"{size}\n", encoding="ascii")
    unfinished.rename(top / _MARK)


def check_size(size: int) -> None:
    """Refuse a limit that would hold nothing, as InvalidArgument."""
    if size < SMALLEST:
        raise InvalidArgument(
            f"a size limit of {size} bytes is too small", hint=f"the smallest is {format_size(SMALLEST)}"
        )


class _No:
    """A file system without limits."""

    available = False

    def __init__(self, home: Path, why: str, how: str) -> None:
        self._home, self._why, self._how = home, why, how

    def check(self, size: int) -> None:
        check_size(size)
        kind = fs.filesystem_name(self._home)
        raise Unsupported(f"{kind} at {self._home} cannot limit sizes: {self._why}", hint=self._how)

    def make(self, top: Path, snapshot: SnapshotId, size: int) -> None:
        self.check(size)

    def is_in_force(self, top: Path) -> bool:
        return False

    def usage(self, top: Path) -> Usage:
        raise NotImplementedError

    def lift(self, top: Path) -> None:
        """There can be none, or the file system has forgotten it."""


class _Projects:
    """A project for each limited directory.

    Its id is computed from the snapshot's number, which is never used twice, so no crash can lose it; from where on is
    computed from the home's inode number, so that two roots on one file system hardly meet. If they do, it is noticed.
    """

    available = True

    def __init__(self, home: Path) -> None:
        self._home = home

    def check(self, size: int) -> None:
        check_size(size)

    def make(self, top: Path, snapshot: SnapshotId, size: int) -> None:
        self.check(size)
        project = self._project(snapshot)
        top.mkdir(mode=0o700, exist_ok=True)
        if fs.get_fsxattr(top).projid != project:
            self._require_unused(project)
            fs.set_project(top, project)
        quota.set_project_limit(top, project, size)
        note(top, size)

    def _project(self, snapshot: SnapshotId) -> int:
        offset = os.stat(self._home).st_ino * 0x9E3779B1  # Fibonacci hashing: neighbours end up far apart
        return FIRST_PROJECT + (offset + snapshot) % (LAST_PROJECT - FIRST_PROJECT + 1)

    def _require_unused(self, project: int) -> None:
        deadline = time.monotonic() + _FREED_SECONDS
        while any(found := quota.project_quota(self._home, project)):
            if found.limit or time.monotonic() > deadline:
                raise FailedPrecondition(
                    f"project {project} on the file system of {self._home} is used by something else",
                    hint="try again: the next snapshot takes another",
                )
            # Or by what was this snapshot before a crash: XFS frees removed inodes later, and asking for space hurries
            # it on (xfs_inodegc_push, Linux 5.14).
            os.statvfs(self._home)
            time.sleep(0.01)

    def is_in_force(self, top: Path) -> bool:
        project = fs.get_fsxattr(top).projid
        return bool(project and quota.project_quota(top, project).limit)

    def usage(self, top: Path) -> Usage:
        found = quota.project_quota(top, fs.get_fsxattr(top).projid)
        return Usage(found.size, found.inodes)

    def lift(self, top: Path) -> None:
        try:
            project = fs.get_fsxattr(top).projid
        except FileNotFoundError:
            return
        if FIRST_PROJECT <= project <= LAST_PROJECT:
            quota.set_project_limit(top, project, 0)


class _Groups:
    """A subvolume, and a group that holds it, for each limited directory.

    Subvolumes' numbers are btrfs's own, so roots on one file system never meet.
    """

    available = True

    def __init__(self, home: Path) -> None:
        self._home = home

    def check(self, size: int) -> None:
        check_size(size)

    def make(self, top: Path, snapshot: SnapshotId, size: int) -> None:
        self.check(size)
        if qgroup.mode(self._home) is qgroup.Mode.NONE:
            qgroup.enable_simple(self._home)
        if not top.exists():
            btrfs.create_subvolume(top)
            top.chmod(0o700)
        member, group = _group_of(top)
        qgroup.create(self._home, group)
        qgroup.set_limit(self._home, group, size)
        qgroup.join(self._home, member, group)
        note(top, size)

    def is_in_force(self, top: Path) -> bool:
        return btrfs.is_subvolume(top) and qgroup.limit(top, _group_of(top)[1]) > 0

    def usage(self, top: Path) -> Usage:
        used = qgroup.usage(top, _group_of(top)[1])
        return Usage(used.exclusive + used.reserved, btrfs.count_inodes(top))

    def lift(self, top: Path) -> None:
        if not btrfs.is_subvolume(top) or qgroup.mode(top) is not qgroup.Mode.SIMPLE:
            return
        member, group = _group_of(top)
        for one in (member, *btrfs.nested(top, member)):
            qgroup.leave(self._home, one, group)  # not by `top`: to a full subvolume even this is refused
        qgroup.remove(self._home, group)


def _group_of(top: Path) -> tuple[int, int]:
    """A subvolume's own group, and the one that limits it."""
    number = btrfs.subvolume(top).id
    return number, qgroup.qgroup(GROUP_LEVEL, number)
