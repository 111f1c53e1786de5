"""Writing images out: as an OCI layout, as one in a tar, or as what `docker load` takes.

All three hold the same blobs; a Docker archive is an OCI archive with a manifest.json that points to them, as Docker's
own since 25.0, which versions from 1.10 on load too. The same images give the same bytes: times and owners are
0, images are ordered by id, blobs by first use. (gzip's bytes may differ between processors, as igzip picks its code
by instruction set; DiffIDs and image ids never do.)
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from errno import EDQUOT, ENOSPC
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol, cast

import msgspec

from hpmapper.errors import AlreadyExists, Corrupt, InvalidArgument, NoSpace, NotFound
from hpmapper.image import codec, documents, oci, reference

_BLOBS = "blobs/sha256"
_LAYOUT_MARKER = b'{"imageLayoutVersion":"1.0.0"}'

Progress = Callable[[int], None]
"""Is told the number of uncompressed bytes that have been read since it was last called."""


class SaveForm(StrEnum):
    """What to write, in the words that name it on the command line."""

    LAYOUT = "oci"
    OCI_ARCHIVE = "oci-archive"
    DOCKER_ARCHIVE = "docker-archive"


class SavedLayer(NamedTuple):
    """A layer to write: its DiffID, the size of its tar, and how to get a new stream of it, uncompressed."""

    diff_id: str
    size: int
    open: Callable[[], BinaryIO]


class SavedImage(NamedTuple):
    """An image to write: its references (with tags, may be none), its config as it is, its layers lowest first.

    And its start profile, b"" if it has none.
    """

    names: tuple[str, ...]
    config_bytes: bytes
    layers: tuple[SavedLayer, ...]
    start_profile: bytes = b""


def save(
    images: Iterable[SavedImage],
    target: Path,
    form: SaveForm,
    *,
    compression: str = "none",
    progress: Progress | None = None,
) -> None:
    """Write `images` to `target`, which appears whole or not at all; a file of that name is replaced.

    Raises:
        AlreadyExists: a layout's directory is there and not empty.
        Corrupt: a layer is not what its DiffID says.
        InvalidArgument: a name, the compression or the target makes no sense.
    """
    wanted = _checked(images, compression)
    if not target.parent.is_dir():
        raise NotFound(f"there is no directory {target.parent}")
    with _no_space(target):
        if form is SaveForm.LAYOUT:
            with _new_directory(target) as directory:
                _Writer(_DirectorySink(directory), compression, target.parent, progress).write(wanted, form)
            return
        with new_file(target) as out:
            _write_tar(out, wanted, form, compression, target.parent, progress)


def save_to_stream(
    images: Iterable[SavedImage],
    out: BinaryIO,
    form: SaveForm,
    *,
    spool: Path,
    compression: str = "none",
    progress: Progress | None = None,
) -> None:
    """Write `images` as a tar to `out`, for example standard output; what has gone out cannot be taken back."""
    if form is SaveForm.LAYOUT:
        raise InvalidArgument("a layout is a directory and cannot be written to a stream", hint="oci-archive can")
    _write_tar(out, _checked(images, compression), form, compression, spool, progress)


def _write_tar(
    out: BinaryIO,
    images: Sequence[SavedImage],
    form: SaveForm,
    compression: str,
    spool: Path,
    progress: Progress | None,
) -> None:
    # In its default pieces of 10 KiB tarfile would copy each chunk a hundred times.
    with tarfile.open(fileobj=out, mode="w|", bufsize=codec.COPY, format=tarfile.PAX_FORMAT) as tar:
        _Writer(_TarSink(tar), compression, spool, progress).write(images, form)


def _checked(images: Iterable[SavedImage], compression: str) -> list[SavedImage]:
    """Return the images in the order of their ids, each once, with full names; wrong ones are refused."""
    if compression not in codec.COMPRESSIONS:
        raise InvalidArgument(f"{compression!r} is not a compression", hint="one of " + ", ".join(codec.COMPRESSIONS))
    by_id: dict[str, SavedImage] = {}
    for image in images:
        image_id = oci.sha256(image.config_bytes)
        config = oci.decode_config(image.config_bytes, f"config {image_id}")
        if config.diff_ids != [layer.diff_id for layer in image.layers]:
            raise InvalidArgument(f"the layers given for image {image_id} are not those of its config")
        seen = by_id.get(image_id, image)
        names = {*map(_tag, (*seen.names, *image.names))}
        by_id[image_id] = image._replace(names=tuple(sorted(names)))
    if not by_id:
        raise InvalidArgument("there is no image to save")
    return [by_id[image_id] for image_id in sorted(by_id)]


def _tag(name: str) -> str:
    parsed = reference.parse(name)
    if parsed.digest:
        raise InvalidArgument(f"an image cannot be saved as {name!r}", hint="give it a tag")
    return str(parsed.tagged())


class _Sink(Protocol):
    """Takes files by path, each once; the directories of `_BLOBS` come first."""

    def put(self, path: str, size: int, data: codec.Readable) -> None: ...


class _DirectorySink:
    def __init__(self, root: Path) -> None:
        self._root = root
        (root / _BLOBS).mkdir(parents=True)

    def put(self, path: str, size: int, data: codec.Readable) -> None:
        with (self._root / path).open("xb") as out:
            out.writelines(codec.chunks(data))
            out.flush()
            os.fsync(out.fileno())


class _TarSink:
    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        for path in ("blobs", _BLOBS):
            entry = tarfile.TarInfo(path)
            entry.type = tarfile.DIRTYPE
            entry.mode = 0o755
            tar.addfile(entry)

    def put(self, path: str, size: int, data: codec.Readable) -> None:
        entry = tarfile.TarInfo(path)
        entry.size = size
        self._tar.addfile(entry, cast(BinaryIO, data))


class _Checked:
    """A layer's stream that must turn out to be what it is called."""

    def __init__(self, layer: SavedLayer, stream: BinaryIO, progress: Progress | None) -> None:
        self._layer = layer
        self._stream = stream
        self._progress = progress
        self._hash = hashlib.sha256()
        self._left = layer.size

    def read(self, size: int, /) -> bytes:
        chunk = self._full(min(size, self._left))
        self._left -= len(chunk)
        self._hash.update(chunk)
        if self._progress:
            self._progress(len(chunk))
        return chunk

    def _full(self, size: int) -> bytes:
        """Return exactly `size` bytes: tarfile takes a short read, as pipes give them, for the end."""
        chunk = self._stream.read(size)
        while len(chunk) < size:
            more = self._stream.read(size - len(chunk))
            if not more:
                raise Corrupt(f"layer {self._layer.diff_id} ends {self._left - len(chunk)} bytes early")
            chunk += more
        return chunk

    def finish(self) -> None:
        """Raise Corrupt unless all was read and was right."""
        if self._left or self._stream.read(1):
            raise Corrupt(f"layer {self._layer.diff_id} does not have the {self._layer.size} bytes it should")
        if f"sha256:{self._hash.hexdigest()}" != self._layer.diff_id:
            raise Corrupt(f"layer {self._layer.diff_id} has other contents than its DiffID says")


