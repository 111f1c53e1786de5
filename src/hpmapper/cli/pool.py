"""hpmapper pool: the file system that everything lies on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import click

from hpmapper.cli import output, thinpool
from hpmapper.cli.groups import NearestGroup
from hpmapper.cli.session import config_of, require_stopped, session
from hpmapper.cli.state import State, json_option, pass_state
from hpmapper.config import Config
from hpmapper.drivers.devicemapper import admin
from hpmapper.drivers.devicemapper.devices import Devices
from hpmapper.drivers.registry import by_name
from hpmapper.errors import Corrupt, FailedPrecondition, InvalidArgument
from hpmapper.meta.db import Database
from hpmapper.pool.base import CheckReport, Pool, PoolFs, parse_size
from hpmapper.root import make_root, pool_of, remember_pool, remove_root, require_no_daemon
from hpmapper.runtime import place

_DRIVER, _THIN = "hpmapper", "devicemapper"


@click.group(cls=NearestGroup)
def pool() -> None:
    """Make, watch and grow the storage pool."""


@pool.command()
@click.option("--size", metavar="SIZE", help="Of the sparse file [100G, or 90% of what is free].")
@click.option("--device", metavar="DEVICE", help="Use this block device instead of a file.")
@click.option("--directory", metavar="DIR", help="Use a directory on XFS or btrfs instead of a file.")
@click.option("--fs", type=click.Choice(list(map(str, PoolFs))), help="The file system to make [xfs].")
@click.option("--force", is_flag=True, help="Overwrite what is there, unless it is in use.")
@json_option
@pass_state
def create(
    state: State, size: str | None, device: str | None, directory: str | None, fs: str | None, force: bool
) -> None:
    """Make the pool, and with it the root directory."""
    asked = {
        "pool.size": size,
        "pool.device": device and str(Path(device).absolute()),
        "pool.directory": directory and str(Path(directory).absolute()),
        "pool.fs": fs,
    }
    config = config_of(state).with_options([f"{name}={value}" for name, value in asked.items() if value])
    if config.driver == _THIN:
        _create_thin(state, config)
        return
    driver = by_name(config.driver or _DRIVER)
    if not driver.needs_pool:
        raise InvalidArgument(f"the driver {driver.name} has no pool", hint="leave out --storage-driver")
    make_root(dataclasses.replace(config, driver=driver.name), force=force)
    with session(state), _pool(config) as (_, made):
        facts = _status(config, made)
    output.show(state, facts, lambda: _text(facts))


def _create_thin(state: State, config: Config) -> None:
    with session(state, create=True):
        found = thinpool.find(config)
    assert found is not None
    thinpool.status(state, found)


@pool.command()
@json_option
@pass_state
def status(state: State) -> None:
    """Show where the pool is, its size and its free space."""
    config = config_of(state)
    if thin := thinpool.find(config):
        thinpool.status(state, thin)
        return
    with _pool(config) as (_, found):
        facts = _status(config, found)
    output.show(state, facts, lambda: _text(facts))


@pool.command()
@click.argument("size", required=False)
@click.option("--metadata", default="", metavar="SIZE", help="Thin pools: the metadata's size, too.")
@click.option("--add-device", type=click.Path(path_type=Path), metavar="DEVICE", help="Direct-lvm: and by this device.")
@json_option
@pass_state
def grow(state: State, size: str | None, metadata: str, add_device: Path | None) -> None:
    """Grow the pool to SIZE, or to its device's end.

    Containers may run meanwhile. For direct-lvm, SIZE may also say by how much: +50G, +80%FREE.
    """
    config = config_of(state)
    if thin := thinpool.find(config):
        thinpool.grow(state, thin, size or "", metadata, add_device)
        return
    if metadata or add_device:
        raise InvalidArgument("--metadata and --add-device are for thin pools", hint="leave them out")
    with _pool(config) as (db, found):
        remember_pool(db, found.grow(parse_size(size) if size else 0))
        facts = _status(config, found)
    output.show(state, facts, lambda: _text(facts))


@pool.command()
@json_option
@pass_state
def check(state: State) -> None:
    """Check the pool's file system.

    When the pool is detached thoroughly, else as far as possible. What is stored in it is checked by `hpmapper fsck`.
    """
    config = config_of(state)
    if thin := thinpool.find(config):
        report = thinpool.check(state, thin)
    else:
        with _pool(config) as (_, found):
            report = found.check()
    output.show(state, dataclasses.asdict(report), lambda: _report(report))
    if report.sound is False and thin:
        raise Corrupt("the pool's metadata is damaged", hint="hpmapper pool repair")
    if report.sound is False:
        raise Corrupt("the pool's file system is damaged", hint="save its images, and see xfs_repair or btrfs check")


@pool.command()
@pass_state
def repair(state: State) -> None:
    """Repair a thin pool's metadata.

    It is taken down for that: no container may run. The damaged metadata is kept beside the new.
    """
    config = config_of(state)
    require_stopped(config.root)
    thinpool.repair(state, _thin(config))


@pool.command()
@json_option
@pass_state
def usage(state: State) -> None:
    """List what each thin device occupies.

    MAPPED is all that it has, EXCLUSIVE what its removal would give back, CHANGED what its parent has not.
    """
    config = config_of(state)
    with session(state):
        thinpool.usage(state, _thin(config))


@pool.command()
@click.option("--warning", default=80.0, metavar="PERCENT", help="Full from here on is a warning [80].")
@click.option("--critical", default=90.0, metavar="PERCENT", help="Full from here on is critical [90].")
@click.option("--interval", default=0.0, metavar="SECONDS", help="Go on for ever, at this distance.")
@click.option("--metrics", is_flag=True, help="In Prometheus's text format.")
@json_option
@pass_state
def watch(state: State, warning: float, critical: float, interval: float, metrics: bool) -> int:
    """Say how full a thin pool is, as monitoring plugins do.

    Ends with 0 when all is well, 1 for a warning, 2 when it is critical, 3 when the pool is not active.
    """
    return thinpool.watch(state, _thin(config_of(state)), warning, critical, interval, metrics=metrics)


@pool.command()
@json_option
@pass_state
def trim(state: State) -> None:
    """Give the pool's unused blocks back to its device or file.

    Of a thin pool, those of running containers' deleted files.
    """
    config = config_of(state)
    with session(state):
        if thin := thinpool.find(config):
            size = admin.trim(thin)
        else:
            with _pool(config) as (_, found):
                size = found.trim()
    output.show(state, {"bytes_trimmed": size}, lambda: f"gave back {output.size(size)}")


@pool.command()
@pass_state
def attach(state: State) -> None:
    """Mount the pool, as other commands do when they need it."""
    with session(state):
        pass


@pool.command()
@pass_state
def activate(state: State) -> None:
    """Bring a thin pool up, as other commands do when they need it.

    After a reboot, or when Docker would say "Non existing device".
    """
    _thin(config_of(state)).attach()


@pool.command()
@pass_state
def detach(state: State) -> None:
    """Unmount all containers and the pool.

    Everything stays on the disk, and the next command that needs the pool attaches it again.
    """
    config = config_of(state)
    if not thinpool.find(config):
        with _pool(config) as (_, found):
            if not found.is_attached():
                return
    require_no_daemon(config.root)
    require_stopped(config.root)
    with session(state) as opened:
        opened.engine.detach()


@pool.command()
@click.option("--force", is_flag=True, help="With all images and containers in it.")
@pass_state
def rm(state: State, force: bool) -> None:
    """Remove the pool and the root directory, whatever its driver."""
    config = config_of(state)
    require_stopped(config.root)
    remove_root(config, force=force)
    place.forget(config.root)


def _thin(config: Config) -> Devices:
    found = thinpool.find(config)
    if found is None:
        raise FailedPrecondition(f"the root at {config.root} has no thin pool", hint="hpmapper pool status")
    return found


@contextmanager
def _pool(config: Config) -> Iterator[tuple[Database, Pool]]:
    db, found = pool_of(config)
    with closing(db):
        yield db, found


def _status(config: Config, found: Pool) -> dict[str, object]:
    facts: dict[str, object] = {"kind": str(found.config.kind), "attached": found.is_attached()}
    facts |= {key.replace(" ", "_"): value for key, value in found.facts().items()}
    if found.config.size:
        facts["size"] = found.config.size
    if found.is_attached():
        space = found.space()
        facts |= {"total": space.total, "used": space.used, "free": space.free, "floor": config.floor().of(space)}
    return facts


def _text(facts: dict[str, object]) -> str:
    shown = {key.replace("_", " "): _shown(value) for key, value in facts.items()}
    if not facts["attached"]:
        shown["free"] = "unknown while it is not attached; any command that needs it attaches it"
    return output.pairs(shown)


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return output.yes(value)
    return output.size(value) if isinstance(value, int) else str(value)


def _report(report: CheckReport) -> str:
    verdict = {True: "sound", False: "damaged", None: "no damage seen"}[report.sound]
    lines = [verdict, f"checked: {report.checked}"]
    lines += [f"not checked: {report.unchecked}"] if report.unchecked else []
    return "\n".join([*lines, *report.findings])
