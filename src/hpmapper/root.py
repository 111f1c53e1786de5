"""A root directory: opened, made on first use, its driver chosen.

    <root>/hpmapper.db      what exists (hpmapper.meta.schema)
    <root>/pool, pool.img   the pool of a driver that needs one (hpmapper.pool)
    <root>/DRIVER           the data of one that does not

A root has one driver for life: the one it was made with. Data that is there wins over every preference, as in Docker.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from hpmapper import faults
from hpmapper.config import Config
from hpmapper.drivers import registry
from hpmapper.drivers.base import Driver
from hpmapper.drivers.registry import Registered
from hpmapper.engine import Engine
from hpmapper.errors import AlreadyExists, FailedPrecondition, HpmapperError, NotFound, Unsupported
from hpmapper.kernel import lock
from hpmapper.meta import images, snapshots
from hpmapper.meta.db import Database
from hpmapper.pool import open_pool
from hpmapper.pool.base import LOCK_NAME, Pool, PoolConfig, PoolKind
from hpmapper.store import workspace
from hpmapper.store.workspace import remove_tree

log = logging.getLogger(__name__)

DATABASE = "hpmapper.db"
LOCK = "root.lock"
DAEMON_LOCK = "daemon.lock"


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
    db = _database(config, create=create)
    try:
        registered, pool_config = _settle(config, db, create=create)
        pool = open_pool(config.root, pool_config) if registered.needs_pool else None
        driver = registered.make(config.root, pool_config, config.own_options(registered))
        driver.attach()
    except BaseException:
        db.close()
        raise
    engine = Engine(db, driver, config.floor())
    try:
        engine.rubbish.reconcile()
        yield Opened(engine, pool)
    finally:
        engine.close()


def make_root(config: Config, *, force: bool = False) -> None:
    """Make a root that is not there yet; `force` as for `Pool.create`.

    Raises:
        AlreadyExists: it is there, or something is in the pool's way. Unsupported: the driver does not work here.
    """
    with closing(_database(config, create=True)) as db, lock.exclusive(config.root / LOCK):
        if db.setting("driver") is not None:
            raise AlreadyExists(f"there is a root at {config.root} already", hint="hpmapper pool status; see --root")
        _make(config, db, force=force)


def remove_root(config: Config, *, force: bool = False) -> None:
    """Remove a root with all its data; one that was half removed before is no error.

    Raises:
        NotFound: it is not there. FailedPrecondition: it is in use, or, without `force`, has images or containers.
    """
    require_no_daemon(config.root)
    with closing(_database(config, create=False)) as db, lock.exclusive(config.root / LOCK):
        if not force:
            _require_empty(db)
        _remove_storage(config, db)
    for name in (f"{DATABASE}-shm", f"{DATABASE}-wal", DATABASE, LOCK_NAME, LOCK, DAEMON_LOCK):
        (config.root / name).unlink(missing_ok=True)
    try:
        config.root.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EBUSY):
            raise
        # other people's files, or a mount point


@contextmanager
def only_daemon(root: Path) -> Iterator[None]:
    """Hold the root's daemon lock; it tells others who holds it.

    Raises:
        FailedPrecondition: a daemon serves the root.
    """
    try:
        with lock.exclusive(root / DAEMON_LOCK, timeout=0) as fd:
            os.ftruncate(fd, 0)
            os.pwrite(fd, b"%d\n" % os.getpid(), 0)
            yield
    except BlockingIOError:
        pid = (root / DAEMON_LOCK).read_text().strip()
        raise FailedPrecondition(
            f"a daemon serves the root at {root}: its pid is {pid}", hint="stop it, or name another --root"
        ) from None


def require_no_daemon(root: Path) -> None:
    """Raise FailedPrecondition if a daemon serves the root."""
    if (root / DAEMON_LOCK).exists():
        with only_daemon(root):
            pass


def pool_of(config: Config) -> tuple[Database, Pool]:
    """The root's pool without attaching it, and the database that has its settings.

    Raises:
        NotFound: there is no root, or its driver has no pool.
    """
    db = _database(config, create=False)
    stored = db.setting("pool")
    if stored is None:
        driver = db.setting("driver")
        db.close()
        raise NotFound(f"the root at {config.root} has no pool: its driver is {driver}")
    return db, open_pool(config.root, PoolConfig.from_dict(json.loads(stored)))


def driver_name(config: Config) -> str:
    """The name of the root's driver; where there is no root yet, of the one that is asked for or preferred."""
    if (config.root / DATABASE).exists():
        with closing(_database(config, create=False)) as db:
            name = db.setting("driver")
            if name is not None:
                return name
    return config.driver or registry.DRIVERS[0].name


def driver_of(config: Config) -> Driver:
    """The root's driver, not attached.

    Raises:
        NotFound: there is no root.
    """
    with closing(_database(config, create=False)) as db:
        name, stored = db.setting("driver"), db.setting("pool")
    if name is None:
        raise _missing(config)
    registered = registry.by_name(name)
    pool = PoolConfig.from_dict(json.loads(stored)) if stored else config.pool()
    return registered.make(config.root, pool, config.own_options(registered))


def remember_pool(db: Database, pool: PoolConfig) -> None:
    """Record a pool's settings: before it is made, and whenever they change."""
    db.set_setting("pool", json.dumps(pool.to_dict()))


def _database(config: Config, *, create: bool) -> Database:
    if not create and not (config.root / DATABASE).exists():
        raise _missing(config)
    config.root.mkdir(mode=0o700, parents=True, exist_ok=True)
    return Database(config.root / DATABASE)


