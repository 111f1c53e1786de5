"""The endpoint that Prometheus asks: HTTP on a unix socket, or on a loopback address. It tells, and takes nothing."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from hpmapper import sockets
from hpmapper.errors import FailedPrecondition, InvalidArgument

log = logging.getLogger(__name__)

_SECONDS = 10.0
"""How long a client may keep a thread waiting."""


@contextmanager
def serving(address: str, found: CollectorRegistry) -> Iterator[None]:
    """Serve metrics while the body runs, at `address`: a path, or a loopback address and port ("127.0.0.1:9469").

    Raises:
        InvalidArgument: it is neither. FailedPrecondition: somebody listens there already.
    """
    server = _UnixServer(Path(address)) if address.startswith("/") else _tcp_server(address)
    server.set_app(make_wsgi_app(found))
    thread = threading.Thread(target=server.serve_forever, args=(0.5,), name="metrics", daemon=True)
    thread.start()
    log.info("metrics at %s", address)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(WSGIRequestHandler):
    timeout = _SECONDS

    def address_string(self) -> str:
        return "-"  # a unix socket's client has no address

    def get_environ(self) -> dict[str, str]:
        self.client_address = ("", 0)
        return super().get_environ()

    def log_message(self, format: str, *arguments: object) -> None:
        log.debug(format, *arguments)


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    """A thread for each request; the last ones do not keep the daemon from ending."""

    daemon_threads = True

    def setup_environ(self) -> None:
        self.server_name, self.server_port = "hpmapper", 0
        super().setup_environ()

    def handle_error(self, request: object, client_address: object) -> None:
        log.info("a client of the metrics went away", exc_info=True)


class _UnixServer(_Server):
    address_family = socket.AF_UNIX

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
        super().__init__(os.fspath(path), _Handler)  # type: ignore[arg-type]

    def server_bind(self) -> None:
        sockets.bind(self.socket, self._path, "place for the metrics")
        self.setup_environ()

    def shutdown(self) -> None:
        super().shutdown()
        self._path.unlink(missing_ok=True)


class _TcpServer(_Server):
    def __init__(self, family: socket.AddressFamily, address: tuple[str, int]) -> None:
        self.address_family = family
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self.socket.bind(self.server_address)
        except OSError as error:
            raise FailedPrecondition(f"metrics cannot be served at {self.server_address}: {error.strerror}") from error
        self.setup_environ()


def _tcp_server(address: str) -> _TcpServer:
    host, colon, port = address.rpartition(":")
    hint = "a path such as /run/hpmapper/metrics.sock, or 127.0.0.1:9469"
    if not colon or not port.isdigit() or int(port) > 65535:
        raise InvalidArgument(f"{address!r} is no address for metrics", hint=hint)
    try:
        found = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host.strip("[]"))
    except ValueError:
        raise InvalidArgument(f"{address!r} is no address for metrics", hint=hint) from None
    if not found.is_loopback:
        raise InvalidArgument(
            f"metrics are not served at {address}: it is no loopback address", hint="put a proxy before a loopback port"
        )
    family = socket.AF_INET6 if found.version == 6 else socket.AF_INET
    return _TcpServer(family, (str(found), int(port)))
