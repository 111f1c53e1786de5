"""libnghttp2, as far as a server needs it: a session that is fed bytes and asked for bytes (nghttp2.org/documentation).

Callbacks are bound once for each connection. Frames are read at their offsets instead of through structures: a
callback runs a dozen times for each call, and ctypes' structures would cost as much as the call's work.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Callable, Sequence
from ctypes import POINTER, c_char_p, c_int, c_int32, c_size_t, c_ssize_t, c_uint8, c_uint32, c_void_p
from typing import Any, Protocol

from hpmapper.errors import Unsupported

DATA_FRAME, HEADERS_FRAME = 0, 1
NO_ERROR, CANCEL = 0, 8

_FLAG_END_STREAM = 1
_DATA_FLAG_EOF, _DATA_FLAG_NO_END_STREAM = 1, 2
_CALLBACK_FAILURE = -902
_MAX_CONCURRENT_STREAMS, _INITIAL_WINDOW_SIZE = 3, 4
_STREAM_ID_OFFSET, _TYPE_OFFSET, _FLAGS_OFFSET = 8, 12, 13  # nghttp2_frame_hd
_NV_FLAG_NONE = 0

Headers = Sequence[tuple[bytes, bytes]]


class _Nv(ctypes.Structure):
    _fields_ = (
        ("name", c_char_p),
        ("value", c_char_p),
        ("namelen", c_size_t),
        ("valuelen", c_size_t),
        ("flags", c_uint8),
    )


class _Setting(ctypes.Structure):
    _fields_ = (("id", c_int32), ("value", c_uint32))


_READ = ctypes.CFUNCTYPE(c_ssize_t, c_void_p, c_int32, c_void_p, c_size_t, POINTER(c_uint32), c_void_p, c_void_p)


class _DataProvider(ctypes.Structure):
    _fields_ = (("source", c_void_p), ("read", _READ))


_ON_BEGIN = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p, c_void_p)
_ON_HEADER = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p, c_void_p, c_size_t, c_void_p, c_size_t, c_uint8, c_void_p)
_ON_DATA = ctypes.CFUNCTYPE(c_int, c_void_p, c_uint8, c_int32, c_void_p, c_size_t, c_void_p)
_ON_FRAME = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p, c_void_p)
_ON_CLOSE = ctypes.CFUNCTYPE(c_int, c_void_p, c_int32, c_uint32, c_void_p)

_string_at = ctypes.string_at
_stream_id = c_int32.from_address
_byte = c_uint8.from_address


def _load() -> Any:
    for name in ("libnghttp2.so.14", ctypes.util.find_library("nghttp2")):
        if name:
            try:
                return ctypes.CDLL(name)
            except OSError:
                continue
    raise Unsupported("libnghttp2 is not installed", hint="apt-get install libnghttp2-14")


_library: Any = None


def library() -> Any:
    """The loaded library; Unsupported if it is not installed."""
    global _library
    if _library is None:
        lib = _load()
        lib.nghttp2_session_mem_recv.argtypes = (c_void_p, c_char_p, c_size_t)
        lib.nghttp2_session_mem_recv.restype = c_ssize_t
        lib.nghttp2_session_mem_send.argtypes = (c_void_p, POINTER(c_void_p))
        lib.nghttp2_session_mem_send.restype = c_ssize_t
        lib.nghttp2_submit_response.argtypes = (c_void_p, c_int32, c_void_p, c_size_t, c_void_p)
        lib.nghttp2_submit_trailer.argtypes = (c_void_p, c_int32, c_void_p, c_size_t)
        lib.nghttp2_submit_rst_stream.argtypes = (c_void_p, c_uint8, c_int32, c_uint32)
        lib.nghttp2_submit_goaway.argtypes = (c_void_p, c_uint8, c_int32, c_uint32, c_char_p, c_size_t)
        lib.nghttp2_submit_settings.argtypes = (c_void_p, c_uint8, c_void_p, c_size_t)
        for name in ("nghttp2_session_want_read", "nghttp2_session_want_write", "nghttp2_session_del"):
            getattr(lib, name).argtypes = (c_void_p,)
        lib.nghttp2_session_get_last_proc_stream_id.argtypes = (c_void_p,)
        lib.nghttp2_session_get_last_proc_stream_id.restype = c_int32
        lib.nghttp2_strerror.restype = c_char_p
        _library = lib
    return _library


class ProtocolError(Exception):
    """The peer does not speak HTTP/2: its connection is to be closed."""


class HeaderBlock:
    """Headers in the form that the library takes; made once where they are always the same."""

    def __init__(self, headers: Headers) -> None:
        self.count = len(headers)
        self.array = (_Nv * self.count)(
            *(_Nv(name, value, len(name), len(value), _NV_FLAG_NONE) for name, value in headers)
        )


class Listener(Protocol):
    """Whom a session tells what came in. An exception ends the connection."""

    def begun(self, stream: int) -> None:
        """A request begins."""

    def header(self, name: bytes, value: bytes) -> None:
        """The next header of the request that began last."""

    def data(self, stream: int, piece: bytes) -> None:
        """More of a request's body."""

    def ended(self, stream: int) -> None:
        """A request is complete."""

    def closed(self, stream: int) -> None:
        """A stream is gone: answered, or cancelled by the peer."""


