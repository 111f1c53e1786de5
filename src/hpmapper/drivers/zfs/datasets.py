"""The datasets of a root, through ZFS's own programs.

    FSNAME/lID, FSNAME/aID     a layer's, a snapshot's
    …@layer                    what others are clones of: made when it is complete

Programs, not libzfs_core: that library knows neither properties nor diffs, wants its arguments as nvlists, which are
built in C, and answers with numbers. The programs promise `-H -p` to scripts, and say in words what is wrong; each call
takes some milliseconds, most of which is the pool's.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from enum import StrEnum

from hpmapper.errors import (
    AlreadyExists,
    FailedPrecondition,
    HpmapperError,
    InvalidArgument,
    NoSpace,
    NotFound,
    Unsupported,
)
from hpmapper.model import SnapshotId
from hpmapper.pool.tools import run_tool

OWNER = "hpmapper:root"
"""A property of FSNAME: the id of the root whose datasets lie in it."""

_PROPERTIES = {"mountpoint": "legacy", "atime": "off", "xattr": "sa", "acltype": "posixacl"}
"""Of every dataset: mounted by nobody but us, as images need it; attributes in the file itself, so diffs see them."""

_COMPLETE = "layer"

_NAME = re.compile(r"[A-Za-z][\w.: -]*(/[A-Za-z0-9][\w.: -]*)*", re.ASCII)
_LONGEST = 200  # of ZFS's 255 (ZFS_MAX_DATASET_NAME_LEN), with room for what is below and for its own snapshots
_OURS = re.compile(r"([al])(\d+)")


class Role(StrEnum):
    """What a dataset is for: the letter that its name begins with."""

    SNAPSHOT = "a"
    LAYER = "l"


def check_name(fsname: str) -> str:
    """A dataset's name as an option has it.

    Raises:
        InvalidArgument: it cannot be one.
    """
    if len(fsname) > _LONGEST or not _NAME.fullmatch(fsname):
        raise InvalidArgument(f"zfs.fsname {fsname!r} is not the name of a dataset", hint="such as tank/hpmapper")
    return fsname


def require(fsname: str) -> None:
    """Refuse a dataset that is not there, or is none for files.

    Raises:
        Unsupported: no ZFS here, or no such dataset; says which. InvalidArgument: it is a volume.
    """
    pool, slash, _ = fsname.partition("/")
    if not exists(fsname):
        if slash and exists(pool):
            raise Unsupported(f"there is no dataset {fsname}", hint=f"zfs create -o mountpoint=none {fsname}")
        raise Unsupported(
            f"there is no ZFS pool {pool}", hint=f"zpool import {pool}; or zpool create -m none {pool} DEVICE"
        )
    if properties(fsname, "type") != {"type": "filesystem"}:
        raise InvalidArgument(f"{fsname} is a volume or a snapshot", hint="name a file system in zfs.fsname")


def exists(name: str) -> bool:
    """Whether there is a dataset or snapshot of that name.

    Raises:
        Unsupported: ZFS's programs or its kernel module are missing.
    """
    try:
        _zfs("list", "-H", "-o", "name", name)
    except NotFound:
        return False
    return True


def properties(name: str, *wanted: str) -> dict[str, str]:
    """Properties of a dataset; numbers are bytes, "-" is one that is not set."""
    lines = _zfs("get", "-H", "-p", "-o", "property,value", ",".join(wanted), name).splitlines()
    return dict(line.split("\t", 1) for line in lines)


def health(pool: str) -> str:
    """ "ONLINE" when all is well."""
    return run_tool(["zpool", "list", "-H", "-o", "health", pool]).stdout.strip()


class Datasets:
    """The datasets below one that a root has for itself."""

    def __init__(self, fsname: str) -> None:
        self.fsname = fsname
        self.pool = fsname.partition("/")[0]
        self._complete: dict[SnapshotId, Role] = {}  # what was seen; if another process removes it, cloning fails

    def name(self, role: Role, number: SnapshotId) -> str:
        """A dataset's whole name."""
        return f"{self.fsname}/{role}{number}"

    def complete(self, role: Role, number: SnapshotId) -> str:
        """The name of what others are clones of."""
        return f"{self.name(role, number)}@{_COMPLETE}"

    def has(self, role: Role, number: SnapshotId) -> bool:
        """Whether the dataset is there, complete or not."""
        return exists(self.name(role, number))

    def find(self, number: SnapshotId) -> Role:
        """What stands for a layer in chains.

        Raises:
            NotFound: nothing does.
        """
        if number in self._complete:
            return self._complete[number]
        for role in (Role.LAYER, Role.SNAPSHOT):
            if exists(self.complete(role, number)):
                self._complete[number] = role
                return role
        raise NotFound(f"layer {number} has no dataset in {self.fsname}", hint="run hpmapper fsck")

    def make(self, role: Role, number: SnapshotId, origin: str | None) -> None:
        """Make a dataset: a clone of a complete one, or an empty one; done already is no error."""
        words = [word for option in _PROPERTIES.items() for word in ("-o", "=".join(option))]
        name = self.name(role, number)
        with suppress(AlreadyExists):
            _zfs(*(["clone", *words, origin, name] if origin else ["create", *words, name]))

    def finish(self, role: Role, number: SnapshotId) -> None:
        """Let others be made of what a dataset has now. It is on disk when this returns."""
        name = self.complete(role, number)
        try:
            _zfs("snapshot", name)
        except AlreadyExists:  # from before a crash: nobody knew of it, so nothing was made of it
            _zfs("destroy", name)
            _zfs("snapshot", name)
        self._complete[number] = role

    def remove(self, role: Role, number: SnapshotId) -> None:
        """Destroy a dataset with its own snapshots, never what was made of it.

        Raises:
            FailedPrecondition: it is mounted somewhere, or others are clones of it.
        """
        with suppress(NotFound):
            _patiently("destroy", "-r", self.name(role, number))
        self._complete.pop(number, None)

    def limit(self, number: SnapshotId, size: int) -> None:
        """Let a snapshot take so many bytes of the pool, what it has of its parent not counted. 0: any."""
        _zfs("set", f"quota={size or 'none'}", self.name(Role.SNAPSHOT, number))

    def numbers(self) -> Mapping[Role, set[SnapshotId]]:
        """All that there are."""
        found: dict[Role, set[SnapshotId]] = {role: set() for role in Role}
        for line in _zfs("list", "-H", "-o", "name", "-d", "1", "-t", "filesystem", self.fsname).splitlines():
            ours = _OURS.fullmatch(line.removeprefix(f"{self.fsname}/"))
            if ours:
                found[Role(ours[1])].add(SnapshotId(int(ours[2])))
        return found

    def sync(self) -> None:
        """Bring all that was written to disk: until then no property counts it."""
        run_tool(["zpool", "sync", self.pool])

    def owner(self) -> str | None:
        """The id of the root whose datasets lie in FSNAME; None: it is free.

        Raises:
            NotFound: there is no such dataset.
        """
        source, value = _zfs("get", "-H", "-p", "-o", "source,value", OWNER, self.fsname).rstrip("\n").split("\t")
        return value if source in ("local", "received") else None  # another root may have the dataset above

    def own(self, root: str) -> None:
        """Note that all in FSNAME is one root's."""
        _zfs("set", f"{OWNER}={root}", self.fsname)

    def disown(self, root: str) -> None:
        """Give FSNAME back, emptied, if it is the root's: clones are newer than what they are clones of."""
        if self.owner() != root:
            return
        left = [(role, number) for role, numbers in self.numbers().items() for number in numbers]
        for role, number in sorted(left, key=lambda one: one[1], reverse=True):
            self.remove(role, number)
        _zfs("inherit", OWNER, self.fsname)


