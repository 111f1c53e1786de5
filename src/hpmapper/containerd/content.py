"""containerd's content store, as seen by a differ: blobs are written over containerd's socket, and read from files.

Whoever cannot see these files (another machine's, another mount namespace's, another kind of store) reads them over the
socket as well, which takes both sides a copy more of each byte.
"""

from __future__ import annotations

import hashlib
import io
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, BinaryIO, cast

import grpc

from hpmapper.containerd.api import content_pb2 as api
from hpmapper.containerd.api import introspection_pb2 as introspection
from hpmapper.containerd.api import leases_pb2 as leases
from hpmapper.errors import Corrupt, FailedPrecondition, NotFound, Unsupported

UNCOMPRESSED_LABEL = "containerd.io/uncompressed"
"""The label of a compressed layer that has its DiffID; Docker requires it."""

Metadata = tuple[tuple[str, str | bytes], ...]
"""A call's headers: which namespace, and which lease keeps new content."""

_SERVICE = "/containerd.services.content.v1.Content/"
_LEASES = "/containerd.services.leases.v1.Leases/Create"
_LEASE = "containerd-lease"
_EXPIRE_LABEL = "containerd.io/gc.expire"
_KEPT = timedelta(hours=1)
"""How long a blob that nobody has taken up is kept, which its writer's client may still read or push."""

_PLUGINS = "/containerd.services.introspection.v1.Introspection/Plugins"
_LOCAL_STORE = "type==io.containerd.content.v1,id==content"
_CONNECT_SECONDS = 5.0
_MAX_MESSAGE = 16 << 20


class ContentStore:
    """A client of the content store behind a socket."""

    def __init__(self, address: str) -> None:
        self._address = address
        options = [("grpc.max_receive_message_length", _MAX_MESSAGE), ("grpc.enable_http_proxy", 0)]
        self._channel = grpc.insecure_channel(f"unix:{address}", options=options)
        self._read = self._channel.unary_stream(_SERVICE + "Read", _serialized, api.ReadContentResponse.FromString)
        self._write = self._channel.stream_stream(_SERVICE + "Write", _serialized, api.WriteContentResponse.FromString)
        self._info = self._channel.unary_unary(_SERVICE + "Info", _serialized, api.InfoResponse.FromString)
        self._update = self._channel.unary_unary(_SERVICE + "Update", _serialized, api.UpdateResponse.FromString)
        self._abort = self._channel.unary_unary(_SERVICE + "Abort", _serialized, lambda _: None)
        self._create_lease = self._channel.unary_unary(_LEASES, _serialized, leases.CreateResponse.FromString)
        self._plugins = self._channel.unary_unary(_PLUGINS, _serialized, introspection.PluginsResponse.FromString)
        self._directory: str | None = None

    def close(self) -> None:
        """End the connection."""
        self._channel.close()

    def require(self) -> None:
        """Raise Unsupported if containerd cannot be reached: then only its own differ can help."""
        try:
            self._info(api.InfoRequest(), timeout=_CONNECT_SECONDS, wait_for_ready=True)
        except grpc.RpcError as error:
            if _code(error) not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                return  # it refuses to answer that, but it answers
            raise Unsupported(
                f"containerd's content store cannot be reached at {self._address}",
                hint="hpmapper serve --containerd-address names containerd's socket",
            ) from None

    def open(self, digest: str, metadata: Metadata) -> BinaryIO:
        """The bytes of the blob of that (well-formed) digest, as a stream.

        Raises:
            NotFound: there is no such blob; from here or from the first read.
        """
        file = self._file(digest, metadata)
        if file is not None:
            return file
        call = self._read(api.ReadContentRequest(digest=digest), metadata=metadata)
        return cast(BinaryIO, io.BufferedReader(_Blob(call, digest), 1 << 20))

    def _file(self, digest: str, metadata: Metadata) -> BinaryIO | None:
        """The file that has the blob, if it can be seen from here, and if the caller's namespace has the blob."""
        try:
            directory = self._blobs()
            if not directory:
                return None
            file = io.FileIO(os.path.join(directory, *digest.split(":")))
        except (grpc.RpcError, OSError):
            return None
        try:
            self._info(api.InfoRequest(digest=digest), metadata=metadata)
        except grpc.RpcError as error:
            file.close()
            if _code(error) is grpc.StatusCode.NOT_FOUND:
                raise NotFound(f"containerd has no content {digest}") from None
            return None
        return cast(BinaryIO, file)

    def _blobs(self) -> str:
        """Where containerd says that its own store has blobs; "" if it is another's."""
        if self._directory is None:
            found = self._plugins(introspection.PluginsRequest(filters=[_LOCAL_STORE]), timeout=_CONNECT_SECONDS)
            roots = [plugin.exports.get("root", "") for plugin in found.plugins]
            self._directory = os.path.join(roots[0], "blobs") if roots and os.path.isabs(roots[0]) else ""
        return self._directory

    def write(
        self,
        ref: str,
        pieces: Iterable[bytes],
        labels: Callable[[], Mapping[str, str]],
        metadata: Metadata,
    ) -> tuple[str, int]:
        """Write a blob under the name `ref` while it is unfinished; returns its digest and its size in bytes.

        `labels` is asked when all pieces are through. A blob that is there already gets those that it lacks.
        """
        metadata = self._leased(metadata)
        writer = _Writer(ref, pieces, labels)
        try:
            for answer in self._write(writer.requests(), metadata=metadata):
                if answer.action == api.WriteAction.COMMIT:
                    return answer.digest, writer.size
            raise FailedPrecondition(f"containerd ended the writing of {ref!r} before it was committed")
        except grpc.RpcError as error:
            if writer.failure is not None:
                self._abort(api.AbortRequest(ref=ref), metadata=metadata)
                raise writer.failure from None
            if _code(error) is not grpc.StatusCode.ALREADY_EXISTS:
                raise FailedPrecondition(f"containerd refused to store {ref!r}: {_details(error)}") from error
        self._add_labels(writer.digest(), labels(), metadata)
        return writer.digest(), writer.size

    def _leased(self, metadata: Metadata) -> Metadata:
        """The headers with a lease, without which containerd's collector may take the blob before anybody has used it.

        containerd does not pass its client's lease on to a differ (seen with 2.1.9); so this is one that expires.
        """
        if _LEASE in dict(metadata):
            return metadata
        name = f"hpmapper-diff-{secrets.token_hex(8)}"
        expires = (datetime.now(UTC) + _KEPT).strftime("%Y-%m-%dT%H:%M:%SZ")
        try:
            self._create_lease(leases.CreateRequest(id=name, labels={_EXPIRE_LABEL: expires}), metadata=metadata)
        except grpc.RpcError as error:
            raise FailedPrecondition(f"containerd gives no lease for a new layer: {_details(error)}") from error
        return (*metadata, (_LEASE, name))

    def _add_labels(self, digest: str, labels: Mapping[str, str], metadata: Metadata) -> None:
        present = self._info(api.InfoRequest(digest=digest), metadata=metadata).info.labels
        request = api.UpdateRequest(info=api.Info(digest=digest, labels=labels))
        request.update_mask.paths.extend(f"labels.{name}" for name in labels if name not in present)
        if request.update_mask.paths:
            self._update(request, metadata=metadata)


