"""A root that is served, its client over a real socket, and a content store such as containerd's for the differ."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import grpc
from google.protobuf.empty_pb2 import Empty

from hpmapper.cache.start import StartSettings
from hpmapper.cache.starts import Starts
from hpmapper.caretaker import Caretaker
from hpmapper.config import Config
from hpmapper.containerd.api import content_pb2 as content_api
from hpmapper.containerd.api import diff_pb2 as diff_api
from hpmapper.containerd.api import introspection_pb2 as introspection_api
from hpmapper.containerd.api import leases_pb2 as leases_api
from hpmapper.containerd.api import snapshots_pb2 as api
from hpmapper.containerd.api.types_pb2 import Descriptor, Mount
from hpmapper.containerd.content import ContentStore
from hpmapper.daemon import methods
from hpmapper.engine import Engine
from hpmapper.forest import Forest
from hpmapper.kernel import mount
from hpmapper.kernel.mountinfo import mounts_below
from hpmapper.labels import TARGET_LABEL
from hpmapper.meta import snapshots
from hpmapper.model import Kind
from hpmapper.root import open_root
from hpmapper.rpc.server import Server
from hpmapper.testing import trees
from tests import scenario

_T = TypeVar("_T")

SECONDS = 60
GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
TAR = "application/vnd.oci.image.layer.v1.tar"

Labels = Mapping[str, str]


def config(directory: Path, driver: str) -> Config:
    """A root of that driver in a directory, small and without a floor."""
    return Config(root=directory / "root", driver=driver).with_options(["pool.size=600M", "min_free_space=0"])


class Client:
    """containerd's side: the snapshotter and differ services over a socket."""

    def __init__(self, address: Path) -> None:
        self._channel: Any = grpc.insecure_channel(
            f"unix:{address}",
            options=[
                ("grpc.max_receive_message_length", -1),
                ("grpc.initial_reconnect_backoff_ms", 50),
                # Else what an earlier client found out about this address, of a daemon killed since, is answered.
                ("grpc.use_local_subchannel_pool", 1),
            ],
        )

    def close(self) -> None:
        """End the connection."""
        self._channel.close()

    def future(
        self, name: str, request: Any, answer: Any, *, service: str = "snapshots.v1.Snapshots", metadata: Any = None
    ) -> Any:
        """A call under way."""
        call = self._channel.unary_unary(
            f"/containerd.services.{service}/{name}", type(request).SerializeToString, answer.FromString
        )
        return call.future(request, timeout=SECONDS, metadata=metadata)

    def _call(self, name: str, request: Any, answer: type[_T], **more: Any) -> _T:
        result: _T = self.future(name, request, answer, **more).result()
        return result

    def start_prepare(self, key: str, parent: str = "", labels: Labels | None = None) -> Any:
        """A Prepare under way."""
        request = api.PrepareSnapshotRequest(key=key, parent=parent, labels=labels)
        return self.future("Prepare", request, api.PrepareSnapshotResponse)

    def start_remove(self, key: str) -> Any:
        """A Remove under way."""
        return self.future("Remove", api.RemoveSnapshotRequest(key=key), Empty)

    def start_mounts(self, key: str) -> Any:
        """A Mounts under way."""
        return self.future("Mounts", api.MountsRequest(key=key), api.MountsResponse)

    def prepare(self, key: str, parent: str = "", labels: Labels | None = None) -> list[Mount]:
        return list(self.start_prepare(key, parent, labels).result().mounts)

    def view(self, key: str, parent: str = "", labels: Labels | None = None) -> list[Mount]:
        request = api.ViewSnapshotRequest(key=key, parent=parent, labels=labels)
        return list(self._call("View", request, api.ViewSnapshotResponse).mounts)

    def mounts(self, key: str) -> list[Mount]:
        return list(self.start_mounts(key).result().mounts)

    def commit(self, name: str, key: str, labels: Labels | None = None, parent: str = "") -> None:
        request = api.CommitSnapshotRequest(name=name, key=key, labels=labels, parent=parent)
        self._call("Commit", request, Empty)

    def remove(self, key: str) -> None:
        self.start_remove(key).result()

    def stat(self, key: str) -> api.Info:
        return self._call("Stat", api.StatSnapshotRequest(key=key), api.StatSnapshotResponse).info

    def update(self, key: str, labels: Labels, paths: Sequence[str] = (), **more: Any) -> api.Info:
        request = api.UpdateSnapshotRequest(info=api.Info(name=key, labels=labels, **more))
        request.update_mask.paths.extend(paths)
        return self._call("Update", request, api.UpdateSnapshotResponse).info

    def list_blocks(self, *filters: str) -> list[list[api.Info]]:
        call = self._channel.unary_stream(
            "/containerd.services.snapshots.v1.Snapshots/List",
            api.ListSnapshotsRequest.SerializeToString,
            api.ListSnapshotsResponse.FromString,
        )
        return [list(block.info) for block in call(api.ListSnapshotsRequest(filters=filters), timeout=SECONDS)]

    def list(self, *filters: str) -> dict[str, api.Info]:
        return {info.name: info for block in self.list_blocks(*filters) for info in block}

    def usage(self, key: str) -> api.UsageResponse:
        return self._call("Usage", api.UsageRequest(key=key), api.UsageResponse)

    def cleanup(self) -> None:
        self._call("Cleanup", api.CleanupRequest(), Empty)

    def apply(self, blob: Descriptor, mounts: Sequence[Mount], metadata: Any = None) -> Descriptor:
        request = diff_api.ApplyRequest(diff=blob, mounts=mounts)
        call = self._channel.unary_unary(
            "/containerd.services.diff.v1.Diff/Apply",
            diff_api.ApplyRequest.SerializeToString,
            diff_api.ApplyResponse.FromString,
        )
        applied: Descriptor = call(request, timeout=SECONDS, metadata=metadata).applied
        return applied

    def diff(self, left: Sequence[Mount], right: Sequence[Mount], lease: str = "", **more: Any) -> Descriptor:
        """As containerd asks, which tells no lease."""
        request = diff_api.DiffRequest(left=left, right=right, **more)
        sent = [("containerd-namespace", "k8s.io"), *([("containerd-lease", lease)] if lease else [])]
        answer = self._call("Diff", request, diff_api.DiffResponse, service="diff.v1.Diff", metadata=sent)
        found: Descriptor = answer.diff
        return found


