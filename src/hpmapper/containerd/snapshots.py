"""containerd's snapshotter service: requests to calls of a `Forest`, and back."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import islice

from google.protobuf.empty_pb2 import Empty
from google.protobuf.field_mask_pb2 import FieldMask

from hpmapper.containerd import filters
from hpmapper.containerd.api import snapshots_pb2 as api
from hpmapper.containerd.api.types_pb2 import Mount
from hpmapper.errors import InvalidArgument
from hpmapper.forest import Forest, Info, Labels, Root
from hpmapper.model import Kind

_KINDS = {Kind.VIEW: api.Kind.VIEW, Kind.ACTIVE: api.Kind.ACTIVE, Kind.COMMITTED: api.Kind.COMMITTED}

_BLOCK = 100
"""Snapshots in one message of a List, as in containerd's own service."""


class SnapshotService:
    """containerd.services.snapshots.v1.Snapshots. Methods raise `HpmapperError`; the server makes codes of them."""

    def __init__(self, forest: Forest, cleanup: Callable[[], object]) -> None:
        """`cleanup` is what Cleanup asks for: to begin to free what was removed."""
        self._forest = forest
        self._cleanup = cleanup

    def prepare(self, request: api.PrepareSnapshotRequest) -> api.PrepareSnapshotResponse:
        root = self._forest.prepare(request.key, request.parent, dict(request.labels))
        return api.PrepareSnapshotResponse(mounts=_mounts(root))

    def view(self, request: api.ViewSnapshotRequest) -> api.ViewSnapshotResponse:
        root = self._forest.prepare(request.key, request.parent, dict(request.labels), Kind.VIEW)
        return api.ViewSnapshotResponse(mounts=_mounts(root))

    def mounts(self, request: api.MountsRequest) -> api.MountsResponse:
        return api.MountsResponse(mounts=_mounts(self._forest.mounts(request.key)))

    def commit(self, request: api.CommitSnapshotRequest) -> Empty:
        self._forest.commit(request.name, request.key, dict(request.labels), request.parent)
        return Empty()

    def remove(self, request: api.RemoveSnapshotRequest) -> Empty:
        self._forest.remove(request.key)
        return Empty()

    def stat(self, request: api.StatSnapshotRequest) -> api.StatSnapshotResponse:
        return api.StatSnapshotResponse(info=_info(self._forest.stat(request.key)))

    def update(self, request: api.UpdateSnapshotRequest) -> api.UpdateSnapshotResponse:
        change = _label_change(request.update_mask, dict(request.info.labels))
        return api.UpdateSnapshotResponse(info=_info(self._forest.update(request.info.name, change)))

    def list(self, request: api.ListSnapshotsRequest) -> Iterator[api.ListSnapshotsResponse]:
        wanted = filters.parse(request.filters)
        found = (_info(info) for info in self._forest.walk() if wanted(info))
        while block := list(islice(found, _BLOCK)):
            yield api.ListSnapshotsResponse(info=block)

    def usage(self, request: api.UsageRequest) -> api.UsageResponse:
        usage = self._forest.usage(request.key)
        return api.UsageResponse(size=usage.size, inodes=usage.inodes)

    def cleanup(self, request: api.CleanupRequest) -> Empty:
        self._cleanup()
        return Empty()


def _mounts(root: Root) -> list[Mount]:
    """One bind of the root that is mounted already: nobody outside may see what it is made of (design trap 1)."""
    options = ["rbind", "ro" if root.read_only else "rw"]
    return [Mount(type="bind", source=os.fspath(root.path), options=options)]


def _info(info: Info) -> api.Info:
    message = api.Info(name=info.key, parent=info.parent, kind=_KINDS[info.kind], labels=info.labels)
    message.created_at.FromNanoseconds(info.created)
    message.updated_at.FromNanoseconds(info.updated)
    return message


def _label_change(mask: FieldMask, new: Labels) -> Callable[[Labels], Labels]:
    """What an Update does to labels: replace them all, or set those named; an empty value deletes.

    Raises:
        InvalidArgument: the mask names something that cannot be changed.
    """
    names = []
    for path in mask.paths:
        if path.startswith("labels."):
            names.append(path.removeprefix("labels."))
        elif path != "labels":
            raise InvalidArgument(f"cannot update {path[:100]!r} of a snapshot: only its labels can be changed")
    if not names or "labels" in mask.paths:
        return lambda _: _filled(new)
    return lambda old: _filled({**old, **{name: new.get(name, "") for name in names}})


def _filled(labels: Labels) -> Labels:
    return {name: value for name, value in labels.items() if value}
