"""Layers at the edges: a file beyond 4 GiB, a directory of 100,000 entries, trees under many names."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpmapper.drivers.hpmapper import HpmapperDriver
from hpmapper.engine import Engine
from hpmapper.meta.db import Database
from hpmapper.pool.base import MIB, PoolConfig, PoolKind
from hpmapper.pool.floor import Floor
from hpmapper.pool.loop import LoopPool
from hpmapper.testing import tars
from hpmapper.testing.contract import Subject

pytestmark = pytest.mark.kernel

GIB = 1 << 30
ENTRIES = 100_000


@pytest.fixture
def subject(tmp_path: Path) -> Iterator[Subject]:
    pool = LoopPool(tmp_path, PoolConfig(kind=PoolKind.LOOP, size=700 * MIB))
    pool.create()
    driver = HpmapperDriver(pool)
    driver.attach()
    engine = Engine(Database(tmp_path / "db"), driver, Floor())
    engine.rubbish.reconcile()
    made = Subject(engine, tmp_path)
    try:
        yield made
        made.remove_everything()
    finally:
        engine.detach()
        engine.close()


def test_a_file_beyond_4_gib(subject: Subject) -> None:
    """Five GiB, nearly all holes: every offset right, no space taken, copied up at once, its tar given back."""
    size = 5 * GIB
    segments = [(0, b"begin"), (4 * GIB - 2, b"across"), (size - 3, b"end")]
    tar = tars.sparse_pax_10(b"huge", size, segments) + tars.END
    layer = subject.layer(tar)
    assert b"".join(subject.engine.read_tar(layer)) == tar
    container, root = subject.opened(layer)
    assert (root / "huge").stat().st_size == size
    with (root / "huge").open("r+b", buffering=0) as data:
        for offset, expected in segments:
            assert os.pread(data.fileno(), len(expected), offset) == expected
        assert os.pread(data.fileno(), 4096, 2 * GIB) == bytes(4096)
        os.pwrite(data.fileno(), b"written", 4 * GIB + 100)
        assert os.pread(data.fileno(), 10, 4 * GIB - 2) == b"across" + bytes(4)
    assert subject.engine.usage(container).size < MIB
    assert subject.changes(container) == ["C /huge"]


def test_a_directory_of_100000_entries(subject: Subject) -> None:
    """Files and directories, found by name and by listing; one more and one less in a container."""
    members = b"".join(tars.member(b"d/f%06d" % number) for number in range(ENTRIES - 1000))
    members += b"".join(tars.folder(b"d/s%04d/" % number) for number in range(1000))
    container, root = subject.opened(subject.layer(io.BytesIO(tars.tar(members))))
    assert len(os.listdir(root / "d")) == ENTRIES
    for name in ("f000000", "f050000", "f098999", "s0000", "s0999"):
        assert (root / "d" / name).exists()
    assert not (root / "d/f099000").exists()
    assert (root / "d").stat().st_nlink == 1002
    (root / "d/f050000").unlink()
    (root / "d/new").touch()
    assert len(os.listdir(root / "d")) == ENTRIES
    assert subject.changes(container) == ["C /d", "D /d/f050000", "A /d/new"]


def test_a_directory_of_70000_directories(subject: Subject) -> None:
    """More links than 16 bits count."""
    _, root = subject.opened(subject.layer(tars.tar(*(tars.folder(b"d/%05d/" % number) for number in range(70_000)))))
    assert (root / "d").stat().st_nlink in (70_002, 1)  # 1: "not counted", as on other file systems
    assert len(os.listdir(root / "d")) == 70_000


def test_a_file_of_70000_names(subject: Subject) -> None:
    """Hard links beyond 16 bits."""
    links = (tars.member(b"l/%05d" % number, kind=tars.LINK, link=b"f") for number in range(70_000))
    _, root = subject.opened(subject.layer(tars.tar(tars.member(b"f", b"data"), *links)))
    assert (root / "f").stat().st_nlink == 70_001
    assert (root / "l/69999").read_bytes() == b"data"
