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


def test_an_image_whose_chain_is_gone_does_not_keep_layers_from_being_removed(tmp_path: Path) -> None:
    config = Config(root=tmp_path / "root", driver="hpmapper").with_options(["pool.size=400M", "min_free_space=0"])
    with open_root(config) as one:
        lower = one.engine.ingest(None, io.BytesIO(tar(member(b"lower", b"l"))), Expected()).snapshot
        upper = one.engine.ingest(lower, io.BytesIO(tar(member(b"upper", b"u"))), Expected()).snapshot
        one.engine.finish(upper)
        assert isinstance(one.engine.driver, HpmapperDriver)
        (image,) = (one.engine.driver.home / "i").iterdir()
        (image / "chain").unlink()
        one.engine.remove(upper)
        one.engine.remove(lower)
        assert one.engine.collect().layers == 2
        assert list((one.engine.driver.home / "i").iterdir()) == []
        one.engine.detach()
