"""What drivers share that give a container its root as an overlay mount: upper, work and merged directories.

    a/ID/u   what the container wrote      a/ID/w   overlayfs's own      a/ID/m   the merged root
    a/ID/size   how much a limited one may keep (hpmapper.drivers.limits); a/ID then is a subvolume on btrfs

A sealed snapshot stays where it is; its u is then a layer.

Nobody outside ever sees the overlay's layers: what is handed out is m (design trap 1).
"""

from __future__ import annotations

import dataclasses
import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

from hpmapper import faults
from hpmapper.drivers.base import Capabilities, Chain, ChainBelow, MountSpec, Stored, bind_spec
from hpmapper.drivers.limits import Limits, limit_of, limits_of, require_in_force
from hpmapper.errors import FailedPrecondition
from hpmapper.kernel import fiemap, lock, mount, mountinfo, sync
from hpmapper.kernel.idmap import IdMapping, IdRange, mapped_tree, user_namespace
from hpmapper.layer.build import Below
from hpmapper.layer.compare import drop_untouched
from hpmapper.layer.diff import changes, write_tar
from hpmapper.layer.marks import ESCAPED, IMPLIED_ROOT, METACOPY, OVERLAY, USERXATTR
from hpmapper.layer.scan import scan
from hpmapper.model import Change, SnapshotId, Space, Usage
from hpmapper.store.workspace import discard
from hpmapper.tree import Inode

PORTABLE = {"index": "off", "metacopy": "off", "redirect_dir": "nofollow", **USERXATTR}
"""Uppers that any reader of directories understands: no metadata-only copies, no redirects (design trap 2)."""

METADATA_COPIES = {"index": "off", "metacopy": "on", "redirect_dir": "on"}
"""What data-only layers need before Linux 6.16; our own diff knows both kinds of xattrs."""

METADATA_COPIES_MARK = "metacopy"
"""A file in a/ID: the upper was written under `METADATA_COPIES`, and is to be mounted so for good."""


_NOBODYS_ID = 2**32 - 2
"""The highest id there is: no mapping for a container has it."""


_ROOTS_KEPT = 256
"""Chains whose root's attributes are remembered: those that containers are made of just now."""


STANDS_ON = "on"
"""The directory of files ID: the layers' directories on which a root was mounted with its ids mapped, a line each."""


class Stack(NamedTuple):
    """What an overlay is made of, below its upper.

    Attributes:
        lowers: the layers' directories, nearest first.
        data: the data-only layer, if one of them redirects into it.
        portable: works under `PORTABLE` on a kernel that has data-only layers without metadata copies.
    """

    lowers: list[str]
    data: str | None = None
    portable: bool = True


