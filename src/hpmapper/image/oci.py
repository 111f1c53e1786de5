"""The JSON documents of OCI and Docker images, as far as this project reads them.

The two dialects differ in media types only, so one set of models serves both. Unknown fields are ignored: the
raw bytes are what is stored and named by digest, a model is merely a view of them. Whatever could reach a path, a
command line or an allocation is checked here, once, with the document and the field in the message.

References: github.com/opencontainers/image-spec (v1.1), Docker image manifest version 2 schema 2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Annotated, TypeVar

import msgspec

from hpmapper.errors import Corrupt, InvalidArgument, Unsupported
from hpmapper.model import oci_digest

MAX_JSON = 8 << 20
"""Bytes of one document. containerd and Docker accept 8 and 4 MiB; more is not an image but an attack."""

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"

INDEX_TYPES = frozenset({OCI_INDEX, DOCKER_INDEX})
MANIFEST_TYPES = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
# The last one is what `docker plugin` images and very old builders wrote for an ordinary config.
CONFIG_TYPES = frozenset({OCI_CONFIG, DOCKER_CONFIG, "application/octet-stream"})

LAYER_COMPRESSION = {
    OCI_LAYER: "none",
    f"{OCI_LAYER}+gzip": "gzip",
    f"{OCI_LAYER}+zstd": "zstd",
    "application/vnd.oci.image.layer.nondistributable.v1.tar": "none",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip": "gzip",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd": "zstd",
    "application/vnd.docker.image.rootfs.diff.tar": "none",
    "application/vnd.docker.image.rootfs.diff.tar.gzip": "gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd": "zstd",
    "application/vnd.docker.image.rootfs.foreign.diff.tar": "none",
    "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip": "gzip",
}
"""What a layer's media type says of its bytes: none, gzip or zstd."""

REF_NAME = "org.opencontainers.image.ref.name"
CONTAINERD_NAME = "io.containerd.image.name"
START_PROFILE = "dev.hpmapper.start-profile"
"""Annotation of an image in a layout's index: the descriptor, as JSON, of the blob that is its start profile.

Not a manifest of its own, as an artifact's would be: tools that take a layout's only image refuse one with two.
"""

START_PROFILE_TYPE = "application/vnd.hpmapper.start-profile.v1+json"

Size = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Json = dict[str, object]
_T = TypeVar("_T")


def _digest(text: str) -> None:
    # msgspec adds the field's path to a ValueError, and to nothing else.
    try:
        oci_digest(text)
    except InvalidArgument as error:
        raise ValueError(error.message) from None


def _no_nul(texts: Iterable[str]) -> None:
    # They become arguments of execve(2), which would silently cut them.
    if any("\0" in text for text in texts):
        raise ValueError("a text contains a NUL character")


class DescriptorPlatform(msgspec.Struct, frozen=True):
    """What an index says an entry runs on."""

    architecture: str = ""
    os: str = ""
    variant: str = ""


