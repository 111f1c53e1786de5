"""Layers that are plain directories: unpacking a tree, and keeping the tar's recipe beside it.

l/ID/diff        the layer's files: what it adds (overlay), or the whole root (drivers that copy)
l/ID/tar         the recipe of its tar; its references are the numbers of files in the tar
l/ID/names       the path of each number, NUL-terminated; empty for a file that the same tar replaced later
l/ID/superseded  those files, by number
l/ID/unlinked    if it is there: see LOST_LINKS
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from pathlib import Path
from typing import BinaryIO

from hpmapper import faults
from hpmapper.drivers.base import Chain, Fresh, Ingested, Problem, Progress
from hpmapper.errors import Corrupt, InvalidArgument
from hpmapper.files import Pieces, Segments, write_file
from hpmapper.kernel import sync
from hpmapper.kernel.clone import can_clone
from hpmapper.kernel.fs import filesystem_name
from hpmapper.layer.aufs import MAX_NAME
from hpmapper.layer.build import OPAQUE_MARKER, WHITEOUT_PREFIX, Below, LayerBuilder, Nothing
from hpmapper.layer.diff import OpenData
from hpmapper.layer.marks import ESCAPED, IMPLIED_ROOT, OPAQUE, OVERLAY
from hpmapper.layer.merged import Merged
from hpmapper.layer.recipe import RecipeWriter, replay
from hpmapper.layer.scan import DirectoryView
from hpmapper.layer.stream import Expected, LayerStream
from hpmapper.model import ObjectDigest, SnapshotId
from hpmapper.store.workspace import discard, remove_tree
from hpmapper.tree import Inode, walk

LAYER = "layer"
"""Where `fill` makes a layer in the directory it is given."""

CONTENTS = f"{LAYER}/diff"

LOST_LINKS = "unlinked"
"""A file in a layer that deletes in a copy of the one below: it took one of several names of a file, or more."""


class Dialect(Enum):
    """How deletions are written: as overlayfs or AUFS reads them, or by deleting in a copy of the layer below."""

    OVERLAY = "overlay"
    AUFS = "aufs"
    APPLIED = "applied"


class NumberedFiles:
    """Keeps a tar's files as DIRECTORY/0, 1, … (the builder's `FileSink`)."""

    inline_below = 0

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._directory = directory
        self.count = 0
        self.bytes = 0

    def inline(self, data: bytes) -> int:
        raise AssertionError("nothing is smaller than 0 bytes")

    def put(self, pieces: Pieces, size: int, segments: Segments | None) -> tuple[int, bytes]:
        """Write one file."""
        number = self.count
        self.count += 1
        self.bytes += size
        with (self._directory / str(number)).open("xb", buffering=0) as out:
            write_file(out.fileno(), pieces, size, segments)
        return number, str(number).encode("ascii")


def unpack(
    blob: BinaryIO,
    below: Below,
    work: Path,
    layer: Path,
    dialect: Dialect,
    expect: Expected,
    progress: Progress | None,
) -> Ingested:
    """Read a tar and make `layer` of it: whole and durable under its name when this returns.

    `work/layer/diff` (`CONTENTS`) exists and, for the dialect APPLIED, holds a copy of the layer below.
    """
    ingested = fill(blob, below, work, SnapshotId(int(layer.name)), dialect, expect, progress)
    (work / LAYER).rename(layer)
    faults.point("ingest.layer-renamed")
    sync.syncfs(work)
    return ingested


def fill(
    blob: BinaryIO,
    below: Below,
    work: Path,
    layer: SnapshotId,
    dialect: Dialect,
    expect: Expected,
    progress: Progress | None,
) -> Ingested:
    """Read a tar into `work/layer`, as `unpack` does, and leave it there, synced."""
    made = work / LAYER
    data = made / "data"  # in it: the layer may be a subvolume, out of which nothing can be renamed
    sink = NumberedFiles(data)
    with LayerStream(blob, progress) as stream, (made / "tar").open("wb") as out:
        recipe = RecipeWriter(out)
        builder = LayerBuilder(below, sink, recipe)
        builder.read(stream)
        recipe.close()
        expect.verify(stream.digests)
    if dialect is Dialect.AUFS:
        _require_short_names(builder.root)
    _note_names(builder.root, sink.count, data, made)
    try:
        unpacker = _Unpacker(made / "diff", data, dialect)
        unpacker.unpack(builder.root)
    except OSError as error:
        raise _explained(error) from error
    if unpacker.lost_links:
        (made / LOST_LINKS).touch()
    data.rmdir()
    faults.point("ingest.unpacked")
    sync.syncfs(work)
    faults.point("ingest.synced")
    return Ingested(layer, stream.digests, builder.bound, None, {}, sink.bytes, 0, builder.entries)


def whole_root(root: Path | None) -> Below:
    """What a chain shows where its topmost layer is a copy with all below it; None: an empty chain."""
    if root is None:
        return Nothing()
    # Merged, though there is but one: it asks step by step, so that no symlink of an image leads to the host.
    return Merged([DirectoryView(os.fsencode(root), overlay=False)])


def open_data(root: Path) -> OpenData:
    """What opens the files of a root that a container may be writing to: never through a symlink in a file's place."""
    return DirectoryView(os.fsencode(root), overlay=False).open


