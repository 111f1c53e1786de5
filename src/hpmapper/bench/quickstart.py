"""What `./quickstart` runs: a real Debian image, several containers of it at once, and what they cost.

The same is done with plain copies of the image, as a driver without sharing would make them, on the same file system.
Nothing here is special: each step is what a user would type, and is printed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hpmapper.bench.measure import cached_below, cached_bytes, drop_caches, read_all, regular_files
from hpmapper.config import Config
from hpmapper.containers import Containers
from hpmapper.drivers import registry
from hpmapper.errors import FailedPrecondition, HpmapperError, NotFound
from hpmapper.image import reference
from hpmapper.images import Images
from hpmapper.kernel import mount
from hpmapper.kernel.sync import syncfs
from hpmapper.model import Space
from hpmapper.pool.base import format_size
from hpmapper.root import Opened, open_root

IMAGE = "quickstart"
REGISTRY_IMAGE = "debian:stable-slim"
COUNT = 5
WORK = "find /usr -xdev -type f -exec cat {} + | wc -c; echo changed >> /etc/hostname; printf x >> /usr/bin/perl"
"""What each container does: reads all of /usr, writes a small file, and writes one byte to a large one of the image."""

console = Console(stderr=True)


@dataclass
class Cost:
    """Of COUNT containers together: seconds to have them, to do the work, bytes of disk and of page cache."""

    make: float = 0.0
    work: float = 0.0
    disk: int = 0
    cache: int = 0


def main() -> None:
    """Show, or clean up."""
    parser = argparse.ArgumentParser(prog="./quickstart", description="Shows hpmapper at work.")
    parser.add_argument("--root", type=Path, default=Path("/var/lib/hpmapper-quickstart"))
    parser.add_argument("--storage-driver", help="instead of the best that works here")
    parser.add_argument("--clean", action="store_true", help="remove all that was made")
    options = parser.parse_args()
    config = Config(root=options.root, driver=options.storage_driver).with_options(["min_free_space=0"])
    try:
        clean(config) if options.clean else show(config)
    except HpmapperError as error:
        sys.exit(f"quickstart: {error}")


def show(config: Config) -> None:
    """Bring in the image, run the containers, print the table."""
    with open_root(config) as opened:
        driver = opened.engine.driver
        console.print(f"[bold]storage driver {driver.name}[/] in {config.root}", highlight=False)
        for better in itertools.takewhile(lambda one: one.name != driver.name, registry.DRIVERS):
            verdict = registry.probe(better, config.root, config.pool(better), config.own_options(better))
            if not verdict.works:
                console.print(f"the driver {better.name} would be better, but: {verdict.why}", highlight=False)
        bring(config, opened)
        remove_containers(opened)
        ours, how = run_containers(config, opened)
        copies = run_copies(opened)
        print_table(driver.name, ours, copies, how)
        remove_containers(opened)
    console.print(f"Go on by yourself: .venv/bin/hpmapper --root {config.root} image ls", highlight=False)
    console.print("Clean up: ./quickstart --clean", highlight=False)


def bring(config: Config, opened: Opened) -> None:
    """Have a Debian image: from a registry if one answers, else built here with mmdebstrap."""
    try:
        Images(opened.engine).find(IMAGE)
        return
    except NotFound:
        pass
    begin = time.monotonic()
    if registry_answers():
        hpmapper(config, "image", "pull", f"docker://{REGISTRY_IMAGE}")
        hpmapper(config, "image", "tag", REGISTRY_IMAGE, IMAGE)
    else:
        console.print("no registry can be reached: building a Debian image with mmdebstrap (a minute or two)")
        from hpmapper.bench.images import debian_minimal

        with tempfile.TemporaryDirectory(prefix="hpmapper-", dir="/var/tmp") as scratch:
            Path(scratch).chmod(0o755)  # apt's own user walks through here
            hpmapper(config, "image", "import", f"oci:{debian_minimal(Path(scratch))}", IMAGE)
    console.print(f"image ready after {time.monotonic() - begin:.0f} s", highlight=False)


def registry_answers() -> bool:
    """Whether the default registry can be reached at all."""
    try:
        with socket.create_connection((reference.parse(REGISTRY_IMAGE).domain, 443), timeout=3):
            return True
    except OSError:
        return False


def hpmapper(config: Config, *words: str) -> str:
    """Run the command line as a user would, and show it."""
    console.print(f"[dim]$ hpmapper {' '.join(words)}[/]", highlight=False)
    command = [sys.executable, "-m", "hpmapper.cli.main", "--root", str(config.root), *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise FailedPrecondition(f"hpmapper {words[0]} ended with status {done.returncode}")
    return done.stdout


@contextmanager
def measured(opened: Opened, cost: Cost) -> Iterator[None]:
    """Add what the block takes of disk and page cache."""
    home = opened.engine.driver.scratch.parent
    syncfs(home)
    drop_caches()
    before = Space.of(home).free
    yield
    syncfs(home)
    cost.disk += before - Space.of(home).free
    cost.cache += cached(opened)


def cached(opened: Opened) -> int:
    """Bytes of page cache of everything that the driver keeps, maps' own inodes included, each once."""
    home = opened.engine.driver.scratch.parent
    maps = [path / "m" for place in ("l", "i") if (home / place).exists() for path in (home / place).iterdir()]
    mounted = [path for path in maps if mount.is_mountpoint(path)]
    devices = [one.source for one in mount.mounts() if one.target == str(home) and one.source.startswith("/dev/loop")]
    return cached_below(home, *mounted) + cached_bytes(devices)


