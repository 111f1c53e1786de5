"""Where images come from: the contract between the sources and whoever ingests.

A *source* is opened with `with` and lists *images*; an image has *documents* (manifest, config) and *layers*,
lowest first. A layer's bytes are handed out as they lie in the source, still compressed and unverified: digests and
decompression belong to the one pass that reads them anyway. Documents are verified here.

The way through, for every kind of source:

    with open_source("docker://debian:12", options) as source:
        for image in source.images():
            unpacked = [ingest(layer) for layer in image.layers]    # -> Unpacked(diff_id, size)
            image = image.finish(unpacked)                          # now all documents exist and agree
            store(image.names, image.config_bytes, image.manifest_bytes)

`finish` exists because not every source knows everything at the start: a root file system has no DiffID until its
tar was read, and `docker save` archives have no manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from types import TracebackType
from typing import BinaryIO, NamedTuple, Protocol, Self

from hpmapper.errors import Corrupt
from hpmapper.image import documents, oci


@dataclass(frozen=True, slots=True)
class LayerBlob:
    """One layer as it lies in its source.

    Attributes:
        diff_id: digest of the uncompressed tar as the config claims it; None when nobody has computed it yet.
        digest: digest of the bytes that `open` gives, as the manifest claims it; None when nobody does.
        media_type: tells the compression (`oci.LAYER_COMPRESSION`), as claimed.
        size: bytes that `open` gives; None when unknown beforehand.
        open: returns a new stream each time; only while the source is open. Its reads may raise Corrupt.
    """

    diff_id: str | None
    digest: str | None
    media_type: str
    size: int | None
    open: Callable[[], BinaryIO]


class Unpacked(NamedTuple):
    """What reading a layer to its end has shown: DiffID and size of the uncompressed tar."""

    diff_id: str
    size: int


@dataclass(frozen=True, slots=True)
class SourceImage:
    """An image on offer.

    Attributes:
        names: full, tagged references that the source suggests; may be empty.
        layers: lowest first, as many as the config has DiffIDs.
        config_bytes, config: the document whose digest is the image's id, and a view of it.
        manifest_bytes: as in the source, b"" when it has none.
        start_profile: the blob of that name, unread by anybody; b"" when it has none.
        make_config: set while the config is provisional, as it is for a root file system: makes it from DiffIDs.
    """

    names: tuple[str, ...]
    layers: tuple[LayerBlob, ...]
    config_bytes: bytes
    config: oci.ImageConfig
    manifest_bytes: bytes = b""
    start_profile: bytes = b""
    make_config: Callable[[Sequence[str]], bytes] | None = None

    @property
    def image_id(self) -> str:
        return oci.sha256(self.config_bytes)

    def finish(self, unpacked: Sequence[Unpacked]) -> SourceImage:
        """Return the image with its final documents, `unpacked` being what reading its layers has shown.

        Raises:
            Corrupt: a layer is not the one that the config names.
        """
        diff_ids = [layer.diff_id for layer in unpacked]
        image = self._with_config(diff_ids) if self.make_config else self
        if image.config.diff_ids != diff_ids:
            raise Corrupt("the layers' contents are not those that the image's config names by DiffID")
        manifest = image.manifest_bytes or documents.manifest_of(image.config_bytes, unpacked)
        return replace(image, manifest_bytes=manifest)

    def _with_config(self, diff_ids: Sequence[str]) -> SourceImage:
        assert self.make_config is not None
        data = self.make_config(diff_ids)
        config = oci.decode_config(data, "the new image's config", len(diff_ids))
        return replace(self, config_bytes=data, config=config, make_config=None)


class Form(StrEnum):
    """What a tar holds, in the words that name it on the command line."""

    DOCKER = "docker-archive"
    OCI = "oci-archive"
    ROOTFS = "tar"


class ImageSource(Protocol):
    """Something that images can be read from."""

    def __enter__(self) -> Self:
        """Acquire what reading needs: open files, a temporary copy, a download."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release it; temporary files are gone afterwards."""
        ...

    def images(self) -> list[SourceImage]:
        """Return the images for the wanted platform, at least one, each only once.

        Raises:
            NotFound: none suits the platform or the reference; what there is stands in the hint.
            Corrupt: a document is malformed, missing, or not what its digest says.
        """
        ...