class _Writer:
    """The requests that write one blob."""

    def __init__(self, ref: str, pieces: Iterable[bytes], labels: Callable[[], Mapping[str, str]]) -> None:
        self._ref = ref
        self._pieces = pieces
        self._labels = labels
        self._hasher = hashlib.sha256()
        self.size = 0
        self.failure: BaseException | None = None

    def digest(self) -> str:
        return f"sha256:{self._hasher.hexdigest()}"

    def requests(self) -> Iterator[api.WriteContentRequest]:
        try:
            # At offset 0: what an earlier attempt left under the name is cut off.
            yield api.WriteContentRequest(action=api.WriteAction.WRITE, ref=self._ref)
            for piece in self._pieces:
                yield api.WriteContentRequest(action=api.WriteAction.WRITE, offset=self.size, data=piece)
                self._hasher.update(piece)
                self.size += len(piece)
            yield api.WriteContentRequest(
                action=api.WriteAction.COMMIT,
                offset=self.size,
                total=self.size,
                expected=self.digest(),
                labels=self._labels(),
            )
        except Exception as error:
            self.failure = error  # the call only says that its requests ended
            raise


class _Blob(io.RawIOBase):
    """What a Read call streams."""

    def __init__(self, call: Any, digest: str) -> None:
        self._call = call
        self._digest = digest
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            answer = self._next()
            if answer is None:
                return 0
            self._rest = memoryview(answer.data)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def _next(self) -> api.ReadContentResponse | None:
        try:
            answer: api.ReadContentResponse | None = next(self._call, None)
        except grpc.RpcError as error:
            if _code(error) is grpc.StatusCode.NOT_FOUND:
                raise NotFound(f"containerd has no content {self._digest}") from None
            raise Corrupt(f"content {self._digest} cannot be read from containerd: {_details(error)}") from error
        return answer

    def close(self) -> None:
        self._call.cancel()
        super().close()


def _serialized(message: Any) -> bytes:
    return bytes(message.SerializeToString())


def _code(error: grpc.RpcError) -> grpc.StatusCode | None:
    return error.code() if isinstance(error, grpc.Call) else None


def _details(error: grpc.RpcError) -> str:
    return str(error.details()) if isinstance(error, grpc.Call) else str(error)
