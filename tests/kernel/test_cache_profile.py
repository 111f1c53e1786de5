"""Start profiles: what a start reads is recorded however it reads it, and read ahead next time."""

from __future__ import annotations

import io
import json
import mmap
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hpmapper.cache import start
from hpmapper.cache.beside import Beside, Side
from hpmapper.cache.count import count
from hpmapper.cache.profile import Profile
from hpmapper.cache.record import Seen, watch
from hpmapper.cache.replay import Swept, claimed, is_cached, sweep
from hpmapper.cache.start import ImageFiles, StartSettings, load, starting
from hpmapper.image.opening import SourceOptions
from hpmapper.image.save import SaveForm, save
from hpmapper.kernel.mincore import Run
from hpmapper.layer.stream import Expected
from hpmapper.meta.db import Database
from hpmapper.model import ObjectDigest
from tests.cacheroot import MIB, CacheRoot, cache_root, tar_of
from tests.kernel.test_cli_end_to_end import BUSYBOX
from tests.scenario import Silent

pytestmark = pytest.mark.kernel

FILES = {name: random.Random(name).randbytes(2 * MIB) for name in ("read", "mapped", "untouched", "opened")}
FILES["busybox"] = BUSYBOX.read_bytes() if BUSYBOX.exists() else b""


@pytest.fixture
def root(tmp_path: Path) -> Iterator[CacheRoot]:
    assert BUSYBOX.exists(), "apt install busybox-static (./test does)"
    with cache_root(tmp_path) as opened:
        opened.image("one", FILES)
        yield opened


def files_of(root: CacheRoot, image: str = "one") -> ImageFiles:
    return ImageFiles(root.engine.db, root.engine.driver, root.images.find(image).top)


def sizes(root: CacheRoot) -> dict[str, int]:
    """Cached bytes of each of the image's files."""
    from hpmapper.cache.names import names_of_image

    files = files_of(root)
    assert files.map_file is not None
    names = names_of_image(files.map_file, files.objects)
    return {name.lstrip("/"): count(files.places.object_file(digest) or "").cached for digest, name in names.items()}


def test_a_few_objects_stand_for_all(root: CacheRoot) -> None:
    root.image("many", {f"{number}": bytes([number]) * 2000 for number in range(50)})
    root.image("small", {"of no object": b"x"})
    top = None
    for number in range(30):
        layer = io.BytesIO(tar_of({f"{number}": bytes([number]) * 2000}))
        top = root.engine.ingest(top, layer, Expected()).snapshot
    assert top is not None
    for files in (files_of(root, "many"), ImageFiles(root.engine.db, root.engine.driver, top.id)):
        assert len(files.sample) == 16
        assert files.sample < files.objects
    assert files_of(root, "small").sample == files_of(root, "small").objects == set()


def a_start(path: Path) -> None:
    """Reads in every way there is: read(2), a mapping, exec; and one file that is only opened."""
    subprocess.run(["chroot", path, "/busybox", "true"], check=True)
    (path / "read").read_bytes()
    with (path / "mapped").open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
        assert data[MIB] == FILES["mapped"][MIB]
    (path / "opened").open("rb").close()


@contextmanager
def started(root: CacheRoot, **settings: Any) -> Iterator[None]:
    top = root.images.find("one").top
    with starting(root.engine.db, root.engine.driver, top, StartSettings(**settings)):
        yield


def recorded(root: CacheRoot) -> Profile:
    profile = load(root.engine.db, root.images.find("one").top)
    assert profile is not None
    return profile


def record_cold(root: CacheRoot) -> Path:
    _, path = root.container("one", "recorded")
    root.forget()
    with started(root):
        a_start(path)
    return path


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_a_cold_start_reads_is_recorded(root: CacheRoot) -> None:
    record_cold(root)
    profile = recorded(root)
    assert profile.cold
    read = {digest: sum(run.end - run.start for run in runs) for digest, runs in profile.objects}
    assert len(read) == 3, "what is only opened, or not at all, is not read ahead"
    assert max(read.values()) >= 2 * MIB
    assert profile.map_size > 0


def test_it_is_read_ahead_at_the_next_cold_start(root: CacheRoot) -> None:
    record_cold(root)
    root.forget()
    with started(root):
        pass
    until(lambda: sizes(root)["read"] > MIB)
    seen = sizes(root)
    assert seen["mapped"] > 0
    assert seen["busybox"] > 0
    assert (seen["untouched"], seen["opened"]) == (0, 0)


