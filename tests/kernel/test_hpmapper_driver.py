"""What is the flagship driver's own, beyond the contract."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from hpmapper.config import Config
from hpmapper.drivers.hpmapper import HpmapperDriver
from hpmapper.kernel import cachestat, sync
from hpmapper.layer.stream import Expected
from hpmapper.root import open_root
from hpmapper.testing.tars import member, tar

pytestmark = pytest.mark.kernel


def test_a_map_is_read_ahead_when_it_is_mounted(tmp_path: Path) -> None:
    """A start after a boot does not ask the disk for one block of names after the other."""
    config = Config(root=tmp_path / "root", driver="hpmapper").with_options(["pool.size=400M", "min_free_space=0"])
    with open_root(config) as one:
        layer = tar(*(member(b"%d" % number, os.urandom(900)) for number in range(300)))
        top = one.engine.ingest(None, io.BytesIO(layer), Expected()).snapshot
        assert isinstance(one.engine.driver, HpmapperDriver)
        (path,) = one.engine.driver.map_files([top.id])
        size = path.stat().st_size
        sync.syncfs(path)
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        before = cachestat.cachestat(path).cached
        active = one.engine.prepare("active", top)
        one.engine.mount(active)
        after = cachestat.cachestat(path).cached
        one.engine.unmount(active)
        one.engine.detach()
    assert (before, after) == (0, -(-size // os.sysconf("SC_PAGESIZE")))
