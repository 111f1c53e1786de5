"""The server's loop: one thread for all connections.

Each turn reads what has come in on any connection, calls the methods that were asked for, and sends the answers. Quick
methods run in the loop's own thread, all of one turn inside one `batch`: a database commits once for all of them, and
no answer leaves before. Slow ones run in a pool of threads, and those that may take minutes in another: whoever waits
for a list does not wait for somebody else's layers.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from urllib.parse import quote_from_bytes

from hpmapper import sockets
from hpmapper.pipe import Flag
from hpmapper.rpc.calls import Calls
from hpmapper.rpc.nghttp2 import HeaderBlock, ProtocolError, Session
from hpmapper.rpc.status import Code, Failure

log = logging.getLogger(__name__)

Metadata = tuple[tuple[str, str], ...]
"""A call's own headers, without HTTP's and gRPC's."""

MAX_MESSAGE = 16 << 20
"""Bytes of one message: containerd's own limit (defaults.DefaultMaxRecvMsgSize)."""

_MAX_STREAMS = 4096
_MAX_HEADERS = 16 << 10  # bytes of one call's headers
_WINDOW = 1 << 20
_READ = 256 << 10
_SLOW_THREADS = 4
_LONG_THREADS = 8
_SHOWN = 600  # characters of an error's text; clients limit all headers of an answer to 8 KiB
_PREFIX = struct.Struct(">?I")  # compressed, length (gRPC over HTTP/2, "Length-Prefixed-Message")

_OK_HEADERS = HeaderBlock([(b":status", b"200"), (b"content-type", b"application/grpc")])
_OK_TRAILERS = HeaderBlock([(b"grpc-status", b"0")])
_NOT_GRPC = HeaderBlock([(b":status", b"415")])


class Later(Exception):
    """A quick method found that it would take long: it is undone and called again as a slow one."""


@dataclass(slots=True)
class Call:
    """A request. `cancelled` is set when nobody waits for the answer any more."""

    message: bytes
    headers: Sequence[tuple[bytes, bytes]] = ()
    quick: bool = True
    cancelled: Flag = field(default_factory=Flag)

    @property
    def metadata(self) -> Metadata:
        """What containerd tells of the caller: its namespace, its lease."""
        return tuple(
            (name.decode("ascii", "replace"), value.decode("utf-8", "replace"))
            for name, value in self.headers
            if name.startswith(b"containerd-")
        )


@dataclass(frozen=True, slots=True)
class After:
    """What is left of a quick call once its batch is recorded; `slow`: in a thread of its own."""

    act: Callable[[], Iterable[bytes] | After]
    slow: bool = False


@dataclass(frozen=True, slots=True)
class Method:
    """What answers a path: `call` returns the answer's messages, serialized; a unary method's only one.

    A quick one may return what is to be done `After` its batch instead. A `long` one may take minutes.
    """

    call: Callable[[Call], Iterable[bytes] | After]
    quick: bool = False
    long: bool = False


Batch = Callable[[], AbstractContextManager[object]]


class _Stream:
    """One call. `name`: its method's, "" if there is none of that path; `began`: when it had come in, for metrics."""

    __slots__ = ("began", "body", "call", "headers", "name", "size")

    def __init__(self) -> None:
        self.name = ""
        self.began = 0.0
        self.headers: list[tuple[bytes, bytes]] = []
        self.size = 0
        self.body = bytearray()
        self.call: Call | None = None


