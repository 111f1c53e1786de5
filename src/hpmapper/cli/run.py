"""hpmapper run, and container start: a container in the foreground."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from hpmapper.cache.start import WINDOW, StartSettings, starting
from hpmapper.cli.session import Session, session
from hpmapper.cli.state import State, pass_state
from hpmapper.errors import HpmapperError
from hpmapper.image import oci
from hpmapper.meta.images import ContainerRow
from hpmapper.pool.base import parse_size
from hpmapper.runtime.run import Runner, find_runtime, require_terminal
from hpmapper.runtime.spec import Defaults, Options
from hpmapper.runtime.volumes import parse_volume

log = logging.getLogger(__name__)

_Command = TypeVar("_Command", bound=Callable[..., Any])

FAILED = 125
"""The exit status when hpmapper fails: the container's own are the others (as of `docker run`)."""


@dataclass(frozen=True, slots=True)
class Words:
    """The options of `run` as they were typed."""

    env: Sequence[str]
    volume: Sequence[str]
    workdir: str | None
    user: str | None
    entrypoint: str | None
    hostname: str | None
    interactive: bool
    tty: bool
    runtime: str | None
    profile: bool
    profile_window: float

    def start(self) -> StartSettings:
        """What is done about start profiles."""
        return StartSettings(replay=self.profile, record=self.profile, window=self.profile_window)

    def options(self, command: Sequence[str]) -> Options:
        """Checked, as far as that can be done before anything is made."""
        find_runtime(self.runtime)
        options = Options(
            command=tuple(command),
            entrypoint=self.entrypoint,
            env=tuple(self.env),
            user=self.user,
            workdir=self.workdir,
            volumes=tuple(map(parse_volume, self.volume)),
            hostname=self.hostname,
            terminal=self.tty,
            interactive=self.interactive,
        )
        require_terminal(options)
        return options


_OPTIONS = (
    click.option("-e", "--env", multiple=True, metavar="NAME[=VALUE]", help="Set, or pass on, a variable."),
    click.option("-v", "--volume", multiple=True, metavar="HOST:CONTAINER[:ro]", help="Show a part of the host."),
    click.option("-w", "--workdir", metavar="DIR", help="Working directory, made if it is missing."),
    click.option("-u", "--user", metavar="USER[:GROUP]", help="Names in the container, or numbers."),
    click.option("--entrypoint", metavar="COMMAND", help="Instead of the image's; '' for none."),
    click.option("--hostname", metavar="NAME", help="Instead of the container's name."),
    click.option("-i", "--interactive", is_flag=True, help="Leave standard input open."),
    click.option("-t", "--tty", is_flag=True, help="Give it a terminal."),
    click.option("--runtime", metavar="NAME|PATH", help="crun or runc; by default the first that is installed."),
    click.option(
        "--profile/--no-profile",
        default=True,
        help="Read ahead what starts of the image read; record it at the first one. On by default.",
    ),
    click.option(
        "--profile-window",
        type=click.FloatRange(min=0.1),
        default=WINDOW,
        metavar="SECONDS",
        help="How long a start is recorded; by default 30.",
    ),
)


size_option = click.option("--size", metavar="SIZE", help="How much it may keep, where the file system has limits.")


def run_options(command: _Command) -> _Command:
    """The options of everything that runs a container."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.command(context_settings={"allow_interspersed_args": False})
@click.argument("image")
@click.argument("command", nargs=-1)
@click.option("--name", metavar="NAME", help="The container's name; by default a random one.")
@size_option
@click.option("--rm", "remove", is_flag=True, help="Remove the container when it has ended, however it did.")
@run_options
@pass_state
@click.pass_context
def run(
    ctx: click.Context,
    state: State,
    /,
    image: str,
    command: Sequence[str],
    name: str | None,
    size: str | None,
    remove: bool,
    **words: Any,
) -> None:
    """Run a command in a new container of IMAGE.

    It runs in the foreground, on the host's network. Without COMMAND the image's own is run. The exit status is the
    command's, or 125 when hpmapper itself fails.
    """
    state.failure = FAILED
    typed = Words(**words)
    options = typed.options(command)
    with session(state) as opened:
        container = opened.containers.create(image, name, size=parse_size(size) if size else None)
        try:
            status = run_container(opened, container, options, typed.runtime, typed.start())
        finally:
            if remove:
                opened.containers.remove(container)
    ctx.exit(status)


def run_container(
    opened: Session, container: ContainerRow, options: Options, runtime: str | None, start: StartSettings
) -> int:
    """Run a container that exists; returns its exit status. Its root is mounted meanwhile, or longer if it was."""
    place = opened.place(container.name)
    image = opened.containers.image(container)
    with place.held() as lock, starting(opened.engine.db, opened.engine.driver, image.top, start):
        was_mounted = container.snapshot in opened.mounted()
        root = opened.containers.mount(container)
        try:
            config = oci.decode_config(image.config, f"config of {container.image}")
            return Runner(find_runtime(runtime), place, lock).run(root, defaults_of(config.settings), options)
        finally:
            if not was_mounted:
                _unmount(opened, container)


def _unmount(opened: Session, container: ContainerRow) -> None:
    try:
        opened.containers.unmount(container)
    except HpmapperError as error:
        log.warning("%s stays mounted: %s", container.name, error)


def defaults_of(settings: oci.Settings) -> Defaults:
    """What the image says of how it is to be run."""
    return Defaults(
        entrypoint=tuple(settings.entrypoint or ()),
        cmd=tuple(settings.cmd or ()),
        env=tuple(settings.env or ()),
        user=settings.user,
        workdir=settings.working_dir,
    )
