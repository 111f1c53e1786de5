"""The flagship driver: maps in EROFS, one store of objects for all, copy-on-write by extents.

    o/ab/cdef…      objects                                   (hpmapper.store.objects)
    l/ID/map        a layer's map                             (hpmapper.erofs)
    l/ID/tar        how to make its tar again                 (hpmapper.layer.recipe)
    i/NAME/map      an image's map: its layers' maps merged   (hpmapper.layer.merge)
    i/NAME/chain    its layers' numbers, nearest first
    i/NAME/wasted   bytes of the map that nothing refers to, if it grew out of another
    */m             where a map is mounted, once for all containers, so that they share its cached pages
    a/ID/u, w, m    a snapshot's upper, work and merged directories; u of a sealed one is a layer
    t/              unfinished things

A container's root is one overlay: upper u, the image's map as the only lower (an image of one layer has the layer's),
and o as the data-only layer into which the map's large files redirect. u and o are on one reflink file system, so a
copy-up clones extents.

Why one map per image: overlayfs follows a redirect out of any lower but the last only with metacopy=on ("refusing to
follow metacopy origin", seen on 6.18), which would leave metadata-only copies in the uppers (design trap 2); and a
lookup in one lower is cheaper than in many. Measured: docs/measurements.md. Until that map is made, and between the
layers of an image that is just coming in, the layers' maps are stacked under metacopy=on.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from blake3 import blake3

from hpmapper import faults, pace
from hpmapper.drivers.ahead import NamesAhead
from hpmapper.drivers.base import Capabilities, Chain, ChainBelow, Fresh, Ingested, Problem, Progress
from hpmapper.drivers.upper import Stack, UpperDriver, unmount_path
from hpmapper.erofs.kept import kept_tree
from hpmapper.erofs.plan import NoRoom
from hpmapper.erofs.reader import Map
from hpmapper.erofs.writer import extend_map, write_map
from hpmapper.errors import Corrupt, HpmapperError
from hpmapper.kernel import clone, lock, mount, sync
from hpmapper.layer.build import Below, LayerBuilder
from hpmapper.layer.merge import Spools, merge
from hpmapper.layer.merged import Later, LayerView, Merged
from hpmapper.layer.recipe import RecipeWriter, replay
from hpmapper.layer.scan import DirectoryView
from hpmapper.layer.stream import Digests, Expected, LayerStream
from hpmapper.model import ObjectDigest, SnapshotId, Space
from hpmapper.pool.base import Pool, PoolKind
from hpmapper.store.objects import IsObject, ObjectStore, Staging
from hpmapper.store.workspace import discard, workspace
from hpmapper.tree import Inode

log = logging.getLogger(__name__)

INLINE_BELOW = 1024
"""Bytes from which a file becomes an object; smaller ones lie in the map. Measured: docs/measurements.md."""

_WASTED_MOST = 0.25
"""The part of a map that may be of no use before it is written anew."""

_ANY_UUID = "00" * 16


class HpmapperDriver(UpperDriver):
    """See the module's text, and `hpmapper.drivers.base` for the contract."""

    name = "hpmapper"
    capabilities = Capabilities(
        shares_layers=True,
        copies_extents=True,
        shares_cache=True,
        changes_from_upper=True,
        max_layers=1 << 16,  # merged, not stacked
        mounts=True,
        keeps_sealed=False,
        maps_ids=True,
        renames_directories=False,
        keeps_links=False,
    )

    def __init__(
        self, pool: Pool, *, inline_below: int = INLINE_BELOW, map_form: mount.ErofsForm | None = None
    ) -> None:
        """Stand on a pool. `map_form` says how maps are mounted; None: as this kernel does best."""
        super().__init__(pool.path)
        self._pool = pool
        self._inline_below = inline_below
        self._map_form = map_form
        self._objects = ObjectStore(self.home / "o")
        self.names_ahead = NamesAhead(self._objects)

    def attach(self) -> None:
        self._pool.attach()
        self._make_home("i")
        self._objects.make()

    def _owns_file_system(self) -> bool:
        return self._pool.config.kind is not PoolKind.DIRECTORY

    def detach(self) -> None:
        if not self._pool.is_attached():
            return
        self._make_home("o", "i")  # a crash may have come before
        self.names_ahead.wait()
        self._detach_snapshots()
        for place in ("i", "l"):
            for entry in list(os.scandir(self.home / place)):
                unmount_path(Path(entry.path) / "m")
        self._pool.detach()

    def pin(self) -> AbstractContextManager[object]:
        return self._objects.shared()

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
        made = work / "layer"
        (made / "m").mkdir(mode=0o700, parents=True)
        spool = (work / "spool").open("w+b")
        try:
            staged = Staging(self._objects, work, spool, self._inline_below, is_object)
            with staged as staging, pace.ingesting():
                builder, digests = self._read(blob, below, made / "tar", staging, progress)
                expect.verify(digests)
                staging.start_writeback()
                map_digest, map_size = _write_map(builder.root, spool, made / "map", digests.diff_id[7:39])
                faults.point("ingest.map-written")
                sync.syncfs(work)
                faults.point("ingest.synced")
                staging.publish()
                made.rename(self._layer(layer))
                faults.point("ingest.layer-renamed")
                sync.syncfs(work)
            size = map_size + (self._layer(layer) / "tar").stat().st_size + staging.new_bytes
        except BaseException:
            spool.close()
            raise
        known = sum(staging.objects.values()) - staging.new_bytes
        fresh = Fresh(builder.root, spool)
        return Ingested(layer, digests, builder.bound, map_digest, staging.objects, size, known, builder.entries, fresh)

    def _read(
        self, blob: BinaryIO, below: ChainBelow, recipe: Path, staging: Staging, progress: Progress | None
    ) -> tuple[LayerBuilder, Digests]:
        with LayerStream(blob, progress) as stream, recipe.open("wb") as out, self._below(below) as merged:
            writer = RecipeWriter(out)
            builder = LayerBuilder(merged, staging, writer)
            builder.read(stream)
            writer.close()
            return builder, stream.digests

    def read_tar(self, layer: SnapshotId) -> Iterator[bytes]:
        with (self._layer(layer) / "tar").open("rb") as recipe:
            yield from replay(recipe, lambda name: self._objects.open(ObjectDigest(name)))

    def finish(self, chain: Chain, fresh: Mapping[SnapshotId, Fresh]) -> None:
        if len(chain) < 2 or os.path.exists(f"{self._image_name(chain)}/map"):
            return
        maps = self._split(chain)[1]  # sealed layers have none
        if len(maps) > 1 and not os.path.exists(f"{self._image(maps)}/map"):
            self._merge(maps, fresh)

    def _merge(self, chain: Chain, fresh: Mapping[SnapshotId, Fresh]) -> None:
        """Make the image's map. It can be made again from the layers' maps at any time, so nothing records it."""
        image = self._image(chain)
        with workspace(self.scratch) as work:
            made = work / "image"
            (made / "m").mkdir(mode=0o700, parents=True)
            (made / "chain").write_text(_chain_text(chain))
            with pace.ingesting():
                if not self._extend(chain, fresh, work, made, image.name):
                    self._write_merged(chain, work, made / "map", image.name)
            sync.syncfs(work)
            faults.point("finish.synced")
            try:
                sync.rename_noreplace(made, image)
            except FileExistsError:
                pass  # another process was first
        faults.point("finish.merged")

    def _extend(self, chain: Chain, fresh: Mapping[SnapshotId, Fresh], work: Path, made: Path, uuid: str) -> bool:
        """Let the map of the layers below grow by what the topmost ones change; takes as long as that is much.

        False: write it anew. There is no room in it, too much in it is of no use any more, or it is damaged.
        """
        above, base = self._nearest_map(chain)
        path = made / "map"
        try:
            with ExitStack() as stack:
                below = stack.enter_context(Map.open(base / "map"))
                tree = kept_tree(below)
                spool = self._merge_layers(above, fresh, work, stack, tree).spool
                with path.open("w+b") as out, (base / "map").open("rb") as lower:
                    clone.clone(lower.fileno(), out.fileno())
                    size, wasted = extend_map(tree, below, spool, out, uuid=bytes.fromhex(uuid))
            wasted += _number_in(base / "wasted")
        except (NoRoom, Corrupt, FileNotFoundError) as error:
            log.info("the map of layers %s cannot grow into that of %s: %r", base.name, uuid, error)
            return False
        if wasted > size * _WASTED_MOST:
            return False
        (made / "wasted").write_text(f"{wasted}\n")
        return True

    def _nearest_map(self, chain: Chain) -> tuple[Chain, Path]:
        """The longest part of a chain below others that has a map: what is above it, and where that map is."""
        for at in range(1, len(chain)):
            place = self._image(chain[at:])
            if (place / "map").exists():
                return chain[:at], place
        raise Corrupt(f"layer {chain[-1]} has no map", hint="run hpmapper fsck --repair")

    def _write_merged(self, chain: Chain, work: Path, path: Path, uuid: str) -> None:
        with ExitStack() as stack:
            tree, spool = self._merge_layers(chain, {}, work, stack)
            _write_map(tree, spool, path, uuid)

    def _merge_layers(
        self,
        chain: Chain,
        fresh: Mapping[SnapshotId, Fresh],
        work: Path,
        stack: ExitStack,
        onto: Inode | None = None,
    ) -> Fresh:
        spools = Spools()
        trees = []
        for layer in reversed(chain):
            tree, spool = fresh.get(layer) or self._read_again(self._layer(layer), work, stack)
            trees.append(spools.add(tree, spool))
        return Fresh(merge(trees, onto), cast(BinaryIO, spools))

    def _read_again(self, place: Path, work: Path, stack: ExitStack) -> Fresh:
        spool = stack.enter_context((work / f"spool-{place.name}").open("w+b"))
        with Map.open(place / "map") as found:
            return Fresh(found.tree(spool), spool)

    def remove_layer(self, layer: SnapshotId) -> None:
        self._remove_sealed(layer)
        for image in self._images_with(layer):
            unmount_path(image / "m")
            discard(image, self.scratch)
        unmount_path(self._layer(layer) / "m")
        discard(self._layer(layer), self.scratch)

    def sweep_objects(self, known: Callable[[], Container[ObjectDigest]], timeout: float) -> int:
        with self._objects.exclusive(timeout):
            kept = known()
            return self._objects.delete([digest for digest in self._objects if digest not in kept])

    def stored_objects(self) -> set[ObjectDigest]:
        return set(self._objects)

    def space(self) -> Space:
        return self._pool.space()

    def status(self) -> dict[str, str]:
        return self._pool.facts()

    def check_layer(self, layer: SnapshotId, digest: bytes | None) -> Iterator[str]:
        path = self._layer(layer)
        for name in ("map", "tar", "m"):
            if not (path / name).exists():
                yield f"{path / name} is missing"
        if (path / "map").exists() and _file_digest(path / "map") != digest:
            yield f"{path / 'map'} is not what its digest says"

    def check_derived(self, *, repair: bool) -> Iterator[Problem]:
        for entry in sorted(os.scandir(self.home / "i"), key=lambda entry: entry.name):
            image = Path(entry.path)
            problem = self._wrong_image(image)
            if problem:
                if repair:
                    unmount_path(image / "m")
                    discard(image, self.scratch)
                yield Problem(f"image map {image.name}", problem)

    def _wrong_image(self, image: Path) -> str | None:
        """Why an image's map is not what its layers give, None if it is."""
        try:
            chain = [SnapshotId(int(number)) for number in (image / "chain").read_text().split(",")]
            with workspace(self.scratch) as work, ExitStack() as stack:
                self._write_merged(chain, work, work / "merged", _ANY_UUID)
                # Written anew, since it may have grown out of others: equal trees give equal maps.
                shown = self._read_again(image, work, stack)
                _write_map(merge([shown.tree]), shown.spool, work / "shown", _ANY_UUID)
                same = _file_digest(work / "merged") == _file_digest(work / "shown")
        except (HpmapperError, OSError, ValueError) as error:
            return f"cannot be compared with its layers: {error}"
        return None if same else "is not what its layers' maps give"

    def check_object(self, digest: ObjectDigest, size: int) -> str | None:
        found = self._objects.size(digest)
        if found is None:
            return "is missing"
        if found != size:
            return f"has {found} bytes instead of {size}"
        return None if self._objects.verify(digest) else "has other data than its name says"

    # For the cache (`hpmapper.cache.places`).

    def object_file(self, digest: ObjectDigest) -> str:
        """Where an object's data is."""
        return self._objects.path(digest)

    def map_files(self, chain: Chain) -> list[Path]:
        """The maps of a chain: the image's first, then its layers', as far as they are there."""
        return [path / "map" for path in self._map_places(chain) if (path / "map").exists()]

    def map_mounts(self, chain: Chain) -> list[Path]:
        """Where these maps are mounted, as far as they are."""
        return [path / "m" for path in self._map_places(chain) if mount.is_mountpoint(path / "m")]

    def _map_places(self, chain: Chain) -> list[Path]:
        maps = self._split(chain)[1]
        return list(dict.fromkeys([self._image(maps), *map(self._layer, maps)])) if maps else []

    def layer_files(self, layer: SnapshotId) -> Path | None:
        """A sealed layer's directory; any other's files are objects."""
        sealed = self._sealed(layer)
        return sealed if sealed.is_dir() and not self._layer(layer).exists() else None

    def _image(self, chain: Chain) -> Path:
        """Where the map of a whole chain is."""
        return Path(self._image_name(chain))

    def _image_name(self, chain: Chain) -> str:
        """The same as a string: every start asks three times, and a path takes ten times as long to make."""
        if len(chain) == 1:
            return f"{self.home}/l/{chain[0]}"
        return f"{self.home}/i/{blake3(_chain_text(chain).encode('ascii')).hexdigest(length=16)}"

    def _images_with(self, layer: SnapshotId) -> list[Path]:
        paths = [Path(entry.path) for entry in os.scandir(self.home / "i")]
        return [path for path in paths if _names(path / "chain", layer)]

    def _stack(self, chain: Chain) -> Stack:
        try:
            if chain:
                return Stack([self._mounted(self._image_name(chain))], self._data())
        except FileNotFoundError:
            pass  # not merged, or with sealed layers
        sealed, maps = self._split(chain)
        lowers = [str(self._sealed(layer)) for layer in sealed]
        if not maps:
            return Stack(lowers)
        try:
            return Stack([*lowers, self._mounted(self._image_name(maps))], self._data())
        except FileNotFoundError:
            stacked = [self._mounted(str(self._layer(layer))) for layer in maps]
            return Stack([*lowers, *stacked], self._data(), portable=False)

    def _split(self, chain: Chain) -> tuple[Chain, Chain]:
        """A chain's sealed layers, and those below them, which have maps."""
        sealed = 0
        while sealed < len(chain) and not os.path.exists(f"{self.home}/l/{chain[sealed]}"):
            sealed += 1
        return chain[:sealed], chain[sealed:]

    def _mounted(self, path: str) -> str:
        """Where the map in the directory `path` is mounted; mounts it if it is not."""
        target = f"{path}/m"
        if not self._is_mounted(path):
            with lock.exclusive(path):
                if not self._is_mounted(path):
                    mount.erofs(f"{path}/map", target, form=self._map_form)
        return target

    def _mount(self, top: str, below: Stack, read_only: bool, layer: Callable[[str], str | int]) -> None:
        super()._mount(top, below, read_only, layer)
        self.names_ahead.begin(below.lowers)  # not before: the mount would wait behind it

    def _data(self) -> str:
        return str(self._objects.directory)

    @contextmanager
    def _below(self, chain: ChainBelow) -> Iterator[Below]:
        with ExitStack() as stack:
            yield Later(lambda: Merged(self._views(chain(), stack)))

    def _views(self, chain: Chain, stack: ExitStack) -> list[LayerView]:
        sealed, maps = self._split(chain)
        views: list[LayerView] = [DirectoryView(os.fsencode(self._sealed(layer))) for layer in sealed]
        return views + [_LazyMap(path, self._objects, stack) for path in self._maps(maps)]

    def _maps(self, chain: Chain) -> list[Path]:
        """The maps that tell what a chain shows: the image's, if it is there, or the layers'."""
        image = self._image(chain) / "map" if chain else None
        return [image] if image and image.exists() else [self._layer(layer) / "map" for layer in chain]


