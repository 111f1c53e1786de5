"""The contract between the engine and a storage driver.

Vocabulary
    A *layer* is immutable storage made from one tar; a *chain* of layers, nearest first, is what a container sees.
    A *snapshot* is named by a number that is never used twice. The engine owns keys, parents, kinds, labels,
    times and states; a driver is told numbers and turns them into storage. It keeps no database, and
    whatever the engine's database does not name, it must be able to remove.

Lifecycle, by two examples
    Importing an image of two layers, then running a container:

        driver.ingest(1, …[], blob, work)           layer 1: the tar becomes storage; durable when it returns
        driver.ingest(2, …[1], blob, work)          layer 2, on top of layer 1
        driver.finish([2, 1])                       the image is complete
        driver.prepare(3, [2, 1])                   snapshot 3: an empty writable place above both
        root = driver.mount(3, [2, 1])              the container's root file system, at a path
        …                                           the container runs
        driver.unmount(3)
        driver.changes(3, [2, 1])                   what it did, as Docker's A, C and D

    Turning it into an image, then throwing it away:

        driver.write_diff(3, [2, 1], out)           its changes as a deterministic layer tar
        driver.ingest(4, [2, 1], blob, work)        which is read like any other layer
        driver.unmount(3); driver.remove(3)

    Or keeping what it wrote as a layer, as it lies there (containerd's Commit, which must be quick):

        driver.seal(3)                              durable; 3 may now stand in chains as a layer
        driver.prepare(4, [3, 2, 1])

Promises
    - Every method but `ingest` may be called again after it was cut short at any instant, and finishes the work.
      A cut-short `ingest` is undone by `remove_layer`; the engine never calls it twice for one number.
    - `remove` and `remove_layer` of something that is not there, or half there, succeed.
    - A chain's sealed layers are its topmost ones, for a driver that does not keep them: whoever ingests on top of
      one ingests that one first.
    - Removing never follows a mount point or a symlink out of the snapshot.
    - Nothing is promised to be durable but what `ingest` made: the engine's record follows, never precedes it.
    - Methods may be called from several threads and processes at once for different numbers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol, runtime_checkable

from hpmapper.kernel.idmap import IdMapping
from hpmapper.layer.stream import Digests, Expected
from hpmapper.model import Change, ObjectDigest, SnapshotId, Space, Usage
from hpmapper.store.objects import IsObject
from hpmapper.tree import Inode

Chain = Sequence[SnapshotId]
"""Layers, nearest first: the parent's, then its parent's, …"""

ChainBelow = Callable[[], Chain]

Progress = Callable[[int], None]
"""Told how many more bytes of the compressed layer were read."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a driver can and cannot do; each has a test of its own in the contract suite.

    Attributes:
        shares_layers: one layer's storage may stand in several chains.
        copies_extents: the first write to a file of the image copies extents, not the file.
        shares_cache: containers of one image read one cached copy of its data.
        changes_from_upper: `changes` reads what the container wrote, not the whole tree.
        max_layers: layers below one snapshot.
        mounts: a snapshot's root is a mount; a driver without makes do where mounting is forbidden.
        keeps_sealed: a sealed layer is as good as an ingested one; otherwise it is ingested when there is time.
        maps_ids: `handout` can let files appear under other owners.
        renames_directories: a directory of the image can be renamed; otherwise EXDEV, and mv(1) copies it.
        keeps_links: a file of the image that has several names stays one when it is written to; otherwise the name by
            which it is written to becomes a file of its own.
        size_limits: what a snapshot keeps can be limited; found out by `attach`, as it depends on the file system.
        default_size: how many bytes a container may keep for which nobody says; None: without limit. The engine's
            users pass it to `prepare`; what is unpacked into a snapshot is not a container's.
    """

    shares_layers: bool
    copies_extents: bool
    shares_cache: bool
    changes_from_upper: bool
    max_layers: int
    mounts: bool
    keeps_sealed: bool = True
    maps_ids: bool = False
    renames_directories: bool = True
    keeps_links: bool = True
    size_limits: bool = False
    default_size: int | None = None


class Fresh(NamedTuple):
    """A layer's tree as it was just built, and the open file that its inodes' offsets point into."""

    tree: Inode
    spool: BinaryIO


@dataclass(frozen=True, slots=True)
class Ingested:
    """What became of a layer's tar.

    Attributes:
        layer: its number.
        digests: of the stream, which are what was promised.
        bound: holds above this chain only.
        digest: of the driver's own form of the layer (the map), for fsck.
        objects: the stored objects that it needs, with their sizes in bytes.
        size: bytes newly occupied. deduplicated: bytes that were there already and so were not written.
        inodes: members of the tar.
        fresh: what `finish` can use instead of reading the layer again; whoever holds this closes its spool.
    """

    layer: SnapshotId
    digests: Digests
    bound: bool
    digest: bytes | None
    objects: Mapping[ObjectDigest, int]
    size: int
    deduplicated: int
    inodes: int
    fresh: Fresh | None = None


@dataclass(frozen=True, slots=True)
class Stored:
    """Whose storage lies on disk, named by the database or not."""

    snapshots: set[SnapshotId] = field(default_factory=set)
    layers: set[SnapshotId] = field(default_factory=set)


class MountSpec(NamedTuple):
    """A mount for somebody else to make: mount(8)'s type, source and options."""

    type: str
    source: str
    options: list[str]


