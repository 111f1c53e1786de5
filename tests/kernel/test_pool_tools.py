"""Programs that one thread starts do not keep what another unmounts."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from hpmapper.kernel import mount
from hpmapper.pool.tools import none_starts, run_tool

pytestmark = pytest.mark.kernel

ROUNDS = 300


def test_a_program_that_starts_does_not_keep_a_mount(tmp_path: Path) -> None:
    """Between fork and exec it has every file open that this process has, those of other threads too."""
    done = threading.Event()

    def start_programs() -> None:
        while not done.is_set():
            run_tool(["true"])

    threads = [threading.Thread(target=start_programs) for _ in range(4)]
    for thread in threads:
        thread.start()
    refused = 0
    try:
        for _ in range(ROUNDS):
            mount.filesystem("tmpfs", "none", tmp_path)
            with (tmp_path / "file").open("w"):
                time.sleep(0.002)  # a program is about to start
            with none_starts():
                try:
                    mount.umount(tmp_path)
                except OSError:
                    refused += 1
                    mount.umount(tmp_path, lazy=True)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not refused
