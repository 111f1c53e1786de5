"""The devicemapper driver beside Docker 20.10's: containers made, mounted and removed; starts while layers are deleted.

    python -m hpmapper.bench.dockerdm DISK --work DIR [--runs N] [--layers N]

DISK is a block device with Debian 12 and its Docker in it (tests.vm.docker). Both sides have sparse files on ext4 and
the same options, and make containers of the same image in turns. Docker is asked over its API; ours is a library.
Needs root and dm-thin; in a guest:

    python -m tests.vm.program --feature docker hpmapper.bench.dockerdm /dev/vde --work /var/tmp

Prints JSON: for each side and case the milliseconds of all runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from hpmapper.bench.dockerd import Docker, archive
from hpmapper.config import Config
from hpmapper.containers import Containers
from hpmapper.image.opening import SourceOptions
from hpmapper.images import Images
from hpmapper.kernel import mount
from hpmapper.layer.scan import scan
from hpmapper.root import Opened, open_root
from hpmapper.testing.tars import folder, member, tar

OPTIONS = ["dm.basesize=1G", "dm.loopdatasize=8G", "dm.loopmetadatasize=128M", "dm.min_free_space=0%"]
_IMAGE, _DEEP, _MANY = "measured:1", "deep:1", "many:1"
_WARM = 2

Results = dict[str, dict[str, list[float]]]


class _Silent:
    """Watches an import without a word."""

    def layer(self, number: int, count: int, size: int | None) -> Callable[[int], None]:
        return lambda _: None

    def layer_done(self, number: int, taken: object) -> None:
        pass


def _layers(count: int) -> list[bytes]:
    """Each with ten files of 40 kB."""
    return [
        tar(folder(b"d%d/" % layer), *(member(b"d%d/f%d" % (layer, file), os.urandom(40_000)) for file in range(10)))
        for layer in range(count)
    ]


def _many_files() -> bytes:
    """A layer of 4,000 small files in 200 directories."""
    directories = (folder(b"m%d/" % number) for number in range(200))
    files = (member(b"m%d/f%d" % (number % 200, number), b"x" * 100) for number in range(4000))
    return tar(*directories, *files)


class _Clock:
    """Milliseconds of one side, by case."""

    def __init__(self, results: dict[str, list[float]]) -> None:
        self._results = results

    @contextmanager
    def __call__(self, case: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._results.setdefault(case, []).append((time.perf_counter() - began) * 1000)


def _docker_cycle(docker: Docker, clock: _Clock) -> None:
    with clock("all"):
        with clock("create"):
            container = docker.create(_IMAGE)
        with clock("mount"):
            docker.mount(container)
        with clock("remove"):
            docker.remove(container)


def _our_cycle(opened: Opened, clock: _Clock) -> None:
    containers = Containers(opened.engine)
    with clock("all"):
        with clock("create"):
            container = containers.create(_IMAGE)
        with clock("mount"):
            containers.mount(container)
            containers.unmount(container)
        with clock("remove"):
            containers.remove(container)


def _changes(docker: Docker, opened: Opened, found: Results, runs: int) -> None:
    """What one written file in 4,000 takes to be found; and, for comparison, to read one of the two trees."""
    containers = Containers(opened.engine)
    theirs, mine = docker.create(_MANY), containers.create(_MANY)
    docker.call("PUT", f"/containers/{theirs}/archive?path=/m7", tar(member(b"new", b"n")), "application/x-tar")
    root = containers.mount(mine)
    (root / "m7/new").write_bytes(b"n")
    for _ in range(runs):
        with _Clock(found["Docker 20.10"])("changes of one file in 4,000"):
            docker.ask("GET", f"/containers/{theirs}/changes")
        with _Clock(found["hpmapper"])("changes of one file in 4,000"):
            list(containers.changes(mine))
        with _Clock(found["hpmapper"])("reading one whole tree of 4,000 files"):
            scan(os.fsencode(root), overlay=False)
    docker.remove(theirs)
    containers.remove(mine)


def _bring(opened: Opened, work: Path, name: str, layers: list[bytes]) -> None:
    file = work / "image.tar"
    file.write_bytes(archive(name, layers))
    Images(opened.engine).bring(f"docker-archive:{file}", SourceOptions(spool=work), [name], _Silent())
    file.unlink()


def _cycles(disk: Path, opened: Opened, work: Path, runs: int) -> Results:
    found: Results = {"Docker 20.10": {}, "hpmapper": {}}
    root = work / "docker"
    root.mkdir()
    layers = _layers(3)
    mount.filesystem("ext4", disk, root)
    try:
        with Docker(root, OPTIONS) as docker:
            docker.load(archive(_IMAGE, layers))
            _bring(opened, work, _IMAGE, layers)
            for run in range(_WARM + runs):
                kept: Results = found if run >= _WARM else {side: {} for side in found}
                _docker_cycle(docker, _Clock(kept["Docker 20.10"]))
                _our_cycle(opened, _Clock(kept["hpmapper"]))
            many = [_many_files()]
            docker.load(archive(_MANY, many))
            _bring(opened, work, _MANY, many)
            _changes(docker, opened, found, 3)
    finally:
        mount.umount(root)
    return found


def _start(opened: Opened, clock: _Clock) -> None:
    """A start, as far as storage has part in it; the container is removed outside of the clock."""
    containers = Containers(opened.engine)
    with clock("create and mount"):
        container = containers.create(_IMAGE)
        containers.mount(container)
    containers.remove(container)


def _deletion(config: Config, opened: Opened, work: Path, layers: int, runs: int) -> Results:
    """Starts in quiet, and while another process deletes an image of so many layers, later at a low priority."""
    found: Results = {"quiet": {}, "meanwhile": {}, "meanwhile, nice": {}, "deletion": {}}
    _bring(opened, work, _DEEP, _layers(layers))
    for _ in range(runs):
        _start(opened, _Clock(found["quiet"]))
    Images(opened.engine).remove(_DEEP)
    began = time.perf_counter()
    child = os.fork()
    if not child:
        _collect(config)
    for number in count():
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            break
        if number == runs:
            os.setpriority(os.PRIO_PROCESS, child, 19)
        _start(opened, _Clock(found["meanwhile" if number < runs else "meanwhile, nice"]))
    found["deletion"]["all layers"] = [(time.perf_counter() - began) * 1000]
    return found


def _collect(config: Config) -> None:
    status = 1
    try:
        with open_root(config) as opened:
            status = 0 if opened.engine.rubbish.collect().layers else 2
    finally:
        os._exit(status)


def measure(disk: Path, work: Path, runs: int, layers: int) -> dict[str, Any]:
    """All cases."""
    config = Config(root=work / "root", driver="devicemapper").with_options(OPTIONS)
    with open_root(config) as opened:
        print("cycles", file=sys.stderr)
        cycles = _cycles(disk, opened, work, runs)
        print("deletion", file=sys.stderr)
        deletion = _deletion(config, opened, work, layers, runs)
        opened.engine.detach()
    return {"cycles": cycles, "deletion": deletion}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("disk", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--layers", type=int, default=100)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.work) as work:
        found = measure(given.disk, Path(work), given.runs, given.layers)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
