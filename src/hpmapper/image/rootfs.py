"""A root file system, in a tar or a directory, as an image of one layer with a made-up config (`docker import`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from hpmapper.errors import NotFound
from hpmapper.image import oci, reference
from hpmapper.image.documents import ImportOptions, imported_config
from hpmapper.image.source import LayerBlob, SourceImage
from hpmapper.pipe import stream_of

TarDirectory = Callable[[Path, BinaryIO], None]
"""Writes a directory's contents as a deterministic tar stream."""


def rootfs_image(
    open_stream: Callable[[], BinaryIO], media_type: str, size: int | None, options: ImportOptions
) -> SourceImage:
    """Return the image of a root file system; its config is provisional until `finish`."""
    make = partial(imported_config, options=options)
    provisional = make([])
    return SourceImage(
        names=tuple(reference.normalised(name) for name in options.names),
        layers=(LayerBlob(diff_id=None, digest=None, media_type=media_type, size=size, open=open_stream),),
        config_bytes=provisional,
        config=oci.decode_config(provisional, "the new image's config"),
        make_config=make,
    )


class DirectorySource:
    """A directory that holds a root file system."""

    def __init__(self, directory: Path, tar_directory: TarDirectory, options: ImportOptions | None = None) -> None:
        self._directory = directory
        self._tar_directory = tar_directory
        self._options = options or ImportOptions()

    def __enter__(self) -> Self:
        if not self._directory.is_dir():
            raise NotFound(f"there is no directory {self._directory}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass  # each stream ends its own thread

    def images(self) -> list[SourceImage]:
        write = partial(self._tar_directory, self._directory)
        return [rootfs_image(lambda: stream_of(write), oci.OCI_LAYER, None, self._options)]
