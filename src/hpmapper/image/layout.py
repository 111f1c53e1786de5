"""OCI image layouts, in a directory or inside an archive (OCI image spec, image-layout.md).

index.json lists images; an entry may be an index again, of one image's platforms. Which of several entries to take
is decided at two places: by name at the top, by platform below it and among entries of one name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path, PurePath
from types import TracebackType
from typing import Self

import msgspec

from hpmapper.errors import Corrupt, InvalidArgument, NotFound, Unsupported
from hpmapper.image import oci, platforms, reference
from hpmapper.image.files import DirectoryFiles, File, Files, read_all, read_document
from hpmapper.image.platforms import Platform
from hpmapper.image.source import LayerBlob, SourceImage

MARKER = "oci-layout"
_MAX_DEPTH = 4  # buildx nests once; the spec sets no limit


class _Marker(msgspec.Struct, rename="camel"):
    image_layout_version: str


class Blobs:
    """The blobs of a layout by digest."""

    def __init__(self, files: Files, directory: str = "blobs/sha256/") -> None:
        self._files = files
        self._directory = directory
        self.name = files.name

    def document(self, descriptor: oci.Descriptor, what: str) -> bytes:
        """Return a JSON blob, verified."""
        data = read_document(self.file(descriptor, what), f"{what} {descriptor.digest}")
        if oci.sha256(data) != descriptor.digest:
            raise Corrupt(f"{what} {descriptor.digest} in {self.name} does not have that digest")
        return data

    def file(self, descriptor: oci.Descriptor, what: str) -> File:
        """Return a blob of the size that its descriptor says; the contents are not read."""
        file = self._files.find(self._path(descriptor))
        if file is None:
            hint = "a nondistributable layer, kept out of the image on purpose" if descriptor.urls else ""
            raise Corrupt(f"{what} {descriptor.digest} is not in {self.name}", hint=hint)
        if file.size != descriptor.size:
            raise Corrupt(f"{what} {descriptor.digest} in {self.name} has {file.size} bytes, not {descriptor.size}")
        return file

    def _path(self, descriptor: oci.Descriptor) -> str:
        return self._directory + descriptor.digest.removeprefix("sha256:")


def read_image(blobs: Blobs, data: bytes, names: Iterable[str], what: str) -> SourceImage:
    """Return the image whose manifest is `data`."""
    manifest = oci.decode_manifest(data, what)
    if isinstance(manifest, oci.Index):
        raise Corrupt(f"{what} is an index where a manifest was promised")
    if manifest.config.media_type not in oci.CONFIG_TYPES:
        raise Unsupported(f"{what} is not a container image: its config is a {manifest.config.media_type[:100]!r}")
    config_bytes = blobs.document(manifest.config, "config")
    config = oci.decode_config(config_bytes, f"config {manifest.config.digest}", len(manifest.layers))
    pairs = zip(manifest.layers, config.diff_ids, strict=True)
    layers = tuple(_layer(blobs, layer, diff_id, what) for layer, diff_id in pairs)
    return SourceImage(tuple(names), layers, config_bytes, config, data)


def _layer(blobs: Blobs, descriptor: oci.Descriptor, diff_id: str, what: str) -> LayerBlob:
    oci.layer_compression(descriptor.media_type, what)
    file = blobs.file(descriptor, "layer")
    return LayerBlob(diff_id, descriptor.digest, descriptor.media_type, descriptor.size, file.open)


class LayoutReader:
    """Finds the wanted images in a layout."""

    def __init__(self, files: Files, ref: str | None, platform: Platform | None, stem: str) -> None:
        """`ref` selects by name; `stem` stands in for the repository where a name is a tag only."""
        self._files = files
        self._blobs = Blobs(files)
        self._ref = ref
        self._platform = platform or platforms.this_machine()
        self._stem = stem
        self._seen: list[str] = []  # platforms and kinds passed over, for the error message

    def images(self) -> list[SourceImage]:
        entries = self._selected(self._top())
        found: dict[str, tuple[oci.Descriptor, set[str]]] = {}
        for group in _grouped(entries):
            manifest = self._resolve(group, 0)
            if manifest is not None:
                names = found.setdefault(manifest.digest, (manifest, set()))[1]
                names.update(name for entry in group for name in self._names(entry))
        if not found:
            raise self._nothing()
        return [self._read(manifest, sorted(names)) for manifest, names in found.values()]

    def _top(self) -> list[oci.Descriptor]:
        marker = read_all(self._files, MARKER)
        if marker is None:
            raise InvalidArgument(f"{self._files.name} is not an OCI layout: it has no file {MARKER}")
        version = oci.decode(marker, _Marker, MARKER).image_layout_version
        if version.partition(".")[0] != "1":
            raise Unsupported(f"{self._files.name} has layout version {version[:40]!r}", hint="1.x can be read")
        data = read_all(self._files, "index.json")
        if data is None:
            raise Corrupt(f"{self._files.name} has no index.json")
        return self._index(data, f"index.json in {self._files.name}")

    def _index(self, data: bytes, what: str) -> list[oci.Descriptor]:
        index = oci.decode_manifest(data, what)
        if isinstance(index, oci.Manifest):
            raise Corrupt(f"{what} is a manifest where an index was promised")
        return index.manifests

    def _selected(self, entries: list[oci.Descriptor]) -> list[oci.Descriptor]:
        if self._ref is None:
            return entries
        chosen = [entry for entry in entries if self._is_called(entry, self._ref)]
        if not chosen:
            known = sorted({label for entry in entries for label in _labels(entry)})
            raise NotFound(f"{self._files.name} has no image {self._ref!r}", hint=f"it has {', '.join(known)[:500]}")
        return chosen

    def _is_called(self, entry: oci.Descriptor, ref: str) -> bool:
        if ref in (entry.digest, *_labels(entry)):
            return True
        try:
            return reference.normalised(ref) in self._names(entry)
        except InvalidArgument:
            return False

    def _names(self, entry: oci.Descriptor) -> Iterator[str]:
        """Yield the references that an entry's annotations amount to; what is not one is passed over."""
        annotations = entry.annotations or {}
        full = annotations.get(oci.CONTAINERD_NAME)
        label = annotations.get(oci.REF_NAME)
        if full is None and label is not None:
            # A tag alone names no repository. podman's localhost/ keeps a directory's name from posing as Docker Hub's.
            full = label if ":" in label or "/" in label else f"localhost/{self._stem}:{label}"
        if full is not None:
            try:
                yield reference.normalised(full)
            except InvalidArgument:
                return

    def _resolve(self, entries: list[oci.Descriptor], depth: int) -> oci.Descriptor | None:
        """Return the manifest among `entries`, or below them, that suits the platform best."""
        if depth > _MAX_DEPTH:
            raise Corrupt(f"{self._files.name} nests indexes more than {_MAX_DEPTH} deep")
        offers: list[tuple[Platform, oci.Descriptor]] = []
        for entry in filter(self._is_image, entries):
            platform = self._platform_of(entry)
            offers.append((platform, entry))
            self._seen.append(str(platform))
        best = platforms.choose(self._platform, offers)
        if best is None or best.media_type in oci.MANIFEST_TYPES:
            return best
        data = self._blobs.document(best, "index")
        return self._resolve(self._index(data, f"index {best.digest}"), depth + 1)

    def _is_image(self, entry: oci.Descriptor) -> bool:
        known = entry.media_type in oci.MANIFEST_TYPES or entry.media_type in oci.INDEX_TYPES
        if not known or entry.artifact_type:
            self._seen.append(entry.artifact_type or entry.media_type)
            return False
        return True

    def _platform_of(self, entry: oci.Descriptor) -> Platform:
        """An entry without a platform claims to suit every one."""
        given = entry.platform
        if given is None or not given.architecture:
            return self._platform
        return platforms.normalise(given.os or "linux", given.architecture, given.variant)

    def _read(self, descriptor: oci.Descriptor, names: list[str]) -> SourceImage:
        data = self._blobs.document(descriptor, "manifest")
        image = read_image(self._blobs, data, names, f"manifest {descriptor.digest}")
        return replace(image, start_profile=self._profile(descriptor))

    def _profile(self, manifest: oci.Descriptor) -> bytes:
        text = (manifest.annotations or {}).get(oci.START_PROFILE)
        if text is None:
            return b""
        descriptor = oci.decode(text.encode(errors="replace"), oci.Descriptor, f"annotation {oci.START_PROFILE}")
        return self._blobs.document(descriptor, "start profile")

    def _nothing(self) -> NotFound:
        seen = ", ".join(sorted(set(self._seen))) or "nothing"
        return NotFound(f"{self._files.name} has no image for {self._platform}", hint=f"it has {seen[:500]}")


