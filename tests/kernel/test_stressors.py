"""stress-ng's file system stressors, and fio reading back what it wrote, on a container's root of each driver.

The same runs on the bare file system: what fails there as well is none of a driver's failures. Stressors are bounded by
operations; HPMAPPER_STRESS=200 does that many of each instead of a few, and runs those that end by time alone as well.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from hpmapper.pool.base import MIB, PoolFs
from hpmapper.pool.tools import run_tool
from hpmapper.testing.contract import Subject
from hpmapper.testing.tars import folder, member, tar
from tests import drivers, zpools

pytestmark = [pytest.mark.kernel]

OPERATIONS = int(os.environ.get("HPMAPPER_STRESS", "0")) or 3
LONG = "HPMAPPER_STRESS" in os.environ

CLASSES = ("filesystem", "io")

ELSEWHERE = {"bind-mount", "binderfs", "dup", "eventfd", "io", "ioprio", "procfs", "rawdev"}
"""Stressors that have nothing to do with the directory that they are given: of /proc, devices, the whole machine."""

TIMED = {"fpunch", "inode-flags"}
"""Stressors that no number of operations ends."""

SMALL = {
    "aio-requests": "8",
    "chdir-dirs": "64",
    "fallocate-bytes": "4m",
    "hdd-bytes": "4m",
    "iomix-bytes": "4m",
    "readahead-bytes": "4m",
    "revio-bytes": "4m",
    "seek-size": "4m",
    "sync-file-bytes": "4m",
}
"""Options that make an operation cheap."""

SECONDS = 60 if LONG else 20
"""After which a stressor is ended that goes on: so that a test ends, whatever happens."""

_FAILURE = re.compile(r"stress-ng: fail: +\[\d+\] ([\w-]+): (.*)")


def stressors() -> list[str]:
    """The names of those of stress-ng's stressors that are about files in a directory."""
    found: set[str] = set()
    for one in CLASSES:
        said = subprocess.run(["stress-ng", "--class", f"{one}?"], capture_output=True, text=True, check=True).stdout
        found |= set(said.partition("stressors:")[2].split())
    assert len(found) > 40, f"stress-ng names but few stressors: {found}"
    return sorted(found - ELSEWHERE - (set() if LONG else TIMED))


def stressed(place: Path, work: Path) -> Mapping[str, list[str]]:
    """Run the stressors one after the other below `place`; what those said that failed."""
    below = place / "stress"
    below.mkdir()
    job = work / "job"
    lines = ["run sequential", f"temp-path {below}", f"timeout {SECONDS}"]
    lines += [f"{option} {value}" for option, value in SMALL.items() if not LONG]
    lines += [line for name in stressors() for line in (f"{name} 1", f"{name}-ops {OPERATIONS}")]
    job.write_text("\n".join(lines) + "\n")
    done = subprocess.run(["stress-ng", "--job", job], cwd=work, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert "run completed" in said, said[-3000:]
    if done.returncode == 0:  # some remark on what they then do not count as a failure
        return {}
    failures: dict[str, list[str]] = {}
    for name, text in _FAILURE.findall(said):
        failures.setdefault(name, []).append(text)
    assert failures, said[-3000:]
    return failures


JOBS = {
    "buffered": ["--ioengine=psync"],
    "direct": ["--ioengine=libaio", "--iodepth=16", "--direct=1"],
    "mapped": ["--ioengine=mmap"],
    "synced": ["--ioengine=psync", "--fsync=256"],
}
"""Ways in which fio writes."""


def write_and_verify(file: Path, work: Path, *, only: bool = False) -> None:
    """Let fio write all blocks of a file of the image in random order, in each way, and read them back.

    With `only`, verify what the last way wrote.
    """
    size = file.stat().st_size
    common = [f"--filename={file}", f"--size={size}", "--rw=randwrite", "--bs=4k", "--randseed=7", "--verify=crc32c"]
    common += ["--verify_fatal=1", "--verify_state_save=0", "--output-format=terse"]
    for name, options in list(JOBS.items())[-1:] if only else JOBS.items():
        command = ["fio", f"--name={name}", *common, *options, *(["--verify_only"] if only else ["--do_verify=1"])]
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}"


@pytest.fixture(scope="module", params=drivers.parameters())
def subject(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, private_mounts: None
) -> Iterator[Subject]:
    with drivers.subject_of(request.param, tmp_path_factory.mktemp("driver")) as made:
        yield made


UNDERNEATH = {"btrfs": "btrfs", "zfs": "zfs"}
"""The file system that a container's files lie on; with the other drivers it is XFS."""


@contextmanager
def bare_file_system(kind: str, directory: Path) -> Iterator[Path]:
    """A file system without us, in memory."""
    if kind != "zfs":
        with drivers.in_memory(PoolFs(kind), directory) as place:
            yield place
        return
    with zpools.dataset(directory) as name:
        target = directory / "bare"
        run_tool(["zfs", "create", "-o", f"mountpoint={target}", f"{name}/bare"])
        yield target


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory, private_mounts: None) -> Callable[[str], Mapping[str, list[str]]]:
    """What fails on a file system itself, by its name."""

    @cache
    def failures(kind: str) -> Mapping[str, list[str]]:
        with bare_file_system(kind, tmp_path_factory.mktemp(kind)) as place:
            return stressed(place, tmp_path_factory.mktemp("work"))

    return failures


def test_stressors_fail_no_more_than_on_the_bare_file_system(
    subject: Subject, bare: Callable[[str], Mapping[str, list[str]]], tmp_path: Path
) -> None:
    container, root = subject.opened(subject.layer(tar(folder(b"etc/"), member(b"etc/hosts", b"127.0.0.1\n"))))
    failures = stressed(root, tmp_path)
    underneath = bare(UNDERNEATH.get(subject.driver.name, "xfs"))
    assert {name: said for name, said in failures.items() if name not in underneath} == {}
    assert (root / "etc/hosts").read_bytes() == b"127.0.0.1\n"
    assert list((root / "stress").iterdir()) == []
    subject.engine.remove(container)
    subject.remove_everything()


def test_fio_reads_back_what_it_wrote(subject: Subject, tmp_path: Path) -> None:
    """Into a file of the image, whose copy in another container stays as it was; again after mounting it anew."""
    data = os.urandom(8 * MIB if not LONG else 256 * MIB)
    image = subject.layer(tar(member(b"data", data)))
    (container, root), (_, other) = subject.opened(image), subject.opened(image)
    write_and_verify(root / "data", tmp_path)
    subject.engine.unmount(container)
    write_and_verify(subject.root(container) / "data", tmp_path, only=True)
    with (other / "data").open("rb") as untouched:
        assert hashlib.file_digest(untouched, "sha256").digest() == hashlib.sha256(data).digest()
    subject.remove_everything()


@pytest.mark.parametrize("kind", [PoolFs.XFS, PoolFs.BTRFS])
def test_fio_reads_back_what_it_wrote_on_the_bare_file_system(kind: PoolFs, tmp_path: Path) -> None:
    with drivers.in_memory(kind, tmp_path) as place:
        (place / "data").write_bytes(os.urandom(8 * MIB))
        write_and_verify(place / "data", place)
