"""The graph driver plugin protocol: its 16 endpoints, and their JSON.

Sources: moby v26, daemon/graphdriver/proxy.go and pkg/plugins; Docker's own description (docs/extend in docker/cli)
differs from these in the form of capabilities and of id maps, and the code is what clients are made of.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from hpmapper.caretaker import Caretaker
from hpmapper.docker.http import Request, Response, Server
from hpmapper.docker.layers import Layers
from hpmapper.engine import Engine
from hpmapper.errors import HpmapperError, InvalidArgument, NotFound, Unsupported
from hpmapper.forest import Forest, Starts
from hpmapper.model import ChangeKind
from hpmapper.rpc.calls import Calls
from hpmapper.rpc.status import code_of

log = logging.getLogger(__name__)

OWNER = "docker"
"""Whose forest it is."""

_MEDIA_TYPE = "application/vnd.docker.plugins.v1.2+json"
_TAR = "application/x-tar"
_MAX_JSON = 1 << 20
_DRAIN_SECONDS = 30.0

_KINDS = {ChangeKind.CHANGED: 0, ChangeKind.ADDED: 1, ChangeKind.DELETED: 2}
"""archive.ChangeType of moby's pkg/archive."""


class _Init(msgspec.Struct):
    """Docker leaves out what is empty, and writes null for lists without entries."""

    Home: str = ""
    Opts: list[str] | None = None
    UIDMaps: list[Any] | None = None
    GIDMaps: list[Any] | None = None


class _Layer(msgspec.Struct):
    ID: str = ""
    Parent: str = ""
    MountLabel: str = ""
    StorageOpt: dict[str, str] | None = None


_Asked = TypeVar("_Asked", _Init, _Layer)


@contextmanager
def serving(
    engine: Engine, caretaker: Caretaker, address: Path, calls: Calls | None = None, starts: Starts | None = None
) -> Iterator[None]:
    """Serve an engine's snapshots to Docker, on a unix socket, while the body runs; `calls` counts what is asked.

    Raises as `Server`.
    """
    plugin = Plugin(Layers(Forest(engine, OWNER, caretaker, starts), caretaker.clean_up), calls)
    server = Server(address, plugin.handle, plugin.failed)
    server.start()
    try:
        yield
    finally:
        server.stop(_DRAIN_SECONDS)