def drop_recipe(layer: Path) -> None:
    """Take away what a copy of a layer has beside the tree: what the tar of the layer below is made again from."""
    for name in ("tar", "names"):
        (layer / name).unlink(missing_ok=True)
    if (layer / "superseded").exists():
        remove_tree(layer / "superseded")


def read_tar(layer: Path) -> Iterator[bytes]:
    """Yield the tar that the layer at that path was made from."""
    names = (layer / "names").read_bytes().split(b"\0")

    def open_stored(number: bytes) -> BinaryIO:
        name = names[int(number)]
        path = layer / "diff" / os.fsdecode(name) if name else layer / "superseded" / number.decode("ascii")
        try:
            return path.open("rb")
        except FileNotFoundError:
            raise Corrupt(f"{path} is missing", hint="run hpmapper fsck") from None

    with (layer / "tar").open("rb") as recipe:
        yield from replay(recipe, open_stored)


def check(layer: Path) -> Iterator[str]:
    """Say what is wrong with a layer's directory."""
    for name in ("diff", "tar", "names"):
        if not (layer / name).exists():
            yield f"{layer / name} is missing"


def _require_short_names(root: Inode) -> None:
    for path, _ in walk(root):
        if len(path) > MAX_NAME and len(path.rpartition(b"/")[2]) > MAX_NAME:
            raise InvalidArgument(
                f"the layer's {os.fsdecode(path)!r} has a longer name than AUFS shows: {MAX_NAME} bytes",
                hint="another storage driver may hold it",
            )


def _note_names(root: Inode, count: int, data: Path, made: Path) -> None:
    """Write down where each of the tar's files goes, and put those aside that no longer have a place."""
    names = [b""] * count
    for path, inode in walk(root):
        if isinstance(inode.content, int) and not names[inode.content]:
            names[inode.content] = path
    (made / "names").write_bytes(b"".join(name + b"\0" for name in names))
    (made / "superseded").mkdir()
    for number, name in enumerate(names):
        if not name:
            (data / str(number)).rename(made / "superseded" / str(number))


class _Unpacker:
    """Makes a tree real below a directory that nobody else touches.

    The tree's paths hold no symlinks and every directory on the way is made or checked first, so joined paths are safe.

    `lost_links`: of a file with several names in the layer below, one has gone.
    """

    def __init__(self, top: Path, data: Path, dialect: Dialect) -> None:
        self._top = os.fsencode(top)
        self._data = os.fsencode(data)
        self._dialect = dialect
        self._applied = dialect is Dialect.APPLIED
        self._made: dict[Inode, bytes] = {}
        self.lost_links = False

    def unpack(self, root: Inode) -> None:
        directories = []
        before = os.stat(self._top).st_mtime_ns
        for path, inode in walk(root):
            target = self._top + b"/" + path if path else self._top
            if inode.is_dir:
                directories.append((target, inode))
                if path:
                    self._directory(target, inode)
            elif inode in self._made:
                self._clear(target)
                os.link(self._made[inode], target, follow_symlinks=False)
            elif inode.is_whiteout:
                self._whiteout(target)
            else:
                self._clear(target)
                self._create(target, inode)
                self._attributes(target, inode)
                self._made[inode] = target
        for target, inode in reversed(directories):  # last, since filling a directory changes its times
            self._attributes(target, inode)
        if self._applied and (IMPLIED_ROOT, b"y") in root.xattrs:
            os.utime(self._top, ns=(before, before))

    def _directory(self, target: bytes, inode: Inode) -> None:
        try:
            os.mkdir(target, 0o700)
        except FileExistsError:
            if inode.opaque or not stat.S_ISDIR(os.lstat(target).st_mode):
                self._clear(target)
                os.mkdir(target, 0o700)
        if inode.opaque and self._dialect is Dialect.OVERLAY:
            os.setxattr(target, OPAQUE, b"y")
        elif inode.opaque and self._dialect is Dialect.AUFS:
            _mark(target + b"/" + OPAQUE_MARKER)

    def _whiteout(self, target: bytes) -> None:
        if self._dialect is Dialect.OVERLAY:
            os.mknod(target, stat.S_IFCHR, 0)
        elif self._dialect is Dialect.AUFS:
            above, name = os.path.split(target)
            _mark(above + b"/" + WHITEOUT_PREFIX + name)
        else:
            self._clear(target)

    def _clear(self, target: bytes) -> None:
        """Make room in a copy of the layer below."""
        if not self._applied:
            return
        self.lost_links = self.lost_links or _has_links(target)
        try:
            os.unlink(target)
        except FileNotFoundError:
            return
        except IsADirectoryError:
            remove_tree(Path(os.fsdecode(target)))

    def _create(self, target: bytes, inode: Inode) -> None:
        if stat.S_ISLNK(inode.mode):
            os.symlink(inode.target, target)
        elif isinstance(inode.content, int):
            os.rename(self._data + b"/%d" % inode.content, target)
        elif stat.S_ISREG(inode.mode):
            os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        else:
            os.mknod(target, inode.mode, inode.rdev)

    def _attributes(self, target: bytes, inode: Inode) -> None:
        if self._applied and (IMPLIED_ROOT, b"y") in inode.xattrs:
            return  # the copy has the root attributes of the layer below
        os.chown(target, inode.uid, inode.gid, follow_symlinks=False)
        if not stat.S_ISLNK(inode.mode):
            os.chmod(target, stat.S_IMODE(inode.mode))  # after chown, which clears set-user-ID
        if self._applied and inode.is_dir:
            _drop_xattrs(target)
        for name, value in inode.xattrs:
            if self._dialect is Dialect.OVERLAY and name.startswith(OVERLAY):
                name = ESCAPED + name.removeprefix(OVERLAY)  # an image must not speak to overlayfs (design trap 3)
            os.setxattr(target, name, value, follow_symlinks=False)
        os.utime(target, ns=(inode.mtime_ns, inode.mtime_ns), follow_symlinks=False)