class Session:
    """One connection's protocol state."""

    def __init__(self, listener: Listener, *, max_streams: int, window: int) -> None:
        self._lib = library()
        self._listener = listener
        self._error: BaseException | None = None
        self._bodies: dict[int, tuple[memoryview, HeaderBlock]] = {}
        self._callbacks = self._bind()
        self._provider = _DataProvider(None, _READ(self._read))
        self._provider_address = ctypes.addressof(self._provider)
        self._session = c_void_p()
        self._out = c_void_p()
        self._create(max_streams, window)

    def _bind(self) -> dict[str, Any]:
        return {
            "on_begin_headers": _ON_BEGIN(self._on_begin),
            "on_header": _ON_HEADER(self._on_header),
            "on_data_chunk_recv": _ON_DATA(self._on_data),
            "on_frame_recv": _ON_FRAME(self._on_frame),
            "on_stream_close": _ON_CLOSE(self._on_close),
        }

    def _create(self, max_streams: int, window: int) -> None:
        callbacks = c_void_p()
        self._check(self._lib.nghttp2_session_callbacks_new(ctypes.byref(callbacks)))
        for name, function in self._callbacks.items():
            getattr(self._lib, f"nghttp2_session_callbacks_set_{name}_callback")(callbacks, function)
        try:
            self._check(self._lib.nghttp2_session_server_new(ctypes.byref(self._session), callbacks, None))
        finally:
            self._lib.nghttp2_session_callbacks_del(callbacks)
        settings = (_Setting * 2)(
            _Setting(_MAX_CONCURRENT_STREAMS, max_streams), _Setting(_INITIAL_WINDOW_SIZE, window)
        )
        self._check(self._lib.nghttp2_submit_settings(self._session, 0, settings, 2))

    def close(self) -> None:
        """Free the state; the session is not usable any more."""
        if self._session:
            self._lib.nghttp2_session_del(self._session)
            self._session = c_void_p()

    def feed(self, data: bytes) -> None:
        """Take in bytes from the peer.

        Raises:
            ProtocolError: they are no HTTP/2.
        """
        count = self._lib.nghttp2_session_mem_recv(self._session, data, len(data))
        if self._error is not None:
            raise self._error
        self._check(count)

    def pending(self) -> bytes:
        """The bytes that are to be sent to the peer now."""
        pieces = []
        while (count := self._lib.nghttp2_session_mem_send(self._session, self._out)) > 0:
            pieces.append(_string_at(self._out.value or 0, count))
        if self._error is not None:
            raise self._error
        self._check(count)
        return b"".join(pieces)

    def is_over(self) -> bool:
        """Whether neither side has anything more to say."""
        return not (
            self._lib.nghttp2_session_want_read(self._session) or self._lib.nghttp2_session_want_write(self._session)
        )

    def respond(self, stream: int, headers: HeaderBlock, body: bytes, trailers: HeaderBlock) -> None:
        """Answer a request with headers, a body and trailers."""
        self._bodies[stream] = memoryview(body), trailers
        self._submit(stream, headers, self._provider_address)

    def respond_headers(self, stream: int, headers: HeaderBlock) -> None:
        """Answer a request with headers alone."""
        self._submit(stream, headers, None)

    def _submit(self, stream: int, headers: HeaderBlock, provider: int | None) -> None:
        self._check(self._lib.nghttp2_submit_response(self._session, stream, headers.array, headers.count, provider))

    def cancel(self, stream: int) -> None:
        """End a stream without an answer."""
        self._check(self._lib.nghttp2_submit_rst_stream(self._session, 0, stream, CANCEL))

    def go_away(self) -> None:
        """Tell the peer that no further requests are taken; those that came are still answered."""
        last = self._lib.nghttp2_session_get_last_proc_stream_id(self._session)
        self._check(self._lib.nghttp2_submit_goaway(self._session, 0, last, NO_ERROR, None, 0))

    def _check(self, result: int) -> None:
        if result < 0:
            raise ProtocolError(self._lib.nghttp2_strerror(int(result)).decode())

    # Callbacks. An exception must not leave them: it is kept, and the library told to stop.

    def _guarded(self, tell: Callable[..., None], *values: Any) -> int:
        try:
            tell(*values)
        except BaseException as error:  # raised again by whoever called the library
            self._error = error
            return _CALLBACK_FAILURE
        return 0

    def _on_begin(self, _: int, frame: int, __: int) -> int:
        return self._guarded(self._listener.begun, _stream_id(frame + _STREAM_ID_OFFSET).value)

    def _on_header(self, _: int, __: int, name: int, name_size: int, value: int, value_size: int, *___: int) -> int:
        return self._guarded(self._listener.header, _string_at(name, name_size), _string_at(value, value_size))

    def _on_data(self, _: int, __: int, stream: int, data: int, size: int, ___: int) -> int:
        return self._guarded(self._listener.data, stream, _string_at(data, size))

    def _on_frame(self, _: int, frame: int, __: int) -> int:
        is_request = _byte(frame + _TYPE_OFFSET).value <= HEADERS_FRAME
        if is_request and _byte(frame + _FLAGS_OFFSET).value & _FLAG_END_STREAM:
            return self._guarded(self._listener.ended, _stream_id(frame + _STREAM_ID_OFFSET).value)
        return 0

    def _on_close(self, _: int, stream: int, __: int, ___: int) -> int:
        self._bodies.pop(stream, None)
        return self._guarded(self._listener.closed, stream)

    def _read(self, _: int, stream: int, buffer: int, size: int, flags: Any, *__: int) -> int:
        body, trailers = self._bodies[stream]
        count = min(size, len(body))
        ctypes.memmove(buffer, bytes(body[:count]), count)
        if count == len(body):
            flags[0] = _DATA_FLAG_EOF | _DATA_FLAG_NO_END_STREAM
            self._lib.nghttp2_submit_trailer(self._session, stream, trailers.array, trailers.count)
        else:
            self._bodies[stream] = body[count:], trailers
        return count