class Plugin:
    """Turns requests into calls of `Layers`."""

    def __init__(self, layers: Layers, calls: Calls | None = None) -> None:
        self._layers = layers
        self._calls = calls or Calls()
        self._endpoints: Mapping[str, Callable[[Request], Response]] = {
            "/Plugin.Activate": lambda _: _told(Implements=["GraphDriver"]),
            "/GraphDriver.Init": self._init,
            # Every layer's tar can be made again byte for byte: Docker need not keep what it would take to do so.
            "/GraphDriver.Capabilities": lambda _: _told(Capabilities={"ReproducesExactDiffs": True}),
            "/GraphDriver.Create": self._create,
            "/GraphDriver.CreateReadWrite": partial(self._create, writable=True),
            "/GraphDriver.Remove": self._remove,
            "/GraphDriver.Get": self._get,
            "/GraphDriver.Put": self._put,
            "/GraphDriver.Exists": lambda request: _told(Exists=layers.exists(_layer(request).ID)),
            "/GraphDriver.Status": lambda _: _told(Status=layers.status()),
            "/GraphDriver.GetMetadata": lambda request: _told(Metadata=layers.metadata(_layer(request).ID)),
            "/GraphDriver.Cleanup": self._cleanup,
            "/GraphDriver.Diff": self._diff,
            "/GraphDriver.Changes": self._changes,
            "/GraphDriver.ApplyDiff": self._apply_diff,
            "/GraphDriver.DiffSize": self._diff_size,
        }

    def handle(self, request: Request) -> Response:
        """Answer a request.

        Raises:
            HpmapperError: for `failed`.
        """
        began, outcome = time.perf_counter(), "OK"
        try:
            return self._answer(request)
        except Exception as error:
            outcome = code_of(error).name
            raise
        finally:
            name = request.path.removeprefix("/") if request.path in self._endpoints else ""
            self._calls.count(name, outcome, time.perf_counter() - began)

    def _answer(self, request: Request) -> Response:
        endpoint = self._endpoints.get(request.path)
        if endpoint is None:
            raise NotFound(f"there is no endpoint {request.path[:100]!r}")
        if request.method != "POST":
            raise InvalidArgument(f"{request.path} is asked by POST, not {request.method[:20]}")
        log.debug("%s %s", request.path, dict(request.query))
        return endpoint(request)

    def failed(self, error: Exception) -> Response:
        """What is answered when a request failed: Docker shows `Err`."""
        if isinstance(error, NotFound) and str(error).startswith("there is no endpoint"):
            return _json(HTTPStatus.NOT_FOUND, {"Err": str(error)})
        if not isinstance(error, HpmapperError):
            log.error("a request failed", exc_info=error)
            error = HpmapperError(f"{type(error).__name__}: {error}", hint="hpmapper's log has the details")
        return _json(HTTPStatus.INTERNAL_SERVER_ERROR, {"Err": str(error)})

    def _init(self, request: Request) -> Response:
        """Docker begins. What it would have us do otherwise is refused, not ignored."""
        asked = _decoded(request, _Init)
        if asked.Opts:
            raise InvalidArgument(
                f"the storage option {asked.Opts[0]!r} is not the plugin's",
                hint="take storage-opts out of daemon.json; hpmapper has its own config file",
            )
        if asked.UIDMaps or asked.GIDMaps:
            raise Unsupported("userns-remap is not supported by the plugin", hint="take it out of daemon.json")
        return _told()

    def _create(self, request: Request, *, writable: bool = False) -> Response:
        asked = _layer(request)
        self._layers.create(asked.ID, asked.Parent, asked.StorageOpt or {}, asked.MountLabel, writable=writable)
        return _told()

    def _remove(self, request: Request) -> Response:
        self._layers.remove(_layer(request).ID)
        return _told()

    def _get(self, request: Request) -> Response:
        return _told(Dir=str(self._layers.mount(_layer(request).ID)))

    def _put(self, request: Request) -> Response:
        self._layers.unmount(_layer(request).ID)
        return _told()

    def _cleanup(self, _: Request) -> Response:
        self._layers.unmount_all()
        return _told()

    def _diff(self, request: Request) -> Response:
        asked = _layer(request)
        return Response(HTTPStatus.OK, _TAR, stream=self._layers.diff(asked.ID, asked.Parent))

    def _changes(self, request: Request) -> Response:
        asked = _layer(request)
        changes = [
            {"Path": change.path.decode("utf-8", "replace"), "Kind": _KINDS[change.kind]}
            for change in self._layers.changes(asked.ID, asked.Parent)
        ]
        return _told(Changes=changes)

    def _apply_diff(self, request: Request) -> Response:
        size = self._layers.apply(request.query.get("id", ""), request.query.get("parent", ""), request.body)
        return _told(Size=size)

    def _diff_size(self, request: Request) -> Response:
        asked = _layer(request)
        return _told(Size=self._layers.diff_size(asked.ID, asked.Parent))


def _layer(request: Request) -> _Layer:
    return _decoded(request, _Layer)


def _decoded(request: Request, kind: type[_Asked]) -> _Asked:
    body = request.body.read(_MAX_JSON)
    data = body
    while data and len(body) < _MAX_JSON:
        data = request.body.read(_MAX_JSON - len(body))
        body += data
    if len(body) == _MAX_JSON:
        raise InvalidArgument(f"{request.path} has more than {_MAX_JSON} bytes of JSON")
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{request.path}: {error}") from None


def _told(**facts: object) -> Response:
    return _json(HTTPStatus.OK, {**facts, "Err": ""})


def _json(status: HTTPStatus, facts: Mapping[str, object]) -> Response:
    return Response(status, _MEDIA_TYPE, msgspec.json.encode(facts) + b"\n")
