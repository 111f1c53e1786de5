"""A small HTTP/1.1 server on a unix socket: bodies of any length both ways.

h11 knows HTTP: it parses, frames and refuses. What is left here is reading, writing, and an orderly end. Each
connection has a thread that waits for requests; those are answered by a fixed number of others, since a thread that
asks the database keeps a connection to it.
"""

from __future__ import annotations

import io
import logging
import os
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import BinaryIO, cast
from urllib.parse import parse_qsl, urlsplit

import h11

from hpmapper import sockets
from hpmapper.errors import Corrupt, InvalidArgument

log = logging.getLogger(__name__)

_RECEIVE = 256 << 10
_SEND = 256 << 10
_MAX_HEADERS = 64 << 10
_LOOKS_UP = 3600.0

_WORKERS = 32
"""Requests that are answered at a time. A long one is a layer on its way to or from a registry."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request whose body is read as it comes in."""

    method: str
    path: str
    query: Mapping[str, str]
    body: BinaryIO


@dataclass(frozen=True, slots=True)
class Response:
    """A response; `stream` writes a body whose length nobody knows yet."""

    status: HTTPStatus
    media_type: str
    body: bytes = b""
    stream: Callable[[BinaryIO], None] | None = None


Handle = Callable[[Request], Response]
"""Answers a request."""

Failed = Callable[[Exception], Response]
"""What is answered when that raised, or a stream before its first byte."""


class Server:
    """A server on a unix socket that only root may use."""

    def __init__(self, address: Path, handle: Handle, failed: Failed) -> None:
        """Listen, without answering yet.

        Raises:
            FailedPrecondition, InvalidArgument: as `hpmapper.sockets.bind`.
        """
        self.address = address
        self._connections: set[_Connection] = set()
        self._workers = ThreadPoolExecutor(_WORKERS, "http-worker")
        self._lock = threading.Lock()
        self._stopping = False
        address.parent.mkdir(parents=True, exist_ok=True)
        self._server = _listening(address, self._converse)
        # It looks for the end only now and then; `stop` wakes it.
        self._thread = threading.Thread(target=self._server.serve_forever, args=(_LOOKS_UP,), name="http-accept")
        self._handle = handle
        self._failed = failed

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """Take no more connections, let requests under way end for so long, then cut them off."""
        if self._thread.is_alive():
            self._server.socket.shutdown(socket.SHUT_RDWR)  # wakes it
            self._server.shutdown()
            self._thread.join()
        self.address.unlink(missing_ok=True)
        deadline = time.monotonic() + seconds
        with self._lock:
            self._stopping = True
            waiting = list(self._connections)
        for connection in waiting:
            connection.end_when_idle()
        for connection in waiting:
            if not connection.ended.wait(max(0.0, deadline - time.monotonic())):
                connection.cut_off()
        self._server.server_close()  # joins the connections' threads
        self._workers.shutdown()

    def _converse(self, sock: socket.socket) -> None:
        """Answer the requests of one connection."""
        connection = _Connection(sock, self._workers, self._handle, self._failed)
        with self._lock:
            if self._stopping:
                return
            self._connections.add(connection)
        try:
            connection.run()
        finally:
            with self._lock:
                self._connections.discard(connection)
            connection.ended.set()


