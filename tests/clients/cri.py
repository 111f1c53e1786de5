"""Kubernetes' Container Runtime Interface, version 1, as kubelet speaks it with containerd.

    cri = Cri(trees.made("trixie"), machine.path(SOCKET))
    pod = cri("RunPodSandbox", config={"metadata": {"name": "one", "uid": "1"}}).pod_sandbox_id

The protocol's description is the one in Debian's golang-github-kubernetes-cri-api-dev, on which the sources of
containerd in every tree depend: read when it is needed, so that each release is spoken to in its own words.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from grpc_tools import protoc  # type: ignore[import-untyped]

from hpmapper.bench.gobuild import GOCODE

_DESCRIPTION = "k8s.io/cri-api/pkg/apis/runtime/v1/api.proto"

_TIMEOUT = 120.0
"""Seconds for a call: kubelet's own limit for most of them (--runtime-request-timeout)."""


@dataclass(frozen=True)
class _Method:
    """A call: its path, and the classes of the messages that go there and come back."""

    path: str
    request: Any
    response: Any


class Cri:
    """A client of the runtime and the image service behind a socket."""

    def __init__(self, tree: Path, address: Path) -> None:
        self._methods = _methods(tree)
        self._channel = grpc.insecure_channel(f"unix:{address}", options=[("grpc.enable_http_proxy", 0)])

    def close(self) -> None:
        """End the connection."""
        self._channel.close()

    def answers(self) -> bool:
        """Whether the CRI plugin is up, which is later than containerd."""
        try:
            self("Version")
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN):  # 2.1, and 1.7
                return False
            raise
        return True

    def __call__(self, method: str, **fields: object) -> Any:
        """Call a method with a request of these fields, nested ones as dicts; returns the response message.

        Raises:
            grpc.RpcError: containerd refuses, or fails.
        """
        known = self._methods[method]
        request = json_format.ParseDict(fields, known.request())
        call = self._channel.unary_unary(known.path, known.request.SerializeToString, known.response.FromString)
        return call(request, timeout=_TIMEOUT)


@cache
def _methods(tree: Path) -> Mapping[str, _Method]:
    """By name; the two services have no method in common."""
    pool = descriptor_pool.DescriptorPool()
    for file in _described(tree).file:
        pool.Add(file)
    services = pool.FindFileByName(_DESCRIPTION).services_by_name.values()
    return {
        method.name: _Method(
            f"/{service.full_name}/{method.name}",
            message_factory.GetMessageClass(method.input_type),
            message_factory.GetMessageClass(method.output_type),
        )
        for service in services
        for method in service.methods
    }


def _described(tree: Path) -> descriptor_pb2.FileDescriptorSet:
    """The description and all that it imports, compiled."""
    places = [tree / GOCODE / "src", resources.files("grpc_tools") / "_proto"]
    with tempfile.NamedTemporaryFile() as compiled:
        words = [f"--descriptor_set_out={compiled.name}", "--include_imports", _DESCRIPTION]
        status = protoc.main(["protoc", *(f"--proto_path={place}" for place in places), *words])
        assert status == 0, f"{_DESCRIPTION} in {tree} does not compile: status {status}"
        return descriptor_pb2.FileDescriptorSet.FromString(Path(compiled.name).read_bytes())
