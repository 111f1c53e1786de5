"""Images in tar archives: what `docker save` writes, OCI layouts in a tar, and plain root file systems.

An archive is read in place. A compressed one, or one on standard input, is first copied to an unnamed temporary
file, because its members are needed out of order; a root file system is not, because it is read once, forward.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self, cast

import msgspec

from hpmapper.errors import Corrupt, InvalidArgument, NotFound
from hpmapper.image import codec, oci, reference
from hpmapper.image.documents import ImportOptions
from hpmapper.image.files import File, Files, TarFiles, member_path, open_range, read_all, read_document, tar_members
from hpmapper.image.layout import MARKER, LayoutReader, stem_of
from hpmapper.image.platforms import Platform
from hpmapper.image.rootfs import rootfs_image
from hpmapper.image.source import Form, LayerBlob, SourceImage

DOCKER_MANIFEST = "manifest.json"

_DIGEST_NAME = re.compile(r"(?:.*/)?([0-9a-f]{64})(?:\.json)?")
_BLOB = re.compile(r"blobs/sha256/([0-9a-f]{64})")

# Directories that a root file system has and an image archive has not: at the first one the search can stop.
_ROOT_NAMES = frozenset(("bin", "boot", "dev", "etc", "home", "lib", "proc", "root", "sbin", "sys", "usr", "var"))

_MEDIA_TYPES = {
    "none": oci.OCI_LAYER,
    "gzip": f"{oci.OCI_LAYER}+gzip",
    "zstd": f"{oci.OCI_LAYER}+zstd",
}


class TarSource:
    """A tar of any of the three forms as an image source."""

    def __init__(
        self,
        path: Path | None,
        *,
        spool: Path,
        stdin: BinaryIO | None = None,
        form: Form | None = None,
        ref: str | None = None,
        platform: Platform | None = None,
        options: ImportOptions | None = None,
    ) -> None:
        """Read `path`, or `stdin` when that is None; without a `form` it is found out by looking."""
        self._path = path
        self._stdin = stdin
        self._spool = spool
        self._form = form
        self._ref = ref
        self._platform = platform
        self._options = options or ImportOptions(platform=platform)
        self._name = str(path) if path else "standard input"
        self._stack = ExitStack()
        self._images: Callable[[], list[SourceImage]] = list

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            raw = stack.enter_context(self._open())
            compression = sniffed(raw, self._name)
            form = self._form or recognise(raw, compression, self._name)
            if form is Form.ROOTFS:
                self._images = self._rootfs(raw, compression)
            else:
                archive = stack.enter_context(self._seekable(raw, compression))
                self._images = self._reader(form, TarFiles(archive, self._name))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def images(self) -> list[SourceImage]:
        return self._images()

    def _open(self) -> BinaryIO:
        if self._path is None:
            if self._stdin is None:
                raise InvalidArgument("there is no standard input to read an image from")
            return codec.spool(self._stdin, self._spool, self._name)
        try:
            raw = cast(BinaryIO, self._path.open("rb", buffering=0))
        except FileNotFoundError as error:
            raise NotFound(f"there is no file {self._path}") from error
        except OSError as error:
            raise InvalidArgument(f"{self._path} cannot be read: {error.strerror}") from error
        if raw.seekable():
            return raw
        with raw:  # a pipe, as the shell's <(…) gives
            return codec.spool(raw, self._spool, self._name)

    def _seekable(self, raw: BinaryIO, compression: str) -> BinaryIO:
        if compression == "none":
            return raw
        raw.seek(0)
        with codec.decompressed(raw, compression) as stream:
            return codec.spool(stream, self._spool, self._name)

    def _rootfs(self, raw: BinaryIO, compression: str) -> Callable[[], list[SourceImage]]:
        size = raw.seek(0, 2)
        blob = File(size, lambda: open_range(raw.fileno(), 0, size, self._name))
        return lambda: [rootfs_image(blob.open, _MEDIA_TYPES[compression], size, self._options)]

    def _reader(self, form: Form, files: TarFiles) -> Callable[[], list[SourceImage]]:
        if form is Form.OCI:
            stem = stem_of(self._path) if self._path else "stdin"
            return LayoutReader(files, self._ref, self._platform, stem).images
        return lambda: docker_images(files, self._ref)


def sniffed(raw: BinaryIO, name: str) -> str:
    """Return the compression of `raw`, which is back at its start afterwards."""
    raw.seek(0)
    head = raw.read(codec.HEAD)
    raw.seek(0)
    return codec.sniff(head, name)


def recognise(raw: BinaryIO, compression: str, name: str) -> Form:
    """Return what the tar in `raw` holds, by the names of its members.

    An archive that is both (`docker save` since 25.0) is read as OCI, where every blob has a digest to verify.
    """
    raw.seek(0)
    docker = False
    with codec.damage(name):
        for path in _paths(codec.decompressed(raw, compression), name):
            if path == MARKER:
                return Form.OCI
            if path.partition("/")[0] in _ROOT_NAMES:
                return Form.ROOTFS
            docker = docker or path == DOCKER_MANIFEST
    return Form.DOCKER if docker else Form.ROOTFS


def _paths(stream: BinaryIO, name: str) -> Iterator[str]:
    for member in tar_members(stream, name):
        yield member_path(member.name) or ""


class _Entry(msgspec.Struct, rename="pascal"):
    """One image of manifest.json. `repositories`, its forerunner, says nothing that is not here, so it is not read."""

    config: str
    layers: list[str] | None
    repo_tags: list[str] | None = None


def docker_images(files: Files, ref: str | None = None) -> list[SourceImage]:
    """Return the images of a `docker save` archive, all or those called `ref`."""
    data = read_all(files, DOCKER_MANIFEST)
    if data is None:
        raise Corrupt(
            f"{files.name} has no {DOCKER_MANIFEST}",
            hint="archives of Docker before 1.10 (2016) must be loaded and saved again with a later one",
        )
    entries = oci.decode(data, list[_Entry], f"{DOCKER_MANIFEST} in {files.name}")
    wanted = reference.normalised(ref) if ref else None
    images = [_docker_image(files, entry) for entry in entries if wanted is None or wanted in _names(entry)]
    if not images:
        known = sorted(tag for entry in entries for tag in entry.repo_tags or ())
        raise NotFound(
            f"{files.name} has no image {ref or ''}".rstrip(), hint=f"it has {', '.join(known)[:500] or 'none'}"
        )
    return images


def _names(entry: _Entry) -> list[str]:
    """Return an entry's tags in full; what is not a reference is passed over."""
    names = set()
    for tag in entry.repo_tags or ():
        try:
            names.add(reference.normalised(tag))
        except InvalidArgument:
            continue
    return sorted(names)


