"""What is unpacked through a mount is on its way to the disk before anybody commits it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpmapper.caretaker import Caretaker
from hpmapper.config import Config
from hpmapper.forest import Forest
from hpmapper.kernel import mount
from hpmapper.kernel.cachestat import cachestat
from hpmapper.labels import TARGET_LABEL
from hpmapper.root import open_root

pytestmark = [pytest.mark.kernel]

_PATIENCE = 60


@pytest.fixture
def forest(tmp_path: Path, private_mounts: None) -> Iterator[Forest]:
    config = Config(root=tmp_path / "root", driver="hpmapper").with_options(["pool.size=400M", "min_free_space=0"])
    with open_root(config) as opened:
        caretaker = Caretaker(opened.engine)
        caretaker.start()
        yield Forest(opened.engine, "containerd", caretaker)
        caretaker.stop()
        for one in mount.mounts_below(tmp_path):
            if one.fstype == "overlay":
                mount.umount(one.target)
        opened.engine.detach()


def _dirty_pages(path: Path) -> int:
    with path.open("rb") as file:
        return cachestat(file.fileno()).dirty


def _unpack(forest: Forest, key: str, labels: dict[str, str]) -> Path:
    recorded = forest.prepare(key, "", labels)
    root = Path(forest.first_mounts(recorded).source)
    (root / "file").write_bytes(os.urandom(1 << 20))
    return forest.engine.driver.root(recorded.snapshot.id).parent / "u/file"


def test_what_is_unpacked_is_written_out_before_the_commit(forest: Forest) -> None:
    path = _unpack(forest, "extract", {TARGET_LABEL: "sha256:" + "0" * 64})
    deadline = time.monotonic() + _PATIENCE
    while _dirty_pages(path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _dirty_pages(path) == 0
    assert forest.commit("layer", "extract", {})
