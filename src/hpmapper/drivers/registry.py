"""Which drivers there are, which work here, and which one a root uses."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hpmapper.drivers.base import Driver, Verdict
from hpmapper.drivers.hpmapper import HpmapperDriver
from hpmapper.drivers.overlay import OverlayDriver
from hpmapper.drivers.vfs import VfsDriver
from hpmapper.kernel.probe import Host
from hpmapper.pool import open_pool
from hpmapper.pool.base import PoolConfig

Options = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Registered:
    """A driver by name: how it is made, and whether it would work on this host."""

    name: str
    make: Callable[[Path, PoolConfig], Driver]
    probe: Callable[[Path], Verdict]
    needs_pool: bool = False
