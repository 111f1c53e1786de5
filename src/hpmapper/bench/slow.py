"""A block device with a given latency and bandwidth, for hosts whose kernel has no dm-delay.

    with slow_device(file, target) as device:      /dev/loopN, whose reads take 1 ms or more, side by side

A loop device with direct I/O over a file that a small FUSE server hands out: one file, mounted on a file. Reads wait;
writes pass. The server is a process of its own, with many threads that mostly sleep.
"""

from __future__ import annotations

import errno
import os
import signal
import stat
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from hpmapper.kernel import loop, mount

_IN = struct.Struct("<IIQQIIIHH")  # struct fuse_in_header (include/uapi/linux/fuse.h)
_OUT = struct.Struct("<IiQ")  # struct fuse_out_header
_INIT_OUT = struct.Struct("<IIIIHHIIHHII24x")
_ATTR_OUT = struct.Struct("<QII6Q3I7I")
_OPEN_OUT = struct.Struct("<QIi")
_IO_IN = struct.Struct("<QQIIQII")  # struct fuse_read_in, and fuse_write_in

_GETATTR, _OPEN, _READ, _WRITE, _RELEASE, _FSYNC, _FLUSH, _INIT = 3, 14, 15, 16, 18, 20, 25, 26
_NO_REPLY = (2, 36, 42)  # FORGET, INTERRUPT, BATCH_FORGET
_ASYNC_READ, _ASYNC_DIO, _MAX_PAGES = 1 << 0, 1 << 15, 1 << 22
_DIRECT_IO = 1
_MAX = 1 << 20
_THREADS = 48


@contextmanager
def slow_device(file: Path, target: Path, *, seconds: float = 0.001, rate: float = 200e6) -> Iterator[Path]:
    """The device over `file`, by way of `target`, which is made; each read takes `seconds` and its share of `rate`."""
    target.touch()
    fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    server = os.fork()
    if server == 0:
        _serve(fuse, os.open(file, os.O_RDWR), seconds, rate)
    try:
        options = {"fd": str(fuse), "rootmode": "100000", "user_id": "0", "group_id": "0", "max_read": str(_MAX)}
        mount.filesystem("fuse", "slow", target, options=options)
        os.close(fuse)  # the server alone has it: with its end requests fail, instead of waiting for ever
        try:
            with loop.attached(target, block_size=4096) as device:
                yield device
        finally:
            mount.umount(target, lazy=True)
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)


def _serve(fuse: int, file: int, seconds: float, rate: float) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's goes to all: whoever mounted must end first
    try:
        server = _Server(fuse, file, seconds, rate)
        threads = [threading.Thread(target=server.run, daemon=True) for _ in range(_THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        os._exit(0)


class _Server:
    def __init__(self, fuse: int, file: int, seconds: float, rate: float) -> None:
        self._fuse = fuse
        self._file = file
        self._seconds = seconds
        self._rate = rate
        self._lock = threading.Lock()
        self._free_at = 0.0

    def run(self) -> None:
        """Answer requests until the mount is gone."""
        while True:
            try:
                request = os.read(self._fuse, _MAX + 4096)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return
                continue
            header = _IN.unpack_from(request)
            operation, unique = header[1], header[2]
            if operation not in _NO_REPLY:
                self._reply(unique, *self._answer(operation, memoryview(request)[_IN.size :]))

    def _reply(self, unique: int, error: int, data: bytes) -> None:
        os.writev(self._fuse, [_OUT.pack(_OUT.size + len(data), -error, unique), data])

    def _answer(self, operation: int, body: memoryview) -> tuple[int, bytes]:
        if operation == _READ:
            _, offset, size, *_ = _IO_IN.unpack_from(body)
            self._wait(size)
            return 0, os.pread(self._file, size, offset)
        if operation == _WRITE:
            _, offset, size, *_ = _IO_IN.unpack_from(body)
            data = body[_IO_IN.size : _IO_IN.size + size]
            return 0, struct.pack("<II", os.pwrite(self._file, data, offset), 0)
        if operation == _INIT:
            flags = _ASYNC_READ | _ASYNC_DIO | _MAX_PAGES
            return 0, _INIT_OUT.pack(7, 31, 0, flags, _THREADS, _THREADS, _MAX, 1, _MAX // 4096, 0, 0, 0)
        if operation == _GETATTR:
            size = os.fstat(self._file).st_size
            about = (1, size, size // 512, 0, 0, 0, 0, 0, 0, stat.S_IFREG | 0o600, 1, 0, 0, 0, 4096, 0)
            return 0, _ATTR_OUT.pack(3600, 0, 0, *about)
        if operation == _OPEN:
            return 0, _OPEN_OUT.pack(1, _DIRECT_IO, 0)
        if operation in (_RELEASE, _FSYNC, _FLUSH):
            return 0, b""
        return errno.ENOSYS, b""

    def _wait(self, size: int) -> None:
        """Latencies run side by side, the bytes one after the other."""
        now = time.monotonic()
        with self._lock:
            self._free_at = max(now, self._free_at) + size / self._rate
            due = max(self._free_at, now + self._seconds)
        time.sleep(due - now)
