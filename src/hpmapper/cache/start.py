"""A container's start: read ahead by its image's profile, or recorded if there is none.

    with starting(db, driver, top, settings):
        …                       the container runs

`top` is the image's topmost snapshot. Profiles belong to layers, told by their chain ID, not to images' names.

All of it happens in a process beside, in parallel with mounting and the runtime's set-up. Nothing here may keep a
container from starting: what goes wrong is logged, and the start is as slow as it would have been.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from hpmapper.cache.beside import Beside, Side
from hpmapper.cache.places import Places, own_devices, places
from hpmapper.cache.profile import Profile, decode, for_this_disk
from hpmapper.cache.record import Seen, enough, forget, is_cold, watch
from hpmapper.cache.replay import Swept, claimed, read_ahead, sweep
from hpmapper.drivers.base import Chain, Driver
from hpmapper.errors import Corrupt, NotFound, Unsupported
from hpmapper.kernel import bdi
from hpmapper.meta import profiles, uses
from hpmapper.meta.db import Database
from hpmapper.meta.snapshots import layers_below
from hpmapper.model import ObjectDigest, SnapshotId

log = logging.getLogger(__name__)

WINDOW = 30.0
"""Seconds of a start that are recorded, unless something says sooner that it is over."""

_EXACT_KIB = 16
"""Read ahead while a start is recorded exactly. With none each page would be a request."""

_SAMPLE = 16
"""Objects of an image that tell whether it is cached."""


@dataclass(frozen=True, slots=True)
class StartSettings:
    """What is done at starts. `window`: seconds to record; `record`: record the first start of an image."""

    replay: bool = True
    record: bool = True
    window: float = WINDOW


class ImageFiles:
    """An image as far as its start is concerned.

    Attributes:
        chain_id: what its profile is kept under, None if that is unknown.
        sample: a few of its objects; none if it has none.
        map_file: the map that a start asks for names.
        database: the files of the database that says so.

    Raises:
        Unsupported: the driver has no objects, so nothing is known of files across images and machines.
    """

    def __init__(self, db: Database, driver: Driver, top: SnapshotId | None) -> None:
        self.places: Places = places(driver)
        named = profiles.chain_of(db, top)
        self.chain_id = named[0] if named else None
        self.chain: Chain = layers_below(db, named[1] if named else top)
        self.sample = uses.some_objects(db, self.chain, _SAMPLE)
        if self.sample and self.places.object_file(next(iter(self.sample))) is None:
            raise Unsupported(f"the {driver.name} driver has no objects: starts cannot be recorded")
        self.map_file = first_map(self.places, self.chain)
        self.database = db.files
        self._db = db

    @cached_property
    def objects(self) -> set[ObjectDigest]:
        """All of its objects. Of a large image it takes 20 ms to find them, for which a start need not wait."""
        by_layer = uses.objects_of_layers(self._db, self.chain)
        return {digest for layer in self.chain for digest in by_layer.get(layer, ())}

    def is_cold(self) -> bool:
        """Whether next to nothing of it is cached, told from the sample."""
        return is_cold(self.places, self.sample)

    def forget(self) -> None:
        """Drop what is cached of it."""
        forget(self.places, self.places.map_files(self.chain), self.objects)


def first_map(places: Places, chain: Chain) -> Path | None:
    """The map that a start on a chain asks for names: the image's, if it has one."""
    return next(iter(places.map_files(chain)), None)


def load(db: Database, top: SnapshotId | None) -> Profile | None:
    """An image's profile, None if it has none (or a damaged one, which is logged)."""
    named = profiles.chain_of(db, top)
    found = profiles.find(db, named[0]) if named else None
    if named is None or found is None:
        return None
    try:
        return decode(found[0], f"start profile of {named[0]}")
    except Corrupt as error:
        log.warning("%s", error)
        return None


def keep(db: Database, files: ImageFiles, profile: Profile) -> Profile:
    """Store a profile with an image, without what is none of the image's; returns it as stored."""
    own = for_this_disk(profile.restricted(files.objects), files.places)
    if files.chain_id is not None:
        with db.transaction() as transaction:
            profiles.store(transaction, files.chain_id, own.encode())
    return own