def _names(chain: Path, layer: SnapshotId) -> bool:
    """Whether an image's chain names the layer. Of one that somebody damaged nobody can say no."""
    try:
        return str(layer) in chain.read_text().split(",")
    except FileNotFoundError:
        return True


def _number_in(path: Path) -> int:
    """What a file says; nothing if it is not there.

    Raises:
        Corrupt: it says something else.
    """
    try:
        return int(path.read_text())
    except FileNotFoundError:
        return 0
    except ValueError:
        raise Corrupt(f"{path} holds no number") from None


def _chain_text(chain: Chain) -> str:
    return ",".join(map(str, chain))


def _write_map(root: Inode, spool: BinaryIO, path: Path, uuid: str) -> tuple[bytes, int]:
    """Write a map; returns its digest and its size in bytes."""
    with path.open("w+b") as out:
        spool.flush()
        size = write_map(root, spool, out, uuid=bytes.fromhex(uuid))
    return _file_digest(path), size


def _file_digest(path: Path) -> bytes:
    hasher = blake3()
    hasher.update_mmap(path)
    return hasher.digest()


class _LazyMap:
    """A layer's map as a `merged.LayerView`, opened when first asked: most layers never ask below."""

    def __init__(self, path: Path, objects: ObjectStore, stack: ExitStack) -> None:
        self._path = path
        self._objects = objects
        self._stack = stack
        self._opened: Map | None = None

    def _map(self) -> Map:
        if self._opened is None:
            self._opened = self._stack.enter_context(Map.open(self._path))
        return self._opened

    def lookup(self, path: bytes) -> Inode | None:
        return self._map().lookup(path)

    def names(self, path: bytes) -> list[bytes]:
        directory = self._map().lookup(path)
        return self._map().names(directory) if directory is not None else []

    def open(self, path: bytes) -> BinaryIO:
        inode = self._map().lookup(path)
        if inode is None:
            raise FileNotFoundError(path)
        if isinstance(inode.content, bytes):
            return self._objects.open(inode.content)
        return io.BytesIO(self._map().read(inode))
