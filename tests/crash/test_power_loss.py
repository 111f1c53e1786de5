"""Power loss: while operations run, the disk is cloned as it is at an instant; the clone is brought up as after a boot.

    disk.img (XFS, reflink) ── A/outer.img ── loop, direct I/O ── B/ (XFS) ── root/hpmapper.db
                                                                              root/pool.img ── loop ── pool (XFS)

A clone of outer.img is what B's disk holds at that instant, with everything that B's and the pool's page caches had not
yet written missing: database and pool are cut off together, as a power failure would.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from hpmapper import faults
from hpmapper.check import check
from hpmapper.config import Config
from hpmapper.engine import Engine
from hpmapper.kernel import clone, loop, mount
from hpmapper.layer.stream import Expected
from hpmapper.meta import snapshots
from hpmapper.meta.db import Database
from hpmapper.pool import filesystem
from hpmapper.pool.base import MIB, PoolFs
from hpmapper.root import open_root
from hpmapper.testing import tars
from tests import scenario
from tests.scenario import Report

pytestmark = pytest.mark.kernel

INSTANTS = 8
SEED = 20191120

WORKER = """
import io, os, random, sys, tarfile
from pathlib import Path
from hpmapper.config import Config
from hpmapper.containers import Containers
from hpmapper.engine import Blob
from hpmapper.images import Images
from hpmapper.image.documents import ImportOptions
from hpmapper.layer.stream import Expected
from hpmapper.root import open_root
from hpmapper.testing import tars

def layer(rng):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for number in range(rng.randrange(1, 40)):
            member = tarfile.TarInfo(f"d{rng.randrange(5)}/f{number}")
            data = rng.randbytes(rng.choice((10, 900, 5000, 70_000, 400_000)))
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()

def say(*words):
    print(*words, flush=True)

rng = random.Random(int(sys.argv[2]))
with open_root(Config(root=Path(sys.argv[1]), driver="hpmapper").with_options(["pool.size=400M"])) as opened:
    engine, containers = opened.engine, Containers(opened.engine)
    say("ready")
    for turn in range(10_000):
        with engine.lease() as lease:
            tars = [layer(rng) for _ in range(rng.randrange(1, 4))]
            blobs = [Blob(Expected(), lambda tar=tar: io.BytesIO(tar)) for tar in tars]
            taken = engine.take_layers(blobs, lease)
            top = taken[-1].snapshot
            config = b'{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]},"n":%d}' % turn
            Images(engine).record(config, top, 0, [f"docker.io/library/image:{turn}"])
        for one in taken:
            say("committed", one.snapshot.key, one.ingested.digests.diff_id)
        made = containers.create(f"image:{turn}", f"c{turn}")
        root = containers.mount(made)
        (root / "written").write_bytes(rng.randbytes(3000))
        new = engine.commit(containers.snapshot(made)).snapshot
        say("committed", new.key, "-")
        if turn % 3 == 2:
            containers.remove(containers.get(f"c{turn - 1}"))
            say("gone", f"c{turn - 1}")
