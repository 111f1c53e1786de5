"""How long a pull and a start take: our daemon beside containerd's own snapshotters, in one containerd, in turns.

    python -m tests.clients.measure --image LAYOUT --work DIRECTORY [--release sid] [--runs 5]

Every side pulls the same image from the same registry on loopback, with its blobs on the same file system. Between runs
everything is removed and collected.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from hpmapper.bench.measure import drop_caches
from tests.clients import registry
from tests.clients.containerd import Containerd
from tests.clients.pools import xfs
from tests.clients.setups import Case, assert_reclaimed, left, running

_AT_ONCE = 20


class Side:
    """One snapshotter of one containerd."""

    def __init__(self, name: str, containerd: Containerd, snapshotter: str, reference: str) -> None:
        self.name = name
        self.containerd = containerd
        self.snapshotter = snapshotter
        self.reference = reference
        self.times: dict[str, list[float]] = {}
        self.containerd.pull(
            reference, snapshotter, "warming-up"
        )  # the server then has all that it keeps while it runs
        self.containerd.remove_images("warming-up")
        time.sleep(5)
        self.empty = left(containerd)

    def run(self, number: int) -> None:
        """Pull, start one container cold, start many at once, and remove all of it."""
        namespace = f"measure-{number}"
        self._timed("pull", lambda: self.containerd.pull(self.reference, self.snapshotter, namespace))
        time.sleep(1)  # what is done behind the pull
        drop_caches()
        self._timed("start, cold", lambda: self._start(namespace, "cold"))
        self._timed("start, warm", lambda: self._start(namespace, "warm"))

        def many() -> None:
            with ThreadPoolExecutor(_AT_ONCE) as threads:
                list(threads.map(lambda one: self._start(namespace, f"many-{one}"), range(_AT_ONCE)))

        self._timed(f"{_AT_ONCE} starts at once", many)
        self.containerd.remove_images(namespace)
        assert_reclaimed(self.containerd, self.empty)

    def _start(self, namespace: str, name: str) -> None:
        words = ["run", "--rm", "--net-host", "--snapshotter", self.snapshotter, self.reference, name]
        self.containerd.ctr(*words, "/usr/bin/python3", "-c", "import numpy", namespace=namespace)

    def _timed(self, what: str, do: Callable[[], object]) -> None:
        begin = time.monotonic()
        do()
        self.times.setdefault(what, []).append(time.monotonic() - begin)
        print(f"{self.name}: {what}: {self.times[what][-1]:.2f} s", file=sys.stderr)


def _sides(stack: ExitStack, release: str, work: Path, image: Path) -> Iterator[Side]:
    for name in ("hpmapper-fast", "hpmapper", "overlay", "erofs"):
        containerd = stack.enter_context(running(Case(release, name), work, Containerd))
        reference = f"{registry.ADDRESS}/measured:latest"
        archive = containerd.machine.path("/data/image.tar")
        subprocess.run(["tar", "-C", str(image), "-cf", str(archive), "."], check=True)
        containerd.ctr("images", "import", "--no-unpack", f"--index-name={reference}", "-", stdin=archive)
        containerd.ctr("images", "push", "--plain-http", reference)
        containerd.remove_images()
        archive.unlink()
        if name == "hpmapper-fast":
            yield Side("containerd's overlayfs", containerd, "overlayfs", reference)
        own = "our" if containerd.setup.command else "containerd's"
        yield Side(f"{own} {name}", containerd, containerd.setup.name, reference)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--release", default="sid")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    options.work.mkdir(exist_ok=True)
    with ExitStack() as stack:
        pool = stack.enter_context(xfs(options.work))
        sides = list(_sides(stack, options.release, pool, options.image))
        for number in range(options.runs):
            for side in sides:
                side.run(number)
    base = sides[0]
    print("| case | side | median, s | least-most | against overlayfs |\n|---|---|---|---|---|")
    for what in base.times:
        for side in sides:
            times = side.times[what]
            ratio = median(base.times[what]) / median(times)
            print(f"| {what} | {side.name} | {median(times):.2f} | {min(times):.2f}-{max(times):.2f} | {ratio:.2f}x |")


if __name__ == "__main__":
    main()
