"""Writing out what is being unpacked while it is being unpacked.

A layer that containerd's own differ unpacks through a mount is made durable at Commit, and Commit runs inside
containerd's global transaction: what is left to write then has to be little (design traps 5 and 6).
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from hpmapper.kernel.sync import syncfs
from hpmapper.model import SnapshotId

log = logging.getLogger(__name__)

_SECONDS = 0.5
"""Between two rounds: what is written in that time is what a Commit may have to wait for."""


class Writeback:
    """A thread that writes out one file system for as long as snapshots on it are being unpacked into."""

    def __init__(self, place: Path) -> None:
        """`place` is anywhere on the file system."""
        self._place = place
        self._unpacking: set[SnapshotId] = set()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="writeback")

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def begin(self, snapshot: SnapshotId) -> None:
        """Something is going to be unpacked into a snapshot."""
        with self._wake:
            self._unpacking.add(snapshot)
            self._wake.notify()

    def end(self, snapshot: SnapshotId) -> None:
        """No more; one that never began is no error."""
        with self._wake:
            if snapshot in self._unpacking:  # else nobody is to be woken: every commit and removal comes by here
                self._unpacking.discard(snapshot)
                self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._stopping or self._unpacking)
                self._wake.wait_for(lambda: self._stopping or not self._unpacking, timeout=_SECONDS)
                if self._stopping:
                    return
                if not self._unpacking:
                    continue
            try:
                syncfs(self._place)
            except OSError as error:
                log.warning("cannot write out %s: %s", self._place, error)  # whoever commits will hear of it
