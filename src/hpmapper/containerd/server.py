"""The gRPC server: which service answers which call, on which threads, and what code an error becomes."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from hpmapper.containerd.api import diff_pb2, snapshots_pb2
from hpmapper.containerd.content import Metadata
from hpmapper.containerd.diff import DiffService
from hpmapper.containerd.snapshots import SnapshotService
from hpmapper.errors import (
    AlreadyExists,
    Corrupt,
    FailedPrecondition,
    HpmapperError,
    InvalidArgument,
    NoSpace,
    NotFound,
    Unsupported,
)

log = logging.getLogger(__name__)

CODES: dict[type[HpmapperError], grpc.StatusCode] = {
    NotFound: grpc.StatusCode.NOT_FOUND,
    AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    Unsupported: grpc.StatusCode.UNIMPLEMENTED,
    NoSpace: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Corrupt: grpc.StatusCode.DATA_LOSS,
}
"""containerd's own client turns these into its errors (errdefs/pkg/errgrpc)."""

SNAPSHOTS = "containerd.services.snapshots.v1.Snapshots"
DIFF = "containerd.services.diff.v1.Diff"

_MAX_MESSAGE = 16 << 20  # containerd's own limit (defaults.DefaultMaxRecvMsgSize)
_MAX_SOCKET_PATH = 107  # unix(7)
_MESSAGE_OF_BUG = "a bug in hpmapper; its log has the details"

_QUICK_THREADS = 4
"""For calls that take one transaction: more would only wait for each other."""

_SLOW_THREADS = 8
"""For calls that read layers or walk directories, so that they never stand in the way of the quick ones."""


class _Method(NamedTuple):
    call: Callable[..., Any]
    request: Any
    slow: bool = False


def make_server(snapshots: SnapshotService, diff: DiffService) -> grpc.Server:
    """A server that is not bound or started yet."""
    quick = ThreadPoolExecutor(_QUICK_THREADS, "rpc")
    slow = ThreadPoolExecutor(_SLOW_THREADS, "slow-rpc")
    options = [
        ("grpc.max_receive_message_length", _MAX_MESSAGE),
        ("grpc.max_send_message_length", _MAX_MESSAGE),
        ("grpc.so_reuseport", 0),
    ]
    server = grpc.server(quick, options=options)
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(SNAPSHOTS, _snapshot_handlers(snapshots, slow)),
            grpc.method_handlers_generic_handler(DIFF, _diff_handlers(diff, slow)),
        )
    )
    servicer = health.HealthServicer()
    for name in ("", SNAPSHOTS, DIFF):
        servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    return server


def bind(server: grpc.Server, address: Path) -> None:
    """Let a server listen on a unix socket that only root may use.

    Raises:
        FailedPrecondition: somebody listens there already. InvalidArgument: the path is too long for a socket.
    """
    if len(os.fsencode(address)) > _MAX_SOCKET_PATH:
        raise InvalidArgument(f"{address} is too long for a socket's path", hint=f"at most {_MAX_SOCKET_PATH} bytes")
    address.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
    _clear_stale(address)
    umask = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{address}")
    except RuntimeError as error:
        raise FailedPrecondition(f"cannot listen on {address}: {error}") from error
    finally:
        os.umask(umask)


def _clear_stale(address: Path) -> None:
    """Remove the socket of a server that is gone."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.connect(os.fspath(address))
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            address.unlink(missing_ok=True)
            return
    raise FailedPrecondition(f"somebody else serves {address} already", hint="stop it, or name another --address")


def _snapshot_handlers(
    service: SnapshotService, slow: ThreadPoolExecutor
) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
    api = snapshots_pb2
    methods = {
        "Prepare": _Method(service.prepare, api.PrepareSnapshotRequest),
        "View": _Method(service.view, api.ViewSnapshotRequest),
        "Mounts": _Method(service.mounts, api.MountsRequest),
        "Commit": _Method(service.commit, api.CommitSnapshotRequest),
        "Remove": _Method(service.remove, api.RemoveSnapshotRequest),
        "Stat": _Method(service.stat, api.StatSnapshotRequest),
        "Update": _Method(service.update, api.UpdateSnapshotRequest),
        "Usage": _Method(service.usage, api.UsageRequest, slow=True),
        "Cleanup": _Method(service.cleanup, api.CleanupRequest),
    }
    handlers = {name: _unary(method, slow) for name, method in methods.items()}

    def listing(
        request: api.ListSnapshotsRequest, context: grpc.ServicerContext
    ) -> Iterator[api.ListSnapshotsResponse]:
        with _Coded(context):
            yield from service.list(request)

    listing.experimental_thread_pool = slow  # type: ignore[attr-defined]
    handlers["List"] = grpc.unary_stream_rpc_method_handler(
        listing, api.ListSnapshotsRequest.FromString, api.ListSnapshotsResponse.SerializeToString
    )
    return handlers


def _diff_handlers(service: DiffService, slow: ThreadPoolExecutor) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
    return {
        "Apply": _unary(_Method(service.apply, diff_pb2.ApplyRequest, slow=True), slow, metadata=True),
        "Diff": _unary(_Method(service.diff, diff_pb2.DiffRequest, slow=True), slow, metadata=True),
    }


def _unary(method: _Method, slow: ThreadPoolExecutor, *, metadata: bool = False) -> grpc.RpcMethodHandler[Any, Any]:
    def behave(request: Any, context: grpc.ServicerContext) -> Any:
        with _Coded(context):
            return method.call(request, _passed_on(context)) if metadata else method.call(request)

    if method.slow:
        behave.experimental_thread_pool = slow  # type: ignore[attr-defined]
    return grpc.unary_unary_rpc_method_handler(behave, method.request.FromString, _serialized)


def _serialized(answer: Any) -> bytes:
    return bytes(answer.SerializeToString())


def _passed_on(context: grpc.ServicerContext) -> Metadata:
    """The headers that say for whom a call is: containerd wants them again when we call it."""
    return tuple((key, value) for key, value in context.invocation_metadata() if key.startswith("containerd-"))


class _Coded:
    """Ends a call with the code of the error that its body raised. A class: this is on every call's path."""

    __slots__ = ("_context",)

    def __init__(self, context: grpc.ServicerContext) -> None:
        self._context = context

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or kind is GeneratorExit:
            return
        if isinstance(error, HpmapperError):
            self._abort(CODES.get(type(error), grpc.StatusCode.UNKNOWN), str(error))
        log.error("a call failed", exc_info=error)
        self._abort(grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error} ({_MESSAGE_OF_BUG})")

    def _abort(self, code: grpc.StatusCode, message: str) -> NoReturn:
        self._context.abort(code, message)