class _Threading(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    request_queue_size = 128

    def server_bind(self) -> None:
        sockets.bind(self.socket, Path(str(self.server_address)), "socket")


def _listening(address: Path, converse: Callable[[socket.socket], None]) -> _Threading:
    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            converse(self.request)

    return _Threading(os.fspath(address), Handler)


class _Connection:
    """One client's requests, one after the other."""

    def __init__(self, sock: socket.socket, workers: ThreadPoolExecutor, handle: Handle, failed: Failed) -> None:
        self.ended = threading.Event()
        self._sock = sock
        self._workers = workers
        self._handle = handle
        self._failed = failed
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=_MAX_HEADERS)
        self._lock = threading.Lock()
        self._busy = False
        self._last = False

    def end_when_idle(self) -> None:
        """Take no further request."""
        with self._lock:
            self._last = True
            if not self._busy:
                self.cut_off()

    def cut_off(self) -> None:
        """End at once; what the client waits for does not come."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it has gone already

    def run(self) -> None:
        """Answer requests until the client or we have had enough."""
        try:
            while self._one_request():
                self._http.start_next_cycle()
        except h11.RemoteProtocolError as error:
            self._refuse(error)
        except OSError as error:
            log.info("a client went away: %s", error)

    def _one_request(self) -> bool:
        """Answer one request; False when it is the connection's last."""
        event = self.next_event()
        if not isinstance(event, h11.Request):
            return False
        with self._lock:
            if self._last:
                return False
            self._busy = True
        try:
            return self._answer(event)
        finally:
            with self._lock:
                self._busy = False

    def _answer(self, event: h11.Request) -> bool:
        body = _Body(self)
        target = urlsplit(event.target.decode("ascii", "replace"))
        request = Request(
            event.method.decode("ascii"), target.path, dict(parse_qsl(target.query)), cast(BinaryIO, body)
        )
        whole = self._workers.submit(self._respond, request).result()
        # What the handler left of the body would be taken for the next request.
        return whole and body.is_read() and not self._last and self._http.our_state is not h11.MUST_CLOSE

    def _respond(self, request: Request) -> bool:
        """Send the answer; False if it broke off."""
        try:
            response = self._handle(request)
        except Exception as error:
            response = self._failed(error)
        if response.stream is None:
            self._send_whole(response)
            return True
        out = _Out(self, response)
        buffered = io.BufferedWriter(cast(io.RawIOBase, out), _SEND)
        try:
            response.stream(cast(BinaryIO, buffered))
            buffered.flush()
        except Exception as error:
            out.abandon()
            return self._stream_failed(out, error)
        out.finish()
        return True

    def _stream_failed(self, out: _Out, error: Exception) -> bool:
        response = self._failed(error)
        if not out.begun:
            self._send_whole(response)
            return True
        return False  # the body lacks its end: the client sees that it is not whole

    def _send_whole(self, response: Response) -> None:
        self.begin(response, [("Content-Length", str(len(response.body)))])
        self.send(h11.Data(data=response.body))
        self.send(h11.EndOfMessage())

    def begin(self, response: Response, headers: list[tuple[str, str]]) -> None:
        """Send an answer's head."""
        headers = [("Content-Type", response.media_type), *headers]
        self.send(h11.Response(status_code=int(response.status), headers=headers))

    def send(self, event: h11.Event) -> None:
        """Send a part of an answer."""
        data = self._http.send(event)
        if data:
            self._sock.sendall(data)

    def next_event(self) -> h11.Event | type[h11.PAUSED]:
        """The next part of what the client says."""
        while (event := self._http.next_event()) is h11.NEED_DATA:
            if self._http.they_are_waiting_for_100_continue:
                self.send(h11.InformationalResponse(status_code=100, headers=[]))
            self._http.receive_data(self._sock.recv(_RECEIVE))
        return cast("h11.Event | type[h11.PAUSED]", event)

    def _refuse(self, error: h11.RemoteProtocolError) -> None:
        """Answer what is no HTTP, if that is still possible."""
        log.info("a client does not speak HTTP: %s", error)
        if self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = self._failed(InvalidArgument(f"this is no HTTP: {error}"))
            try:
                self._send_whole(Response(HTTPStatus(error.error_status_hint), response.media_type, response.body))
            except OSError:
                pass  # it has gone already


class _Body(io.RawIOBase):
    """A request's body as a file."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        self._rest = memoryview(b"")
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._rest and not self._ended:
            self._receive()
        count = min(len(self._rest), len(buffer))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def _receive(self) -> None:
        try:
            event = self._connection.next_event()
        except h11.RemoteProtocolError as error:
            raise Corrupt(f"the request broke off: {error}", hint="try again") from error
        if isinstance(event, h11.Data):
            self._rest = memoryview(event.data)
        else:
            self._ended = True

    def close(self) -> None:
        """Whoever reads it may close it; what it has not read is read nevertheless (`is_read`)."""

    def is_read(self) -> bool:
        """Read on to the end; False if there is none."""
        try:
            while not self._ended:
                self._receive()
        except Corrupt:
            return False
        return True


class _Out(io.RawIOBase):
    """An answer's body as a file: the head goes out with the first byte."""

    def __init__(self, connection: _Connection, response: Response) -> None:
        self._connection = connection
        self._response = response
        self._abandoned = False
        self.begun = False

    def writable(self) -> bool:
        return True

    def write(self, data: bytes | memoryview) -> int:  # type: ignore[override]
        if self._abandoned:
            return len(data)
        if not self.begun:
            self._connection.begin(self._response, [])  # without a length h11 sends chunks
            self.begun = True
        self._connection.send(h11.Data(data=bytes(data)))
        return len(data)

    def abandon(self) -> None:
        """Send nothing any more: what a buffer still holds is not wanted."""
        self._abandoned = True

    def finish(self) -> None:
        """Nothing follows any more."""
        if not self.begun:
            self._connection.begin(self._response, [])
        self._connection.send(h11.EndOfMessage())
