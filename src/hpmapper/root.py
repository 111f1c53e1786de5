"""A root directory: opened, made on first use, its driver chosen.

    <root>/hpmapper.db      what exists (hpmapper.meta.schema)
    <root>/pool, pool.img   the pool of a driver that needs one (hpmapper.pool)
    <root>/DRIVER           the data of one that does not

A root has one driver for life: the one it was made with. Data that is there wins over every preference, as in Docker.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hpmapper.config import Config
from hpmapper.drivers import registry
from hpmapper.drivers.registry import Registered
from hpmapper.engine import Engine
from hpmapper.errors import FailedPrecondition, NotFound, Unsupported
from hpmapper.kernel import lock
from hpmapper.meta.db import Database
from hpmapper.pool import open_pool
from hpmapper.pool.base import Pool, PoolConfig

log = logging.getLogger(__name__)

DATABASE = "hpmapper.db"


@dataclass(frozen=True, slots=True)
class Opened:
    """An open root: its engine, and its pool if its driver stands on one."""

    engine: Engine
    pool: Pool | None


@contextmanager
def open_root(config: Config, *, create: bool = True) -> Iterator[Opened]:
    """Open a root; with `create`, one that is not there is made as `config` says.

    Raises:
        NotFound: it is not there. FailedPrecondition: it has another driver than the one asked for.
        Unsupported: the driver asked for does not work on this host.
    """
    if not create and not (config.root / DATABASE).exists():
        raise NotFound(f"there is no hpmapper root at {config.root}", hint="hpmapper pool create makes one; see --root")
    config.root.mkdir(mode=0o700, parents=True, exist_ok=True)
    db = Database(config.root / DATABASE)
    try:
        registered, pool_config = _settle(config, db)
        pool = open_pool(config.root, pool_config) if registered.needs_pool else None
        driver = registered.make(config.root, pool_config)
        driver.attach()
    except BaseException:
        db.close()
        raise
    engine = Engine(db, driver, config.floor())
    try:
        engine.reconcile()
        yield Opened(engine, pool)
    finally:
        engine.close()


def pool_of(config: Config) -> tuple[Database, Pool]:
    """The root's pool without attaching it, and the database that has its settings.

    Raises:
        NotFound: there is no root, or its driver has no pool.
    """
    if not (config.root / DATABASE).exists():
        raise NotFound(f"there is no hpmapper root at {config.root}", hint="hpmapper pool create makes one; see --root")
    db = Database(config.root / DATABASE)
    stored = db.setting("pool")
    if stored is None:
        db.close()
        raise NotFound(f"the root at {config.root} has no pool: its driver is {db.setting('driver')}")
    return db, open_pool(config.root, PoolConfig.from_dict(json.loads(stored)))


def remember_pool(db: Database, pool: PoolConfig) -> None:
    """Record a pool's settings: before it is made, and whenever they change."""
    db.set_setting("pool", json.dumps(pool.to_dict()))


def _settle(config: Config, db: Database) -> tuple[Registered, PoolConfig]:
    """The root's driver and pool settings, chosen and made now if it has none."""
    with lock.exclusive(config.root / "root.lock"):
        name = db.setting("driver")
        if name is None:
            return _make(config, db)
    if config.driver is not None and registry.by_name(config.driver).name != name:
        raise FailedPrecondition(
            f"the root at {config.root} has the driver {name}, not {config.driver}",
            hint="leave out --storage-driver, or name another --root",
        )
    stored = db.setting("pool")
    pool = PoolConfig.from_dict(json.loads(stored)) if stored else config.pool()
    return registry.by_name(name), pool


def _make(config: Config, db: Database) -> tuple[Registered, PoolConfig]:
    wanted = config.pool()
    if config.driver is None:
        registered, verdicts = registry.choose(config.root, wanted)
        for name, verdict in verdicts.items():
            if not verdict.works:
                log.warning("storage driver %s does not work here: %s", name, verdict.why)
    else:
        registered = registry.by_name(config.driver)
        verdict = registry.probe(registered, config.root, wanted)
        if not verdict.works:
            raise Unsupported(f"storage driver {registered.name} does not work here: {verdict.why}")
    if registered.needs_pool:
        wanted = _make_pool(config.root, db, wanted)
    db.set_setting("driver", registered.name)
    return registered, wanted


def _make_pool(root: Path, db: Database, wanted: PoolConfig, *, force: bool = False) -> PoolConfig:
    """Make the pool; intent first, so that a crash in between is made good by the next call."""
    stored = db.setting("pool")
    intent = PoolConfig.from_dict(json.loads(stored)) if stored else wanted.with_uuid()
    remember_pool(db, intent)
    made = open_pool(root, intent).create(force=force)
    remember_pool(db, made)
    return made
