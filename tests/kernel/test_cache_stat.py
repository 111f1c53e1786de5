"""The page cache as it is seen: against bytes that were read on purpose."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpmapper.cache import inventory
from hpmapper.cache.count import count
from hpmapper.cache.names import names_of
from hpmapper.cache.stat import CacheStat, cache_stat
from hpmapper.kernel import mincore
from hpmapper.model import ObjectDigest
from tests.cacheroot import MIB, CacheRoot, cache_root, forget
from tests.serving import eventually

pytestmark = pytest.mark.kernel

BIG, OTHER = os.urandom(8 * MIB), os.urandom(MIB)
ALMOST = len(BIG) - MIB
"""Of its bytes: the machine may take back some pages at any time."""

FILES = {"big": BIG, "other": OTHER, **{f"small{number}": b"s" * 500 for number in range(20)}}


def looked(root: CacheRoot) -> CacheStat:
    return cache_stat(inventory.take(root.engine.db, root.engine.driver), root.engine.driver)


@pytest.mark.parametrize("fs", ["xfs", "btrfs"])
def test_shared_reads_are_counted_once_and_told_for_each_reader(tmp_path: Path, fs: str) -> None:
    with cache_root(tmp_path, fs=fs) as root:
        root.image("one", FILES)
        mounted = [root.container("one", f"c{number}") for number in range(3)]
        root.forget()
        before = looked(root)
        for _, path in mounted:
            assert (path / "big").read_bytes() == BIG
        after = looked(root)
        big = {digest: one for digest, one in after.objects.items() if one.cached > len(BIG) // 2}
        assert len(big) == 1, "one copy for all"
        assert after.readers[next(iter(big))] == 3
        assert after.sharing()[3] - before.sharing().get(3, 0) >= ALMOST
        assert after.plain_copies - before.plain_copies >= 3 * ALMOST
        assert after.total.cached - before.total.cached < len(BIG) + MIB


def test_small_files_are_counted_where_maps_cache_them(tmp_path: Path) -> None:
    with cache_root(tmp_path) as root:
        root.image("one", FILES)
        _, path = root.container("one", "c")
        root.forget()
        maps = looked(root).maps
        target = next(name for name in maps if name.endswith("/m"))
        before = maps[target].cached
        for number in range(20):
            assert (path / f"small{number}").read_bytes() == b"s" * 500
        maps = looked(root).maps
        assert maps[target].cached - before == 20 * mincore.PAGE, "in the inodes of the mount"
        assert maps[target.removesuffix("m") + "map"].cached > 0, "and in the map's file"


def test_what_a_container_writes_is_its_own_and_dirty_until_synced(tmp_path: Path) -> None:
    with cache_root(tmp_path) as root:
        root.image("one", FILES)
        row, path = root.container("one", "c")
        (path / "new").write_bytes(bytes(MIB))
        own = looked(root).own[row.snapshot]
        assert own.cached == MIB
        assert own.dirty + own.writeback <= own.cached
        os.sync()
        assert looked(root).own[row.snapshot].dirty == 0


def test_only_mounted_containers_share(tmp_path: Path) -> None:
    with cache_root(tmp_path) as root:
        root.image("one", FILES)
        rows = [root.container("one", f"c{number}")[0] for number in range(2)]
        root.containers.unmount(rows[0])
        assert set(looked(root).readers.values()) == {1}


@pytest.mark.parametrize("driver", ["overlay", "vfs"])
def test_other_drivers_files_are_counted_too(tmp_path: Path, driver: str) -> None:
    with cache_root(tmp_path, driver) as root:
        root.image("one", FILES)
        rows = [root.container("one", f"c{number}") for number in range(2)]
        root.forget()
        for _, path in rows:
            assert (path / "big").read_bytes() == BIG
        found = looked(root)
        layers, own = (sum(one.cached for one in kind.values()) for kind in (found.layers, found.own))
        shared, copied = (layers, own) if driver == "overlay" else (own / 2, layers)
        assert ALMOST <= shared <= len(BIG)
        assert copied == 0
        assert 2 * ALMOST <= found.plain_copies <= 2 * len(BIG)


def test_a_file_behind_a_loop_device_without_direct_io_counts(tmp_path: Path) -> None:
    from hpmapper.kernel import loop

    with cache_root(tmp_path) as root:
        root.image("one", FILES)
        _, path = root.container("one", "c")
        image = tmp_path / "root/pool.img"
        (device,) = loop.find(image)
        loop.set_direct_io(device.path, False)
        root.forget()
        forget(image)
        assert (path / "big").read_bytes() == BIG
        assert looked(root).devices[str(image)].cached >= ALMOST, "what is read through it is cached twice"


def test_runs_agree_with_counts(xfs: Path) -> None:
    path = xfs / "file"
    path.write_bytes(BIG)
    os.sync()
    forget(path)
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for start in (0, 2 * MIB, 5 * MIB):
            os.pread(file.fileno(), 4096, start)
        runs = mincore.resident(file.fileno())
        assert sum(run.end - run.start for run in runs) == count(path).cached
        assert {0, 2 * MIB, 5 * MIB} <= {run.start for run in runs}
        assert mincore.resident(file.fileno(), 2 * MIB, 1) == [mincore.Run(2 * MIB, 2 * MIB + mincore.PAGE)]


def test_objects_get_their_names_from_images(tmp_path: Path) -> None:
    with cache_root(tmp_path) as root:
        root.image("one", FILES)
        taken = inventory.take(root.engine.db, root.engine.driver)
        digests = {ObjectDigest(digest) for found in taken.objects.values() for digest in found}
        named = names_of(taken, digests)
        assert sorted(named.values()) == ["docker.io/library/one:latest:/big", "docker.io/library/one:latest:/other"]


def test_the_command(tmp_path: Path) -> None:
    with cache_root(tmp_path) as root:
        root.image("one", FILES)
        _, path = root.container("one", "c")
        root.forget()
        (path / "new").write_bytes(b"n" * 10_000)

        def facts(*words: str) -> Any:
            line = [sys.executable, "-m", "hpmapper.cli.main", "--root", str(tmp_path / "root"), "--json"]
            done = subprocess.run([*line, "cache", "stat", *words], capture_output=True, text=True, check=True)
            return json.loads(done.stdout)

        def is_told() -> None:
            (path / "big").read_bytes()
            (path / "new").read_bytes()
            whole = facts()
            assert whole["objects"]["count"] == 2
            assert whole["objects"]["cached"] >= ALMOST
            assert [one["name"] for one in whole["containers"]] == ["c"]
            assert whole["containers"][0]["cached"] >= 10_000
            assert whole["images"][0]["containers"] == 1

        def is_told_first() -> None:
            (path / "big").read_bytes()
            (top,) = facts("--top", "1")
            assert (top["kind"], top["name"]) == ("object", "docker.io/library/one:latest:/big")
            assert ALMOST <= top["cached"] <= len(BIG)

        # Again: until a command has begun to look, a machine with much to do may have taken back what was read.
        eventually(is_told)
        eventually(is_told_first)
        assert [one["name"] for one in facts("--container", "c")] == ["c:/new"]
        assert facts("--image", "one")[0]["name"].endswith(":/big")
