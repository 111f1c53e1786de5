"""A start profile as an OCI artifact of its own: an archive, or a layout's directory, with one manifest and one blob.

    index.json → manifest: artifactType START_PROFILE_TYPE, an empty config, one layer of that type
                 annotation CHAIN_ID: the chain ID of the layers that it is about

(OCI image spec 1.1, manifest.md, "Guidelines for Artifact Usage".) Registries, skopeo and oras carry such a thing like
any image. What `hpmapper.image.save` writes has the profile within the image's own index instead.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import msgspec

from hpmapper.errors import Corrupt, InvalidArgument, NotFound
from hpmapper.image import oci
from hpmapper.image.save import new_file

CHAIN_ID = "dev.hpmapper.chain-id"

_EMPTY_TYPE, _EMPTY = "application/vnd.oci.empty.v1+json", b"{}"
_MARKER = b'{"imageLayoutVersion":"1.0.0"}'
_MOST = 16 << 20
"""Bytes of one file in it."""

_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")


class _Manifest(msgspec.Struct, rename="camel", omit_defaults=True):
    schema_version: int
    media_type: str
    config: oci.Descriptor
    layers: list[oci.Descriptor]
    artifact_type: str = ""
    annotations: dict[str, str] = {}


def save(target: Path, chain_id: str, profile: bytes) -> None:
    """Write a profile of the layers `chain_id` to an archive, which appears whole or not at all."""
    blobs = {oci.sha256(data): data for data in (_EMPTY, profile)}
    manifest = msgspec.json.encode(
        _Manifest(
            2,
            oci.OCI_MANIFEST,
            oci.Descriptor(_EMPTY_TYPE, oci.sha256(_EMPTY), len(_EMPTY)),
            [oci.Descriptor(oci.START_PROFILE_TYPE, oci.sha256(profile), len(profile))],
            oci.START_PROFILE_TYPE,
            {CHAIN_ID: chain_id},
        )
    )
    entry = oci.Descriptor(oci.OCI_MANIFEST, oci.sha256(manifest), len(manifest), artifact_type=oci.START_PROFILE_TYPE)
    files = {"oci-layout": _MARKER, "index.json": msgspec.json.encode(oci.Index(2, [entry], oci.OCI_INDEX))}
    files |= {_path(digest): data for digest, data in (blobs | {oci.sha256(manifest): manifest}).items()}
    if not target.absolute().parent.is_dir():
        raise NotFound(f"there is no directory {target.parent}")
    with new_file(target.absolute()) as out, tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def read(source: Path) -> tuple[str, bytes]:
    """The chain ID and the profile that an archive or a layout's directory holds.

    Raises:
        NotFound: it is not there. Corrupt: it is damaged. InvalidArgument: it holds something else.
    """
    if not source.exists():
        raise NotFound(f"{source} does not exist")
    try:
        if source.is_dir():
            return _read(source, lambda name: _limited((source / name).open("rb")))
        with tarfile.open(source) as tar:
            return _read(source, lambda name: _limited(tar.extractfile(name)))
    except (tarfile.TarError, KeyError, OSError, EOFError) as error:
        raise Corrupt(f"{source} is no OCI archive or layout: {error}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Corrupt(f"{source} has a damaged document: {error}") from error


def _read(source: Path, file: Callable[[str], bytes]) -> tuple[str, bytes]:
    index = msgspec.json.decode(file("index.json"), type=oci.Index)
    for entry in index.manifests:
        manifest = msgspec.json.decode(_blob(source, entry, file), type=_Manifest)
        chain_id = manifest.annotations.get(CHAIN_ID, "")
        for layer in manifest.layers:
            if layer.media_type == oci.START_PROFILE_TYPE and _DIGEST.fullmatch(chain_id):
                return chain_id, _blob(source, layer, file)
    raise InvalidArgument(f"{source} holds no start profile", hint="hpmapper profile save writes one")


def _blob(source: Path, descriptor: oci.Descriptor, file: Callable[[str], bytes]) -> bytes:
    if not _DIGEST.fullmatch(descriptor.digest):
        raise Corrupt(f"{source} names a blob {descriptor.digest[:100]!r}")
    data = file(_path(descriptor.digest))
    if oci.sha256(data) != descriptor.digest:
        raise Corrupt(f"blob {descriptor.digest} in {source} has other contents than its name says")
    return data


def _limited(opened: IO[bytes] | None) -> bytes:
    if opened is None:
        raise EOFError("a member is no file")
    with opened:
        data = opened.read(_MOST + 1)
    if len(data) > _MOST:
        raise EOFError(f"a file has more than {_MOST} bytes")
    return data


def _path(digest: str) -> str:
    return f"blobs/sha256/{digest.removeprefix('sha256:')}"
