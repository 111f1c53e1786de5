"""`hpmapper serve`."""

from __future__ import annotations

import dataclasses
import faulthandler
import logging
from pathlib import Path

import click

from hpmapper import daemon
from hpmapper.cache.start import WINDOW, StartSettings
from hpmapper.cli.session import config_of
from hpmapper.cli.state import State

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.option(
    "--address",
    type=_FILE,
    default=Path("/run/hpmapper/hpmapper.sock"),
    show_default=True,
    help="The unix socket to serve on.",
)
@click.option(
    "--containerd-address",
    type=_FILE,
    default=Path("/run/containerd/containerd.sock"),
    show_default=True,
    help="containerd's own socket, from whose content store layers are read.",
)
@click.option(
    "--docker-plugin",
    type=_FILE,
    metavar="FILE",
    help="Serve Docker 1.13 to 26 as well, as a graph driver plugin: /run/docker/plugins/hpmapper.sock.",
)
@click.option(
    "--metrics",
    metavar="ADDRESS",
    help="Tell Prometheus the metrics: on a unix socket, by its path, or a loopback address such as 127.0.0.1:9469.",
)
@click.option(
    "--profile/--no-profile",
    default=True,
    help="Read ahead what starts of an image read; record it at the first one. On by default.",
)
@click.option(
    "--profile-window",
    type=click.FloatRange(min=0.1),
    default=WINDOW,
    metavar="SECONDS",
    help="How long a start is recorded; by default 30.",
)
@click.pass_obj
def serve(
    state: State,
    address: Path,
    containerd_address: Path,
    docker_plugin: Path | None,
    metrics: str | None,
    profile: bool,
    profile_window: float,
) -> None:
    """Serve the root to containerd and Docker until told to stop.

    containerd has its snapshotter and differ here, older Dockers their graph driver. Stops on SIGTERM: calls under way
    are finished first. Running containers are not touched, and go on to be served by the next daemon.
    """
    faulthandler.enable()  # should a library crash, the journal says where
    if not state.debug:
        logging.basicConfig(level=logging.INFO, format="%(levelname).1s %(message)s")
    config = config_of(state)
    if metrics is not None:
        config = dataclasses.replace(config, metrics=metrics)
    start = StartSettings(replay=profile, record=profile, window=profile_window)
    daemon.serve(config, address.absolute(), str(containerd_address), docker_plugin, start)
