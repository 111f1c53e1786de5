"""A container's start: read ahead by its image's profile, or recorded if there is none.

    with starting(db, driver, image, settings):
        …                       the container runs

All of it happens in a process beside, in parallel with mounting and the runtime's set-up. Nothing here may keep a
container from starting: what goes wrong is logged, and the start is as slow as it would have been.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from hpmapper.cache.beside import Beside, Side
from hpmapper.cache.places import Places, places
from hpmapper.cache.profile import Profile, decode, for_this_disk
from hpmapper.cache.record import enough, forget, is_cold, profile_of, watch
from hpmapper.cache.replay import Swept, sweep
from hpmapper.drivers.base import Chain, Driver
from hpmapper.errors import Corrupt, NotFound, Unsupported
from hpmapper.meta import profiles, uses
from hpmapper.meta.db import Database
from hpmapper.meta.images import ImageRow
from hpmapper.meta.snapshots import layers_below
from hpmapper.model import ObjectDigest

log = logging.getLogger(__name__)

WINDOW = 30.0
"""Seconds of a start that are recorded, unless something says sooner that it is over."""


@dataclass(frozen=True, slots=True)
class StartSettings:
    """What is done at starts. `window`: seconds to record; `record`: record the first start of an image."""

    replay: bool = True
    record: bool = True
    window: float = WINDOW


class ImageFiles:
    """An image as far as its start is concerned.

    Raises:
        Unsupported: the driver has no objects, so nothing is known of files across images and machines.
    """

    def __init__(self, db: Database, driver: Driver, image: ImageRow) -> None:
        self.image = image
        self.places: Places = places(driver)
        self.chain: Chain = layers_below(db, image.top)
        by_layer = uses.objects_of_layers(db, self.chain)
        self.objects: set[ObjectDigest] = {digest for layer in self.chain for digest in by_layer.get(layer, ())}
        if self.objects and self.places.object_file(next(iter(self.objects))) is None:
            raise Unsupported(f"the {driver.name} driver has no objects: starts cannot be recorded")

        self.map_file: Path | None = next(iter(self.places.map_files(self.chain)), None)

    def forget(self) -> None:
        """Drop what is cached of it."""
        forget(self.places, self.places.map_files(self.chain), self.objects)


def load(db: Database, image: ImageRow) -> Profile | None:
    """An image's profile, None if it has none (or a damaged one, which is logged)."""
    found = profiles.find(db, image.id)
    if found is None:
        return None
    try:
        return decode(found[0], f"start profile of {image.id}")
    except Corrupt as error:
        log.warning("%s", error)
        return None


def keep(db: Database, files: ImageFiles, profile: Profile) -> Profile:
    """Store a profile with an image, without what is none of the image's; returns it as stored."""
    own = for_this_disk(profile.restricted(files.objects), files.places)
    with db.transaction() as transaction:
        profiles.store(transaction, files.image.id, own.encode())
    return own


def replay(db: Database, driver: Driver, image: ImageRow) -> Swept | None:
    """Read ahead what the image's profile says, now; None if it has none."""
    profile = load(db, image)
    files = ImageFiles(db, driver, image)
    return sweep(profile, files.places, files.map_file) if profile else None


@contextmanager
def starting(db: Database, driver: Driver, image: ImageRow, settings: StartSettings) -> Iterator[None]:
    """While it lasts, a container of the image starts and runs."""
    helper = _helper(db, driver, image, settings)
    try:
        yield
    finally:
        if helper is not None:
            helper.end()


def _helper(db: Database, driver: Driver, image: ImageRow, settings: StartSettings) -> Beside | None:
    try:
        profile = load(db, image)
        if image.top is None or not (settings.replay if profile else settings.record):
            return None
        if profile is not None and (profile.cold or not settings.record):
            map_file = next(iter(places(driver).map_files(layers_below(db, image.top))), None)
            return Beside(lambda side: _sweep(profile, places(driver), map_file))
        files = ImageFiles(db, driver, image)
    except Unsupported:
        return None  # nothing to be done about it, and nothing to be told at each start
    if not files.objects:
        return None
    helper = Beside(lambda side: _record_or_sweep(side, db.path, profile, files, settings.window))
    if profile is None:
        helper.wait_ready()
    return helper


def _sweep(profile: Profile, where: Places, map_file: Path | None) -> None:
    sweep(profile, where, map_file)


def _record_or_sweep(side: Side, database: Path, known: Profile | None, files: ImageFiles, window: float) -> None:
    """Record, if there is no profile yet, or one that was recorded warm where now it is cold."""
    cold = is_cold(files.places, files.objects)
    if known is not None and not cold:
        sweep(known, files.places, files.map_file)
        return
    store_beside(database, files.image, record(files, side, window, cold=cold))


def store_beside(database: Path, image: ImageRow, profile: Profile) -> None:
    """Store a profile from a process beside, which must not touch SQLite: its maker has the database open.

    (sqlite.org/howtocorrupt.html, "Carrying an open database connection across a fork".)
    """
    command = [sys.executable, "-m", "hpmapper.cache.start", str(database), image.id]
    subprocess.run(command, input=profile.encode(), check=False)


def main(database: str, image_id: str) -> None:
    """Store the profile that stands on standard input."""
    profile = decode(sys.stdin.buffer.read(), f"start profile of {image_id}")
    with closing(Database(Path(database))) as db, db.transaction() as transaction:
        try:
            profiles.store(transaction, image_id, profile.encode())
        except NotFound:
            pass  # the image was removed meanwhile


def record(
    files: ImageFiles, side: Side, window: float, *, cold: bool, is_ready: Callable[[], bool] = lambda: False
) -> Profile:
    """Watch until time is up, the side is told to end, or the container `is_ready`."""
    began = time.monotonic()
    over = enough(side.told, window)
    seen = watch(files.places, lambda wait: over(wait) or is_ready(), side.ready)
    own = [digest for digest in seen if digest in files.objects]
    return profile_of(files.places, files.map_file, own, time.monotonic() - began, cold=cold)


if __name__ == "__main__":
    main(*sys.argv[1:])
