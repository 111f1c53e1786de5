"""A root file system, in a tar or a directory, as an image of one layer with a made-up config (`docker import`)."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self, cast

from hpmapper.errors import NotFound
from hpmapper.image import codec, oci, reference
from hpmapper.image.documents import ImportOptions, imported_config
from hpmapper.image.source import LayerBlob, SourceImage

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
        return [rootfs_image(lambda: piped(write), oci.OCI_LAYER, None, self._options)]


def piped(write: Callable[[BinaryIO], None]) -> BinaryIO:
    """Return a stream of what `write` writes, in a thread, while it is read."""
    return cast(BinaryIO, io.BufferedReader(_Pipe(write), codec.COPY))


class _Pipe(io.RawIOBase):
    """The reading end. An error of the writer is raised here in place of the end of the file."""

    def __init__(self, write: Callable[[BinaryIO], None]) -> None:
        super().__init__()
        self._error: BaseException | None = None
        self._fd, out = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._run, args=(write, out), name="tar", daemon=True)
        self._thread.start()

    def _run(self, write: Callable[[BinaryIO], None], out: int) -> None:
        try:
            with os.fdopen(out, "wb", codec.COPY) as stream:
                write(stream)
        except BaseException as error:
            self._error = error

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # Buffer is 3.12's
        got = os.readv(self._fd, [buffer])
        if not got:
            self._thread.join()
            if self._error is not None:
                raise self._error
        return got

    def close(self) -> None:
        if not self.closed:
            os.close(self._fd)  # a writer that is not done gets EPIPE and ends
            self._thread.join()
        super().close()
