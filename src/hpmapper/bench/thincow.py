"""Copy-on-write below a container: thin snapshots in blocks of 64 and 512 KiB, and dm-snapshot in chunks of 4 KiB.

    python -m hpmapper.bench.thincow DATA METADATA [--runs N]

DATA and METADATA are two block devices that may be overwritten. The third side is what `dm.cow_chunk=4K` would be:
the layer's thin device read-only, over it a dm-snapshot whose exception store is a thin device of the container's own,
merged into a thin snapshot of the layer when the container is committed. Needs root and dm-thin; in a guest:

    python -m tests.vm.program --feature dm hpmapper.bench.thincow /dev/vdb /dev/vdc

Prints JSON: for each side and case the microseconds (or MiB) of all runs.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from hpmapper.drivers.devicemapper import thin
from hpmapper.kernel import dm, fs

_KIB, _MIB = 1 << 10, 1 << 20
_PAGE = 4 * _KIB
_SIZE = 256 * _MIB
_SPREAD = 512 * _KIB
_CHUNK = _PAGE // dm.SECTOR
_POOL, _LAYER, _ROOT, _STORE = "cow-pool", "cow-layer", "cow-root", "cow-store"
_LAYER_ID, _ROOT_ID = 1, 2

Results = dict[str, list[float]]
_Move = Callable[[int, list[mmap.mmap], int], int]


@dataclass(frozen=True)
class Side:
    """One way to have a writable copy: on a pool of these blocks (bytes), with a dm-snapshot on it or without."""

    block: int
    fine: bool

    @property
    def name(self) -> str:
        if self.fine:
            return f"dm-snapshot, 4 KiB chunks, on a pool of {self.block // _KIB} KiB"
        return f"thin snapshot, {self.block // _KIB} KiB"


SIDES = (Side(64 * _KIB, False), Side(512 * _KIB, False), Side(64 * _KIB, True))


@contextmanager
def _pool(data: Path, metadata: Path, block: int) -> Iterator[None]:
    """A new pool with a layer in it, every block of which has been written."""
    with metadata.open("r+b") as file:
        file.write(bytes(_PAGE))
    length = fs.device_size(data) // block * block // dm.SECTOR
    dm.activate(_POOL, [thin.PoolTable(length, str(metadata), str(data), block // dm.SECTOR).target()])
    try:
        thin.create(_POOL, _LAYER_ID)
        with _active(_LAYER, _thin(_LAYER_ID)) as layer, layer.open("wb", buffering=0) as file:
            for _ in range(_SIZE // _MIB):
                file.write(bytes(range(256)) * (_MIB // 256))
            os.fsync(file.fileno())
        yield
    finally:
        dm.remove(_POOL)


def _thin(device: int) -> dm.Target:
    return thin.thin_target(_POOL, device, _SIZE)


@contextmanager
def _active(name: str, target: dm.Target, *, read_only: bool = False) -> Iterator[Path]:
    dm.activate(name, [target], read_only=read_only)
    try:
        yield dm.path(name)
    finally:
        dm.remove(name)


@contextmanager
def _root(side: Side) -> Iterator[Path]:
    """A container's device, made and removed again."""
    if not side.fine:
        thin.snapshot(_POOL, _ROOT_ID, _LAYER_ID)
        with _active(_ROOT, _thin(_ROOT_ID)) as root:
            yield root
    else:
        thin.create(_POOL, _ROOT_ID)
        with (
            _active(_LAYER, _thin(_LAYER_ID), read_only=True) as layer,
            _active(_STORE, _thin(_ROOT_ID)) as store,
            _active(_ROOT, dm.Target(0, _SIZE // dm.SECTOR, "snapshot", f"{layer} {store} P {_CHUNK}")) as root,
        ):
            yield root
    thin.delete(_POOL, _ROOT_ID)


def _used(side: Side) -> float:
    return thin.pool_status(_POOL).data_used * side.block / _MIB


class Writer:
    """Writes single pages past the page cache, and notes how long each took, in microseconds."""

    def __init__(self, device: Path, flags: int = 0) -> None:
        self._fd = os.open(device, os.O_RDWR | os.O_DIRECT | flags)
        self._page = mmap.mmap(-1, _PAGE)
        self._page.write(os.urandom(_PAGE))

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def pages(self, offsets: list[int]) -> list[float]:
        return self._each(os.pwritev, offsets)

    def read_pages(self, offsets: list[int]) -> list[float]:
        return self._each(os.preadv, offsets)

    def _each(self, move: _Move, offsets: list[int]) -> list[float]:
        taken = []
        for offset in offsets:
            before = time.perf_counter_ns()
            move(self._fd, [self._page], offset)
            taken.append((time.perf_counter_ns() - before) / 1000)
        return taken

    def read_all(self) -> float:
        """Read all of it, in pieces of a MiB; seconds."""
        return self._whole(os.preadv, _SIZE)

    def write_some(self) -> float:
        """Write an eighth of it, in pieces of a MiB; seconds."""
        return self._whole(os.pwritev, _SIZE // 8)

    def _whole(self, move: _Move, size: int) -> float:
        piece = mmap.mmap(-1, _MIB)
        before = time.perf_counter()
        for offset in range(0, size, _MIB):
            move(self._fd, [piece], offset)
        return time.perf_counter() - before


def _spread(dice: random.Random) -> tuple[list[int], list[int]]:
    """A page in each stretch of 512 KiB, in random order, and another page of the same 64 KiB."""
    starts = [start + dice.randrange(0, _SPREAD, 64 * _KIB) for start in range(0, _SIZE, _SPREAD)]
    dice.shuffle(starts)
    return starts, [start + dice.randrange(1, 16) * _PAGE for start in starts]


def _measure(side: Side, dice: random.Random) -> Results:
    found: Results = {}
    before = _used(side)
    with ExitStack() as stack:
        began = time.perf_counter()
        root = stack.enter_context(_root(side))
        found["create and activate, ms"] = [(time.perf_counter() - began) * 1000]
        with Writer(root) as writer:
            first, second = _spread(dice)
            found["first write of a block, µs"] = writer.pages(first)
            found["second write, another page, µs"] = writer.pages(second)
            found["third write, the same page, µs"] = writer.pages(second)
            found["reading a page, µs"] = writer.read_pages(first)
            found["reading 256 MiB, s"] = [writer.read_all()]
        pages = len(first) + len(second)
        found["space for each page written, KiB"] = [(_used(side) - before) * _KIB / pages]
        if side.fine:
            found["merge on commit, s"] = [_merge(stack)]
    with _root(side) as root, Writer(root, os.O_DSYNC) as writer:
        first, _ = _spread(dice)
        found["first write, synchronous, µs"] = writer.pages(first)
    with _root(side) as root, Writer(root) as writer:
        found["first write of 32 MiB, s"] = [writer.write_some()]
    return found


def _merge(stack: ExitStack) -> float:
    """What committing takes: a thin snapshot of the layer, into which the exceptions are merged; seconds."""
    merged = 3
    thin.snapshot(_POOL, merged, _LAYER_ID)
    stack.callback(thin.delete, _POOL, merged)
    target = stack.enter_context(_active("cow-merged", _thin(merged)))
    dm.remove(_ROOT)
    table = f"{target} {dm.path(_STORE)} P {_CHUNK}"
    began = time.perf_counter()
    with _active("cow-merge", dm.Target(0, _SIZE // dm.SECTOR, "snapshot-merge", table)):
        while not _is_merged(dm.status("cow-merge")[0].params):
            time.sleep(0.01)
    return time.perf_counter() - began


def _is_merged(status: str) -> bool:
    """ "USED/TOTAL METADATA": all that is left of the used sectors is metadata."""
    used, _, rest = status.partition("/")
    return int(used) <= int(rest.split()[1])


def measure(data: Path, metadata: Path, runs: int, report: Callable[[str], None]) -> dict[str, Results]:
    """All sides, in turns."""
    found: dict[str, Results] = {side.name: {} for side in SIDES}
    dice = random.Random(1)
    for run in range(runs):
        for side in SIDES:
            report(f"run {run + 1}: {side.name}")
            with _pool(data, metadata, side.block):
                for case, values in _measure(side, dice).items():
                    found[side.name].setdefault(case, []).extend(values)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("metadata", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    found = measure(given.data, given.metadata, given.runs, lambda text: print(text, file=sys.stderr))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