class Descriptor(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """A reference to a blob: type, digest and size."""

    media_type: str
    digest: str
    size: Size
    annotations: dict[str, str] | None = None
    platform: DescriptorPlatform | None = None
    urls: list[str] | None = None
    artifact_type: str | None = None

    def __post_init__(self) -> None:
        _digest(self.digest)


class Index(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """Several manifests: of a layout's images, or of one image's platforms."""

    schema_version: int
    manifests: list[Descriptor]
    media_type: str | None = None

    def __post_init__(self) -> None:
        _version(self.schema_version)


class Manifest(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """One image: its config and its layers, lowest first."""

    schema_version: int
    config: Descriptor
    layers: list[Descriptor]
    media_type: str | None = None

    def __post_init__(self) -> None:
        _version(self.schema_version)


def _version(number: int) -> None:
    if number != 2:
        raise ValueError(f"schemaVersion {number} is not 2")


class Settings(msgspec.Struct, frozen=True, rename="pascal"):
    """How a container of the image is to be run. Go writes an empty list or map as null, hence the Nones."""

    user: str = ""
    env: list[str] | None = None
    entrypoint: list[str] | None = None
    cmd: list[str] | None = None
    working_dir: str = ""
    labels: dict[str, str] | None = None
    exposed_ports: dict[str, object] | None = None
    volumes: dict[str, object] | None = None
    stop_signal: str = ""

    def __post_init__(self) -> None:
        _no_nul((self.user, self.working_dir, self.stop_signal))
        for texts in (self.env, self.entrypoint, self.cmd, self.volumes):
            _no_nul(texts or ())


class RootFs(msgspec.Struct, frozen=True):
    """The layers by DiffID, lowest first."""

    diff_ids: list[str] | None
    type: str = "layers"

    def __post_init__(self) -> None:
        if self.type != "layers":
            raise ValueError(f"type {self.type[:40]!r} is not 'layers'")
        for diff_id in self.diff_ids or ():
            _digest(diff_id)


class History(msgspec.Struct, frozen=True, omit_defaults=True):
    """How one layer came to be; for display only, so nothing relies on it."""

    created: str | None = None
    created_by: str | None = None
    author: str | None = None
    comment: str | None = None
    empty_layer: bool = False


class ImageConfig(msgspec.Struct, frozen=True):
    """A view of an image's config document."""

    rootfs: RootFs
    architecture: str = ""
    os: str = ""
    variant: str = ""
    created: str | None = None
    author: str | None = None
    config: Settings | None = None
    history: list[History] | None = None

    @property
    def settings(self) -> Settings:
        return self.config or Settings()

    @property
    def diff_ids(self) -> list[str]:
        return self.rootfs.diff_ids or []


class _Shape(msgspec.Struct, rename="camel"):
    """The fields by which documents are told apart; null is as good as absent."""

    manifests: object = None
    layers: object = None
    config: object = None
    fs_layers: object = None
    media_type: str | None = None


def decode(data: bytes, kind: type[_T], document: str) -> _T:
    """Return `data` as a `kind`.

    Raises:
        Corrupt: it is malformed JSON, too large, or a field is not as it must be; `document` and the field are named.
    """
    if len(data) > MAX_JSON:
        raise Corrupt(f"{document} has {len(data)} bytes, more than the {MAX_JSON} allowed")
    try:
        data.decode()  # else msgspec would find a bad byte in one place and skip it in another
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Corrupt(f"{document} is not valid: {error}") from error
    except RecursionError as error:
        raise Corrupt(f"{document} is not valid: nested too deeply") from error


def decode_manifest(data: bytes, document: str) -> Manifest | Index:
    """Return the manifest or index in `data`, whichever it is."""
    shape = decode(data, _Shape, document)
    if shape.fs_layers is not None:
        raise Unsupported(
            f"{document} is a Docker schema 1 manifest",
            hint="that format was withdrawn in 2020; push the image again with a current tool",
        )
    # One digest must not mean two images, depending on who reads it: CVE-2021-41190.
    if shape.manifests is not None and (shape.layers is not None or shape.config is not None):
        raise Corrupt(f"{document} claims to be both a manifest and an index")
    is_index = shape.manifests is not None
    if shape.media_type in (MANIFEST_TYPES if is_index else INDEX_TYPES):
        raise Corrupt(f"{document} is not the {shape.media_type} that its mediaType says")
    return decode(data, Index, document) if is_index else decode(data, Manifest, document)


def decode_config(data: bytes, document: str, layers: int | None = None) -> ImageConfig:
    """Return the image config in `data`, which must list `layers` DiffIDs when that is given."""
    config = decode(data, ImageConfig, document)
    if layers is not None and len(config.diff_ids) != layers:
        raise Corrupt(f"{document} lists {len(config.diff_ids)} diff_ids for {layers} layers")
    return config


def layer_compression(media_type: str, document: str) -> str:
    """Return none, gzip or zstd; `document` is named when `media_type` is not a layer's."""
    try:
        return LAYER_COMPRESSION[media_type]
    except KeyError:
        raise Unsupported(
            f"{document} has a layer of type {media_type[:100]!r}",
            hint="tar layers, plain or compressed with gzip or zstd, can be read",
        ) from None


def sha256(data: bytes) -> str:
    """Return the OCI digest of `data`."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def chain_id(diff_ids: Sequence[str]) -> str:
    """Return the name of a stack of layers (OCI image spec, config.md, "Layer ChainID")."""
    if not diff_ids:
        raise InvalidArgument("an empty stack of layers has no ChainID")
    chain = oci_digest(diff_ids[0])
    for diff_id in diff_ids[1:]:
        chain = sha256(f"{chain} {oci_digest(diff_id)}".encode())
    return chain
