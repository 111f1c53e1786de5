"""Images: what a user pulls, lists, saves and removes, made of the engine's layers."""

from __future__ import annotations

import dataclasses
import io
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from hpmapper import faults
from hpmapper.cache.profile import decode
from hpmapper.cache.start import ImageFiles, keep
from hpmapper.engine import Blob, Engine, Taken
from hpmapper.errors import Corrupt, InvalidArgument, NotFound, Unsupported
from hpmapper.image import oci, reference
from hpmapper.image.opening import SourceOptions, open_source
from hpmapper.image.save import SavedImage, SavedLayer
from hpmapper.image.source import LayerBlob, SourceImage, Unpacked
from hpmapper.layer.diff import write_tar
from hpmapper.layer.scan import scan
from hpmapper.layer.stream import Expected
from hpmapper.meta import images as meta
from hpmapper.meta import profiles, snapshots
from hpmapper.meta.images import ImageRow
from hpmapper.meta.snapshots import Snapshot

log = logging.getLogger(__name__)

_ID = re.compile(r"(?:sha256:)?([0-9a-f]{4,64})")


class Watcher(Protocol):
    """Told how bringing in an image goes; the command line draws it."""

    def layer(self, number: int, count: int, size: int | None) -> Callable[[int], None]:
        """Layer `number` of `count` begins; returns what is told of compressed bytes read."""

    def layer_done(self, number: int, taken: Taken) -> None:
        """It is there."""


@dataclass(frozen=True, slots=True)
class Brought:
    """An image that came, with what each of its layers cost, lowest first.

    Attributes:
        not_read: bytes, as the source has them, of layers that were there (0 where it does not say).
        not_unpacked: bytes of the tars in them.
    """

    image: ImageRow
    layers: tuple[Taken, ...]
    not_read: int = 0
    not_unpacked: int = 0

    @property
    def not_written(self) -> int:
        """Bytes of files in new layers that were objects already."""
        return sum(taken.ingested.deduplicated for taken in self.layers if taken.ingested)