class _Connection:
    """One peer. Collects its requests; what is complete is put into the server's `ready`."""

    def __init__(self, peer: socket.socket, ready: deque[tuple[_Connection, int, _Stream]]) -> None:
        self.peer = peer
        self.out = b""
        self._ready = ready
        self._streams: dict[int, _Stream] = {}
        self._current = _Stream()
        self.session = Session(self, max_streams=_MAX_STREAMS, window=_WINDOW)

    @property
    def is_busy(self) -> bool:
        """Whether a request is not answered yet, or an answer not sent."""
        return bool(self._streams or self.out)

    def begun(self, stream: int) -> None:
        self._current = self._streams[stream] = _Stream()

    def header(self, name: bytes, value: bytes) -> None:
        here = self._current
        here.size += len(name) + len(value)
        if here.size <= _MAX_HEADERS:
            here.headers.append((name, value))

    def data(self, stream: int, piece: bytes) -> None:
        here = self._streams.get(stream)
        if here is not None and len(here.body) <= MAX_MESSAGE:  # what is longer is refused when it is complete
            here.body += piece

    def ended(self, stream: int) -> None:
        self._ready.append((self, stream, self._streams[stream]))

    def closed(self, stream: int) -> None:
        gone = self._streams.pop(stream, None)
        if gone is not None and gone.call is not None:
            gone.call.cancelled.set()

    def close(self) -> None:
        for stream in list(self._streams):
            self.closed(stream)
        self.session.close()
        self.peer.close()

    def has(self, stream: int) -> bool:
        return stream in self._streams

    def stream(self, number: int) -> _Stream | None:
        return self._streams.get(number)