def _missing(config: Config) -> NotFound:
    return NotFound(
        f"there is no hpmapper root at {config.root}",
        hint="hpmapper pool create makes one, as does bringing in an image; see --root",
    )


def _settle(config: Config, db: Database, *, create: bool) -> tuple[Registered, PoolConfig]:
    """The root's driver and pool settings, chosen and made now if it has none."""
    with lock.exclusive(config.root / LOCK):
        name = db.setting("driver")
        if name is None and create:
            return _make(config, db)
    if name is None:
        raise _missing(config)
    if config.driver is not None and registry.by_name(config.driver).name != name:
        raise FailedPrecondition(
            f"the root at {config.root} has the driver {name}, not {config.driver}",
            hint="leave out --storage-driver, or name another --root",
        )
    stored = db.setting("pool")
    pool = PoolConfig.from_dict(json.loads(stored)) if stored else config.pool()
    return registry.by_name(name), pool


def _make(config: Config, db: Database, *, force: bool = False) -> tuple[Registered, PoolConfig]:
    asked = registry.by_name(config.driver) if config.driver is not None else None
    if asked is None and db.setting("pool") is None:  # else it is a pool that was being made
        asked = _prior(config.root)
    if asked is None:
        registered, verdicts = registry.choose(config.root, config.pool, config.own_options)
        for name, verdict in verdicts.items():
            if not verdict.works:
                log.warning("storage driver %s does not work here: %s", name, verdict.reason)
    else:
        registered = asked
        verdict = registry.probe(registered, config.root, config.pool(registered), config.own_options(registered))
        if not verdict.works:
            raise Unsupported(f"storage driver {registered.name} does not work here: {verdict.reason}")
    _require_no_data(config.root, registered)
    wanted = config.pool(registered)
    if registered.needs_pool:
        wanted = _make_pool(config.root, db, wanted, force=force)
    faults.point("root.storage-made")
    db.set_setting("driver", registered.name)
    faults.point("root.recorded")
    return registered, wanted


def _prior(root: Path) -> Registered | None:
    """The driver that has left something in a root that no database speaks for, as Docker finds its own.

    Raises:
        FailedPrecondition: there are several.
    """
    found = registry.prior(root)
    if len(found) > 1:
        raise FailedPrecondition(
            f"{root} contains several valid graphdrivers: {', '.join(one.name for one in found)}",
            hint="clean up, or choose a storage driver explicitly: --storage-driver",
        )
    return found[0] if found else None


def _require_no_data(root: Path, registered: Registered) -> None:
    """Refuse to take over layers that the database does not know: it would have them removed as rubbish.

    A pool that is not known refuses by itself to be made again.
    """
    layers = root / registered.name / "l"
    if not registered.needs_pool and layers.is_dir() and next(layers.iterdir(), None) is not None:
        raise FailedPrecondition(
            f"{layers} has layers, but there is no database that knows them",
            hint=f"restore {root / DATABASE} from a backup, or move {root / registered.name} away",
        )


def _make_pool(root: Path, db: Database, wanted: PoolConfig, *, force: bool = False) -> PoolConfig:
    """Make the pool; intent first, so that a crash in between is made good by the next call."""
    stored = db.setting("pool")
    earlier = PoolConfig.from_dict(json.loads(stored)) if stored else None
    intent = earlier if earlier is not None and _is_wanted(earlier, wanted) else wanted.with_uuid()
    remember_pool(db, intent)
    try:
        made = open_pool(root, intent).create(force=force)
    except HpmapperError:
        db.forget_setting("pool")  # refused: there is nothing to be finished or removed
        raise
    remember_pool(db, made)
    return made


def _is_wanted(earlier: PoolConfig, wanted: PoolConfig) -> bool:
    """Whether a pool that a crash cut off is still the one to make: UUID and a size that was left open may differ."""
    return dataclasses.replace(earlier, uuid="", size=earlier.size if wanted.size else 0) == wanted


def _require_empty(db: Database) -> None:
    present = {
        "container": len(images.containers(db)),
        "image": len(images.images(db)),
        "snapshot": snapshots.count_of_front_ends(db),
    }
    if any(present.values()):
        counts = " and ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in present.items() if count)
        raise FailedPrecondition(f"the root has {counts}", hint="remove them first, or all together with --force")


def _remove_storage(config: Config, db: Database) -> None:
    name, stored = db.setting("driver"), db.setting("pool")
    pool_config = PoolConfig.from_dict(json.loads(stored)) if stored else config.pool()
    registered = registry.by_name(name) if name else None
    if registered:
        driver = registered.make(config.root, pool_config, config.own_options(registered))
        _require_unused(driver.scratch)
        if not registered.needs_pool or pool_config.kind is PoolKind.DIRECTORY:
            _lift_limits(driver)
        driver.detach()
        registered.destroy(driver)
    if stored:
        open_pool(config.root, pool_config).destroy()
    if registered and not registered.needs_pool and (config.root / registered.name).exists():
        remove_tree(config.root / registered.name)


def _lift_limits(driver: Driver) -> None:
    """Remove the snapshots one by one, if there are limits: nothing of these is to stay on the host's file system."""
    try:
        driver.attach()
    except NotFound:
        return  # half removed before
    if driver.capabilities.size_limits:
        for snapshot in driver.stored().snapshots:
            driver.remove(snapshot)


def _require_unused(scratch: Path) -> None:
    tokens = os.listdir(scratch) if scratch.exists() else []
    if any(workspace.is_alive(scratch, token) for token in tokens):
        raise FailedPrecondition("another process is at work in this root", hint="wait for its end")