class Images:
    """The images of one root."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._db = engine.db

    def bring(self, source: str, options: SourceOptions, names: Sequence[str], watcher: Watcher) -> list[Brought]:
        """Bring in all images of a source (see `hpmapper.image.opening`), named as it suggests or as `names` says.

        Raises:
            InvalidArgument: several images came for one name.
            And what the source and the engine raise; then no image is recorded, and nothing stays but whole layers.
        """
        wanted = [reference.normalised(name) for name in names]
        options = dataclasses.replace(options, tar_directory=_tar_directory)
        with open_source(source, options) as opened, self._engine.lease() as lease:
            found = opened.images()
            if wanted and len(found) > 1:
                raise InvalidArgument(f"{source} holds {len(found)} images, which cannot share a name")
            return [self._bring_one(image, wanted or image.names, lease, watcher) for image in found]

    def _bring_one(self, image: SourceImage, names: Sequence[str], lease: str, watcher: Watcher) -> Brought:
        blobs = [
            Blob(_expected(blob), blob.open, watcher.layer(number, len(image.layers), blob.size))
            for number, blob in enumerate(image.layers)
        ]
        layers = self._engine.take_layers(blobs, lease)
        for number, taken in enumerate(layers):
            watcher.layer_done(number, taken)
        parent = layers[-1].snapshot if layers else None
        unpacked = [self._unpacked(taken.snapshot) for taken in layers]
        final = image.finish(unpacked)
        row = self.record(final.config_bytes, parent, sum(layer.size for layer in unpacked), names)
        if image.start_profile:
            self.keep_profile(row, image.start_profile)
        known = [number for number, taken in enumerate(layers) if taken.ingested is None]
        not_read = sum(image.layers[number].size or 0 for number in known)
        return Brought(row, tuple(layers), not_read, sum(unpacked[number].size for number in known))

    def keep_profile(self, row: ImageRow, data: bytes) -> None:
        """Keep a profile that came with an image, unless it already has one of this machine."""
        named = profiles.chain_of(self._db, row.top)
        if named is None or profiles.find(self._db, named[0]) is not None:
            return
        try:
            files = ImageFiles(self._db, self._engine.driver, row.top)
            keep(self._db, files, decode(data, f"start profile of {row.id}"))
        except Unsupported:
            pass  # another driver
        except Corrupt as error:
            log.warning("%s; the image is kept without it", error)

    def _unpacked(self, snapshot: Snapshot) -> Unpacked:
        assert snapshot.layer is not None
        layer = snapshots.layer(self._db, snapshot.layer)
        return Unpacked(layer.diff_id, layer.tar_size)

    def record(self, config: bytes, top: Snapshot | None, size: int, names: Sequence[str]) -> ImageRow:
        """Make an image exist."""
        image_id = oci.sha256(config)
        with self._db.transaction() as transaction:
            meta.add_image(transaction, image_id, config, top.id if top else None, size)
            for name in names:
                meta.tag(transaction, name, image_id)
        faults.point("image.recorded")
        return meta.image(self._db, image_id)

    def all(self) -> list[ImageRow]:
        """Every image, oldest first."""
        return meta.images(self._db)

    def find(self, name: str) -> ImageRow:
        """The image of a name, an id, or the beginning of an id.

        Raises:
            NotFound: there is none. InvalidArgument: several ids begin so, or it is neither.
        """
        by_id = _ID.fullmatch(name)
        if by_id:
            found = meta.images_by_prefix(self._db, by_id[1])
            if len(found) > 1:
                raise InvalidArgument(
                    f"{len(found)} images have ids that begin with {by_id[1]}", hint="give more of it"
                )
            if found:
                return found[0]
        row = meta.image_by_name(self._db, reference.normalised(name))
        if row is None:
            raise NotFound(f"image {name!r} does not exist", hint="hpmapper image ls shows those that do")
        return row

    def tag(self, name: str, new: str) -> None:
        """Give an image one more name."""
        row = self.find(name)
        with self._db.transaction() as transaction:
            meta.tag(transaction, reference.normalised(new), row.id)

    def remove(self, name: str) -> bool:
        """Remove a name, and the image with its last one; by its id, the image with all its names.

        Returns whether the image is gone. Its layers stay until the engine collects.

        Raises:
            NotFound: there is no such image. FailedPrecondition: a container has it.
        """
        row = self.find(name)
        full = None if _ID.fullmatch(name) and row.id[7:].startswith(name.removeprefix("sha256:")) else name
        with self._db.transaction() as transaction:
            if full is not None and len(row.names) > 1:
                meta.untag(transaction, reference.normalised(full))
                return False
            meta.forget_image(transaction, row.id)
        faults.point("image.forgotten")
        return True

    def layers(self, row: ImageRow) -> list[Snapshot]:
        """The image's committed snapshots, lowest first."""
        chain: list[Snapshot] = []
        at = row.top
        while at is not None:
            chain.append(snapshots.by_id(self._db, at))
            at = chain[-1].parent
        return chain[::-1]

    def top(self, row: ImageRow) -> Snapshot | None:
        """The image's topmost snapshot, None for an image without layers."""
        return snapshots.by_id(self._db, row.top) if row.top is not None else None

    def saved(self, row: ImageRow) -> SavedImage:
        """The image as `hpmapper.image.save` writes it out."""
        layers = []
        for snapshot in self.layers(row):
            unpacked = self._unpacked(snapshot)
            layers.append(SavedLayer(unpacked.diff_id, unpacked.size, self._opener(snapshot)))
        named = profiles.chain_of(self._db, row.top)
        profile = profiles.find(self._db, named[0]) if named else None
        return SavedImage(row.names, row.config, tuple(layers), profile[0] if profile else b"")

    def _opener(self, snapshot: Snapshot) -> Callable[[], BinaryIO]:
        return lambda: io.BufferedReader(_PieceReader(self._engine.read_tar(snapshot)), 1 << 20)


class _PieceReader(io.RawIOBase):
    """Pieces of bytes as a file."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def _expected(blob: LayerBlob) -> Expected:
    return Expected(blob.diff_id, blob.digest, blob.size)


def _tar_directory(directory: Path, out: BinaryIO) -> None:
    """Write a root file system's directory as a layer tar."""
    top = os.fsencode(directory)
    write_tar(scan(top, overlay=False), lambda path: (directory / os.fsdecode(path)).open("rb"), out)