def replay(db: Database, driver: Driver, top: SnapshotId | None) -> Swept | None:
    """Read ahead what the image's profile says, now; None if it has none."""
    profile = load(db, top)
    files = ImageFiles(db, driver, top)
    return sweep(profile, files.places, files.map_file) if profile else None


@contextmanager
def starting(db: Database, driver: Driver, top: SnapshotId | None, settings: StartSettings) -> Iterator[None]:
    """While it lasts, a container of the image starts and runs."""
    helper = _helper(db, driver, top, settings)
    try:
        yield
    finally:
        if helper is not None:
            helper.end()


def _helper(db: Database, driver: Driver, top: SnapshotId | None, settings: StartSettings) -> Beside | None:
    try:
        profile = load(db, top)
        if top is None or not (settings.replay if profile else settings.record):
            return None
        if profile is not None and (profile.cold or not settings.record):
            where = places(driver)
            map_file = first_map(where, layers_below(db, top))
            with claimed(profile, where, map_file) as claim:
                return None if claim is None else Beside(lambda side: read_ahead(profile, where, map_file), claim)
        files = ImageFiles(db, driver, top)
    except Unsupported:
        return None  # nothing to be done about it, and nothing to be told at each start
    if not files.objects or files.chain_id is None:  # all of them: the process beside may not ask for more
        return None
    helper = Beside(lambda side: _record_or_sweep(side, db.path, profile, files, settings.window))
    if profile is None:
        helper.wait_ready()
    return helper


def _record_or_sweep(side: Side, database: Path, known: Profile | None, files: ImageFiles, window: float) -> None:
    """Record, if there is no profile yet, or one that was recorded warm where now it is cold."""
    cold = files.is_cold()
    if known is not None and not cold:
        sweep(known, files.places, files.map_file)
        return
    store_beside(database, files, record(files, side, window, cold=cold))


def store_beside(database: Path, files: ImageFiles, profile: Profile) -> None:
    """Store a profile from a process beside, which must not touch SQLite: its maker has the database open.

    (sqlite.org/howtocorrupt.html, "Carrying an open database connection across a fork".)
    """
    command = [sys.executable, "-m", "hpmapper.cache.start", str(database), files.chain_id or ""]
    subprocess.run(command, input=profile.encode(), check=False)


def main(database: str, chain_id: str) -> None:
    """Store the profile that stands on standard input."""
    profile = decode(sys.stdin.buffer.read(), f"start profile of {chain_id}")
    with closing(Database(Path(database))) as db, db.transaction() as transaction:
        try:
            profiles.store(transaction, chain_id, profile.encode())
        except NotFound:
            pass  # the image was removed meanwhile


class Told(Protocol):
    """Whoever says when it is enough: `told` is readable then. `ready` is called when watching has begun."""

    @property
    def told(self) -> int: ...

    @property
    def ready(self) -> Callable[[], None]: ...


def record_exactly(
    files: ImageFiles, side: Told, window: float, *, is_ready: Callable[[], bool] = lambda: False
) -> Profile:
    """`record` a cold start while the kernel reads next to nothing ahead, for this container or any other.

    What is read ahead cannot be told from what is needed: of a loop device it is up to 2.5 MiB around each page, and
    so most of what a profile would have (docs/measurements.md). The start is slower for it. Where others read from the
    device as well, it is left as it is.
    """
    scratch = files.places.scratch
    with bdi.read_ahead(scratch, _EXACT_KIB) if own_devices(scratch) else nullcontext():
        return record(files, side, window, cold=True, is_ready=is_ready)


def record(
    files: ImageFiles, side: Told, window: float, *, cold: bool, is_ready: Callable[[], bool] = lambda: False
) -> Profile:
    """Watch until time is up, the side is told to end, or the container `is_ready`."""
    began = time.monotonic()
    over = enough(side.told, window)
    seen = Seen(files.places, lambda: files.objects, files.map_file, cold=cold)
    watch(files.places, seen, lambda wait: over(wait) or is_ready(), side.ready, files.database)
    return seen.profile(time.monotonic() - began)


if __name__ == "__main__":
    main(*sys.argv[1:])