def code(attempt: Callable[[], object]) -> grpc.StatusCode:
    """The status with which a call fails; OK if it does not."""
    return refusal(attempt)[0]


def refusal(attempt: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    """The status and text with which a call fails."""
    try:
        attempt()
    except grpc.RpcError as error:
        call: Any = error
        return call.code(), call.details()
    return grpc.StatusCode.OK, ""


@contextmanager
def shown(mounts: Sequence[Mount], target: Path) -> Iterator[Path]:
    """Mount what a snapshotter answered, as containerd does."""
    (one,) = mounts
    target.mkdir(exist_ok=True)
    if one.type == "bind":
        mount.bind(one.source, target, read_only="ro" in one.options, recursive=True)
    else:
        options = dict(option.partition("=")[::2] for option in one.options)
        mount.overlay(
            target,
            lowers=options["lowerdir"].split(":"),
            upper=options.get("upperdir"),
            work=options.get("workdir"),
            options={"index": options["index"]},
        )
    try:
        yield target
    finally:
        mount.umount(target)


def eventually(check: Callable[[], object], seconds: float = SECONDS) -> None:
    """Fail as `check` does, unless it succeeds in the end."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            check()
            return
        except (AssertionError, FileNotFoundError):
            if time.monotonic() > deadline:
                raise
        time.sleep(0.05)


@dataclass
class FakeContent:
    """containerd's content store, as much of it as a differ needs: blobs and labels by digest.

    Attributes:
        files: where it keeps its blobs in files as well, if it tells so.
    """

    files: Path | None = None
    blobs: dict[str, bytes] = field(default_factory=dict)
    labels: dict[str, dict[str, str]] = field(default_factory=dict)
    reads: Counter[str] = field(default_factory=Counter)
    metadata: list[tuple[str, str]] = field(default_factory=list)
    leases: dict[str, dict[str, str]] = field(default_factory=dict)
    """Labels by name: of those that were asked for."""
    hold: threading.Event | None = None
    """Reads wait for it after their first piece."""
    reading: threading.Event = field(default_factory=threading.Event)

    def add(self, data: bytes, media_type: str = GZIP) -> Descriptor:
        """A new blob."""
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self.blobs[digest] = data
        if self.files:
            path = self.files / "blobs" / "sha256" / digest.removeprefix("sha256:")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return Descriptor(media_type=media_type, digest=digest, size=len(data))

    def read(self, request: Any, context: Any) -> Iterator[Any]:
        self.metadata += [(key, value) for key, value in context.invocation_metadata() if key.startswith("containerd-")]
        self.reads[request.digest] += 1
        blob = self.blobs.get(request.digest)
        if blob is None:
            context.abort(grpc.StatusCode.NOT_FOUND, f"content {request.digest}: not found")
            return
        for at in range(0, len(blob), 1 << 16):
            yield content_api.ReadContentResponse(offset=at, data=blob[at : at + (1 << 16)])
            self.reading.set()
            while self.hold and not self.hold.wait(0.01) and context.is_active():
                pass

    def write(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        self.metadata += [(key, value) for key, value in context.invocation_metadata() if key.startswith("containerd-")]
        data = b""
        for request in requests:
            assert request.offset == len(data)
            data += request.data
            digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
            if request.action == content_api.WriteAction.COMMIT:
                if digest in self.blobs:
                    context.abort(grpc.StatusCode.ALREADY_EXISTS, f"content {digest}: already exists")
                assert (request.total, request.expected) == (len(data), digest)
                self.blobs[digest] = data
                self.labels[digest] = dict(request.labels)
            yield content_api.WriteContentResponse(action=request.action, offset=len(data), digest=digest)

    def plugins(self, request: Any, _: Any) -> Any:
        assert list(request.filters) == ["type==io.containerd.content.v1,id==content"]
        exports = {"root": os.fspath(self.files)} if self.files else {}
        return introspection_api.PluginsResponse(plugins=[introspection_api.Plugin(exports=exports)])

    def info(self, request: Any, context: Any) -> Any:
        if request.digest and request.digest not in self.blobs:
            context.abort(grpc.StatusCode.NOT_FOUND, f"content {request.digest}: not found")
        found = content_api.Info(digest=request.digest, labels=self.labels.get(request.digest, {}))
        return content_api.InfoResponse(info=found)

    def update(self, request: Any, _: Any) -> Any:
        labels = self.labels.setdefault(request.info.digest, {})
        for path in request.update_mask.paths:
            name = path.removeprefix("labels.")
            labels[name] = request.info.labels[name]
        return content_api.UpdateResponse(info=request.info)

    def abort(self, _: Any, __: Any) -> Any:
        return Empty()

    def lease(self, request: Any, context: Any) -> Any:
        assert dict(context.invocation_metadata())["containerd-namespace"]
        self.leases[request.id] = dict(request.labels)
        return leases_api.CreateResponse(lease=leases_api.Lease(id=request.id, labels=request.labels))

    @contextmanager
    def served(self, address: Path) -> Iterator[None]:
        """Answer on a socket."""
        server: Any = grpc.server(futures.ThreadPoolExecutor(8))
        handlers: dict[str, tuple[Any, Any, Any]] = {
            "Read": (grpc.unary_stream_rpc_method_handler, self.read, content_api.ReadContentRequest),
            "Write": (grpc.stream_stream_rpc_method_handler, self.write, content_api.WriteContentRequest),
            "Info": (grpc.unary_unary_rpc_method_handler, self.info, content_api.InfoRequest),
            "Update": (grpc.unary_unary_rpc_method_handler, self.update, content_api.UpdateRequest),
            "Abort": (grpc.unary_unary_rpc_method_handler, self.abort, content_api.AbortRequest),
        }
        made = {
            name: make(act, kind.FromString, lambda answer: answer.SerializeToString())
            for name, (make, act, kind) in handlers.items()
        }
        service = "containerd.services.content.v1.Content"
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, made),))
        others: dict[tuple[str, str], tuple[Any, Any]] = {
            ("introspection.v1.Introspection", "Plugins"): (self.plugins, introspection_api.PluginsRequest),
            ("leases.v1.Leases", "Create"): (self.lease, leases_api.CreateRequest),
        }
        for (name, method), (act, kind) in others.items():
            unary = grpc.unary_unary_rpc_method_handler
            handler = unary(act, kind.FromString, lambda answer: answer.SerializeToString())
            service = f"containerd.services.{name}"
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        server.add_insecure_port(f"unix:{address}")
        server.start()
        try:
            yield
        finally:
            server.stop(None).wait()


class Served:
    """A root served in this process."""

    def __init__(
        self,
        engine: Engine,
        client: Client,
        caretaker: Caretaker,
        content: FakeContent,
        directory: Path,
        starts: Starts,
    ) -> None:
        self.starts = starts
        self.engine = engine
        self.client = client
        self.caretaker = caretaker
        self.content = content
        self.directory = directory
        self.forest = Forest(engine, "containerd", caretaker)

    def written(self, name: str, operations: Sequence[Any], parent: str = "") -> str:
        """A committed snapshot, written through its mount; returns its name."""
        key = f"extract-{name}"
        with shown(self.client.prepare(key, parent), self.directory / "target") as target:
            trees.apply(operations, target)
        self.client.commit(name, key, {TARGET_LABEL: f"sha256:{hashlib.sha256(name.encode()).hexdigest()}"})
        return name

    def applied(self, name: str, blob: Descriptor, parent: str = "", labels: Labels | None = None) -> str:
        """A committed snapshot, read by the differ; returns its name."""
        key = f"extract-{name}"
        self.client.apply(blob, self.client.prepare(key, parent))
        self.client.commit(name, key, labels)
        return name

    @contextmanager
    def looked_at(self, name: str) -> Iterator[Path]:
        """A view of a committed snapshot, mounted."""
        with shown(self.client.view("look", name), self.directory / "look") as target:
            yield target
        self.client.remove("look")

    def clear(self) -> None:
        """Remove every snapshot, and fail unless nothing is left of them."""
        left = self.client.list()
        while left:
            leaves = left.keys() - {info.parent for info in left.values()}
            calls = [self.client.start_remove(key) for key in leaves]
            for call in calls:
                call.result()
            left = {key: info for key, info in left.items() if key not in leaves}
        for snapshot in snapshots.walk(self.engine.db):
            if snapshot.kind is not Kind.COMMITTED:
                self.engine.remove(snapshot)
        self.settle()
        stored = self.engine.driver.stored()
        assert (stored.snapshots, stored.layers) == (set(), set())
        assert not self.engine.driver.stored_objects()
        for table in ("snapshot", "layer", "object", "label", "applied", "chain", "blob"):
            assert self.engine.db.rows(f"SELECT * FROM {table}") == [], table

    def settle(self) -> None:
        """Free and collect all there is, and fail unless all of it goes. The caretaker may be at work on the same."""
        eventually(self._settled)

    def _settled(self) -> None:
        assert self.engine.rubbish.free_removed()
        self.engine.rubbish.collect()
        scenario.assert_no_orphans(self.engine)


@contextmanager
def served(
    directory: Path,
    driver: str,
    *,
    options: tuple[str, ...] = (),
    idle_seconds: float = 1e6,
    start: StartSettings | None = None,
) -> Iterator[Served]:
    """A new root, served until the end; then nothing is mounted any more. Starts are recorded as `start` says."""
    content = FakeContent()
    wanted = config(directory, driver).with_options(options)
    with content.served(directory / "c.sock"), open_root(wanted) as opened:
        engine = opened.engine
        caretaker = Caretaker(engine, idle_seconds=idle_seconds)
        store = ContentStore(os.fspath(directory / "c.sock"))
        starts = Starts(engine.db, engine.driver, start)
        if start:
            starts.start()
        server = Server(methods(engine, caretaker, store, starts), engine.db.batch)
        server.bind(directory / "h.sock")
        server.start()
        caretaker.start()
        client = Client(directory / "h.sock")
        try:
            yield Served(engine, client, caretaker, content, directory, starts)
        finally:
            client.close()
            server.stop(SECONDS)
            starts.stop()
            caretaker.stop()
            store.close()
            server.close()
            for one in mounts_below(wanted.root):
                if one.fstype == "overlay":
                    mount.umount(one.target, lazy=True)
            engine.detach()