class _Digesting:
    """Passes on what is written and digests it."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes, /) -> int:
        self._hash.update(data)
        self.size += len(data)
        return self._out.write(data)

    def flush(self) -> None:
        self._out.flush()

    @property
    def digest(self) -> str:
        return f"sha256:{self._hash.hexdigest()}"


class _Writer:
    """Puts images into a sink, every blob once."""

    def __init__(self, sink: _Sink, compression: str, spool: Path, progress: Progress | None) -> None:
        self._sink = sink
        self._compression = compression
        self._spool = spool
        self._progress = progress
        self._layers: dict[str, oci.Descriptor] = {}
        self._written: set[str] = set()

    def write(self, images: Sequence[SavedImage], form: SaveForm) -> None:
        self._put("oci-layout", _LAYOUT_MARKER)  # first, so that readers know soon what they have
        entries: list[oci.Descriptor] = []
        docker: list[dict[str, object]] = []
        for image in images:
            layers = [self._layer(layer) for layer in image.layers]
            manifest = documents.manifest(image.config_bytes, layers)
            config = self._blob(oci.OCI_CONFIG, image.config_bytes)
            entry = self._blob(oci.OCI_MANIFEST, manifest)
            if image.start_profile:
                entry = _with_profile(entry, self._blob(oci.START_PROFILE_TYPE, image.start_profile))
            entries += _index_entries(entry, image.names)
            docker.append(_docker_entry(image.names, config, layers))
        self._put("index.json", msgspec.json.encode(oci.Index(2, entries, media_type=oci.OCI_INDEX)))
        if form is SaveForm.DOCKER_ARCHIVE:
            self._put("manifest.json", msgspec.json.encode(docker))

    def _put(self, path: str, data: bytes) -> None:
        self._sink.put(path, len(data), BytesIO(data))

    def _blob(self, media_type: str, data: bytes) -> oci.Descriptor:
        descriptor = oci.Descriptor(media_type, oci.sha256(data), len(data))
        self._put_once(descriptor, BytesIO(data))
        return descriptor

    def _put_once(self, descriptor: oci.Descriptor, data: codec.Readable) -> None:
        if descriptor.digest not in self._written:
            self._sink.put(_path(descriptor), descriptor.size, data)
            self._written.add(descriptor.digest)

    def _layer(self, layer: SavedLayer) -> oci.Descriptor:
        if layer.diff_id not in self._layers:
            with layer.open() as stream:
                checked = _Checked(layer, stream, self._progress)
                put = self._plain if self._compression == "none" else self._compressed
                self._layers[layer.diff_id] = put(layer, checked)
        return self._layers[layer.diff_id]

    def _plain(self, layer: SavedLayer, checked: _Checked) -> oci.Descriptor:
        descriptor = oci.Descriptor(oci.OCI_LAYER, layer.diff_id, layer.size)
        self._put_once(descriptor, checked)
        checked.finish()
        return descriptor

    def _compressed(self, layer: SavedLayer, checked: _Checked) -> oci.Descriptor:
        """Compress to the side first: a tar wants the size, and the blob's name the digest, before the bytes."""
        with tempfile.TemporaryFile(dir=self._spool) as aside:
            out = _Digesting(cast(BinaryIO, aside))
            with codec.compressed(cast(BinaryIO, out), self._compression) as packed:
                packed.writelines(codec.chunks(checked))
            checked.finish()
            aside.seek(0)
            descriptor = oci.Descriptor(f"{oci.OCI_LAYER}+{self._compression}", out.digest, out.size)
            self._put_once(descriptor, aside)
        return descriptor


