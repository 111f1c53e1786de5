"""The gRPC server under a real gRPC client, and under peers that are none."""

from __future__ import annotations

import errno
import os
import resource
import socket
import stat
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import grpc
import pytest

from hpmapper.errors import FailedPrecondition, InvalidArgument, NotFound
from hpmapper.rpc.server import MAX_MESSAGE, After, Call, Later, Method, Server, _Connection
from hpmapper.rpc.status import Code, Failure

_SECONDS = 60
_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1), ("grpc.enable_retries", 0)]
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class Place:
    """A server, and the methods that it has."""

    def __init__(self, directory: Path) -> None:
        self.address = directory / "s.sock"
        self.entered = threading.Event()
        self.go_on = threading.Event()
        self.cancelled = threading.Event()
        self.batches: list[int] = []
        self.server = self.new_server()

    def new_server(self) -> Server:
        methods = {
            "/t/Echo": Method(lambda call: [call.message], quick=True),
            "/t/SlowEcho": Method(lambda call: [call.message]),
            "/t/Twice": Method(lambda call: iter([call.message, call.message])),
            "/t/Nothing": Method(lambda call: iter(())),
            "/t/Fail": Method(_fail, quick=True),
            "/t/SlowFail": Method(_fail_late),
            "/t/Bug": Method(lambda call: [b"%d" % (1 // 0)], quick=True),
            "/t/Later": Method(_later, quick=True),
            "/t/After": Method(lambda call: After(lambda: [b"after " + call.message]), quick=True),
            "/t/AfterFail": Method(lambda call: After(lambda: _fail(call), slow=True), quick=True),
            "/t/Metadata": Method(lambda call: [repr(sorted(call.metadata)).encode()], quick=True),
            "/t/Wait": Method(self._wait, long=True),
        }
        return Server(methods, self._batch)

    @contextmanager
    def _batch(self) -> Iterator[None]:
        self.batches.append(1)
        yield

    def _wait(self, call: Call) -> Iterable[bytes]:
        self.entered.set()
        while not self.go_on.wait(0.01):
            if call.cancelled.is_set():
                self.cancelled.set()
                raise NotFound("nobody waits")
        return [call.message]

    def connect(self) -> socket.socket:
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        peer.settimeout(_SECONDS)
        try:
            peer.connect(os.fspath(self.address))
        except OSError:
            peer.close()
            raise
        return peer

    @contextmanager
    def channel(self) -> Iterator[Any]:
        with _dialled(self.address) as channel:
            yield channel


def _dialled(address: Path) -> Any:  # serializers are optional, which the stubs do not know
    return grpc.insecure_channel(f"unix:{address}", options=_OPTIONS)


def _fail(call: Call) -> Iterable[bytes]:
    raise NotFound(call.message.decode(), hint="look elsewhere")


def _fail_late(call: Call) -> Iterator[bytes]:
    yield b"first"
    raise InvalidArgument("too late")


def _later(call: Call) -> Iterable[bytes]:
    if call.quick:
        raise Later
    return [threading.current_thread().name.encode()]


@contextmanager
def _running(server: Server) -> Iterator[None]:
    server.start()
    try:
        yield
    finally:
        server.stop(10)
        server.close()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    made.server.bind(made.address)
    with _running(made.server):
        yield made
        made.go_on.set()


@pytest.fixture
def channel(place: Place) -> Iterator[Any]:
    with place.channel() as made:
        yield made


def _unary(channel: Any, name: str) -> Callable[..., bytes]:
    call = channel.unary_unary(f"/t/{name}")
    return lambda message=b"", **more: call(message, timeout=_SECONDS, **more)


def _refused(attempt: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        attempt()
    assert isinstance(caught.value, grpc.Call)
    return caught.value.code(), caught.value.details()


@pytest.mark.parametrize("name", ["Echo", "SlowEcho"])
@pytest.mark.parametrize("size", [0, 1, 16_384, 1 << 20, MAX_MESSAGE - 5])
def test_messages_come_back_whole(channel: Any, name: str, size: int) -> None:
    message = os.urandom(size)
    assert _unary(channel, name)(message) == message


def test_a_message_that_is_too_long_is_refused_and_the_connection_goes_on(channel: Any) -> None:
    code, text = _refused(lambda: _unary(channel, "Echo")(bytes(MAX_MESSAGE + 1)))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(MAX_MESSAGE) in text
    assert _unary(channel, "Echo")(b"still there") == b"still there"


def test_answers_of_several_messages_and_of_none(channel: Any) -> None:
    assert list(channel.unary_stream("/t/Twice")(b"x" * 100_000, timeout=_SECONDS)) == [b"x" * 100_000] * 2
    assert list(channel.unary_stream("/t/Nothing")(b"", timeout=_SECONDS)) == []


@pytest.mark.parametrize(
    "text", ["no 'käse' here", "100 % of it\nin two lines", "日本語 🧀", "", "trailing \x00 zero", "a%20b"]
)
def test_an_error_has_its_code_and_text(channel: Any, text: str) -> None:
    assert _refused(lambda: _unary(channel, "Fail")(text.encode())) == (
        grpc.StatusCode.NOT_FOUND,
        f"{text} (look elsewhere)",
    )


@pytest.mark.parametrize("character", ["x", "🧀", "\n"])
def test_a_long_error_keeps_its_beginning_and_its_end(channel: Any, character: str) -> None:
    code, text = _refused(lambda: _unary(channel, "Fail")((character * 32768).encode()))
    assert code is grpc.StatusCode.NOT_FOUND
    assert text.startswith(character * 100)
    assert text.endswith("(look elsewhere)")


def test_an_error_with_undecodable_bytes_is_told(place: Place) -> None:
    def fail(call: Call) -> Iterable[bytes]:
        raise NotFound(os.fsdecode(b"no \xff\xfe here"))

    place.server._methods[b"/t/Undecodable"] = ("t/Undecodable", Method(fail, quick=True))
    with place.channel() as channel:
        code, text = _refused(lambda: _unary(channel, "Undecodable")())
        assert code is grpc.StatusCode.NOT_FOUND
        assert text == r"no \udcff\udcfe here"


def test_other_errors(channel: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert _refused(lambda: _unary(channel, "Missing")())[0] is grpc.StatusCode.UNIMPLEMENTED
    code, text = _refused(lambda: _unary(channel, "Bug")())
    assert code is grpc.StatusCode.INTERNAL
    assert "ZeroDivisionError" in text
    assert "ZeroDivisionError" in caplog.text
    assert _refused(lambda: list(channel.unary_stream("/t/SlowFail")(b"", timeout=_SECONDS)))[1] == "too late"
    assert _refused(lambda: _unary(channel, "AfterFail")(b"gone"))[0] is grpc.StatusCode.NOT_FOUND
    assert _unary(channel, "After")(b"all") == b"after all"
    assert _unary(channel, "Later")().startswith(b"slow-rpc")
    compressed = channel.unary_unary("/t/Echo")
    code, _ = _refused(lambda: compressed(b"x" * 1000, timeout=_SECONDS, compression=grpc.Compression.Gzip))
    assert code is grpc.StatusCode.UNIMPLEMENTED


def test_metadata_of_containerd_is_passed_on(channel: Any) -> None:
    sent = (("containerd-namespace", "k8s.io"), ("containerd-lease", "l-1"), ("other", "thing"))
    answer = _unary(channel, "Metadata")(metadata=sent)
    assert answer == b"[('containerd-lease', 'l-1'), ('containerd-namespace', 'k8s.io')]"


def test_headers_that_are_too_long_are_refused(channel: Any) -> None:
    sent = (("containerd-namespace", "x" * 20_000),)
    assert _refused(lambda: _unary(channel, "Echo")(metadata=sent))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert _unary(channel, "Echo")(b"x") == b"x"


def test_many_calls_at_once_on_one_connection(place: Place, channel: Any) -> None:
    names = ["Echo", "Fail", "SlowEcho"]
    calls = [
        (name, number, channel.unary_unary(f"/t/{name}").future(b"%d" % number, timeout=_SECONDS))
        for number in range(400)
        for name in names
    ]
    for name, number, call in calls:
        if name == "Fail":
            assert call.exception(_SECONDS).code() is grpc.StatusCode.NOT_FOUND
            assert call.details().startswith(f"{number} ")
        else:
            assert call.result(_SECONDS) == b"%d" % number
    assert place.batches, "calls that came together are answered together"


def test_a_failed_batch_fails_all_calls_in_it(tmp_path: Path) -> None:
    @contextmanager
    def full() -> Iterator[None]:
        yield
        raise FailedPrecondition("the disk is full")

    server = Server({"/t/Echo": Method(lambda call: [call.message], quick=True)}, full)
    server.bind(tmp_path / "s.sock")
    with _running(server), _dialled(tmp_path / "s.sock") as channel:
        calls = [channel.unary_unary("/t/Echo").future(b"", timeout=_SECONDS) for _ in range(500)]
        codes = {call.exception(_SECONDS) and call.code() for call in calls}
        assert grpc.StatusCode.FAILED_PRECONDITION in codes
        assert codes <= {None, grpc.StatusCode.FAILED_PRECONDITION}


def test_a_cancelled_call_is_told_so(place: Place, channel: Any) -> None:
    call = channel.unary_unary("/t/Wait").future(b"", timeout=_SECONDS)
    assert place.entered.wait(_SECONDS)
    call.cancel()
    assert place.cancelled.wait(_SECONDS)
    assert _unary(channel, "Echo")(b"x") == b"x"


def test_a_deadline_ends_a_call(place: Place, channel: Any) -> None:
    assert _refused(lambda: channel.unary_unary("/t/Wait")(b"", timeout=0.1))[0] is grpc.StatusCode.DEADLINE_EXCEEDED
    assert place.cancelled.wait(_SECONDS)


def test_a_dropped_connection_ends_its_calls(place: Place) -> None:
    with place.channel() as channel:
        call = channel.unary_unary("/t/Wait").future(b"", timeout=_SECONDS)
        assert place.entered.wait(_SECONDS)
    assert call.done()
    assert place.cancelled.wait(_SECONDS)
    with place.channel() as channel:
        assert _unary(channel, "Echo")(b"x") == b"x"


def test_nothing_is_sent_on_a_connection_that_was_closed(place: Place) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        connection = _Connection(ours, deque())
        connection.close()
        place.server._flush(connection)  # would touch freed memory
        assert theirs.recv(1) == b""


def test_calls_that_take_long_keep_nobody_waiting(place: Place, channel: Any) -> None:
    waiting = [channel.unary_unary("/t/Wait").future(b"%d" % number, timeout=_SECONDS) for number in range(20)]
    assert place.entered.wait(_SECONDS)
    assert _unary(channel, "SlowEcho")(b"meanwhile") == b"meanwhile"
    place.go_on.set()
    assert [call.result(_SECONDS) for call in waiting] == [b"%d" % number for number in range(20)]


_GARBAGE = {
    "text": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "zeros": bytes(1000),
    "noise": bytes(range(255, -1, -1)) * 20,
    "half a preface": _PREFACE[:10],
    "preface and noise": _PREFACE + b"\xff" * 100,
    "a frame that is too long": _PREFACE + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01",
    "data for no stream": _PREFACE + bytes(9) + b"\x00\x00\x04\x00\x01\x00\x00\x00\x01abcd",
    "headers that cannot be decoded": _PREFACE + bytes(3) + b"\4" + bytes(5) + b"\0\0\2\1\5\0\0\0\1\xff\xff",
}


@pytest.mark.parametrize("garbage", _GARBAGE.values(), ids=_GARBAGE)
def test_garbage_instead_of_http2(place: Place, garbage: bytes) -> None:
    with place.connect() as peer:
        peer.sendall(garbage)
        peer.shutdown(socket.SHUT_WR)
        while peer.recv(4096):
            pass
    with place.channel() as channel:
        assert _unary(channel, "Echo")(b"x") == b"x"


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def _literal(*headers: tuple[bytes, bytes]) -> bytes:
    """HPACK, never indexed, without Huffman codes (RFC 7541, 6.2.3)."""
    return b"".join(b"\x10" + bytes((len(k),)) + k + bytes((len(v),)) + v for k, v in headers)


_HEADERS = (
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/t/Echo"),
    (b":authority", b"localhost"),
    (b"content-type", b"application/grpc"),
    (b"te", b"trailers"),
)
_START = _PREFACE + _frame(4, 0, 0, b"")


def _raw(place: Place, *frames: bytes) -> bytes:
    """What the server answers to frames, until it has ended stream 1, or the connection."""
    with place.connect() as peer:
        peer.sendall(_START + b"".join(frames))
        got = b""
        while not _is_ended(got) and (piece := peer.recv(65536)):
            got += piece
    return got


def _is_ended(got: bytes) -> bool:
    at = 0
    while at + 9 <= len(got):
        size, kind, flags = int.from_bytes(got[at : at + 3], "big"), got[at + 3], got[at + 4]
        if int.from_bytes(got[at + 5 : at + 9], "big") == 1 and (kind == 3 or (kind in (0, 1) and flags & 1)):
            return True
        at += 9 + size
    return False


@pytest.mark.parametrize(
    ("body", "code"),
    [(b"", b"13"), (b"\0\0", b"13"), (b"\0\0\0\0\5abc", b"13"), (b"\0\0\0\0\1abc", b"13"), (b"\1\0\0\0\0", b"12")],
)
def test_a_malformed_message_is_refused(place: Place, body: bytes, code: bytes) -> None:
    got = _raw(place, _frame(1, 4, 1, _literal(*_HEADERS)), _frame(0, 1, 1, body))
    assert b"grpc-status" in got or code in got  # either may be Huffman-coded or in a table
    with place.channel() as channel:
        assert _unary(channel, "Echo")(b"x") == b"x"


def test_a_request_that_is_not_grpc_gets_415(place: Place) -> None:
    headers = [(k, v) for k, v in _HEADERS if k != b"content-type"]
    assert b"415" in _raw(place, _frame(1, 5, 1, _literal(*headers)))


def test_half_a_request_is_forgotten(place: Place) -> None:
    for _ in range(50):
        with place.connect() as peer:
            peer.sendall(_START + _frame(1, 4, 1, _literal(*_HEADERS)) + _frame(0, 0, 1, b"\0\0\0"))
    with place.channel() as channel:
        assert _unary(channel, "Echo")(b"x") == b"x"
    assert len(place.server._connections) <= 1


def test_trailers_and_resets_of_a_client_do_no_harm(place: Place) -> None:
    opened = _frame(1, 4, 1, _literal(*_HEADERS)) + _frame(0, 0, 1, b"\0\0\0\0\1x")
    _raw(place, opened, _frame(1, 5, 1, _literal((b"after", b"all"))))
    _raw(place, opened, _frame(3, 0, 1, bytes(4)), _frame(0, 1, 1, b"late"))
    with place.channel() as channel:
        assert _unary(channel, "Echo")(b"x") == b"x"


def test_a_peer_that_asks_and_never_reads_does_not_fill_the_memory(place: Place) -> None:
    pings = _frame(6, 0, 0, bytes(8)) * 1000
    with place.connect() as peer:
        peer.settimeout(2)
        try:
            peer.sendall(_START)
            for _ in range(400):
                peer.sendall(pings)
        except OSError:
            pass  # cut off, or not read from any more
        assert all(len(one.out) < 1 << 20 for one in place.server._connections)
    with place.channel() as channel:
        assert _unary(channel, "Echo")(b"x") == b"x"


def test_a_thousand_connections(place: Place) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # both ends are in this process
    try:
        with ExitStack() as stack:
            for _ in range(1000):
                stack.enter_context(place.connect()).sendall(_START)
            with place.channel() as channel:
                assert _unary(channel, "Echo")(b"x") == b"x"
            assert len(place.server._connections) >= 1000
        with place.channel() as channel:
            assert _unary(channel, "Echo")(b"x") == b"x"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_stopping_answers_what_is_under_way(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.server.bind(place.address)
    place.server.start()
    with place.channel() as channel, place.channel() as other:
        call = channel.unary_unary("/t/Wait").future(b"x", timeout=_SECONDS)
        assert place.entered.wait(_SECONDS)
        stopping = threading.Thread(target=lambda: place.server.stop(_SECONDS))
        stopping.start()
        while True:  # until it takes no more connections
            try:
                place.connect().close()
            except ConnectionRefusedError:
                break
        assert _refused(lambda: _unary(other, "Echo")())[0] is grpc.StatusCode.UNAVAILABLE
        place.go_on.set()
        assert call.result(_SECONDS) == b"x"
        stopping.join(_SECONDS)
        assert not stopping.is_alive()
    place.server.close()


def test_stopping_ends_what_takes_too_long(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.server.bind(place.address)
    place.server.start()
    with place.channel() as channel:
        call = channel.unary_unary("/t/Wait").future(b"x", timeout=_SECONDS)
        assert place.entered.wait(_SECONDS)
        place.server.stop(0)
        place.server.close()
        assert place.cancelled.is_set()
        assert call.exception(_SECONDS).code() is grpc.StatusCode.UNAVAILABLE


def test_a_server_that_cannot_go_on_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = Place(tmp_path)
    place.server.bind(place.address)
    failed = threading.Event()

    def broken() -> None:
        raise ZeroDivisionError("a bug")

    place.server._answer_done = broken  # type: ignore[method-assign]
    place.server.start(failed.set)
    place.connect().close()
    assert failed.wait(_SECONDS)
    place.server.stop(10)
    with pytest.raises(ZeroDivisionError):
        place.server.close()
    assert "a bug" in caplog.text


# The socket.


def test_only_the_owner_may_use_the_socket(place: Place) -> None:
    assert stat.S_IMODE(place.address.stat().st_mode) == 0o600


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(os.fspath(tmp_path / "s.sock"))
    place = Place(tmp_path)
    place.server.bind(place.address)
    with _running(place.server), place.channel() as channel:
        assert _unary(channel, "Echo")(b"x") == b"x"


def test_a_socket_in_use_is_left_alone(place: Place) -> None:
    other = place.new_server()
    with pytest.raises(FailedPrecondition, match="somebody else serves"):
        other.bind(place.address)
    with place.channel() as channel:
        assert _unary(channel, "Echo")(b"x") == b"x"


def test_what_is_not_a_socket_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "s.sock").write_text("precious")
    with pytest.raises(FailedPrecondition, match="is not a socket"):
        Place(tmp_path).server.bind(tmp_path / "s.sock")
    assert (tmp_path / "s.sock").read_text() == "precious"


def test_a_path_that_is_too_long_for_a_socket(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="too long"):
        Place(tmp_path).server.bind(tmp_path / ("x" * 120))


_ACTIVATED = """
import os, socket, sys
from pathlib import Path
from hpmapper.daemon import _listen
from hpmapper.rpc.server import Server, Method
from contextlib import nullcontext
os.environ["LISTEN_PID"] = str(os.getpid())
server = Server({"/t/Echo": Method(lambda call: [call.message], quick=True)}, nullcontext)
_listen(server, Path("/nonexistent/directory/s.sock"))
server.start()
sys.stdin.read()
server.stop(10)
server.close()
"""


def test_socket_activation(tmp_path: Path) -> None:
    """As systemd does it: the socket is number 3, and connections may wait in it before the daemon is there."""
    address = tmp_path / "s.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(os.fspath(address))
        listener.listen()
        child = subprocess.Popen(
            [sys.executable, "-c", f"import os; os.dup2({listener.fileno()}, 3)\n{_ACTIVATED}"],
            stdin=subprocess.PIPE,
            pass_fds=[listener.fileno()],
            env={**os.environ, "LISTEN_FDS": "1"},
        )
    with child, _dialled(address) as channel:
        assert channel.unary_unary("/t/Echo")(b"x", timeout=_SECONDS, wait_for_ready=True) == b"x"
        assert child.stdin is not None
        child.stdin.close()
        assert child.wait(_SECONDS) == 0
    assert address.exists(), "it is systemd's"


def test_without_a_batch_of_its_own(tmp_path: Path) -> None:
    server = Server({"/t/Echo": Method(lambda call: [call.message], quick=True)}, nullcontext)
    server.bind(tmp_path / "deep" / "er" / "s.sock")
    with _running(server), _dialled(tmp_path / "deep/er/s.sock") as channel:
        assert _unary(channel, "Echo")(b"x") == b"x"


def test_a_full_file_system_is_no_bug() -> None:
    failure = Failure.of(OSError(errno.ENOSPC, "No space left on device", "somewhere"))
    assert failure.code is Code.RESOURCE_EXHAUSTED
    assert "somewhere" in failure.message