def _has_links(target: bytes) -> bool:
    """Whether a file, or one below a directory, has several names."""
    try:
        status = os.lstat(target)
    except FileNotFoundError:
        return False
    if not stat.S_ISDIR(status.st_mode):
        return status.st_nlink > 1
    files = (os.path.join(here, name) for here, _, names in os.walk(target) for name in names)
    return any(os.lstat(file).st_nlink > 1 for file in files)


def _mark(path: bytes) -> None:
    """Make an empty file that AUFS knows by its name."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444))


def _drop_xattrs(target: bytes) -> None:
    for name in os.listxattr(target, follow_symlinks=False):
        os.removexattr(target, name, follow_symlinks=False)


def _explained(error: OSError) -> Exception:
    if error.filename is None:
        return error
    return InvalidArgument(
        f"the layer's {os.fsdecode(error.filename)!r} cannot be made on this file system: {error.strerror}",
        hint="another storage driver may hold it",
    )


class DirectoryLayers:
    """A driver's part that deals in such layers: nothing is stored as objects, nothing is derived from a layer."""

    home: Path
    scratch: Path
    one_disk = True
    """See `hpmapper.cache.places`."""

    def _layer(self, layer: SnapshotId) -> Path:
        return self.home / "l" / str(layer)

    def pin(self) -> AbstractContextManager[object]:
        return nullcontext()

    def finish(self, chain: Chain, fresh: Mapping[SnapshotId, Fresh]) -> None:
        """Every layer is ready as it is."""

    def read_tar(self, layer: SnapshotId) -> Iterator[bytes]:
        return read_tar(self._layer(layer))

    # For the cache (`hpmapper.cache.places`).

    def object_file(self, digest: ObjectDigest) -> None:
        """None: nothing is an object."""

    def map_files(self, chain: Chain) -> list[Path]:
        """None: names are the file system's."""
        return []

    def map_mounts(self, chain: Chain) -> list[Path]:
        """None."""
        return []

    def layer_files(self, layer: SnapshotId) -> Path | None:
        """The layer's directory."""
        return self._layer(layer) / "diff"

    def block_devices(self) -> list[Path]:
        """None but what is mounted."""
        return []

    def remove_layer(self, layer: SnapshotId) -> None:
        discard(self._layer(layer), self.scratch)

    def sweep_objects(self, known: Callable[[], Container[ObjectDigest]], timeout: float) -> int:
        return 0

    def stored_objects(self) -> set[ObjectDigest]:
        return set()

    def status(self) -> dict[str, str]:
        return {
            "Backing Filesystem": filesystem_name(self.home),
            "Copies Extents": str(can_clone(self.home)).lower(),
        }

    def check_layer(self, layer: SnapshotId, digest: bytes | None) -> Iterator[str]:
        return check(self._layer(layer))

    def check_derived(self, *, repair: bool) -> Iterator[Problem]:
        return iter(())

    def check_object(self, digest: ObjectDigest, size: int) -> str | None:
        return "is not expected with this driver"
