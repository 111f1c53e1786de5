"""A registry on a machine's loopback: Debian's docker-registry, its blobs below /data."""

from __future__ import annotations

from tests.clients.machine import Machine

ADDRESS = "127.0.0.1:5000"
"""Containerd and Docker speak plain HTTP with it, as it is on loopback."""

_CONFIG = """\
version: 0.1
log: {level: warn}
storage:
  filesystem: {rootdirectory: /data/registry}
  delete: {enabled: true}
http: {addr: "127.0.0.1:5000"}
"""


def start(machine: Machine) -> None:
    """Start it, and wait until it answers; it ends with the machine."""
    machine.path("/data/registry.yml").write_text(_CONFIG)
    registry = machine.start("registry", "docker-registry", "serve", "/data/registry.yml")
    machine.wait(registry, lambda: _listens(machine, 5000))


def _listens(machine: Machine, port: int) -> bool:
    """Whether a process of the machine listens on a port of its loopback."""
    table = machine.path("/proc/1/net/tcp").read_text() + machine.path("/proc/1/net/tcp6").read_text()
    return any(row.split()[1].endswith(f":{port:04X}") and row.split()[3] == "0A" for row in table.splitlines()[1:])