def bind_spec(path: Path, *, read_only: bool) -> MountSpec:
    """A bind of a root that is there already."""
    return MountSpec("bind", os.fspath(path), ["rbind", "ro" if read_only else "rw"])


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with something."""

    subject: str
    text: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What probing a driver found: whether it works here, why it does not, and what makes it (`how`; "": nothing)."""

    works: bool
    why: str
    how: str = ""

    @property
    def reason(self) -> str:
        """Why it does not work, and what would make it."""
        return self.why + (f"; to get it: {self.how}" if self.how else "")


@runtime_checkable
class Driver(Protocol):
    """A way to store layers and to give containers a root. See the module's text."""

    name: str
    capabilities: Capabilities
    scratch: Path
    """A directory for workspaces, on the file system where layers end up: what is made there is renamed in place."""

    def attach(self) -> None:
        """Make the storage usable: devices, mounts. Done again after a reboot; does nothing when all is there."""

    def detach(self) -> None:
        """Give up devices and mounts; everything stays on disk.

        Raises:
            FailedPrecondition: a snapshot is in use.
        """

    def ingest(
        self,
        layer: SnapshotId,
        below: ChainBelow,
        blob: BinaryIO,
        work: Path,
        expect: Expected,
        progress: Progress | None,
        is_object: IsObject,
    ) -> Ingested:
        """Make a layer from a compressed or plain tar, in one pass; whole and durable when this returns.

        `below` tells the chain that the layer goes on top of, and waits for it if it is still being ingested: a driver
        that asks only if the tar leaves something to the chain ingests an image's layers side by side.

        `work` is an empty directory in `scratch`, for the driver's use, removed by the caller whatever happens.

        `is_object` tells which objects the database names: only those are there for good. On failure the caller has
        the others swept.

        Raises:
            Corrupt: the blob is damaged, or not what `expect` says. InvalidArgument: it is hostile. NoSpace: no room.
            In each case nothing of it is left but perhaps in `work`, and objects that nothing names.
        """

    def finish(self, chain: Chain, fresh: Mapping[SnapshotId, Fresh]) -> None:
        """An image's last layer is in: make ready what makes its containers quick. They work without it, too.

        `fresh` has the trees of those layers that have just been ingested; they are used up.
        """

    def prepare(self, snapshot: SnapshotId, chain: Chain, *, read_only: bool = False, size: int | None = None) -> None:
        """Make a place for a container's changes on top of a chain (which may be empty).

        `size` limits what it can keep, in bytes; beyond it, writing fails with ENOSPC or EDQUOT. What counts is the
        file system's affair: see `hpmapper.drivers.limits`.

        Raises:
            Unsupported: a size is asked for, where there are no limits. InvalidArgument: it is too small.
        """

    def has(self, snapshot: SnapshotId) -> bool:
        """Whether a snapshot's storage is there. The engine has it prepared (again) if not."""

    def root(self, snapshot: SnapshotId) -> Path:
        """The path at which `mount` makes the root appear."""

    def seal(self, snapshot: SnapshotId) -> bool:
        """Make durable what was written to a snapshot, which may then stand in chains as a layer of the same number.

        What is mounted stays mounted; nobody writes to it any more. False: it cannot be a layer as it lies there, only
        through `write_diff`.
        """

    def mount(self, snapshot: SnapshotId, chain: Chain, *, read_only: bool = False) -> Path:
        """Make the merged root appear and return its path; does nothing but answer when it is there already."""

    def handout(
        self, snapshot: SnapshotId, chain: Chain, *, read_only: bool = False, ids: IdMapping | None = None
    ) -> MountSpec:
        """What an engine is to mount to get the root: a bind of what `mount` made, unless the layers are plain enough
        for anybody to see (design trap 1).

        With `ids` files appear under other owners, for a container in a user namespace; on disk they stay as they are.
        Only a driver that can (`Capabilities.maps_ids`) is asked for that.

        Raises:
            OSError: the kernel cannot map the ids.
        """

    def is_untouched(self, snapshot: SnapshotId) -> bool:
        """Whether it is plain at once that nothing was written to a snapshot; False where that takes a search."""

    def unmount(self, snapshot: SnapshotId) -> None:
        """Make it disappear again; does nothing when it is not there.

        Raises:
            FailedPrecondition: it is in use.
        """

    def changes(self, snapshot: SnapshotId, chain: Chain) -> Iterator[Change]:
        """What differs from the chain, in path order; parents of changes count as changed, as in Docker."""

    def write_diff(self, snapshot: SnapshotId, chain: Chain, out: BinaryIO) -> None:
        """Write the changes as a layer tar. The same changes give the same bytes."""

    def read_tar(self, layer: SnapshotId) -> Iterator[bytes]:
        """Yield the tar that the layer was made from, byte for byte."""

    def remove(self, snapshot: SnapshotId) -> None:
        """Remove a snapshot's own storage, unmounting it first.

        Raises:
            FailedPrecondition: it is in use.
        """

    def remove_layer(self, layer: SnapshotId) -> None:
        """Remove a layer's storage, sealed ones' too. The engine has made sure that no chain has it any more.

        Of several the newest goes first, so that none goes before those that were made on top of it.

        Raises:
            FailedPrecondition: it is in use all the same.
        """

    def pin(self) -> AbstractContextManager[object]:
        """While it lasts no stored object is swept: from before an ingest until the engine has recorded it."""

    def sweep_objects(self, known: Callable[[], Container[ObjectDigest]], timeout: float) -> int:
        """Remove the stored objects that are not known; returns the bytes freed.

        `known` is asked once no ingest is running any more.

        Raises:
            BlockingIOError: an ingest ran on for `timeout` seconds.
        """

    def stored(self) -> Stored:
        """Whose storage lies on disk."""

    def stored_objects(self) -> set[ObjectDigest]:
        """The objects on disk: a walk of them all."""

    def usage(self, snapshot: SnapshotId) -> Usage:
        """What a snapshot alone occupies: extents shared with the image do not count.

        Of one with a size limit: what counts against the limit, without reading what it keeps.
        """

    def space(self) -> Space:
        """The file system's total and free bytes."""

    def status(self) -> dict[str, str]:
        """Facts for `info`, in the order in which they are shown."""

    def check_layer(self, layer: SnapshotId, digest: bytes | None) -> Iterator[str]:
        """Say what is wrong with a layer's storage; nothing when all is well."""

    def check_derived(self, *, repair: bool) -> Iterator[Problem]:
        """Say what is wrong with storage that was derived from layers (merged maps); with `repair`, drop it."""

    def check_object(self, digest: ObjectDigest, size: int) -> str | None:
        """Say what is wrong with a stored object, None when all is well."""