class Server:
    """A gRPC server on one unix socket."""

    def __init__(self, methods: Mapping[str, Method], batch: Batch) -> None:
        """`methods`: by path, "/package.Service/Method"."""
        self._methods = {path.encode(): (path.removeprefix("/"), method) for path, method in methods.items()}
        self.calls = Calls()
        self._batch = batch
        self._selector = selectors.DefaultSelector()
        self._listener: socket.socket | None = None
        self._connections: set[_Connection] = set()
        self._ready: deque[tuple[_Connection, int, _Stream]] = deque()
        self._done: deque[tuple[_Connection, int, list[bytes] | Failure]] = deque()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._slow = ThreadPoolExecutor(_SLOW_THREADS, "slow-rpc")
        self._long = ThreadPoolExecutor(_LONG_THREADS, "long-rpc")
        self._failure: BaseException | None = None
        self._stop_at: float | None = None
        self._thread = threading.Thread(target=self._guarded_run, name="rpc")

    def bind(self, address: Path) -> None:
        """Listen on a unix socket that only its owner may use.

        Raises:
            FailedPrecondition, InvalidArgument: as `hpmapper.sockets.bind`.
        """
        address.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sockets.bind(listener, address, "--address")
        except BaseException:
            listener.close()
            raise
        self.adopt(listener)

    def adopt(self, listener: socket.socket) -> None:
        """Listen on a socket that is bound and listening already (systemd's socket activation)."""
        listener.setblocking(False)
        self._listener = listener

    def start(self, failed: Callable[[], object] = lambda: None) -> None:
        """Begin to answer. `failed` is called, in the server's thread, should it end without having been told to."""
        assert self._listener is not None, "bind it first"
        self._on_failure = failed
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wake_fd, selectors.EVENT_READ, self._woken)
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """Take no further calls and answer those under way; what takes more than `seconds` is told to end.

        `close` waits for it.
        """
        self._stop_at = time.monotonic() + seconds
        os.eventfd_write(self._wake_fd, 1)
        self._thread.join()

    def close(self) -> None:
        """Wait for the last threads of a stopped server.

        Raises:
            Whatever made the server's own thread end by itself.
        """
        for pool in (self._slow, self._long):
            pool.shutdown(wait=True, cancel_futures=True)
        os.close(self._wake_fd)
        if self._failure is not None:
            raise self._failure

    # The loop.

    def _guarded_run(self) -> None:
        try:
            self._run()
        except BaseException as error:  # raised again by `close`
            log.critical("the server ends: nobody would be answered any more", exc_info=error)
            self._failure = error
            self._on_failure()
        finally:
            for connection in list(self._connections):
                self._close(connection)
            self._selector.close()
            if self._listener is not None:
                self._listener.close()

    def _run(self) -> None:
        draining = False
        while True:
            for key, events in self._selector.select(1.0 if draining else None):
                key.data(events)
            self._answer_ready()
            self._answer_done()
            if self._stop_at is not None:
                if not draining:
                    self._drain()
                    draining = True
                if not any(one.is_busy for one in self._connections) or time.monotonic() >= self._stop_at:
                    return

    def _drain(self) -> None:
        assert self._listener is not None
        self._selector.unregister(self._listener)
        self._listener.close()
        for connection in list(self._connections):
            connection.session.go_away()
            self._flush(connection)

    def _accept(self, _: int) -> None:
        assert self._listener is not None
        try:
            peer, _address = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            log.error("cannot accept a connection: %s", error)  # too many open files: others go on
            time.sleep(0.05)
            return
        peer.setblocking(False)
        connection = _Connection(peer, self._ready)
        self._connections.add(connection)
        self._selector.register(peer, selectors.EVENT_READ, lambda events: self._serve(connection, events))
        self._flush(connection)

    def _woken(self, _: int) -> None:
        os.eventfd_read(self._wake_fd)

    def _serve(self, connection: _Connection, events: int) -> None:
        if events & selectors.EVENT_READ:
            try:
                data = connection.peer.recv(_READ)
            except BlockingIOError:
                data = None
            except OSError:
                data = b""
            if data == b"":
                self._close(connection)
                return
            if data:
                try:
                    connection.session.feed(data)
                except ProtocolError as error:
                    log.info("a client that does not speak HTTP/2 is cut off: %s", error)
                    self._close(connection)
                    return
                except Exception:
                    log.exception("a client is cut off")
                    self._close(connection)
                    return
        self._flush(connection)

    def _flush(self, connection: _Connection) -> None:
        """Send what there is; the rest when the peer has room again."""
        if connection not in self._connections:  # closed meanwhile: its session is no memory of ours any more
            return
        try:
            # No more than one piece is taken ahead of the peer: whoever does not read is not answered for ever.
            while connection.out or (piece := connection.session.pending()):
                connection.out = connection.out or piece
                connection.out = connection.out[connection.peer.send(connection.out) :]
        except BlockingIOError:
            pass
        except (OSError, ProtocolError):
            self._close(connection)
            return
        if connection.session.is_over() and not connection.out:
            self._close(connection)
            return
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.out else 0)
        key = self._selector.get_key(connection.peer)
        if key.events != wanted:
            self._selector.modify(connection.peer, wanted, key.data)

    def _close(self, connection: _Connection) -> None:
        if connection in self._connections:
            self._connections.discard(connection)
            self._selector.unregister(connection.peer)
            connection.close()

    # Calls.

    def _answer_ready(self) -> None:
        if not self._ready:
            return
        now = time.perf_counter()
        touched: dict[_Connection, None] = {}
        quick: list[tuple[_Connection, int, _Stream, Method, Call]] = []
        while self._ready:
            connection, number, stream = self._ready.popleft()
            if connection not in self._connections or not connection.has(number):
                continue
            touched[connection] = None
            stream.began = now
            try:
                method, call = self._understood(stream)
            except Failure as failure:
                self._respond(connection, number, failure)
                continue
            stream.call = call
            if method.quick:
                quick.append((connection, number, stream, method, call))
            else:
                pool = self._long if method.long else self._slow
                self._start(pool, connection, number, partial(method.call, call))
        if quick:
            self._answer_quick(quick)
        for connection in touched:
            self._flush(connection)

    def _understood(self, stream: _Stream) -> tuple[Method, Call]:
        headers = dict(stream.headers)
        if not headers.get(b"content-type", b"").startswith(b"application/grpc"):
            raise Failure(Code.UNKNOWN, "", http=True)
        if stream.size > _MAX_HEADERS:
            raise Failure(Code.RESOURCE_EXHAUSTED, f"the call's headers have more than {_MAX_HEADERS} bytes")
        path = headers.get(b":path", b"")
        found = self._methods.get(path)
        if found is None:
            raise Failure(Code.UNIMPLEMENTED, f"there is no method {path[:200].decode('utf-8', 'replace')}")
        stream.name, method = found
        body = stream.body
        if len(body) > MAX_MESSAGE:
            raise Failure(Code.RESOURCE_EXHAUSTED, f"the message has more than {MAX_MESSAGE} bytes")
        if len(body) < _PREFIX.size:
            raise Failure(Code.INTERNAL, "the call has no message")
        compressed, size = _PREFIX.unpack_from(body)
        if compressed:
            raise Failure(Code.UNIMPLEMENTED, "compressed messages are not understood")
        if size != len(body) - _PREFIX.size:
            raise Failure(Code.INTERNAL, "the call has not exactly one whole message")
        return method, Call(bytes(memoryview(body)[_PREFIX.size :]), stream.headers, method.quick)

    def _answer_quick(self, calls: list[tuple[_Connection, int, _Stream, Method, Call]]) -> None:
        """Call the quick methods of one turn; nothing is answered before the batch is over."""
        results: list[Iterable[bytes] | After | Failure] = []
        try:
            with self._batch() if len(calls) > 1 else nullcontext():
                results = [_called(method, call) for _, _, _, method, call in calls]
        except Exception as error:  # what was done is undone, for all of them
            results = [Failure.of(error)] * len(calls)
        for (connection, number, *_), result in zip(calls, results, strict=True):
            if isinstance(result, After):
                if result.slow:
                    self._start(self._slow, connection, number, result.act)
                    continue
                result = _finished(result.act)
            self._respond(connection, number, result if isinstance(result, Failure) else list(result))

    def _start(
        self,
        pool: ThreadPoolExecutor,
        connection: _Connection,
        number: int,
        act: Callable[[], Iterable[bytes] | After],
    ) -> None:
        def work() -> None:
            self._done.append((connection, number, _finished(act)))
            os.eventfd_write(self._wake_fd, 1)

        pool.submit(work)

    def _answer_done(self) -> None:
        while self._done:
            connection, number, answer = self._done.popleft()
            self._respond(connection, number, answer)
            self._flush(connection)

    def _respond(self, connection: _Connection, number: int, answer: list[bytes] | Failure) -> None:
        stream = connection.stream(number)
        if connection not in self._connections or stream is None:
            return  # gone, or cancelled
        outcome = answer.code.name if isinstance(answer, Failure) else "OK"
        self.calls.count(stream.name, outcome, time.perf_counter() - stream.began)
        session = connection.session
        try:
            if isinstance(answer, Failure):
                session.respond_headers(number, _NOT_GRPC if answer.http else _failed(answer))
            else:
                body = b"".join(_PREFIX.pack(False, len(message)) + message for message in answer)
                session.respond(number, _OK_HEADERS, body, _OK_TRAILERS)
        except ProtocolError as error:
            log.warning("a client is cut off, since it cannot be answered: %s", error)
            self._close(connection)


def _called(method: Method, call: Call) -> Iterable[bytes] | After | Failure:
    """Call a quick method."""
    try:
        return method.call(call)
    except Later:
        call.quick = False
        return After(partial(method.call, call), slow=True)
    except Exception as error:
        return Failure.of(error)


def _finished(act: Callable[[], Iterable[bytes] | After]) -> list[bytes] | Failure:
    """Carry a call through to its answer."""
    try:
        result = act()
        while isinstance(result, After):
            result = result.act()
        return list(result)
    except Exception as error:
        return Failure.of(error)


def _failed(failure: Failure) -> HeaderBlock:
    """gRPC over HTTP/2, "Trailers-Only"; a message is percent-encoded."""
    text = failure.message
    if len(text) > _SHOWN:
        text = f"{text[: _SHOWN // 2]} … {text[-_SHOWN // 2 :]}"  # a long key has the reason behind it
    message = quote_from_bytes(text.encode("utf-8", "backslashreplace"), safe=" !\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~")
    return HeaderBlock(
        [
            (b":status", b"200"),
            (b"content-type", b"application/grpc"),
            (b"grpc-status", b"%d" % failure.code),
            (b"grpc-message", message.encode("ascii")),
        ]
    )