def _docker_image(files: Files, entry: _Entry) -> SourceImage:
    where, file = _found(files, entry.config)
    config_bytes = read_document(file, f"config {where}")
    named = _DIGEST_NAME.fullmatch(where)
    if named and oci.sha256(config_bytes) != f"sha256:{named[1]}":
        raise Corrupt(f"config {where} in {files.name} does not have the digest that it is named by")
    paths = entry.layers or []
    config = oci.decode_config(config_bytes, f"config {where} in {files.name}", len(paths))
    pairs = zip(paths, config.diff_ids, strict=True)
    layers = tuple(_docker_layer(files, path, diff_id) for path, diff_id in pairs)
    return SourceImage(tuple(_names(entry)), layers, config_bytes, config)


def _docker_layer(files: Files, path: str, diff_id: str) -> LayerBlob:
    """A layer may be compressed whatever it is called: kaniko's and crane's are."""
    where, file = _found(files, path)
    with file.open() as stream:
        compression = codec.sniff(stream.read(codec.HEAD), where)
    blob = _BLOB.fullmatch(where)
    digest = f"sha256:{blob[1]}" if blob else None
    return LayerBlob(diff_id, digest, _MEDIA_TYPES[compression], file.size, file.open)


def _found(files: Files, name: str) -> tuple[str, File]:
    path = member_path(name)
    if path is None:
        raise Corrupt(f"{DOCKER_MANIFEST} in {files.name} names {name[:100]!r}, which lies outside")
    file = files.find(path)
    if file is None:
        raise Corrupt(f"{DOCKER_MANIFEST} in {files.name} names {name[:100]!r}, which is not there")
    return path, file
