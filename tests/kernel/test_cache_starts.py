"""Starts that a daemon sees: recorded at the first, read ahead at the next cold one, whatever engine asks."""

from __future__ import annotations

import gzip
import io
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hpmapper.cache.count import count
from hpmapper.cache.places import places
from hpmapper.cache.profile import Profile, decode
from hpmapper.cache.start import StartSettings
from hpmapper.docker.layers import Layers
from hpmapper.engine import chain_id
from hpmapper.forest import Forest
from hpmapper.kernel.mincore import Run
from hpmapper.kernel.sync import syncfs
from hpmapper.labels import TARGET_LABEL
from hpmapper.meta import profiles, snapshots
from hpmapper.model import ObjectDigest, SnapshotId
from hpmapper.testing.tars import member, tar
from tests.cacheroot import MIB, forget
from tests.serving import Served, eventually, served, shown

pytestmark = pytest.mark.kernel

READ, UNTOUCHED = (random.Random(name).randbytes(MIB) for name in ("read", "untouched"))
LAYER = tar(member(b"read", READ), member(b"untouched", UNTOUCHED))


@pytest.fixture
def place(private_mounts: None, tmp_path: Path) -> Iterator[Served]:
    with served(tmp_path, "hpmapper", start=StartSettings(window=2.0)) as found:
        yield found


def objects(place: Served) -> list[Path]:
    return [path for path in (place.engine.driver.scratch.parent / "o").rglob("*") if path.is_file()]


def make_cold(place: Served) -> None:
    syncfs(place.engine.driver.scratch)
    for path in objects(place):
        forget(path)
        assert not count(path).cached


def started(place: Served, name: str, until: Callable[[], object] = lambda: None) -> None:
    """What containerd does, and a container that reads one of two files, again and again until `until` succeeds.

    Some kernels take away what is not used for a second, though memory is free (DAMON).
    """

    def read() -> None:
        read_in_another_process(target / "read")
        until()

    place.client.prepare(name, "image")
    with shown(place.client.mounts(name), place.directory / "target") as target:
        eventually(lambda: counted(place, "watched"))  # any runtime takes longer to begin
        eventually(read)


def read_in_another_process(path: Path) -> None:
    """What the daemon's own process opens is not taken for a container's."""
    assert subprocess.run(["cat", path], check=True, capture_output=True).stdout == READ


def recorded(place: Served) -> profiles.Stored:
    found = profiles.all_of(place.engine.db)
    assert len(found) == 1
    return found[0]


def test_a_start_by_containerd_is_recorded_and_read_ahead(place: Served) -> None:
    place.applied("image", place.content.add(gzip.compress(LAYER)))
    make_cold(place)
    started(place, "first", until=lambda: recorded(place))
    profile = decode(recorded(place).profile, "it")
    assert profile.cold
    assert [sum(run.end - run.start for run in runs) for _, runs in profile.objects] == [MIB]
    assert place.starts.counters()["recorded"] == 1

    make_cold(place)
    place.client.prepare("second", "image")
    (digest,) = (digest for digest, _ in profile.objects)
    read = object_file(place, digest)

    def is_cached() -> None:
        assert count(read).cached == MIB

    def is_counted() -> None:
        assert place.starts.counters()["read_ahead"] == 1

    eventually(is_cached)
    eventually(is_counted)
    (untouched,) = set(objects(place)) - {Path(read)}
    assert place.starts.counters()["read_ahead_bytes"] >= MIB
    assert untouched.stat().st_size == MIB


def object_file(place: Served, digest: ObjectDigest) -> str:
    found = places(place.engine.driver).object_file(digest)
    assert found is not None
    return found


def test_unpacking_is_no_start(place: Served) -> None:
    place.applied("image", place.content.add(gzip.compress(LAYER)))
    make_cold(place)
    key = "unpacking"
    place.client.prepare(key, "image", {TARGET_LABEL: "sha256:" + "0" * 64})
    with shown(place.client.mounts(key), place.directory / "target") as target:
        read_in_another_process(target / "read")
    started(place, "a start")  # the thread takes one after the other: this one comes later
    eventually(lambda: recorded(place))
    assert place.starts.counters()["recorded"] == 1


def test_a_profile_for_other_contents_is_ignored(place: Served) -> None:
    place.applied("image", place.content.add(gzip.compress(LAYER)))
    named = profiles.chain_of(place.engine.db, place.forest.get("image").id)
    assert named is not None
    false = Profile(0, (), ((ObjectDigest(b"n" * 32), (Run(0, MIB),)),))
    with place.engine.db.transaction() as transaction:
        profiles.store(transaction, named[0], false.encode())
    make_cold(place)
    place.client.prepare("first", "image")
    eventually(lambda: counted(place, "cached"))
    assert not any(count(path).cached for path in objects(place))


def counted(place: Served, name: str) -> None:
    assert place.starts.counters()[name]


def test_a_container_of_docker_has_its_images_profile(place: Served) -> None:
    forest = Forest(place.engine, "docker", place.caretaker, place.starts)
    layers = Layers(forest, place.caretaker.clean_up)
    layers.create("image", "", {}, "")
    layers.apply("image", "", io.BytesIO(LAYER))
    make_cold(place)
    layers.create("1-init", "image", {}, "")
    (layers.mount("1-init") / "hosts").write_text("127.0.0.1 localhost")
    layers.unmount("1-init")
    layers.create("1", "1-init", {}, "")
    root = layers.mount("1")
    eventually(lambda: counted(place, "watched"))
    read_in_another_process(root / "read")
    eventually(lambda: recorded(place))
    assert recorded(place).chain_id == chain_id(None, snapshots.diff_id(place.engine.db, layer_of(forest)))
    layers.unmount("1")


def layer_of(forest: Forest) -> SnapshotId:
    layer = forest.get("ro/image").layer
    assert layer is not None
    return layer


def test_it_goes_with_the_images_layers(place: Served) -> None:
    place.applied("image", place.content.add(gzip.compress(LAYER)))
    make_cold(place)
    started(place, "first")
    eventually(lambda: recorded(place))
    place.client.remove("first")
    place.client.remove("image")

    def is_forgotten() -> None:
        place.settle()  # again, if the caretaker was just at work on the layer and kept it from being collected
        assert profiles.all_of(place.engine.db) == []

    eventually(is_forgotten)
