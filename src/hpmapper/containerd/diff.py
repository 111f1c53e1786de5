"""containerd's differ service: layers straight from its content store into the pool, and changes back into it.

Mounts that are not ours are answered with UNIMPLEMENTED: containerd then asks the next differ in its list.
"""

from __future__ import annotations

import hashlib
import secrets
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, Protocol

from isal import isal_zlib

from hpmapper.containerd.api import diff_pb2 as api
from hpmapper.containerd.api.types_pb2 import Descriptor, Mount
from hpmapper.containerd.content import UNCOMPRESSED_LABEL, ContentStore, Metadata
from hpmapper.containerd.snapshots import parsed
from hpmapper.errors import Unsupported
from hpmapper.forest import Forest
from hpmapper.labels import DIFF_ID_LABEL
from hpmapper.layer.stream import Expected, new_zstd_compressor
from hpmapper.model import oci_digest
from hpmapper.pipe import piped, stoppable
from hpmapper.rpc.server import Call, Method

SERVICE = "containerd.services.diff.v1.Diff"

OCI_TAR = "application/vnd.oci.image.layer.v1.tar"
_OCI_LAYERS = {OCI_TAR, "application/vnd.oci.image.layer.nondistributable.v1.tar"}
_DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
_LAYERS = _OCI_LAYERS | {_DOCKER_LAYER, "application/vnd.docker.image.rootfs.foreign.diff.tar"}
_COMPRESSIONS = ("", "+gzip", "+zstd", ".gzip", ".zstd")
READABLE = {layer + how for layer in _LAYERS for how in _COMPRESSIONS}

_NAMESPACE = "containerd-namespace"
_CHUNK = 1 << 20
_GZIP_WINDOW = zlib.MAX_WBITS | 16


class _Compressor(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...
    def flush(self) -> bytes: ...


_COMPRESSORS: dict[str, Callable[[], _Compressor] | None] = {
    OCI_TAR: None,
    f"{OCI_TAR}+gzip": partial(isal_zlib.compressobj, 1, isal_zlib.DEFLATED, _GZIP_WINDOW),
    f"{OCI_TAR}+zstd": new_zstd_compressor,
    _DOCKER_LAYER: None,
    f"{_DOCKER_LAYER}.gzip": partial(isal_zlib.compressobj, 1, isal_zlib.DEFLATED, _GZIP_WINDOW),
}


class DiffService:
    """containerd.services.diff.v1.Diff. Methods raise `HpmapperError`; the server makes codes of them."""

    def __init__(self, forest: Forest, content: ContentStore) -> None:
        self._forest = forest
        self._content = content

    def methods(self) -> dict[str, Method]:
        """The service's methods by path: both take as long as a layer."""
        return {f"/{SERVICE}/Apply": Method(self._apply, long=True), f"/{SERVICE}/Diff": Method(self._diff, long=True)}

    def _apply(self, call: Call) -> list[bytes]:
        """Read a layer into the active snapshot that is mounted where the request says."""
        request = parsed(api.ApplyRequest, call)
        path = _place(request.mounts)
        snapshot = self._forest.at(path) if path else None
        if snapshot is None:
            raise Unsupported("these mounts are not hpmapper's")
        if request.diff.media_type not in READABLE or request.payloads:
            raise Unsupported(f"layers of type {request.diff.media_type[:100]!r} are for containerd's own differ")
        digest = oci_digest(request.diff.digest)
        self._content.require()
        labels = self._forest.labels(snapshot)
        expect = Expected(diff_id=labels.get(DIFF_ID_LABEL), digest=digest, size=request.diff.size or None)

        metadata = _with_namespace(call.metadata, self._forest.key_of(snapshot))

        def blob() -> BinaryIO:
            return stoppable(self._content.open(digest, metadata), call.cancelled)

        applied = self._forest.apply(snapshot, blob, expect)
        found = Descriptor(media_type=OCI_TAR, digest=applied.diff_id, size=applied.tar_size)
        return [api.ApplyResponse(applied=found).SerializeToString()]

    def _diff(self, call: Call) -> list[bytes]:
        """Write what one mounted snapshot changes of another into the content store, as a layer."""
        request = parsed(api.DiffRequest, call)
        if _NAMESPACE not in dict(call.metadata):
            raise Unsupported("this containerd does not say whose lease is to keep what is written")
        media_type = request.media_type or f"{OCI_TAR}+gzip"
        if media_type not in _COMPRESSORS or request.HasField("source_date_epoch"):
            raise Unsupported(f"a layer like this ({media_type[:100]!r}) is for containerd's own differ")
        right = _place(request.right)
        left = _place(request.left) if request.left else None
        if right is None or (request.left and left is None):
            raise Unsupported("these mounts are not hpmapper's")
        write = self._forest.differences(left, right)
        self._content.require()
        new = _COMPRESSORS[media_type]
        with piped(write) as tar:
            packed = _Packed(iter(lambda: tar.read(_CHUNK), b""), new() if new else None)
            labels = dict(request.labels)

            def labelled() -> dict[str, str]:
                return {**labels, UNCOMPRESSED_LABEL: packed.diff_id()} if new else labels

            ref = request.ref or f"hpmapper-diff-{secrets.token_hex(8)}"
            digest, size = self._content.write(ref, packed, labelled, call.metadata)
        found = Descriptor(media_type=media_type, digest=digest, size=size)
        return [api.DiffResponse(diff=found).SerializeToString()]


class _Packed:
    """A tar's pieces, compressed; knows the tar's digest once it is through."""

    def __init__(self, pieces: Iterable[bytes], compressor: _Compressor | None) -> None:
        self._pieces = pieces
        self._compressor = compressor
        self._hasher = hashlib.sha256()

    def diff_id(self) -> str:
        return f"sha256:{self._hasher.hexdigest()}"

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._pieces:
            self._hasher.update(piece)
            packed = self._compressor.compress(piece) if self._compressor else piece
            if packed:
                yield packed
        if self._compressor:
            yield self._compressor.flush()


def _with_namespace(metadata: Metadata, key: str) -> Metadata:
    """A call's headers with the namespace, which containerd 1.7 keeps to itself; its keys begin with it."""
    if _NAMESPACE in dict(metadata):
        return metadata
    return (*metadata, (_NAMESPACE, key.partition("/")[0]))


def _place(mounts: Iterable[Mount]) -> Path | None:
    """The root or the upper of the one mount that a request is about; None: it is about something else."""
    match list(mounts):
        case [Mount(type="bind") as mount]:
            place = mount.source
        case [Mount(type="overlay") as mount]:
            options = dict(option.partition("=")[::2] for option in mount.options)
            place = options.get("upperdir") or options.get("lowerdir", "").partition(":")[0]
        case _:
            return None
    return Path(place) if place.startswith("/") else None
