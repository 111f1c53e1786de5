"""Every driver that is registered, on a root of its own in memory, where no layer waits for a disk; and layers for one.

Those that want another kernel than the host's run in the guest (tests/vm); one that works nowhere says why.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from hpmapper.config import Config
from hpmapper.drivers import registry
from hpmapper.drivers.base import Driver
from hpmapper.drivers.registry import Registered
from hpmapper.kernel import mount
from hpmapper.layer.stream import Expected
from hpmapper.model import SnapshotId
from hpmapper.pool.base import GIB, PoolFs
from hpmapper.root import open_root, remove_root
from hpmapper.store.workspace import workspace
from hpmapper.testing.contract import Subject
from hpmapper.testing.tars import member, tar
from tests import zpools
from tests.filesystems import mounted

GUEST = {"devicemapper": "dm", "zfs": "zfs"}
"""Drivers that want another kernel, and the guest's feature that has it."""

OPTIONS = {
    "hpmapper": ["pool.kind=directory"],
    "btrfs": ["pool.size=2G"],
    "devicemapper": ["dm.basesize=1G", "dm.loopdatasize=2G", "dm.loopmetadatasize=64M"],
}


def parameters() -> list[object]:
    """The drivers, for pytest's `params`."""
    return [_parameter(registered) for registered in registry.DRIVERS]


def _parameter(registered: Registered) -> object:
    feature = GUEST.get(registered.name)
    return pytest.param(registered, id=registered.name, marks=[pytest.mark.guest(feature)] if feature else [])


@contextmanager
def in_memory(kind: PoolFs, directory: Path) -> Iterator[Path]:
    """A file system whose image lies in memory."""
    mount.filesystem("tmpfs", "none", directory)
    try:
        yield mounted(kind, directory, 4 * GIB)
    finally:
        for one in mount.mounts_below(directory):
            mount.umount(one.target, lazy=True)


@contextmanager
def subject_of(registered: Registered, directory: Path) -> Iterator[Subject]:
    """A driver with nothing in it, on an XFS with reflink in memory; skips where it does not work."""
    with ExitStack() as stack:
        place = stack.enter_context(in_memory(PoolFs.XFS, directory))
        options = [*OPTIONS.get(registered.name, []), "min_free_space=0"]
        if registered.name == "zfs":
            options.append(f"zfs.fsname={stack.enter_context(zpools.dataset(directory.parent))}")
        config = Config(root=place / "root", driver=registered.name).with_options(options)
        if registered.name not in GUEST:  # a guest has what they need: there it is a failure if they do not work
            verdict = registry.probe(registered, place, config.pool(registered))
            if not verdict.works:
                pytest.skip(f"the {registered.name} driver does not work here: {verdict.why}")
        with open_root(config) as opened:
            yield Subject(opened.engine, place)
            opened.engine.detach()
        remove_root(config, force=True)


def ingest(driver: Driver, layer: SnapshotId, blob: bytes, *below: SnapshotId) -> None:
    """Make a layer from a tar, on top of layers, nearest first."""
    with workspace(driver.scratch) as work:
        driver.ingest(layer, lambda: list(below), io.BytesIO(blob), work, Expected(), None, lambda _: False)


def ingest_file(driver: Driver, layer: SnapshotId, content: bytes, *below: SnapshotId) -> None:
    """Make a layer of one file, "f"."""
    ingest(driver, layer, tar(member(b"f", content)), *below)
