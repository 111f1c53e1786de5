"""Unix sockets that servers listen on: for their owner alone, and in the place of what a dead server has left."""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

from hpmapper.errors import FailedPrecondition, InvalidArgument
from hpmapper.kernel.syscall import opened

_MAX_PATH = 107  # unix(7)


def bind(listener: socket.socket, address: Path, other: str) -> None:
    """Give a unix socket its path, and listen: who finds the path can connect.

    `other`: what an operator may name another of, for hints: "--address".

    Raises:
        FailedPrecondition: somebody listens there already, or something else is there.
        InvalidArgument: the path is too long for a socket.
    """
    if len(os.fsencode(address)) > _MAX_PATH:
        raise InvalidArgument(f"{address} is too long for a socket", hint=f"at most {_MAX_PATH} bytes")
    _clear_stale(address, other)
    os.fchmod(listener.fileno(), 0o600)  # bind(2) takes the mode of the socket for its name: never open to others
    try:
        _bind_and_listen(listener, address)
    except OSError as error:
        raise FailedPrecondition(f"cannot listen on {address}: {error.strerror}") from error


def _bind_and_listen(listener: socket.socket, address: Path) -> None:
    """Under another name at first: between bind(2) and listen(2) a socket refuses whoever connects."""
    with opened(address.parent, os.O_PATH | os.O_DIRECTORY) as parent:
        new = f"/proc/self/fd/{parent}/.{address.name}.new"  # however long the path
        with suppress(FileNotFoundError):
            os.unlink(new)
        listener.bind(new)
        try:
            listener.listen(socket.SOMAXCONN)
            os.link(new, address)  # as bind(2) itself: not if somebody was faster
        finally:
            os.unlink(new)


def _clear_stale(address: Path, other: str) -> None:
    """Remove the socket of a server that is gone."""
    try:
        if not stat.S_ISSOCK(address.lstat().st_mode):
            raise FailedPrecondition(f"{address} is not a socket", hint=f"name another {other}")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(os.fspath(address))
        except (FileNotFoundError, ConnectionRefusedError):
            address.unlink(missing_ok=True)
            return
    raise FailedPrecondition(f"somebody else serves {address} already", hint=f"stop it, or name another {other}")
