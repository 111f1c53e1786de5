"""The command line's front door: options for all commands, and where each command is.

Nothing else is imported here: `hpmapper --help` has to be quick, so each command brings what it needs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from hpmapper.cli.exits import EPILOG, guarded
from hpmapper.cli.groups import Lazy, LazyGroup
from hpmapper.cli.state import State, json_option

COMMANDS = {
    "run": Lazy("hpmapper.cli.run:run", "Run a command in a new container of IMAGE."),
    "image": Lazy("hpmapper.cli.image:image", "Bring in, list, save and remove images."),
    "container": Lazy("hpmapper.cli.container:container", "Make, inspect, commit and remove containers."),
    "pool": Lazy("hpmapper.cli.pool:pool", "Make, watch and grow the storage pool."),
    "config": Lazy("hpmapper.cli.configure:config", "Make containerd or Docker use hpmapper."),
    "cache": Lazy("hpmapper.cli.cache:cache", "See and tidy the page cache."),
    "top": Lazy("hpmapper.cli.top:top", "Watch containers: cache, processor, disk, copy-ups, and the pool's space."),
    "profile": Lazy("hpmapper.cli.profile:profile", "See, record and drop images' start profiles."),
    "migrate": Lazy("hpmapper.cli.migrate:migrate", "Move everything to a root with another driver."),
    "info": Lazy("hpmapper.cli.system:info", "Show what is in use."),
    "doctor": Lazy("hpmapper.cli.system:doctor", "Try what this host can do."),
    "drivers": Lazy("hpmapper.cli.system:drivers", "List the storage drivers and whether they work here."),
    "serve": Lazy("hpmapper.cli.serve:serve", "Serve the root to containerd and Docker until told to stop."),
    "gc": Lazy("hpmapper.cli.system:gc", "Remove what nothing refers to."),
    "bench": Lazy("hpmapper.cli.bench:bench", "Measure storage drivers side by side."),
    "fsck": Lazy("hpmapper.cli.system:fsck", "Check all that is stored, byte by byte."),
}


class _Cli(LazyGroup):
    """The whole command line, with its errors told."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        run = super().main
        state = extra.setdefault("obj", State())
        if not standalone_mode:
            return run(args, "hpmapper", complete_var, standalone_mode, **extra)
        sys.exit(guarded(state, lambda: run(args, "hpmapper", complete_var, False, **extra)))


@click.group(cls=_Cli, lazy=COMMANDS, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--root", type=click.Path(path_type=Path), metavar="DIR", help="Where everything is kept.")
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="TOML, or Docker's daemon.json.")
@click.option("--storage-driver", metavar="NAME", help="For a new root; see hpmapper drivers.")
@click.option("--storage-opt", multiple=True, metavar="NAME=VALUE", help="As in the config file; repeatable.")
@click.option("--debug", is_flag=True, help="Log what is done, and show where errors come from.")
@json_option
@click.version_option(package_name="hpmapper", message="hpmapper %(version)s")
@click.pass_obj
def cli(
    state: State,
    root: Path | None,
    config: Path | None,
    storage_driver: str | None,
    storage_opt: tuple[str, ...],
    debug: bool,
) -> None:
    """Container storage with extent-grained copy-on-write, and one cached copy of every byte."""
    state.root = root
    state.config = config
    state.driver = storage_driver
    state.options = storage_opt
    state.debug = debug
    if debug:
        import logging

        logging.basicConfig(level=logging.DEBUG, format="%(levelname).1s %(name)s: %(message)s")


def main() -> None:
    """The `hpmapper` command."""
    cli()


if __name__ == "__main__":
    main()
