"""hpmapper migrate."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hpmapper.cli import output
from hpmapper.cli.progress import bars
from hpmapper.cli.session import config_of
from hpmapper.cli.state import State, json_option, pass_state
from hpmapper.config import Config
from hpmapper.drivers.registry import by_name
from hpmapper.errors import InvalidArgument
from hpmapper.migrate.docker import DOCKER_DEVICEMAPPER
from hpmapper.migrate.move import Migration, Moved, Watcher
from hpmapper.migrate.roots import remove_source, source_of, target_of

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_DOCKER_ROOT = Path("/var/lib/docker")
_NAME_WIDTH = 24
_DIRECTORY = click.Path(path_type=Path, file_okay=False)


@click.command()
@click.option("--from", "from_driver", metavar="DRIVER", help=f"The source's driver; or {DOCKER_DEVICEMAPPER}.")
@click.option("--from-root", type=_DIRECTORY, metavar="DIR", help="The source [the root, if --to-root is another].")
@click.option("--from-opt", multiple=True, metavar="NAME=VALUE", help="Storage options of the source; repeatable.")
@click.option("--to", "to_driver", metavar="DRIVER", help="The target's driver [the first that works here].")
@click.option("--to-root", type=_DIRECTORY, metavar="DIR", help="The target; made if it is not there [the root].")
@click.option("--to-opt", multiple=True, metavar="NAME=VALUE", help="Storage options of the target; repeatable.")
@click.option("--without-limits", is_flag=True, help="Drop the size limits of containers.")
@click.option("--remove-source", "remove", is_flag=True, help="Remove the source once all is verified.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
@json_option
@pass_state
def migrate(
    state: State,
    from_driver: str | None,
    from_root: Path | None,
    from_opt: tuple[str, ...],
    to_driver: str | None,
    to_root: Path | None,
    to_opt: tuple[str, ...],
    without_limits: bool,
    remove: bool,
    quiet: bool,
) -> None:
    """Move everything to a root with another driver.

    Images, stopped containers, and the snapshots of containerd and Docker. All of it is read again from the target and
    compared before this ends. Whatever ends it early, the same command goes on where it stopped. The source stays,
    unless --remove-source is given.

    --from docker-devicemapper reads the images and containers that Docker up to 24 has in the directory --from-root,
    by default /var/lib/docker, and never writes there; Docker has to be stopped.
    """
    if not state.debug:
        logging.basicConfig(level=logging.WARNING, format="hpmapper: %(message)s")
    if from_driver == DOCKER_DEVICEMAPPER:
        if remove:
            raise InvalidArgument("Docker's directory is only read", hint="leave --remove-source out")
        from_root = from_root or _DOCKER_ROOT
    source, target = _ends(config_of(state), from_root, to_root)
    source = _with(source, from_driver, from_opt)
    target = _with(target, to_driver, to_opt)
    moved = _moved(source, target, limits=not without_limits, remove=remove, quiet=quiet or state.json)
    facts = {
        "source": str(source.root),
        "target": str(target.root),
        **dataclasses.asdict(moved),
        "source_removed": remove,
    }
    output.show(state, facts, lambda: _text(facts))


def _ends(config: Config, from_root: Path | None, to_root: Path | None) -> tuple[Config, Config]:
    """The configurations of source and target: what is configured counts for the end that is the configured root."""
    if from_root is None and to_root is None:
        raise InvalidArgument("a root has one driver, so two roots are needed", hint="give --to-root, or --from-root")
    source = config if from_root is None else Config(root=from_root.absolute())
    if to_root is not None:
        return source, Config(root=to_root.absolute())
    return source, config


def _with(config: Config, driver: str | None, options: tuple[str, ...]) -> Config:
    if driver is not None:
        known = driver if driver == DOCKER_DEVICEMAPPER else by_name(driver).name
        config = replace(config, driver=known)
    return config.with_options(options)


def _moved(source: Config, target: Config, *, limits: bool, remove: bool, quiet: bool) -> Moved:
    with source_of(source) as offered, target_of(target, source) as engine, _watching(quiet=quiet) as watcher:
        migration = Migration(offered, engine, target.floor(), watcher, limits=limits)
        moved = migration.run()
        if remove:
            migration.require_all_moved()
    if remove:
        remove_source(source)
    return moved


def _text(facts: dict[str, object]) -> str:
    after = "; the source is removed" if facts["source_removed"] else ""
    return (
        f"{facts['images']} images, {facts['containers']} containers and {facts['snapshots']} snapshots are in "
        f"{facts['target']}, verified{after}"
    )


@contextmanager
def _watching(*, quiet: bool) -> Iterator[Watcher]:
    if quiet:
        yield _Silent()
    elif not sys.stderr.isatty():
        yield _Lines()
    else:
        with bars() as drawn:
            shown = _Bars(drawn)
            yield shown
            shown.end()


class _Silent:
    def phase(self, name: str, total: int) -> None:
        pass

    def item(self, name: str) -> None:
        pass

    def advance(self, count: int) -> None:
        pass


class _Lines(_Silent):
    def phase(self, name: str, total: int) -> None:
        click.echo(f"{name} {output.size(total)}", err=True)


class _Bars:
    """One bar of bytes for each phase, which says what it is at."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._task: TaskID | None = None
        self._phase = ""

    def phase(self, name: str, total: int) -> None:
        self.end()
        self._phase = name
        self._task = self._bars.add_task(name, total=total)

    def end(self) -> None:
        """What was estimated is done."""
        if self._task is not None:
            total = self._bars.tasks[self._task].total
            self._bars.update(self._task, description=self._phase, completed=total)

    def item(self, name: str) -> None:
        if self._task is not None:
            self._bars.update(self._task, description=f"{self._phase} {name[:_NAME_WIDTH]}")

    def advance(self, count: int) -> None:
        if self._task is not None:
            self._bars.advance(self._task, count)
