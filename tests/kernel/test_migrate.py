"""Moving a root's whole contents to another driver: all of it, verified, resumable, the source as it was."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from hpmapper.check import check
from hpmapper.cli.main import cli
from hpmapper.config import Config
from hpmapper.containers import Containers
from hpmapper.errors import AlreadyExists, Corrupt, FailedPrecondition, InvalidArgument, NoSpace, Unsupported
from hpmapper.forest import Forest
from hpmapper.image.opening import SourceOptions
from hpmapper.images import Images
from hpmapper.kernel import mount, sync
from hpmapper.migrate.move import Migration
from hpmapper.migrate.roots import source_of, target_of
from hpmapper.root import DATABASE, only_daemon, open_root, remove_root
from hpmapper.runtime import place
from hpmapper.testing.tars import member, tar
from tests import migration, scenario
from tests.migration import Silent, migrate

pytestmark = pytest.mark.kernel

HOST = ("hpmapper", "overlay", "btrfs", "vfs")


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
        assert migration.picture(source) == expected, "the source is as it was"
        migration.assert_shows(expected, target, by_times="vfs" in (before, after))
        assert migrate(source, target).new == 0, "nothing is left to be moved"
    finally:
        remove_root(target, force=True)
        _detach(source)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Config]:
    """A root of the overlay driver with an image and a container, which tests may spoil."""
    source = migration.config(tmp_path, "overlay", "source")
    scenario.write_layouts(tmp_path / "layouts")
    with migration.removed(source):
        with open_root(source) as opened:
            images = Images(opened.engine)
            images.bring(str(tmp_path / "layouts/base"), SourceOptions(spool=tmp_path), ["base"], scenario.Silent())
            Containers(opened.engine).create("base", "one")
        yield source


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Config]:
    """Where to move to; removed afterwards."""
    config = migration.config(tmp_path, "vfs", "target")
    with migration.removed(config):
        yield config


def test_the_source_goes_only_when_told_to(small: Config, target: Config) -> None:
    migrate(small, target)
    assert (small.root / DATABASE).exists()
    migrate(small, target, remove=True)
    assert not small.root.exists()
    with open_root(target) as opened:
        assert [row.name for row in Containers(opened.engine).all()] == ["one"]
        assert list(check(opened.engine)) == []


def test_what_came_in_meanwhile_keeps_the_source(small: Config, target: Config) -> None:
    with source_of(small) as offered, target_of(target, small) as engine:
        moving = Migration(offered, engine, target.floor(), Silent())
        moving.run()
        with open_root(small) as another:
            Containers(another.engine).create("base", "two")
        with pytest.raises(FailedPrecondition, match="container-two"):
            moving.require_all_moved()


def test_a_damaged_layer_is_refused_by_name(small: Config, target: Config) -> None:
    victim = next(small.root.glob("overlay/l/*/diff/big0"))
    data = bytearray(victim.read_bytes())
    data[1000] ^= 1
    victim.write_bytes(data)
    with pytest.raises(Corrupt, match=r"layer \d+ of snapshot 'sha256:.*source.*DiffID"):
        migrate(small, target)
    with open_root(target) as opened:
        assert Images(opened.engine).all() == []
        scenario.assert_no_orphans(opened.engine)


def test_a_layer_with_a_file_missing_is_refused_by_name(small: Config, target: Config) -> None:
    next(small.root.glob("overlay/l/*/diff/big0")).unlink()
    with pytest.raises(Corrupt, match=r"layer \d+ of snapshot 'sha256:.*big0 is missing"):
        migrate(small, target)


def test_a_target_that_was_changed_is_told_from_the_source(small: Config, target: Config) -> None:
    """What a run has found in the target is not believed to be what an earlier run has put there."""
    migrate(small, target)
    with open_root(target) as opened:
        containers = Containers(opened.engine)
        (containers.mount(containers.get("one")) / "etc/small").write_bytes(b"other")
    with pytest.raises(Corrupt, match="container 'one' is not the same in the target: /etc/small"):
        migrate(small, target)


def test_damage_in_the_target_is_found(small: Config, target: Config) -> None:
    migrate(small, target)
    for victim in target.root.glob("vfs/l/*/diff/big0"):
        victim.write_bytes(b"x" * victim.stat().st_size)
    with pytest.raises(Corrupt, match="came out otherwise"):
        migrate(small, target)


def test_a_container_in_use_is_refused(small: Config, target: Config) -> None:
    with open_root(small) as opened:
        containers = Containers(opened.engine)
        root = containers.mount(containers.get("one"))
    with (root / "etc/small").open("rb"), pytest.raises(FailedPrecondition, match=r"container-one.*in use"):
        migrate(small, target)
    assert migrate(small, target).containers == 1, "one that is mounted and idle is unmounted"


def test_what_an_engine_has_mounted_is_refused(small: Config, target: Config, tmp_path: Path) -> None:
    """containerd mounts what the overlay driver hands out itself, and goes on when the daemon is stopped."""
    elsewhere = tmp_path / "bundle"
    elsewhere.mkdir()
    with open_root(small) as opened:
        spec = opened.engine.handout(Containers(opened.engine).snapshot(Containers(opened.engine).get("one")))
    subprocess.run(["mount", "-t", spec.type, spec.source, "-o", ",".join(spec.options), str(elsewhere)], check=True)
    try:
        with pytest.raises(FailedPrecondition, match=f"mounted at {elsewhere}"):
            migrate(small, target)
    finally:
        mount.umount(elsewhere)


def test_a_bind_of_a_root_is_refused(small: Config, target: Config, tmp_path: Path) -> None:
    """vfs hands out binds, which keep nothing busy."""
    elsewhere = tmp_path / "bundle"
    elsewhere.mkdir()
    migrate(small, target)
    with open_root(target) as opened:
        containers = Containers(opened.engine)
        mount.bind(containers.mount(containers.get("one")), elsewhere)
    try:
        with pytest.raises(FailedPrecondition, match=f"mounted at {elsewhere}"):
            migrate(target, migration.config(tmp_path, "overlay", "third"))
    finally:
        mount.umount(elsewhere)
        remove_root(migration.config(tmp_path, "overlay", "third"), force=True)


@pytest.mark.parametrize("driver", ["hpmapper", "btrfs"])
def test_what_a_running_container_has_bound_is_refused_and_left_alone(driver: str, tmp_path: Path) -> None:
    """Its daemon has stopped, it goes on: our own mount stays, so that the next daemon makes no second one."""
    source, target = migration.config(tmp_path, driver, "source"), migration.config(tmp_path, "vfs", "target")
    elsewhere = tmp_path / "bundle"
    elsewhere.mkdir()
    with migration.removed(source, target):
        with open_root(source) as opened:
            forest = Forest(opened.engine, "containerd")
            recorded = forest.prepare("running", "", {})
            spec = forest.first_mounts(recorded)
            mount.bind(spec.source, elsewhere, recursive=True)
        with pytest.raises(FailedPrecondition, match=f"'containerd:running' is in use: it is mounted at {elsewhere}"):
            migrate(source, target)
        assert mount.is_mountpoint(spec.source) or driver == "btrfs", "btrfs hands out the directory itself"
        mount.umount(elsewhere)
        assert migrate(source, target).snapshots == 1


def test_a_daemon_at_either_end_is_refused(small: Config, target: Config) -> None:
    with only_daemon(small.root), pytest.raises(FailedPrecondition, match="a daemon serves"):
        migrate(small, target)
    migrate(small, target)
    with only_daemon(target.root), pytest.raises(FailedPrecondition, match="a daemon serves"):
        migrate(small, target)


def test_a_running_container_is_refused(small: Config, target: Config) -> None:
    with place.Place(small.root, "one").held(), pytest.raises(FailedPrecondition, match="'one' is running"):
        migrate(small, target)


def test_too_little_room_is_refused_before_anything_is_moved(small: Config, target: Config) -> None:
    with pytest.raises(NoSpace, match="does not fit"):
        migrate(small, target.with_options(["min_free_space=100T"]))
    with open_root(target) as opened:
        assert opened.engine.driver.stored().layers == set()


def test_other_things_of_the_same_name_are_refused(small: Config, target: Config, tmp_path: Path) -> None:
    with open_root(target) as opened:
        images = Images(opened.engine)
        images.bring(str(tmp_path / "layouts/third"), SourceOptions(spool=tmp_path), ["base"], scenario.Silent())
    with pytest.raises(AlreadyExists, match=r"another image docker\.io/library/base"):
        migrate(small, target)
    with open_root(target) as opened:
        images = Images(opened.engine)
        images.tag("base", "third")
        images.remove("base")
        Containers(opened.engine).create("third", "one")
    with pytest.raises(AlreadyExists, match="another container 'one'"):
        migrate(small, target)


def test_one_root_is_not_two(small: Config) -> None:
    with pytest.raises(InvalidArgument, match="one root"):
        migrate(small, small)


def test_large_files_keep_what_they_share(tmp_path: Path) -> None:
    """A container that changed one block of a large file of its image costs about that block in the target."""
    source, target = migration.config(tmp_path, "vfs", "source"), migration.config(tmp_path, "hpmapper", "target")
    large = os.urandom(16 << 20)
    try:
        with open_root(source) as opened:
            layer = tar(member(b"large", large))
            (tmp_path / "rootfs.tar").write_bytes(layer)
            images, containers = Images(opened.engine), Containers(opened.engine)
            images.bring(f"tar:{tmp_path / 'rootfs.tar'}", SourceOptions(spool=tmp_path), ["one"], scenario.Silent())
            one = containers.create("one", "one")
            with (containers.mount(one) / "large").open("r+b") as file:
                file.seek(1 << 20)
                file.write(b"changed")
        migrate(source, target)
        with open_root(target) as opened:
            containers = Containers(opened.engine)
            sync.syncfs(containers.mount(containers.get("one")))
            assert containers.usage(containers.get("one")).size < 1 << 20
    finally:
        for config in (source, target):
            remove_root(config, force=True)


def _cli(*words: str | Path, status: int = 0) -> str:
    done = CliRunner().invoke(cli, [*map(str, words)])
    assert done.exit_code == status, (words, done.output)
    return done.output


def test_the_command(small: Config, tmp_path: Path) -> None:
    """The configured root is one end, as the options leave it; the other one's options are named."""
    root, new, third = small.root, tmp_path / "new", tmp_path / "third"
    free = ("--storage-opt", "min_free_space=0")
    wanted = ("--to", "hpmapper", "--to-root", new, "--to-opt", "pool.size=400M", "--to-opt", "min_free_space=0")
    facts = json.loads(_cli("--root", root, *free, "--json", "migrate", *wanted))
    assert facts == {
        "source": str(root),
        "target": str(new),
        "images": 1,
        "containers": 1,
        "snapshots": 2,
        "new": 3,
        "source_removed": False,
    }
    text = _cli(
        "--root", third, "--storage-driver", "vfs", *free, "migrate", "--from-root", new, "--remove-source", "-q"
    )
    assert text == f"1 images, 1 containers and 2 snapshots are in {third}, verified; the source is removed\n"
    assert not new.exists()
    assert "one" in _cli("--root", third, "container", "ls")
    _cli("--root", root, "migrate", status=2)
    _cli("--root", root, "migrate", "--to-root", third, "--to", "nothing", status=2)
    _cli("--root", root, "migrate", "--from", "vfs", "--to-root", third, status=5)
    _cli("--root", tmp_path / "none", "migrate", "--to-root", third, status=3)
    _cli("--root", root, "migrate", "--from", "docker-devicemapper", "--remove-source", status=2)
    _cli("--root", third, "pool", "rm", "--force")


