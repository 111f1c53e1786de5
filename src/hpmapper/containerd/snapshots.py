"""containerd's snapshotter service: requests to calls of a `Forest`, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import TypeVar

from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import DecodeError, Message
from google.protobuf.timestamp_pb2 import Timestamp

from hpmapper.containerd import filters
from hpmapper.containerd.api import snapshots_pb2 as api
from hpmapper.drivers.base import MountSpec
from hpmapper.errors import InvalidArgument
from hpmapper.forest import Forest, Info
from hpmapper.labels import MAX_SIZE_LABEL, TARGET_LABEL, Labels
from hpmapper.model import Kind
from hpmapper.rpc.server import After, Call, Later, Method

SERVICE = "containerd.services.snapshots.v1.Snapshots"

_Request = TypeVar("_Request", bound=Message)

_EMPTY = [b""]
_SECOND = 1_000_000_000

_KINDS = {Kind.VIEW: api.Kind.VIEW, Kind.ACTIVE: api.Kind.ACTIVE, Kind.COMMITTED: api.Kind.COMMITTED}

_BLOCK = 100
"""Snapshots in one message of a List, as in containerd's own service."""


class SnapshotService:
    """containerd.services.snapshots.v1.Snapshots. Methods raise `HpmapperError`; the server makes codes of them."""

    def __init__(self, forest: Forest, cleanup: Callable[[], object]) -> None:
        """`cleanup` is what Cleanup asks for: to begin to free what was removed."""
        self._forest = forest
        self._cleanup = cleanup
        self._slow_to_make = not forest.engine.driver.capabilities.mounts  # then a snapshot is a copy

    def methods(self) -> dict[str, Method]:
        """The service's methods by path. Quick are those that take one transaction and no walk."""
        quick: dict[str, Callable[[Call], list[bytes] | After]] = {
            "Prepare": self._prepare,
            "View": self._view,
            "Mounts": self._mounts,
            "Commit": self._commit,
            "Remove": self._remove,
            "Stat": self._stat,
            "Update": self._update,
            "Cleanup": self._clean_up,
        }
        slow = {"List": self._list, "Usage": self._usage}
        found = {f"/{SERVICE}/{name}": Method(call, quick=True) for name, call in quick.items()}
        return found | {f"/{SERVICE}/{name}": Method(call) for name, call in slow.items()}

    def _prepare(self, call: Call) -> After:
        request = parsed(api.PrepareSnapshotRequest, call)
        made = self._forest.prepare(
            request.key, request.parent, request.labels, size=self._default_size(request.labels)
        )
        return After(
            lambda: [_mounts(api.PrepareSnapshotResponse(), self._forest.first_mounts(made))], self._slow_to_make
        )

    def _default_size(self, labels: Mapping[str, str]) -> int | None:
        """The limit of a container; what is unpacked has none, nor has what brings its own."""
        is_containers = TARGET_LABEL not in labels and MAX_SIZE_LABEL not in labels
        return self._forest.engine.driver.capabilities.default_size if is_containers else None

    def _view(self, call: Call) -> After:
        request = parsed(api.ViewSnapshotRequest, call)
        made = self._forest.prepare(request.key, request.parent, request.labels, Kind.VIEW)
        return After(lambda: [_mounts(api.ViewSnapshotResponse(), self._forest.first_mounts(made))], self._slow_to_make)

    def _mounts(self, call: Call) -> After:
        key = parsed(api.MountsRequest, call).key
        return After(lambda: [_mounts(api.MountsResponse(), self._forest.mounts(key))], self._slow_to_make)

    def _commit(self, call: Call) -> list[bytes]:
        request = parsed(api.CommitSnapshotRequest, call)
        if not self._forest.commit(request.name, request.key, request.labels, request.parent, quick=call.quick):
            raise Later
        return _EMPTY

    def _remove(self, call: Call) -> list[bytes]:
        self._forest.remove(parsed(api.RemoveSnapshotRequest, call).key)
        return _EMPTY

    def _stat(self, call: Call) -> list[bytes]:
        info = self._forest.stat(parsed(api.StatSnapshotRequest, call).key)
        return [api.StatSnapshotResponse(info=_info(info)).SerializeToString()]

    def _update(self, call: Call) -> list[bytes]:
        request = parsed(api.UpdateSnapshotRequest, call)
        change = _label_change(request.update_mask, request.info.labels)
        info = self._forest.update(request.info.name, change)
        return [api.UpdateSnapshotResponse(info=_info(info)).SerializeToString()]

    def _list(self, call: Call) -> Iterator[bytes]:
        wanted = filters.parse(parsed(api.ListSnapshotsRequest, call).filters)
        found = (_info(info) for info in self._forest.walk() if wanted(info))
        while block := list(islice(found, _BLOCK)):
            yield api.ListSnapshotsResponse(info=block).SerializeToString()

    def _usage(self, call: Call) -> list[bytes]:
        usage = self._forest.usage(parsed(api.UsageRequest, call).key)
        return [api.UsageResponse(size=usage.size, inodes=usage.inodes).SerializeToString()]

    def _clean_up(self, call: Call) -> list[bytes]:
        self._cleanup()
        return _EMPTY


def parsed(kind: type[_Request], call: Call) -> _Request:
    """A call's message.

    Raises:
        InvalidArgument: it is no such message.
    """
    message = kind()
    try:
        message.ParseFromString(call.message)
    except DecodeError:
        raise InvalidArgument(f"the message is no {kind.__name__}") from None
    return message


_Answer = api.PrepareSnapshotResponse | api.ViewSnapshotResponse | api.MountsResponse


def _mounts(answer: _Answer, spec: MountSpec) -> bytes:
    answer.mounts.add(type=spec.type, source=spec.source, options=spec.options)
    return answer.SerializeToString()


def _info(info: Info) -> api.Info:
    created, updated = divmod(info.created, _SECOND), divmod(info.updated, _SECOND)
    return api.Info(
        name=info.key,
        parent=info.parent,
        kind=_KINDS[info.kind],
        created_at=Timestamp(seconds=created[0], nanos=created[1]),
        updated_at=Timestamp(seconds=updated[0], nanos=updated[1]),
        labels=info.labels,
    )


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
