"""From the command line to an open root."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hpmapper.cli.state import State
from hpmapper.config import Config, load
from hpmapper.containers import Containers
from hpmapper.drivers.registry import by_name
from hpmapper.drivers.upper import mounted_snapshots
from hpmapper.engine import Engine
from hpmapper.errors import FailedPrecondition
from hpmapper.images import Images
from hpmapper.model import SnapshotId
from hpmapper.root import Opened, open_root
from hpmapper.runtime import place


def config_of(state: State) -> Config:
    """The config file, and over it the command line.

    Raises:
        InvalidArgument: an unknown driver or option, or a malformed file. NotFound: the named file does not exist.
    """
    config = load(state.config)
    if state.driver is not None:
        config = dataclasses.replace(config, driver=by_name(state.driver).name)
    if state.root is not None:
        config = dataclasses.replace(config, root=state.root)
    return dataclasses.replace(config, root=config.root.absolute()).with_options(state.options)


@dataclasses.dataclass(frozen=True, slots=True)
class Session:
    """An open root, with what commands work on."""

    config: Config
    opened: Opened
    images: Images
    containers: Containers

    @property
    def engine(self) -> Engine:
        return self.opened.engine

    def mounted(self) -> set[SnapshotId]:
        """The snapshots whose root file system is mounted."""
        return mounted_snapshots(self.engine.driver.scratch.parent)

    def place(self, name: str) -> place.Place:
        """Where the container of that name runs."""
        return place.Place(self.config.root, name)


@contextmanager
def session(state: State, *, create: bool = False) -> Iterator[Session]:
    """Open the root that the command line names; with `create`, one that is not there is made."""
    config = config_of(state)
    if not state.debug:
        logging.basicConfig(level=logging.WARNING, format="hpmapper: %(message)s")
    with open_root(config, create=create) as opened:
        yield Session(config, opened, Images(opened.engine), Containers(opened.engine))


def require_stopped(root: Path) -> None:
    """Raise FailedPrecondition if a container of the root is running."""
    names = place.running(root)
    if names:
        more = f" and {len(names) - 1} more are" if names[1:] else " is"
        raise FailedPrecondition(
            f"container {names[0]!r}{more} running", hint=f"hpmapper container rm -f {names[0]} ends it"
        )
