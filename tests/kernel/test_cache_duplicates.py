"""Pages that are cached twice: found by their blocks, dropped in the right order, never when dirty."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hpmapper.cache import duplicates, inventory
from hpmapper.cache.activity import Activity, Work
from hpmapper.cache.count import count
from hpmapper.cache.inventory import Inventory
from hpmapper.cache.origins import Origins
from hpmapper.cache.trim import trim
from hpmapper.kernel.sync import syncfs
from hpmapper.model import SnapshotId
from tests.cacheroot import MIB, CacheRoot, cache_root
from tests.serving import eventually

pytestmark = pytest.mark.kernel

SIZE = 16 * MIB
SLACK = MIB
"""The machine may take back some pages at any time."""
BIG, OTHER = (random.Random(seed).randbytes(SIZE) for seed in (6, 7))
BUSY = Work(ticks=5, reads=5)


def taken(root: CacheRoot) -> Inventory:
    return inventory.take(root.engine.db, root.engine.driver)


def object_of(root: CacheRoot) -> str:
    ((digest,),) = taken(root).objects.values()
    path = taken(root).places.object_file(digest)
    assert path is not None
    return path


def copied_up(root: CacheRoot, path: Path, row_snapshot: SnapshotId, *, at: int = MIB) -> Path:
    """Write one block of the big file, sync, and read all of it; returns where the upper's file is."""
    with (path / "big").open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"w" * 4096, at)
    syncfs(root.home)
    (path / "big").read_bytes()
    return root.home / "a" / str(row_snapshot) / "u/big"


def read_again(*containers: Path) -> None:
    """Read the big file just before a look: writing may take long, and a machine takes back what nobody uses."""
    for path in containers:
        (path / "big").read_bytes()


