"""Opening both ends of a migration, so that nobody else is at work in either."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hpmapper.config import Config
from hpmapper.engine import Engine
from hpmapper.errors import FailedPrecondition, InvalidArgument
from hpmapper.migrate.docker import DOCKER_DEVICEMAPPER, docker_devicemapper
from hpmapper.migrate.ours import Ours
from hpmapper.migrate.source import Source
from hpmapper.root import DATABASE, make_root, only_daemon, open_root, remove_root
from hpmapper.runtime import place


@contextmanager
def source_of(config: Config) -> Iterator[Source]:
    """A root of ours to move from; or Docker's directory, if that is what the driver's name says.

    Raises:
        NotFound: there is none. FailedPrecondition: a daemon serves it, a container runs, or it has another driver.
    """
    if config.driver == DOCKER_DEVICEMAPPER:
        with docker_devicemapper(config.root, config.options) as found:
            yield found
        return
    with open_root(config, create=False) as opened, only_daemon(config.root):
        _require_stopped(config)
        yield Ours(opened.engine, config.root)


@contextmanager
def target_of(config: Config, source: Config) -> Iterator[Engine]:
    """A root to move to, made as `config` says if there is none.

    Raises:
        InvalidArgument: it is the source. FailedPrecondition: a daemon serves it, or it has another driver.
    """
    if config.root.resolve() == source.root.resolve():
        raise InvalidArgument(
            f"source and target are one root: {config.root}", hint="a root has one driver; name another --to-root"
        )
    if not (config.root / DATABASE).exists():
        make_root(config)
    with only_daemon(config.root), open_root(config) as opened:
        yield opened.engine


def remove_source(config: Config) -> None:
    """Remove a root of ours after all of it was moved."""
    _require_stopped(config)
    remove_root(config, force=True)
    place.forget(config.root)


def _require_stopped(config: Config) -> None:
    names = place.running(config.root)
    if names:
        raise FailedPrecondition(f"container {names[0]!r} is running", hint="let it end, or end what runs in it")
