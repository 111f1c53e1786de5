"""containerd's content store, as seen by a differ: blobs are read from it and written to it over its own socket."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO, cast

import grpc

from hpmapper.containerd.api import content_pb2 as api
from hpmapper.errors import Corrupt, FailedPrecondition, NotFound, Unsupported

UNCOMPRESSED_LABEL = "containerd.io/uncompressed"
"""The label of a compressed layer that has its DiffID; Docker requires it."""

Metadata = tuple[tuple[str, str | bytes], ...]
"""A call's headers: which namespace, and which lease keeps new content."""

_SERVICE = "/containerd.services.content.v1.Content/"
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
        """A blob's bytes, as a stream; reading raises NotFound when there is no such blob."""
        call = self._read(api.ReadContentRequest(digest=digest), metadata=metadata)
        return cast(BinaryIO, io.BufferedReader(_Blob(call, digest), 1 << 20))

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
