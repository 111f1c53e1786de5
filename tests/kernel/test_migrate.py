"""Moving a root's whole contents to another driver: all of it, verified, resumable, the source as it was."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpmapper.config import Config
from hpmapper.migrate.move import Migration, Moved
from hpmapper.migrate.roots import remove_source, source_of, target_of
from hpmapper.root import open_root, remove_root
from tests import migration

pytestmark = pytest.mark.kernel

HOST = ("hpmapper", "overlay", "btrfs", "vfs")


class Silent:
    """Watches without a word."""

    def phase(self, name: str, total: int) -> None:
        pass

    def item(self, name: str) -> None:
        pass

    def advance(self, count: int) -> None:
        pass


def migrate(source: Config, target: Config, *, remove: bool = False) -> Moved:
    """As the command does."""
    with source_of(source) as offered, target_of(target, source) as engine:
        moved = Migration(offered, engine, target.floor(), Silent()).run()
    if remove:
        remove_source(source)
    return moved


@pytest.fixture(scope="module")
def stocked(tmp_path_factory: pytest.TempPathFactory, private_mounts: None) -> Iterator[dict[str, Config]]:
    """A root of each driver with one of everything."""
    made: dict[str, Config] = {}
    for driver in HOST:
        directory = tmp_path_factory.mktemp(driver)
        made[driver] = migration.config(directory, driver, "source")
        migration.stock(made[driver], directory)
        _detach(made[driver])
    yield made
    for config in made.values():
        remove_root(config, force=True)


def _detach(config: Config) -> None:
    with open_root(config) as opened:
        opened.engine.detach()


@pytest.mark.parametrize(("before", "after"), list(itertools.permutations(HOST, 2)))
def test_everything_moves(before: str, after: str, stocked: dict[str, Config], tmp_path: Path) -> None:
    source, target = stocked[before], migration.config(tmp_path, after, "target")
    expected = migration.picture(source)
    try:
        moved = migrate(source, target)
        assert (moved.images, moved.containers) == (3, 2)
        assert moved.new == moved.snapshots + moved.containers
        found = migration.picture(target)
        assert found.pop("blobs") >= expected["blobs"], "reading the tars has added to what is known"
        assert migration.picture(source) == expected, "the source is as it was"
        if "vfs" in (before, after):
            for one in (found, expected):  # vfs tells changes by their times
                one["changes"]["changed"] = [at for at in one["changes"]["changed"] if at.path != migration.UNSEEN]
        for what, value in found.items():
            assert value == expected[what], what
        assert migrate(source, target).new == 0, "nothing is left to be moved"
    finally:
        remove_root(target, force=True)
        _detach(source)
