"""The health service (grpc.health.v1.Health): whether the daemon answers at all, which it does by answering."""

from __future__ import annotations

from collections.abc import Container

from hpmapper.errors import NotFound
from hpmapper.rpc.server import Call, Method

_SERVING = b"\x08\x01"  # HealthCheckResponse{status: SERVING}


class HealthService:
    """Check alone: there is nothing to watch."""

    def __init__(self, services: Container[str]) -> None:
        self._services = services

    def methods(self) -> dict[str, Method]:
        """The service's methods by path."""
        return {"/grpc.health.v1.Health/Check": Method(self._check, quick=True)}

    def _check(self, call: Call) -> list[bytes]:
        name = _service(call.message)
        if name and name not in self._services:
            raise NotFound(f"there is no service {name[:200]!r}")
        return [_SERVING]


def _service(message: bytes) -> str:
    """HealthCheckRequest{string service = 1}: a tag, a length below 128, the name."""
    is_name = len(message) > 2 and message[0] == 0x0A and message[1] == len(message) - 2
    return message[2:].decode("utf-8", "replace") if is_name else ""