@pytest.fixture(params=["xfs", "btrfs"])
def root(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[CacheRoot]:
    with cache_root(tmp_path, fs=request.param) as opened:
        opened.image("one", {"big": BIG})
        yield opened


def test_what_object_and_upper_both_cache_is_found_and_dropped(root: CacheRoot) -> None:
    (_, reader), (writer_row, writer) = root.container("one", "reader"), root.container("one", "writer")
    root.forget()
    upper = copied_up(root, writer, writer_row.snapshot)
    read_again(reader)
    found = duplicates.find(taken(root))
    assert {one.path for one in found} == {str(upper)}
    assert SIZE - SLACK <= sum(one.size for one in found) <= SIZE - 4096, "all but the block that was written"
    done = trim(found, {})
    assert done.kept == 0
    assert done.dropped >= SIZE - SLACK
    assert count(upper).cached <= 4096
    assert count(object_of(root)).cached >= SIZE - SLACK, "one copy stays"
    assert duplicates.find(taken(root)) == []
    assert (reader / "big").read_bytes() == BIG
    assert (writer / "big").read_bytes() == BIG[:MIB] + b"w" * 4096 + BIG[MIB + 4096 :]


def test_only_what_both_cache_is_a_duplicate(root: CacheRoot) -> None:
    (_, reader), (row, writer) = root.container("one", "reader"), root.container("one", "writer")
    upper = copied_up(root, writer, row.snapshot)
    root.forget()
    assert duplicates.find(taken(root)) == []
    with (reader / "big").open("rb", buffering=0) as one, upper.open("rb", buffering=0) as two:
        for file in (one, two):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for start in range(0, 8 * MIB, MIB):
            os.pread(one.fileno(), 4096, start)
        for start in range(4 * MIB, 12 * MIB, MIB):
            os.pread(two.fileno(), 4096, start)
    found = duplicates.find(taken(root))
    assert {one.start // MIB for one in found} == {4, 5, 6, 7}


def test_dirty_pages_are_no_duplicates_and_stay(root: CacheRoot) -> None:
    (_, reader), (row, writer) = root.container("one", "reader"), root.container("one", "writer")
    assert (reader / "big").read_bytes() == BIG
    upper = copied_up(root, writer, row.snapshot)
    with (writer / "big").open("r+b", buffering=0) as file:
        for start in range(8 * MIB, 8 * MIB + 16 * 4096, 4096):
            os.pwrite(file.fileno(), b"d" * 4096, start)
    dirty = count(upper).dirty
    found = duplicates.find(taken(root))
    stale = duplicates.Duplicate(str(upper), row.snapshot, 8 * MIB, 8 * MIB + 16 * 4096)
    if dirty:  # the kernel may have begun to write them by itself
        assert not any(one.start < 8 * MIB + 4096 and one.end > 8 * MIB for one in found)
        before = count(upper).dirty
        trim([stale], {})
        assert count(upper).dirty == before
    trim(found, {})
    expected = bytearray(BIG)
    expected[MIB : MIB + 4096] = b"w" * 4096
    expected[8 * MIB : 8 * MIB + 16 * 4096] = b"d" * 16 * 4096
    assert (writer / "big").read_bytes() == expected


def test_idle_containers_go_first_and_the_limit_holds(root: CacheRoot) -> None:
    _, reader = root.container("one", "reader")
    (idle_row, idle), (busy_row, busy) = root.container("one", "idle"), root.container("one", "busy")
    root.forget()
    of_busy = copied_up(root, busy, busy_row.snapshot)
    of_idle = copied_up(root, idle, idle_row.snapshot)
    read_again(reader, busy, idle)
    work = {busy_row.snapshot: BUSY, idle_row.snapshot: Work()}
    found = duplicates.find(taken(root), work)
    assert found[0].path == str(of_idle)
    part = trim(found, work, limit=4 * MIB)
    assert 0 < part.idle <= 4 * MIB + 2 * MIB
    assert part.busy == 0
    rest = trim(duplicates.find(taken(root), work), work, busy=False)
    assert rest.busy == 0
    assert rest.passed >= SIZE - SLACK
    assert count(of_idle).cached <= 4096
    assert count(of_busy).cached >= SIZE - SLACK
    assert trim(duplicates.find(taken(root), work), work).busy >= SIZE - 2 * SLACK


def test_an_object_that_every_reader_copied_up_goes_before_the_busy_copy(root: CacheRoot) -> None:
    row, path = root.container("one", "only")
    root.forget()
    assert (path / "big").read_bytes() == BIG
    upper = copied_up(root, path, row.snapshot)
    found = duplicates.find(taken(root), {row.snapshot: BUSY})
    assert {one.path for one in found} == {object_of(root)}
    trim(found, {row.snapshot: BUSY})
    assert count(upper).cached >= SIZE - SLACK
    assert count(object_of(root)).cached <= 4096, "the block that the container has replaced"


def test_renamed_files_are_still_found(root: CacheRoot) -> None:
    (_, reader), (row, writer) = root.container("one", "reader"), root.container("one", "writer")
    (reader / "big").read_bytes()
    upper = copied_up(root, writer, row.snapshot)
    (writer / "big").rename(writer / "other")
    found = duplicates.find(taken(root))
    assert {one.path for one in found} == {str(upper.with_name("other"))}


def test_whoever_looks_again_finds_what_is_new(root: CacheRoot) -> None:
    """Which of the images' files are copied up is remembered from look to look."""
    root.image("two", {"other": OTHER})
    (_, reader), (row, writer) = root.container("one", "reader"), root.container("one", "writer")
    (_, second), (copier_row, copier) = root.container("two", "second"), root.container("two", "copier")
    origins = Origins()

    def are_found(*uppers: Path) -> None:
        for path in (reader / "big", second / "other", *uppers):
            path.read_bytes()  # each time: the machine may take back some pages
        found = duplicates.find(taken(root), origins=origins)
        assert {one.path for one in found} == {str(upper) for upper in uppers}
        assert sum(one.size for one in found) >= len(uppers) * (SIZE - SLACK)

    are_found()
    of_one = copied_up(root, writer, row.snapshot)
    eventually(lambda: are_found(of_one))
    with (copier / "other").open("r+b") as file:
        file.write(b"w")
    syncfs(root.home)
    of_two = root.home / "a" / str(copier_row.snapshot) / "u/other"
    eventually(lambda: are_found(of_one, of_two))
    root.containers.remove(root.containers.get("copier"))
    eventually(lambda: are_found(of_one))


def test_pages_mapped_by_a_process_stay(root: CacheRoot) -> None:
    import mmap

    (_, reader), (row, writer) = root.container("one", "reader"), root.container("one", "writer")
    copied_up(root, writer, row.snapshot)
    read_again(reader)
    with (writer / "big").open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert sum(mapped[start] for start in range(0, SIZE, 4096)) >= 0  # touch every page
        done = trim(duplicates.find(taken(root)), {})
        assert done.dropped == 0
        assert done.kept >= SIZE - SLACK


def test_subvolumes_cache_shared_extents_once_for_each_container(tmp_path: Path) -> None:
    with cache_root(tmp_path, "btrfs", fs="btrfs") as root:
        root.image("one", {"big": BIG})
        mounted = [root.container("one", f"c{number}")[1] for number in range(3)]
        for path in mounted:
            assert (path / "big").read_bytes() == BIG
        found = duplicates.find(taken(root))
        assert sum(one.size for one in found) >= 2 * (SIZE - SLACK)
        assert trim(found, {}).dropped >= 2 * (SIZE - SLACK)
        assert duplicates.find(taken(root)) == []


@pytest.mark.parametrize("driver", ["overlay", "vfs"])
def test_whole_files_of_other_drivers(tmp_path: Path, driver: str) -> None:
    with cache_root(tmp_path, driver) as root:
        root.image("one", {"big": BIG, "a": b"1"})
        root.image("two", {"big": BIG, "b": b"2"})
        mounted = [root.container(name, name) for name in ("one", "two")]
        root.forget()
        for _, path in mounted:
            assert (path / "big").read_bytes() == BIG
        (same,) = duplicates.same_files(duplicates.directories(taken(root)))
        assert (same.size, len(same.paths), same.wasted) == (SIZE, 2, SIZE)


@contextmanager
def process_in(root: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process whose root directory that is."""
    process = subprocess.Popen(["chroot", root, "/busybox", *words], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"READY\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_activity_tells_busy_from_idle(tmp_path: Path) -> None:
    busybox = shutil.which("busybox")
    assert busybox, "apt install busybox-static (./test does)"
    with cache_root(tmp_path) as root:
        root.image("box", {"busybox": Path(busybox).read_bytes()})
        rows = {name: root.container("box", name) for name in ("busy", "idle", "empty")}
        spin = "echo READY; while :; do :; done"
        with (
            process_in(rows["busy"][1], "sh", "-c", spin),
            process_in(rows["idle"][1], "sh", "-c", "echo READY; exec /busybox sleep 60"),
        ):
            work = Activity.over(taken(root), 0.5)
        assert work[rows["busy"][0].snapshot].ticks > 0
        assert work[rows["idle"][0].snapshot] < work[rows["busy"][0].snapshot]
        assert work[rows["empty"][0].snapshot].idle
        assert not work[rows["busy"][0].snapshot].idle
        assert sorted(work, key=lambda one: work[one])[-1] == rows["busy"][0].snapshot


def test_the_commands(tmp_path: Path) -> None:
    with cache_root(tmp_path) as root:
        root.image("one", {"big": BIG})
        (_, reader), (row, writer) = root.container("one", "reader"), root.container("one", "writer")
        upper = copied_up(root, writer, row.snapshot)

        def said(*words: str) -> str:
            line = [sys.executable, "-m", "hpmapper.cli.main", "--root", str(tmp_path / "root"), "cache"]
            return subprocess.run([*line, *words], capture_output=True, text=True, check=True).stdout

        def read() -> None:
            """Again: until a command looks, a machine with much to do may have taken back what was read."""
            (reader / "big").read_bytes()
            (writer / "big").read_bytes()

        def are_told() -> None:
            read()
            assert "writer" in said("duplicates")
            assert "cached twice" in said("stat")

        def are_dropped() -> None:
            read()
            assert json.loads(said("trim", "--json"))["idle"] >= SIZE - SLACK

        eventually(are_told)
        eventually(are_dropped)
        assert said("duplicates").strip() == "nothing is cached twice"
        assert count(upper).cached <= SLACK, "the block that was written, and what the kernel keeps with it"