"""


@contextmanager
def mounted(image: Path, target: Path) -> Iterator[Path]:
    """An XFS image at `target`, through a loop device that bypasses the page cache below."""
    with loop.attached(image, block_size=4096) as device:
        mount.filesystem("xfs", device, target)
    try:
        yield target
    finally:
        for one in mount.mounts_below(target):
            mount.umount(one.target)


def made_xfs(image: Path, size: int) -> Path:
    image.touch()
    os.truncate(image, size)
    filesystem.make(PoolFs.XFS, image, str(uuid.uuid4()))
    return image


class Witness:
    """A worker process, and what it has reported so far."""

    def __init__(self, root: Path) -> None:
        command = [sys.executable, "-c", WORKER, str(root), str(SEED)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as out:
            self.lines.extend(line.strip() for line in out)

    def reported(self) -> list[str]:
        assert self._process.poll() is None, f"the worker ended with status {self._process.returncode}"
        return list(self.lines)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()


def clone_file(source: Path, target: Path) -> None:
    with source.open("rb") as old, target.open("wb") as new:
        clone.clone(old.fileno(), new.fileno())


def verify(engine: Engine, reported: list[str]) -> int:
    """Everything that had been reported is there, whole; returns how many layers that was."""
    committed = [line.split()[1:] for line in reported if line.startswith("committed")]
    for key, diff_id in committed:
        digest = hashlib.sha256()
        for piece in engine.read_tar(snapshots.get(engine.db, key)):
            digest.update(piece)
        assert diff_id in ("-", f"sha256:{digest.hexdigest()}")
    assert list(check(engine)) == []
    return len(committed)


def test_what_was_reported_committed_survives_power_loss(tmp_path: Path) -> None:
    below, disk = tmp_path / "A", tmp_path / "B"
    below.mkdir()
    disk.mkdir()
    rng = random.Random(SEED)
    clones: list[tuple[Path, list[str]]] = []
    with mounted(made_xfs(tmp_path / "disk.img", 6144 * MIB), below):
        outer = made_xfs(below / "outer.img", 2048 * MIB)
        with mounted(outer, disk):
            witness = Witness(disk / "root")
            try:
                wait_for(witness, 3)
                for number in range(INSTANTS):
                    time.sleep(rng.uniform(0.05, 0.8))
                    reported = witness.reported()
                    clone_file(outer, below / f"clone{number}.img")
                    clones.append((below / f"clone{number}.img", reported))
            finally:
                witness.stop()
        counts = [bring_up(image, disk, reported) for image, reported in clones]
    print(f"{len(counts)} instants, with {counts} layers reported by then, all of them intact")
    assert counts[-1] > counts[0] > 0


def wait_for(witness: Witness, lines: int) -> None:
    deadline = time.monotonic() + 60
    while len(witness.reported()) < lines:
        assert time.monotonic() < deadline, "the worker reports nothing"
        time.sleep(0.05)


def bring_up(image: Path, disk: Path, reported: list[str]) -> int:
    """Boot from a clone: its file systems replay their journals, the root reconciles."""
    with mounted(image, disk):
        before = Database(disk / "root" / "hpmapper.db")
        before.set_setting("boot_id", "the boot before")
        before.close()
        with open_root(Config(root=disk / "root"), create=False) as opened:
            engine = opened.engine
            assert engine.db.setting("boot_id") != "the boot before"
            count = verify(engine, reported)
            engine.detach()
        return count


def test_power_lost_at_every_fault_point(tmp_path: Path) -> None:
    """The disk cloned exactly between two durable states, for each such place: nothing reported is lost or half there.

    Containers are no promise: making one is recorded without waiting for the disk.
    """
    below, disk = tmp_path / "A", tmp_path / "B"
    below.mkdir()
    disk.mkdir()
    layouts = tmp_path / "layouts"
    scenario.write_layouts(layouts)
    config = Config(root=disk / "root", driver="hpmapper").with_options(["pool.size=400M", "min_free_space=0"])
    report = tmp_path / "report"
    with mounted(made_xfs(tmp_path / "disk.img", 6144 * MIB), below):
        outer = made_xfs(below / "outer.img", 2048 * MIB)
        clones: list[tuple[str, Path, str]] = []

        def take(point: str) -> None:
            said = report.read_text() if report.exists() else ""
            image = below / f"clone{len(clones)}.img"
            clone_file(outer, image)
            clones.append((point, image, said))

        with mounted(outer, disk):
            _run_stopping(lambda: scenario.run(config, layouts, Report(report)), take)
        for point, image, said in clones:
            states = {
                what: None if what.startswith("container ") else state
                for what, state in scenario.states_of(said).items()
            }
            with mounted(image, disk):
                scenario.forget_boot(config)
                status = scenario.in_child(partial(scenario.verify, config, states))
            assert status == 0, f"after power was lost at {point}: see the traceback above"
            image.unlink()
    names = {point.partition(":")[0] for point, _, _ in clones}
    print(f"power lost at {len(clones)} hits of {len(names)} points: {' '.join(sorted(names))}")


def _run_stopping(act: Callable[[], object], at_point: Callable[[str], None]) -> None:
    """Do something in a process that waits at each fault point until `at_point` is through; not at every hit."""
    said, say = os.pipe()
    heard, hear = os.pipe()
    lock = threading.Lock()

    def stop(name: str) -> None:
        with lock:
            os.write(say, f"{name}\n".encode("ascii"))
            os.read(heard, 1)

    def run() -> None:
        os.close(said)
        faults.point = stop
        act()

    child = scenario.start(run)
    os.close(say)
    os.close(heard)
    hits: Counter[str] = Counter()
    with os.fdopen(said, encoding="ascii") as lines:
        for name in map(str.strip, lines):
            hits[name] += 1
            if hits[name].bit_count() == 1 and not name.startswith(("pool.", "root.")):  # 1, 2, 4, 8, …
                at_point(f"{name}:{hits[name]}")
            os.write(hear, b".")
    os.close(hear)
    assert scenario.finished(child) == 0


def test_a_vfs_container_is_whole_or_not_there(tmp_path: Path) -> None:
    """Without reflink a copy may have its name on the disk before its data: an fsync beside it writes all names."""
    data = {f"f{number}": os.urandom(100_000) for number in range(20)}
    below, disk = tmp_path / "A", tmp_path / "B"
    below.mkdir()
    disk.mkdir()
    with mounted(made_xfs(tmp_path / "disk.img", 2048 * MIB), below):
        outer = below / "outer.img"
        subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=0", "-d", f"file,name={outer},size=512m"], check=True)
        with mounted(outer, disk), open_root(Config(root=disk / "root", driver="vfs")) as opened:
            layer = tars.tar(*(tars.member(name.encode(), content) for name, content in data.items()))
            top = opened.engine.ingest(None, io.BytesIO(layer), Expected()).snapshot
            made = opened.engine.mount(opened.engine.prepare("c", top))
            with (disk / "beside").open("wb") as beside:
                beside.write(b"x")
                os.fsync(beside.fileno())
            clone_file(outer, below / "clone.img")
        with mounted(below / "clone.img", disk):
            assert {path.name: path.read_bytes() for path in made.iterdir()} == data