def test_a_warm_start_is_recorded_too_and_once_more_when_cold(root: CacheRoot) -> None:
    _, path = root.container("one", "first")
    for name in FILES:
        (path / name).read_bytes()
    with started(root):
        a_start(path)
    warm = recorded(root)
    assert not warm.cold
    assert len(warm.objects) == 4, "everything that was opened is taken for read"
    root.forget()
    with started(root):
        time.sleep(0.5)  # a runtime takes longer to set a container up
        a_start(path)
    assert recorded(root).cold


def test_recording_and_replaying_can_be_turned_off(root: CacheRoot) -> None:
    _, path = root.container("one", "first")
    with started(root, record=False):
        a_start(path)
    assert load(root.engine.db, root.images.find("one").top) is None
    record_cold(root)
    root.forget()
    with started(root, replay=False):
        pass
    assert sizes(root)["read"] == 0


def test_the_window_ends_a_recording(root: CacheRoot) -> None:
    _, path = root.container("one", "first")
    root.forget()
    with started(root, window=0.3):
        (path / "read").read_bytes()
        until(lambda: load(root.engine.db, root.images.find("one").top) is not None)
        (path / "untouched").read_bytes()
    assert len(recorded(root).objects) == 1


def test_what_the_kernel_drops_before_the_end_is_recorded_all_the_same(root: CacheRoot) -> None:
    _, path = root.container("one", "first")
    root.forget()
    with started(root):
        (path / "read").read_bytes()
        time.sleep(2.5)  # looked at after one second, and after two
        root.forget()
    assert sizes(root)["read"] == 0
    assert [sum(run.end - run.start for run in runs) for _, runs in recorded(root).objects] == [len(FILES["read"])]


_USE = "import sqlite3, sys; print(sqlite3.connect(sys.argv[1]).execute('SELECT * FROM setting').fetchall())"


@pytest.mark.parametrize("careful", [True, False], ids=["ignored", "watched"])
def test_a_database_beside_the_pool_is_not_torn_from_its_log(root: CacheRoot, careful: bool) -> None:
    """Whatever is watched is opened, and whoever closes a file gives up SQLite's locks on it."""
    files = files_of(root)
    database = Database(root.home / "beside.db")
    log = root.home / "beside.db-wal"

    def use(_: float) -> bool:
        subprocess.run([sys.executable, "-c", _USE, database.path], check=True, capture_output=True)
        return True

    try:
        database.set_setting("a", "1")
        seen = Seen(files.places, lambda: files.objects, files.map_file, cold=True)
        watch(files.places, seen, use, untouchable=database.files if careful else ())
        subprocess.run([sys.executable, "-c", _USE, database.path], check=True, capture_output=True)
        assert log.exists() == careful, "the other process deletes the log only where it finds no locks"
    finally:
        database.close()


@pytest.mark.parametrize("form", ["oci", "oci-archive", "docker-archive"])
def test_it_travels_with_the_image(root: CacheRoot, tmp_path: Path, form: str) -> None:
    record_cold(root)
    profile, target = recorded(root), tmp_path / "saved"
    image = root.images.saved(root.images.find("one"))
    save([image._replace(names=("docker.io/library/one:latest",))], target, SaveForm(form))
    root.containers.remove(root.containers.get("recorded"))
    root.images.remove("one")
    root.engine.rubbish.collect()
    source = str(target) if form == "docker-archive" else f"{form}:{target}"
    root.images.bring(source, SourceOptions(spool=tmp_path), ["one"], Silent())
    again = recorded(root)
    assert dict(again.objects) == dict(profile.objects)
    assert (again.map, again.map_size) == (profile.map, profile.map_size)


def test_a_false_profile_does_no_harm_to_its_image(root: CacheRoot, tmp_path: Path) -> None:
    image = root.images.saved(root.images.find("one"))
    save([image._replace(start_profile=b"nonsense")], tmp_path / "saved", SaveForm.LAYOUT)
    root.images.bring(f"oci:{tmp_path}/saved", SourceOptions(spool=tmp_path), ["again"], Silent())
    assert load(root.engine.db, root.images.find("again").top) is None


def test_a_sweep_is_bounded_by_memory(root: CacheRoot) -> None:
    record_cold(root)
    profile, files = recorded(root), files_of(root)
    root.forget()
    assert sweep(profile, files.places, files.map_file, budget=0) == Swept(0, 0, profile.size)
    assert sizes(root)["read"] == 0
    done = sweep(profile, files.places, files.map_file)
    assert done.skipped == 0
    assert done.bytes == profile.size
    until(lambda: is_cached(profile, files.places))
    assert sweep(profile, files.places, files.map_file).files == 0, "what is cached is not asked for again"


