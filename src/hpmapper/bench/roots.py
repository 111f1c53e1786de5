"""Roots of several drivers side by side, for benchmarks: on one kind of file system, removed at the end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from hpmapper.bench.figures import MIB
from hpmapper.bench.slow import slow_device
from hpmapper.config import Config
from hpmapper.engine import Engine
from hpmapper.root import open_root

PAGE = 4096


@dataclass(frozen=True)
class Place:
    """An open root of a driver, for a side."""

    name: str
    engine: Engine
    config: Config

    @property
    def home(self) -> Path:
        return self.engine.driver.scratch.parent

    @property
    def device(self) -> str:
        """MAJOR:MINOR of the file system's device."""
        number = self.home.stat().st_dev
        return f"{os.major(number)}:{os.minor(number)}"

    def device_bytes(self) -> int:
        """Bytes read from the device so far."""
        return int(Path("/sys/dev/block", self.device, "stat").read_text().split()[2]) * 512


@contextmanager
def place(root: Path, driver: str, *pool: str) -> Iterator[Place]:
    """A root, removed at the end; `pool`: storage options."""
    config = Config(root=root, driver=driver).with_options(["min_free_space=0", *(pool or ["pool.size=40G"])])
    with open_root(config) as opened:
        try:
            yield Place(driver, opened.engine, config)
        finally:
            opened.engine.detach()
    shutil.rmtree(root)


@contextmanager
def on_xfs(work: Path, *drivers: str) -> Iterator[list[Place]]:
    """Roots of these drivers, each on an XFS of its own in a loop pool."""
    with ExitStack() as stack:
        places = []
        for driver in drivers:
            if driver == "hpmapper":
                places.append(stack.enter_context(place(work / driver, driver)))
            else:
                carrier = stack.enter_context(place(work / f"{driver}-xfs", "hpmapper"))
                places.append(stack.enter_context(place(carrier.home / f"{driver}-root", driver)))
        yield places


@contextmanager
def on_slow_device(work: Path) -> Iterator[Place]:
    """A root on an XFS on a device with 1 ms of latency."""
    image = work / "slow.img"
    image.touch()
    os.truncate(image, 8 << 30)
    with slow_device(image, work / "slow") as device, place(work / "late", "hpmapper", f"pool.device={device}") as one:
        yield one
    image.unlink()


def read_all_of(path: Path) -> None:
    """Read one file."""
    with path.open("rb", buffering=0) as file:
        while file.read(MIB):
            pass