_BUSY = "is busy"
_PATIENCE = 2.0

_REFUSALS: Sequence[tuple[str, type[HpmapperError], str]] = (
    ("does not exist", NotFound, "zfs list shows what there is"),
    ("no such pool", NotFound, "zpool import shows what could be imported"),
    ("already exists", AlreadyExists, "zfs list shows it"),
    (_BUSY, FailedPrecondition, "stop what runs in it"),
    ("dependent clones", FailedPrecondition, "remove what was made on it first"),
    ("out of space", NoSpace, "remove something, or give the pool another device"),
    ("quota exceeded", NoSpace, "raise the quota of the dataset in zfs.fsname"),
    ("modules cannot be auto-loaded", Unsupported, "modprobe zfs (Debian: apt install zfs-dkms)"),
    ("modules are not loaded", Unsupported, "modprobe zfs (Debian: apt install zfs-dkms)"),
    ("/dev/zfs", Unsupported, "modprobe zfs, and run as root"),
)
"""What the programs say, and what that means."""


def _patiently(*words: str) -> None:
    """Try again while a dataset is busy though nobody uses it: another mount namespace is just being let go."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            _zfs(*words)
            return
        except FailedPrecondition as error:
            if _BUSY not in error.message or time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _zfs(*words: str) -> str:
    done = run_tool(["zfs", *words], accept=(0, 1, 2))
    if done.code == 0:
        return done.stdout
    said = "; ".join(line.strip() for line in done.stderr.splitlines() if line.strip())
    for part, error, hint in _REFUSALS:
        if part in said:
            raise error(said, hint=hint)
    raise HpmapperError(f"zfs {' '.join(words)} failed: {said}")