def _labels(entry: oci.Descriptor) -> list[str]:
    annotations = entry.annotations or {}
    return [annotations[key] for key in (oci.CONTAINERD_NAME, oci.REF_NAME) if key in annotations]


def _grouped(entries: Iterable[oci.Descriptor]) -> list[list[oci.Descriptor]]:
    """Return the entries by name, in order. One name with several platforms is one image; no platform, one each."""
    groups: dict[object, list[oci.Descriptor]] = {}
    for number, entry in enumerate(entries):
        key: object = tuple(_labels(entry)) if entry.platform else number
        groups.setdefault(key, []).append(entry)
    return list(groups.values())


class LayoutSource:
    """An OCI layout directory as an image source."""

    def __init__(self, directory: Path, ref: str | None = None, platform: Platform | None = None) -> None:
        self._directory = directory
        self._reader = LayoutReader(DirectoryFiles(directory), ref, platform, stem_of(directory))

    def __enter__(self) -> Self:
        if not self._directory.is_dir():
            raise NotFound(f"there is no directory {self._directory}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass  # every file is opened when it is read

    def images(self) -> list[SourceImage]:
        return self._reader.images()


def stem_of(path: PurePath) -> str:
    """Return a file's name without its endings, in lower case, as a repository's name might be."""
    name = path.name.lower()
    for ending in (".gz", ".tgz", ".zst", ".zstd", ".tar", ".oci"):
        name = name.removesuffix(ending)
    return name
