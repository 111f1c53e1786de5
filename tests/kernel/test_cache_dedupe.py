"""Identical contents come to share extents, and nothing that anybody can see changes."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpmapper.cache import duplicates, inventory
from hpmapper.cache.count import count
from hpmapper.cache.dedupe import Deduped, Deduper, Throttle
from hpmapper.kernel.sync import syncfs
from hpmapper.meta import snapshots
from hpmapper.model import Space
from tests.cacheroot import MIB, CacheRoot, cache_root
from tests.serving import eventually

pytestmark = pytest.mark.kernel

DATA = random.Random(4).randbytes(10 * MIB + 777)
NEVER_WAIT = Throttle(limit=100)


@pytest.fixture(params=["xfs", "btrfs"])
def root(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[CacheRoot]:
    with cache_root(tmp_path, fs=request.param, size="800M") as opened:
        opened.image("one", {"known": DATA})
        yield opened


def run(root: CacheRoot, deduper: Deduper | None = None) -> Deduped:
    taken = inventory.take(root.engine.db, root.engine.driver)
    return (deduper or Deduper(NEVER_WAIT, min_age=0)).run(taken, dict(snapshots.objects(root.engine.db)), time.time())


def written(root: CacheRoot, name: str, data: bytes) -> Path:
    """A new container writes a file; returns its place in the pool."""
    row, path = root.container("one", name)
    (path / "file").write_bytes(data)
    syncfs(root.home)
    return root.home / "a" / str(row.snapshot) / "u/file"


def test_a_copy_of_an_object_shares_with_it(root: CacheRoot) -> None:
    upper = written(root, "c", DATA)
    reader = root.container("one", "reader")[1]
    before, used = upper.stat(), Space.of(root.home).used
    done = run(root)
    assert (done.files, done.read) == (1, 1)
    assert done.bytes >= 10 * MIB
    syncfs(root.home)
    assert used - Space.of(root.home).used > 9 * MIB
    after = upper.stat()
    assert (after.st_mtime_ns, after.st_size, after.st_ino) == (before.st_mtime_ns, before.st_size, before.st_ino)
    assert run(root).files == 0, "once is enough"

    def are_duplicates() -> None:
        # Each time: the machine may take back some pages.
        assert (reader / "known").read_bytes() == upper.read_bytes() == DATA
        twice = duplicates.find(inventory.take(root.engine.db, root.engine.driver))
        assert sum(one.size for one in twice) >= 10 * MIB, "both were read: trim knows them now"

    eventually(are_duplicates)


def test_containers_share_what_no_image_has(root: CacheRoot) -> None:
    data = random.Random(5).randbytes(5 * MIB)
    uppers = [written(root, f"c{number}", data) for number in range(3)]
    other = written(root, "other", data[:-1] + bytes([data[-1] ^ 1]))
    done = run(root)
    assert (done.files, done.read) == (2, 4)
    assert done.bytes + 4096 >= 2 * 5 * MIB
    assert [path.read_bytes() == data for path in (*uppers, other)] == [True, True, True, False]


def test_a_file_is_written_to_afterwards_without_harm(root: CacheRoot) -> None:
    upper = written(root, "c", DATA)
    run(root)
    container = root.containers.mount(root.containers.get("c"))
    with (container / "file").open("r+b") as file:
        file.seek(MIB)
        file.write(b"changed")
    syncfs(root.home)
    assert upper.read_bytes() == DATA[:MIB] + b"changed" + DATA[MIB + 7 :]
    assert (container / "known").read_bytes() == DATA


def test_recent_small_and_lonely_files_are_left_alone(root: CacheRoot) -> None:
    written(root, "recent", DATA)
    assert run(root, Deduper(NEVER_WAIT, min_age=600)).read == 0
    written(root, "lonely", b"x" * MIB)
    written(root, "small", b"y" * 1000)
    assert run(root).read == 1, "only the one that is as large as an object"


def test_the_cache_is_left_as_it_was(root: CacheRoot) -> None:
    upper = written(root, "c", DATA)
    root.forget()
    run(root)
    assert count(upper).cached < MIB


def test_what_was_read_is_remembered(root: CacheRoot) -> None:
    written(root, "c", bytes(100) + DATA[100:])
    deduper = Deduper(NEVER_WAIT, min_age=0)
    assert (run(root, deduper).read, run(root, deduper).read) == (1, 0)


def test_it_stops_when_told(root: CacheRoot) -> None:
    written(root, "c", DATA)
    stop = threading.Event()
    stop.set()
    assert run(root, Deduper(NEVER_WAIT, stop, min_age=0)).files == 0


def test_a_busy_disk_makes_it_wait(tmp_path: Path) -> None:
    busy = tmp_path / "io.pressure"  # a control group's, as far as `Throttle` is concerned
    busy.write_text("some avg10=50.00 avg60=0 avg300=0 total=9\nfull avg10=1.00 avg60=0 avg300=0 total=9\n")
    throttle = Throttle(limit=10, resource=str(busy), patience=1.0)
    throttle.wait(threading.Event())
    assert throttle.waited == 1.0
    busy.write_text("some avg10=5.00 avg60=0 avg300=0 total=9\nfull avg10=1.00 avg60=0 avg300=0 total=9\n")
    throttle.wait(threading.Event())
    assert throttle.waited == 1.0
    assert Throttle().resource == "io"


def test_the_command(tmp_path: Path) -> None:
    with cache_root(tmp_path) as root:
        root.image("one", {"known": DATA})
        upper = written(root, "c", DATA)
        line = [sys.executable, "-m", "hpmapper.cli.main", "--root", str(tmp_path / "root"), "cache", "dedupe"]
        line += ["--min-age", "0", "--io-pressure", "100"]
        said = subprocess.run(line, capture_output=True, text=True, check=True).stdout
        assert said.startswith("1 files now share 10.0 MiB")
        assert os.stat(upper).st_size == len(DATA)
