"""Unix sockets: who finds the path can connect, and nothing else is left beside it."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

from hpmapper import sockets
from hpmapper.errors import FailedPrecondition


def _socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)


def test_who_finds_the_path_can_connect(tmp_path: Path) -> None:
    address = tmp_path / "s"
    refused: list[OSError] = []
    rounds = 300

    def connect_whenever_it_is_there() -> None:
        for _ in range(rounds):
            bound.wait()
            while not address.exists():
                pass
            with _socket() as client:
                try:
                    client.connect(os.fspath(address))
                except OSError as error:
                    refused.append(error)
            connected.wait()

    bound, connected = threading.Barrier(2), threading.Barrier(2)
    finder = threading.Thread(target=connect_whenever_it_is_there)
    finder.start()
    for _ in range(rounds):
        with _socket() as listener:
            bound.wait()
            sockets.bind(listener, address, "path")
            connected.wait()
            address.unlink()
    finder.join()
    assert refused == []
    assert os.listdir(tmp_path) == []


def test_what_a_killed_server_left_is_replaced(tmp_path: Path) -> None:
    for name in ("s", ".s.new"):
        with _socket() as dead:
            dead.bind(os.fspath(tmp_path / name))
    with _socket() as listener, _socket() as client:
        sockets.bind(listener, tmp_path / "s", "path")
        client.connect(os.fspath(tmp_path / "s"))
        assert os.listdir(tmp_path) == ["s"]
        with _socket() as second, pytest.raises(FailedPrecondition, match="somebody else serves"):
            sockets.bind(second, tmp_path / "s", "path")


def test_who_was_faster_keeps_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _socket() as faster, _socket() as listener, _socket() as client:
        sockets.bind(faster, tmp_path / "s", "path")
        monkeypatch.setattr(sockets, "_clear_stale", lambda *_: None)  # it came right after that
        with pytest.raises(FailedPrecondition, match="File exists"):
            sockets.bind(listener, tmp_path / "s", "path")
        client.connect(os.fspath(tmp_path / "s"))
        faster.accept()[0].close()
        assert os.listdir(tmp_path) == ["s"]


def test_the_longest_path(tmp_path: Path) -> None:
    address = tmp_path / ("s" * (107 - len(os.fsencode(tmp_path)) - 1))
    with _socket() as listener, _socket() as client:
        sockets.bind(listener, address, "path")
        assert address.stat().st_mode & 0o777 == 0o600
        client.connect(os.fspath(address))