class UpperDriver:
    """A driver's part that deals in snapshots; subclasses deal in layers."""

    capabilities: Capabilities
    one_disk = True
    """See `hpmapper.cache.places`."""
    _limits: Limits

    def __init__(self, home: Path) -> None:
        self.home = home
        self.scratch = home / "t"
        self._device = -1
        self._root_of = lru_cache(_ROOTS_KEPT)(self._read_root)  # a chain's never changes: its layers do not

    # What a subclass says of its layers.

    def _stack(self, chain: Chain) -> Stack:
        """What to stack for a chain, mounted if need be."""
        raise NotImplementedError

    def _below(self, chain: ChainBelow) -> AbstractContextManager[Below]:
        """The merged view of a chain, without mounting it."""
        raise NotImplementedError

    # Places.

    def _snapshot(self, snapshot: SnapshotId) -> Path:
        return Path(f"{self.home}/a/{snapshot}")

    def _layer(self, layer: SnapshotId) -> Path:
        return Path(f"{self.home}/l/{layer}")

    def _make_home(self, *more: str) -> None:
        for name in ("a", "l", "t", "empty", STANDS_ON, *more):
            (self.home / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        self._device = os.stat(self.home).st_dev  # each time: a pool attached again may have another
        self._limits = limits_of(self.home, ours=self._owns_file_system())
        self.capabilities = dataclasses.replace(self.capabilities, size_limits=self._limits.available)

    def _owns_file_system(self) -> bool:
        """Whether the file system is the driver's alone, so that it may switch its quotas on."""
        return False

    # The contract: see `hpmapper.drivers.base`.

    def prepare(self, snapshot: SnapshotId, chain: Chain, *, read_only: bool = False, size: int | None = None) -> None:
        # Strings, and access(): isdir() takes four times as long to say no. Starting a container waits for this.
        top = f"{self.home}/a/{snapshot}"
        if size is not None:
            self._limits.make(Path(top), snapshot, size)
            faults.point("prepare.limited")
        for directory in (top, f"{top}/w", f"{top}/m"):
            _make_directory(directory)
        if os.access(f"{top}/u", os.F_OK):
            return
        _make_directory(f"{top}/new")
        self._root_of(tuple(chain)).give_to(f"{top}/new")
        faults.point("prepare.attributes-copied")
        os.rename(f"{top}/new", f"{top}/u")  # where it is, it is complete: `has` relies on it

    def _read_root(self, chain: tuple[SnapshotId, ...]) -> _Root:
        """The root's attributes of the nearest layer that has any of its own."""
        source = next((lower for lower in self._stack(chain).lowers if not _is_implied(lower)), None)
        return _Root() if source is None else _Root.of(source)

    def has(self, snapshot: SnapshotId) -> bool:
        return os.path.isdir(f"{self.home}/a/{snapshot}/u")

    def root(self, snapshot: SnapshotId) -> Path:
        return self._snapshot(snapshot) / "m"

    def is_untouched(self, snapshot: SnapshotId) -> bool:
        with os.scandir(f"{self.home}/a/{snapshot}/u") as entries:
            return next(entries, None) is None

    def seal(self, snapshot: SnapshotId) -> bool:
        top = f"{self.home}/a/{snapshot}"
        if _has_metadata_copies(top):
            return False
        if not self.is_untouched(snapshot):  # else only its root's attributes could be lost, which prepare gives it
            sync.syncfs(top)
        return True

    def handout(
        self, snapshot: SnapshotId, chain: Chain, *, read_only: bool = False, ids: IdMapping | None = None
    ) -> MountSpec:
        return bind_spec(self._root(snapshot, chain, read_only, ids), read_only=read_only)

    def _sealed(self, layer: SnapshotId) -> Path:
        """Where a layer is that is a sealed snapshot."""
        return self._snapshot(layer) / "u"

    def mount(self, snapshot: SnapshotId, chain: Chain, *, read_only: bool = False) -> Path:
        return self._root(snapshot, chain, read_only, None)

    def _root(self, snapshot: SnapshotId, chain: Chain, read_only: bool, ids: IdMapping | None) -> Path:
        top = f"{self.home}/a/{snapshot}"
        with lock.exclusive(top):  # two live mounts of one upper would corrupt it (design trap 13)
            if not self._is_mounted(top):
                require_in_force(self._limits, top)
                with ExitStack() as stack:
                    layer = _Mapper(ids, top, stack) if ids else _as_it_is
                    below = self._stack(chain)
                    if ids:
                        (self.home / STANDS_ON / str(snapshot)).write_text("\n".join(below.lowers))
                    self._mount(top, below, read_only, layer)
        return self.home / f"a/{snapshot}/m"

    def _mount(self, top: str, below: Stack, read_only: bool, layer: Callable[[str], str | int]) -> None:
        upper, work = (None, None) if read_only else (layer(f"{top}/u"), layer(f"{top}/w"))
        # Even a view needs u: it carries the root's attributes, and overlayfs wants two layers without an upper.
        lowers = [f"{top}/u", *below.lowers] if read_only else below.lowers
        enough = lowers if len(lowers) > (1 if read_only else 0) else [*lowers, f"{self.home}/empty"]
        stack = [layer(one) for one in enough]
        target, data = f"{top}/m", layer(below.data) if below.data else None
        if below.portable and not _has_metadata_copies(top):
            try:
                mount.overlay(target, lowers=stack, data=data, upper=upper, work=work, options=PORTABLE)
                return
            except OSError as error:
                if error.errno != errno.EINVAL or data is None:
                    raise
                # Before Linux 6.16.
        # Written down first: what reads the upper must know, also after a kernel update.
        with open(f"{top}/{METADATA_COPIES_MARK}", "wb"):
            pass
        mount.overlay(target, lowers=stack, data=data, upper=upper, work=work, options=METADATA_COPIES)

    def _is_mounted(self, top: str) -> bool:
        """Whether an overlay or a map is mounted at `top`'s m: both have a device number of their own."""
        device = os.stat(f"{top}/m").st_dev
        return device != self._device and device != os.stat(top).st_dev  # so has a subvolume

    def unmount(self, snapshot: SnapshotId) -> None:
        unmount_path(self._snapshot(snapshot) / "m")

    def changes(self, snapshot: SnapshotId, chain: Chain) -> Iterator[Change]:
        with self._below(lambda: chain) as below:
            yield from changes(self._changed(snapshot, chain), below)

    def write_diff(self, snapshot: SnapshotId, chain: Chain, out: BinaryIO) -> None:
        upper = os.fsencode(self._snapshot(snapshot) / "u")
        merged = self._merged(snapshot, chain)

        def open_data(path: bytes) -> BinaryIO:
            name = upper + b"/" + path
            if merged is not None and (not os.path.lexists(name) or _is_metadata_only(name)):
                name = merged + b"/" + path
            return open(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb")

        write_tar(self._changed(snapshot, chain), open_data, out)

    def _changed(self, snapshot: SnapshotId, chain: Chain) -> Inode:
        upper = os.fsencode(self._snapshot(snapshot) / "u")
        tree = scan(upper, overlay=True, merged=self._merged(snapshot, chain))
        with self._below(lambda: chain) as below:
            drop_untouched(tree, below)
        return tree

    def _merged(self, snapshot: SnapshotId, chain: Chain) -> bytes | None:
        """The mount, where the upper alone does not hold all data."""
        copies = _has_metadata_copies(str(self._snapshot(snapshot)))
        return os.fsencode(self.mount(snapshot, chain)) if copies else None

    def _remove_sealed(self, layer: SnapshotId) -> None:
        """Remove a sealed snapshot that was a layer.

        Raises:
            FailedPrecondition: what was mounted while it was one still has it.
        """
        upper = str(self._sealed(layer))
        if os.path.isdir(upper):
            self.unmount(layer)  # a view's own mount has it for a lower one
            if self._is_lower(upper):
                raise FailedPrecondition(f"layer {layer} is in use", hint="stop the containers that were made on it")
            UpperDriver.remove(self, layer)
        self._root_of.cache_clear()  # nothing is remembered of what is gone

    def _is_lower(self, upper: str) -> bool:
        """Whether something that is mounted has a sealed snapshot's directory for a lower layer."""
        return mountinfo.is_lower(upper) or self._is_mapped_lower(upper)

    def _is_mapped_lower(self, path: str) -> bool:
        """Whether an overlay may have a directory for a lower layer under other owners, which mountinfo calls "/u"."""
        for name in os.listdir(f"{self.home}/{STANDS_ON}"):
            with suppress(FileNotFoundError):
                if path in (self.home / STANDS_ON / name).read_text().split("\n"):
                    return True
        return False

    def remove(self, snapshot: SnapshotId) -> None:
        self.unmount(snapshot)
        faults.point("remove.unmounted")
        self._limits.lift(self._snapshot(snapshot))
        faults.point("remove.unlimited")
        with suppress(FileNotFoundError):
            os.unlink(f"{self.home}/{STANDS_ON}/{snapshot}")
        discard(self._snapshot(snapshot), self.scratch)

    def usage(self, snapshot: SnapshotId) -> Usage:
        top = self._snapshot(snapshot)
        return disk_usage(top / "u") if limit_of(top) is None else self._limits.usage(top)

    def own_files(self, snapshot: SnapshotId) -> Path:
        """The directory with what a container has for itself alone (`hpmapper.cache.places`)."""
        return self._snapshot(snapshot) / "u"

    def block_devices(self) -> list[Path]:
        """None but what is mounted."""
        return []

    def stored(self) -> Stored:
        return Stored(numbers(self.home / "a"), numbers(self.home / "l"))

    def space(self) -> Space:
        return Space.of(self.home)

    def _detach_snapshots(self) -> None:
        for entry in list(os.scandir(self.home / "a")):
            unmount_path(Path(entry.path) / "m")


def _as_it_is(layer: str) -> str:
    return layer


def _with_host_root(ranges: Sequence[IdRange]) -> Sequence[IdRange]:
    has_root = any(one.outside == 0 for one in ranges)
    return ranges if has_root else [*ranges, IdRange(_NOBODYS_ID, 0, 1)]


class _Mapper:
    """Opens layers under other owners: overlayfs itself cannot be idmapped, its layers can (design trap 10).

    Upper and work have to be on one mount, so each directory's mount is copied from the directory above it.

    In those two overlayfs makes files as whoever mounted it, root, before it gives them to their owners. The host's
    root has no id in a container's mapping, so there it gets one that nobody uses (else: EOVERFLOW, and a read-only
    mount).
    """

    def __init__(self, ids: IdMapping, top: str, stack: ExitStack) -> None:
        self._stack = stack
        self._top = top
        self._ids = ids
        self._namespace = stack.enter_context(user_namespace(ids.uids, ids.gids))
        self._trees: dict[str, int] = {}

    def __call__(self, layer: str) -> int:
        if os.path.ismount(layer):  # a map
            return self._tree(layer)
        above, name = os.path.split(layer)
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._tree(above))
        self._stack.callback(os.close, fd)
        return fd

    def _tree(self, path: str) -> int:
        if path not in self._trees:
            namespace = self._with_root() if path == self._top else self._namespace
            self._trees[path] = self._stack.enter_context(mapped_tree(path, namespace))
        return self._trees[path]

    def _with_root(self) -> int:
        return self._stack.enter_context(
            user_namespace(_with_host_root(self._ids.uids), _with_host_root(self._ids.gids))
        )


class _Root(NamedTuple):
    """The attributes of a chain's root directory; by default those of one whose layers bring no root of their own.

    `modified`: nanoseconds since 1970; None: now.
    """

    mode: int = 0o755
    owner: tuple[int, int] | None = None
    modified: int | None = None
    xattrs: tuple[tuple[str, bytes], ...] = ()

    @classmethod
    def of(cls, path: str) -> _Root:
        """Those of a layer's root, without what overlayfs alone understands."""
        status = os.stat(path)
        # What the image escaped stays so in the upper: it is a layer as well.
        own = [
            name
            for name in os.listxattr(path)
            if os.fsencode(name).startswith(ESCAPED) or not os.fsencode(name).startswith(OVERLAY)
        ]
        xattrs = tuple((name, os.getxattr(path, name)) for name in own)
        return cls(stat.S_IMODE(status.st_mode), (status.st_uid, status.st_gid), status.st_mtime_ns, xattrs)

    def give_to(self, path: str) -> None:
        """Let a directory that was just made have them."""
        if self.owner is not None:
            os.chown(path, *self.owner)
        os.chmod(path, self.mode)
        for name, value in self.xattrs:
            os.setxattr(path, name, value)
        if self.modified is not None:
            os.utime(path, ns=(self.modified, self.modified))


def _make_directory(path: str) -> None:
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        return
    faults.point("prepare.directory-made")


def _has_metadata_copies(top: str) -> bool:
    return os.access(f"{top}/{METADATA_COPIES_MARK}", os.F_OK)


def _is_implied(lower: str) -> bool:
    try:
        os.getxattr(lower, IMPLIED_ROOT)
    except OSError as error:
        if error.errno == errno.ENODATA:
            return False
        raise
    return True


def _is_metadata_only(path: bytes) -> bool:
    return os.fsdecode(METACOPY) in os.listxattr(path, follow_symlinks=False)


def unmount_path(target: Path) -> None:
    """Unmount what is mounted at `target`, if anything.

    Raises:
        FailedPrecondition: it is in use.
    """
    try:
        if mount.is_mountpoint(target):
            mount.umount(target)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno == errno.EINVAL and not mount.is_mountpoint(target):
            return  # somebody else was faster
        if error.errno != errno.EBUSY:
            raise
        raise FailedPrecondition(f"{target} is in use", hint="stop what runs in it; fuser -vm shows it") from error


def disk_usage(top: Path) -> Usage:
    """What a directory alone occupies; extents that other files share do not count, nor does what vanishes meanwhile.

    Whoever writes in it may change it at any instant, into anything.
    """
    seen: set[tuple[int, int]] = set()
    size = 0
    pending = [os.fspath(top)]
    while pending:
        with suppress(OSError), os.scandir(pending.pop()) as entries:
            for entry in entries:
                with suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    if (status.st_dev, status.st_ino) not in seen:
                        seen.add((status.st_dev, status.st_ino))
                        size += _exclusive_bytes(entry.path, status)
                    if stat.S_ISDIR(status.st_mode):
                        pending.append(entry.path)
    return Usage(size, len(seen) + 1)


def _exclusive_bytes(path: str, status: os.stat_result) -> int:
    """Bytes on disk that no other file shares."""
    if not stat.S_ISREG(status.st_mode):
        return status.st_blocks * 512
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return sum(extent.length for extent in fiemap.extents(fd) if not extent.shared)
    finally:
        os.close(fd)


def mounted_snapshots(home: Path) -> set[SnapshotId]:
    """The snapshots below a driver's directory whose root file system is mounted."""
    # Every driver mounts a snapshot's root at a/NUMBER/m.
    top = home.resolve()
    places = (Path(one.target).relative_to(top).parts for one in mount.mounts_below(top))
    return {SnapshotId(int(parts[1])) for parts in places if parts[:1] == ("a",) and parts[2:] == ("m",)}


def numbers(directory: Path) -> set[SnapshotId]:
    """The snapshots and layers that have a directory in `directory`."""
    return {SnapshotId(int(entry.name)) for entry in os.scandir(directory) if entry.name.isdigit()}