def run_containers(config: Config, opened: Opened) -> tuple[Cost, str]:
    """COUNT containers at once; says how they ran."""
    cost = Cost()
    with measured(opened, cost):
        begin = time.monotonic()
        containers = Containers(opened.engine)
        made = [containers.create(IMAGE, f"quickstart-{number}") for number in range(COUNT)]
        roots = [containers.mount(one) for one in made]
        cost.make = time.monotonic() - begin
        begin = time.monotonic()
        how = "real OCI containers"
        try:
            with ThreadPoolExecutor(COUNT) as threads:
                list(threads.map(lambda one: hpmapper(config, "container", "start", one.name, "sh", "-c", WORK), made))
        except HpmapperError as error:
            console.print(f"containers cannot run here ({error}); reading their roots from outside instead")
            how = "roots read from outside: containers cannot run here"
            do_work(roots)
        cost.work = time.monotonic() - begin
    return cost, how


def run_copies(opened: Opened) -> Cost:
    """The same with plain copies of the image, on the same file system."""
    containers = Containers(opened.engine)
    source = containers.mount(containers.create(IMAGE, "quickstart-source"))
    place = opened.engine.driver.scratch / "plain-copies"
    cost = Cost()
    place.mkdir()
    try:
        with measured(opened, cost):
            begin = time.monotonic()
            roots = [place / str(number) for number in range(COUNT)]
            for root in roots:
                subprocess.run(["cp", "-a", "--reflink=never", source, root], check=True)
            cost.make = time.monotonic() - begin
            drop_caches()  # what copying cached; the work below reads it again, as a container would
            begin = time.monotonic()
            do_work(roots)
            cost.work = time.monotonic() - begin
    finally:
        shutil.rmtree(place)
    return cost


def do_work(roots: Sequence[Path]) -> None:
    """What the containers do: in a chroot, without starting containers; from outside where even that is forbidden."""
    with ThreadPoolExecutor(COUNT) as threads:
        list(threads.map(_work_in, roots))


def _work_in(root: Path) -> None:
    done = subprocess.run(["chroot", root, "sh", "-c", WORK], stdout=subprocess.DEVNULL, check=False)
    if done.returncode == 0:
        return
    read_all(root / "usr")
    largest = max(regular_files(root / "usr/bin"), key=lambda found: found[1])[0]
    with (root / "etc/hostname").open("a") as small, open(largest, "ab") as large:
        small.write("changed\n")
        large.write(b"x")


def print_table(name: str, ours: Cost, copies: Cost, how: str) -> None:
    """What it cost, side by side."""
    table = Table(title=f"{COUNT} containers of one Debian image at once ({how})", title_justify="left")
    for column in ("", name, "plain copies", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    for label, mine, plain in (
        ("make and mount", ours.make, copies.make),
        ("start, read /usr, change two files", ours.work, copies.work),
    ):
        table.add_row(label, f"{mine:.3f} s", f"{plain:.3f} s", f"{plain / max(mine, 1e-9):.1f} x")
    for label, mine, plain in (
        ("disk space", ours.disk, copies.disk),
        ("page cache", ours.cache, copies.cache),
    ):
        table.add_row(label, format_size(mine), format_size(plain), f"{plain / max(mine, 1):.1f} x")
    table.caption = "Plain copies do the same work in a chroot: no container is started for them."
    Console().print(table)


def remove_containers(opened: Opened) -> None:
    """Remove what an earlier run left."""
    containers = Containers(opened.engine)
    for one in containers.all():
        if one.name.startswith("quickstart-"):
            containers.remove(one)


def clean(config: Config) -> None:
    """Remove the root with all that is in it."""
    if not config.root.exists():
        return
    with open_root(config) as opened:
        remove_containers(opened)
        opened.engine.detach()
    shutil.rmtree(config.root)
    console.print(f"removed {config.root}", highlight=False)


if __name__ == "__main__":
    if os.geteuid() != 0:
        sys.exit("quickstart: this needs root")
    main()