def test_limits_move_or_are_dropped(tmp_path: Path) -> None:
    source, target = migration.config(tmp_path, "hpmapper", "source"), migration.config(tmp_path, "vfs", "target")
    source = source.with_options(["pool.fs=btrfs", "pool.size=512M"])
    third = migration.config(tmp_path, "btrfs", "third")
    scenario.write_layouts(tmp_path / "layouts")
    with migration.removed(source, target, third):
        with open_root(source) as opened:
            images = Images(opened.engine)
            images.bring(str(tmp_path / "layouts/base"), SourceOptions(spool=tmp_path), ["base"], scenario.Silent())
            Containers(opened.engine).create("base", "one", size=migration.LIMIT)
        migrate(source, third)
        with open_root(third) as opened:
            containers = Containers(opened.engine)
            assert containers.limit(containers.get("one")) == migration.LIMIT
        with pytest.raises(Unsupported, match="container 'one' has a size limit"):
            migrate(source, target)
        migrate(source, target, limits=False)
        with open_root(target) as opened:
            containers = Containers(opened.engine)
            assert containers.limit(containers.get("one")) is None


def test_killed_anywhere_and_resumed(
    stocked: dict[str, Config], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Killed at every step of its own, one after the other in one target, and then done: nothing is lost or twofold."""
    source, target = stocked["vfs"], migration.config(tmp_path, "hpmapper", "target")
    expected = migration.picture(source)
    kills = 0
    try:
        for point in ("layer-recorded", "image-recorded", "begun", "copied", "recorded", "verified"):
            for hit in (1, 2, 3):
                status = scenario.in_child(lambda: migrate(source, target), f"migrate.{point}:{hit}")
                kills += status == -signal.SIGKILL
        assert kills >= 8
        for hit in (1, 4):
            scenario.in_child(lambda: migrate(source, target), f"ingest.synced:{hit}")
        migrate(source, target)
        migration.assert_shows(expected, target)
        with open_root(target) as opened:
            opened.engine.rubbish.collect()
            assert list(check(opened.engine)) == []
            scenario.assert_no_orphans(opened.engine)
        record_property("kills", kills)
    finally:
        remove_root(target, force=True)
        _detach(source)
