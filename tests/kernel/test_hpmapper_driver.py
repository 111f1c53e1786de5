"""What is the flagship driver's own, beyond the contract."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hpmapper.config import Config
from hpmapper.drivers.hpmapper import HpmapperDriver
from hpmapper.engine import Engine
from hpmapper.erofs.reader import Map
from hpmapper.kernel import cachestat, sync
from hpmapper.layer.stream import Expected
from hpmapper.meta.snapshots import Snapshot
from hpmapper.model import ObjectDigest
from hpmapper.root import open_root
from hpmapper.testing.tars import DIR, member, tar
from tests.serving import eventually

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("threads", [1, 2])
def test_a_map_is_read_ahead_when_nothing_of_it_is_cached(tmp_path: Path, threads: int) -> None:
    """A start after a boot, or much later, does not ask the disk for one block of names after the other."""
    config = Config(root=tmp_path / "root", driver="hpmapper").with_options(["pool.size=400M", "min_free_space=0"])
    with open_root(config) as one, _so_many_threads(threads):
        layer = tar(*(member(b"%d" % number, os.urandom(900)) for number in range(300)))
        top = one.engine.ingest(None, io.BytesIO(layer), Expected()).snapshot
        assert isinstance(one.engine.driver, HpmapperDriver)
        (path,) = one.engine.driver.map_files([top.id])
        pages = -(-path.stat().st_size // os.sysconf("SC_PAGESIZE"))
        sync.syncfs(path)
        seen = []
        for name in ("after a boot", "much later"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            seen.append(cachestat.cachestat(path).cached)
            active = one.engine.prepare(name, top)
            one.engine.mount(active)
            one.engine.driver.names_ahead.wait()
            seen.append(cachestat.cachestat(path).cached)
            one.engine.unmount(active)
        one.engine.detach()
    assert seen == [0, pages, 0, pages]


def _assert_alone() -> None:
    assert threading.active_count() == 1


@contextmanager
def _so_many_threads(number: int) -> Iterator[None]:
    """A process that has threads lets one read; one that may be about to fork gets none."""
    eventually(_assert_alone)  # those of a test before may be ending
    done = threading.Event()
    others = [threading.Thread(target=done.wait) for _ in range(number - 1)]
    for other in others:
        other.start()
    try:
        yield
    finally:
        done.set()
        for other in others:
            other.join()


def test_objects_are_walked_when_a_layer_went_or_a_thorough_collection_is_wanted(tmp_path: Path) -> None:
    config = Config(root=tmp_path / "root", driver="hpmapper").with_options(["pool.size=400M", "min_free_space=0"])
    with open_root(config) as one:
        assert isinstance(one.engine.driver, HpmapperDriver)
        top = one.engine.ingest(None, io.BytesIO(tar(member(b"large", bytes(5000)))), Expected()).snapshot
        active = one.engine.prepare("active", top)
        (known,) = one.engine.driver.stored_objects()
        stray = Path(one.engine.driver.object_file(ObjectDigest(b"\1" * 32)))
        stray.parent.mkdir(exist_ok=True)
        stray.touch()
        one.engine.rubbish.collect(thorough=False)
        assert stray.exists()
        one.engine.rubbish.collect()
        assert one.engine.driver.stored_objects() == {known}
        one.engine.remove(active)
        assert one.engine.rubbish.collect(thorough=False).objects == 1
        assert not one.engine.driver.stored_objects()
        one.engine.detach()


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
        assert one.engine.rubbish.collect().layers == 2
        assert list((one.engine.driver.home / "i").iterdir()) == []
        one.engine.detach()


def test_an_images_map_grows_out_of_the_one_below(tmp_path: Path) -> None:
    """It shows what a new one would, and is written anew once a quarter of it is of no use any more."""
    config = Config(root=tmp_path / "root", driver="hpmapper").with_options(["pool.size=400M", "min_free_space=0"])
    with open_root(config) as one:
        files = [member(b"d/%03d" % number, os.urandom(900)) for number in range(100)]
        top = _bring(one.engine, None, tar(member(b"d/", kind=DIR), *files))
        top = _bring(one.engine, top, tar(member(b"d/new", b"n"), member(b"d/.wh.007")))
        assert _wasted(one.engine, top) > 0
        top = _bring(one.engine, top, tar(member(b"d/008", b"other"), member(b"more/", kind=DIR)))
        assert _names_in_root(one.engine, top, "d") == {"new", *(f"{n:03d}" for n in range(100) if n != 7)}
        assert _names_in_root(one.engine, top, "") == {"d", "more"}
        assert list(one.engine.driver.check_derived(repair=False)) == []
        top = _bring(one.engine, top, tar(*(member(b"d/.wh.%03d" % number) for number in range(20, 100))))
        assert _wasted(one.engine, top) == 0
        assert _names_in_root(one.engine, top, "d") == {"new", *(f"{n:03d}" for n in range(20) if n != 7)}
        assert list(one.engine.driver.check_derived(repair=False)) == []
        one.engine.detach()


def test_an_images_map_does_not_grow_out_of_a_damaged_one(tmp_path: Path) -> None:
    config = Config(root=tmp_path / "root", driver="hpmapper").with_options(["pool.size=400M", "min_free_space=0"])
    with open_root(config) as one:
        top = _bring(one.engine, None, tar(member(b"a", b"1")))
        top = _bring(one.engine, top, tar(member(b"b", b"2")))
        path = _map(one.engine, top)
        with Map.open(path) as found:
            root = found.root.address
        with path.open("r+b") as out:
            out.seek(root)
            out.write(b"\xff" * 32)
        top = _bring(one.engine, top, tar(member(b"c", b"3")))
        assert _names_in_root(one.engine, top, "") == {"a", "b", "c"}
        one.engine.detach()


def _bring(engine: Engine, below: Snapshot | None, layer: bytes) -> Snapshot:
    top = engine.ingest(below, io.BytesIO(layer), Expected()).snapshot
    engine.finish(top)
    return top


def _map(engine: Engine, top: Snapshot) -> Path:
    assert isinstance(engine.driver, HpmapperDriver)
    images = (engine.driver.home / "i").iterdir()
    return next(image / "map" for image in images if (image / "chain").read_text().startswith(f"{top.id},"))


def _wasted(engine: Engine, top: Snapshot) -> int:
    path = _map(engine, top).parent / "wasted"
    return int(path.read_text()) if path.exists() else 0


def _names_in_root(engine: Engine, top: Snapshot, directory: str) -> set[str]:
    active = engine.prepare(f"look-{top.id}-{directory}", top)
    try:
        return set(os.listdir(engine.mount(active) / directory))
    finally:
        engine.unmount(active)
        engine.remove(active)