def test_a_profile_of_other_contents_is_ignored(root: CacheRoot) -> None:
    record_cold(root)
    profile, files = recorded(root), files_of(root)
    root.image("two", {"read": b"other" * MIB})
    other = files_of(root, "two")
    kept = start.keep(root.engine.db, other, profile)
    assert kept.objects == ()
    root.forget()
    false = Profile(profile.map_size + 1, (Run(0, MIB),), ((ObjectDigest(b"x" * 32), (Run(0, 4096),)),))
    assert sweep(false, files.places, files.map_file).bytes == 4096, "asked for, and not there"
    assert count(files.map_file or "").cached == 0


def test_what_is_cached_needs_no_process_beside(root: CacheRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    record_cold(root)

    def begin(act: Callable[[Side], None], kept: Collection[int]) -> Beside:
        begun.append(act)
        return Beside(act, kept)

    begun: list[Callable[[Side], None]] = []
    monkeypatch.setattr(start, "Beside", begin)
    start.replay(root.engine.db, root.engine.driver, root.images.find("one").top)
    with started(root):
        pass
    assert not begun
    root.forget()
    with started(root):
        pass
    assert len(begun) == 1


def test_one_process_at_a_time_reads_an_image_ahead(root: CacheRoot) -> None:
    record_cold(root)
    profile, files = recorded(root), files_of(root)
    root.forget()
    with claimed(profile, files.places, files.map_file) as claim:
        assert claim
        assert sweep(profile, files.places, files.map_file).files == 0
        heir = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=tuple(claim))
    with claimed(profile, files.places, files.map_file) as none:
        assert none is None, "whoever has the file open has the claim"
    heir.communicate()
    assert sweep(profile, files.places, files.map_file).files > 0


def test_objects_come_in_the_order_of_the_disk(root: CacheRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    from hpmapper.cache.profile import in_disk_order
    from hpmapper.kernel import fiemap

    record_cold(root)
    profile, files = recorded(root), files_of(root)
    places = []
    for digest, _ in profile.objects:
        with open(files.places.object_file(digest) or "", "rb") as file:
            places.append(next(fiemap.extents(file.fileno())).physical)
    assert places == sorted(places)
    backwards = Profile(0, (), profile.objects[::-1])
    assert in_disk_order(backwards, files.places).objects == profile.objects
    monkeypatch.setattr("hpmapper.cache.profile._STRETCH", 1)
    assert in_disk_order(backwards, files.places) == backwards, "what is needed first is not put off for long"


def test_a_process_beside_ends_with_its_maker_and_holds_nothing_open(tmp_path: Path) -> None:
    said = tmp_path / "said"
    held = os.open(tmp_path, os.O_RDONLY)

    def act(side: Side) -> None:
        side.ready()
        os.read(side.told, 1)
        said.write_text(" ".join(os.listdir("/proc/self/fd")))

    with Beside(act) as helper:
        helper.wait_ready()
        assert not said.exists()
    open_then = {int(name) for name in said.read_text().split()}
    assert held not in open_then or held <= 2
    os.close(held)


def test_the_commands(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "hpmapper.cli.main", "--root", str(tmp_path / "root"), "--storage-opt=pool.size=500M"]

    def said(*words: str | Path, status: int = 0) -> str:
        done = subprocess.run([*line, *map(str, words)], capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == status, done.stderr
        return done.stdout

    top = tmp_path / "files"
    (top / "bin").mkdir(parents=True)
    shutil.copy2(BUSYBOX, top / "bin/busybox")
    for applet in ("sh", "cat", "sleep"):
        (top / "bin" / applet).symlink_to("busybox")
    (top / "data").write_bytes(FILES["read"])
    said("image", "import", top, "box")
    try:
        said("profile", "show", "box", status=3)
        reading = ("sh", "-c", "cat /data > /dev/null; sleep 60")
        ready = f"test -e {tmp_path}/ready"
        (tmp_path / "ready").touch()
        words = ["profile", "record", "--window", "20", "--ready", ready, "box", *reading]
        assert "read ahead" in said(*words)
        words = ["profile", "record", "--window", "6", "box", *reading]
        assert json.loads(said("--json", *words))["bytes"] >= 2 * MIB
        shown = json.loads(said("profile", "show", "--files", "box", "--json"))
        assert {one["path"] for one in shown["files"]} == {"/bin/busybox", "/data"}
        assert shown["cold"]
        assert said("container", "ls", "--json").strip() == "[]"
        said("profile", "drop", "box")
        said("profile", "drop", "box", status=3)
        said("run", "--rm", "--no-profile", "box", "sh", "-c", "cat /data > /dev/null")
        said("profile", "show", "box", status=3)
        said("run", "--rm", "--profile-window", "5", "box", "sh", "-c", "cat /data > /dev/null")
        assert "recorded" in said("profile", "show", "box")
    finally:
        said("pool", "detach")