def _path(descriptor: oci.Descriptor) -> str:
    return f"{_BLOBS}/{descriptor.digest.removeprefix('sha256:')}"


def _index_entries(manifest: oci.Descriptor, names: Sequence[str]) -> Iterator[oci.Descriptor]:
    """Yield an entry per name, annotated as Docker and containerd do it, or one without a name."""
    if not names:
        yield manifest
    for name in names:
        annotations = (manifest.annotations or {}) | {
            oci.CONTAINERD_NAME: name,
            oci.REF_NAME: reference.parse(name).tag or "",
        }
        yield msgspec.structs.replace(manifest, annotations=annotations)


def _with_profile(manifest: oci.Descriptor, profile: oci.Descriptor) -> oci.Descriptor:
    annotations = {oci.START_PROFILE: msgspec.json.encode(profile).decode()}
    return msgspec.structs.replace(manifest, annotations=annotations)


def _docker_entry(names: Sequence[str], config: oci.Descriptor, layers: Sequence[oci.Descriptor]) -> dict[str, object]:
    tags = [reference.parse(name).familiar for name in names]
    return {"Config": _path(config), "RepoTags": tags or None, "Layers": [_path(layer) for layer in layers]}


@contextmanager
def _no_space(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (ENOSPC, EDQUOT):
            raise
        raise NoSpace(f"no room to write {target}", hint="free some space, or choose another place") from error


@contextmanager
def new_file(target: Path) -> Iterator[BinaryIO]:
    """Yield a file that takes `target`'s place when all went well. Mode 0600, as Docker's: images hold secrets."""
    if target.exists() and not target.is_file():
        raise InvalidArgument(f"{target} is not a plain file and cannot be replaced by one")
    fd, temporary = tempfile.mkstemp(prefix=".save-", dir=target.parent)
    try:
        with os.fdopen(fd, "wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        Path(temporary).rename(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_directory(target.parent)


@contextmanager
def _new_directory(target: Path) -> Iterator[Path]:
    """Yield a directory that takes `target`'s place when all went well."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise AlreadyExists(f"{target} is there already", hint="give a name that is free, or an empty directory")
    temporary = Path(tempfile.mkdtemp(prefix=".save-", dir=target.parent))
    try:
        yield temporary
        for directory in (temporary / _BLOBS, temporary / "blobs", temporary):
            _sync_directory(directory)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_directory(target.parent)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
