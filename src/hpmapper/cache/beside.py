"""A process beside a starting container: forked, because whoever starts containers forks and may have no threads."""

from __future__ import annotations

import logging
import os
import select
import signal
from collections.abc import Callable, Collection
from typing import NoReturn, Self

log = logging.getLogger(__name__)


class Beside:
    """Runs `act(told)` in a child process; `told` becomes readable when the child shall end, or its maker is gone.

    The child has nothing of its maker open but `kept`, not even locks: an inherited descriptor would hold them on.
    SQLite is out of bounds for it, whatever the file: the library remembers its maker's connections.
    """

    def __init__(self, act: Callable[[Side], object], kept: Collection[int] = ()) -> None:
        ready, say_ready = os.pipe2(os.O_CLOEXEC)
        told, self._tell = os.pipe2(os.O_CLOEXEC)
        self._pid: int | None = os.fork()
        if self._pid == 0:
            _child(act, Side(told, say_ready), kept)
        os.close(told)
        os.close(say_ready)
        self._ready = ready

    def wait_ready(self, seconds: float = 5.0) -> None:
        """Wait until the child has said that it is ready, has ended, or time is up."""
        select.select([self._ready], [], [], seconds)

    def end(self, *, kill: bool = False) -> None:
        """Tell it to end, or end it, and wait for that. Does nothing the second time."""
        if self._pid is None:
            return
        if kill:
            os.kill(self._pid, signal.SIGKILL)
        os.close(self._tell)
        os.close(self._ready)
        os.waitpid(self._pid, 0)
        self._pid = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()


class Side:
    """What the child knows."""

    def __init__(self, told: int, say_ready: int) -> None:
        self.told = told
        self._say_ready = say_ready

    def ready(self) -> None:
        """Say so."""
        try:
            os.write(self._say_ready, b"1")
        except BrokenPipeError:
            pass  # nobody waits any more


def _child(act: Callable[[Side], object], side: Side, kept: Collection[int]) -> NoReturn:
    status = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_IGN)  # a terminal's go to all; the maker decides when this ends
        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1):
            os.dup2(null, standard)
        _close_all_but({0, 1, 2, side.told, side._say_ready, *kept})
        act(side)
        status = 0
    except Exception as error:
        log.warning("a start's profile is neither recorded nor read ahead: %s", error)
        log.debug("", exc_info=True)
    finally:
        os._exit(status)


def _close_all_but(kept: set[int]) -> None:
    for name in os.listdir("/proc/self/fd"):
        number = int(name)
        if number not in kept:
            try:
                os.close(number)
            except OSError:
                pass  # the directory's own, by now
