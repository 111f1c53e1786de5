"""ZFS pools for tests, which only a guest's kernel has."""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hpmapper.pool.base import GIB
from hpmapper.pool.tools import run_tool


@contextmanager
def pool_on(device: Path) -> Iterator[str]:
    """A pool on a file or device; gives its name, and destroys it with all that is in it.

    Without compression, so that what is written takes what it takes elsewhere.
    """
    name = f"test-{secrets.token_hex(4)}"
    run_tool(["zpool", "create", "-f", "-m", "none", "-O", "compression=off", name, device])
    try:
        yield name
    finally:
        subprocess.run(["zpool", "destroy", "-f", name], check=True, capture_output=True)


@contextmanager
def dataset(directory: Path, size: int = 2 * GIB) -> Iterator[str]:
    """An empty dataset in a pool of its own, in a sparse file.

    `directory`: as the kernel's own threads see it, which open the file. They know no private mounts.
    """
    file = directory / "zpool"
    file.touch()
    os.truncate(file, size)
    try:
        with pool_on(file) as pool:
            run_tool(["zfs", "create", f"{pool}/hpmapper"])
            yield f"{pool}/hpmapper"
    finally:
        file.unlink()
