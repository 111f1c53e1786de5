"""hpmapper container: making, looking into, committing and removing containers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import click

from hpmapper.cli import output
from hpmapper.cli.groups import NearestGroup
from hpmapper.cli.run import FAILED, Words, run_container, run_options, size_option
from hpmapper.cli.session import Session, session
from hpmapper.cli.state import State, json_option, pass_state
from hpmapper.drivers.devicemapper import DeviceMapperDriver
from hpmapper.errors import Unsupported
from hpmapper.image import reference
from hpmapper.image.documents import ImportOptions
from hpmapper.meta.images import ContainerRow
from hpmapper.pool.base import parse_size


@click.group(cls=NearestGroup)
def container() -> None:
    """Make, inspect, commit and remove containers."""


_name = click.argument("name", metavar="CONTAINER")


@container.command()
@click.argument("image")
@click.option("--name", metavar="NAME", help="By default a random one.")
@size_option
@json_option
@pass_state
def create(state: State, image: str, name: str | None, size: str | None) -> None:
    """Make a container of IMAGE, and print its name."""
    with session(state) as opened:
        row = opened.containers.create(image, name, size=parse_size(size) if size else None)
    output.show(state, {"name": row.name, "image": row.image}, lambda: row.name)


@container.command(context_settings={"allow_interspersed_args": False})
@_name
@click.argument("command", nargs=-1)
@run_options
@pass_state
@click.pass_context
def start(ctx: click.Context, state: State, /, name: str, command: Sequence[str], **words: Any) -> None:
    """Run a container once more, in the foreground.

    It finds all that it wrote before. The options and COMMAND are those of this time, none is remembered.
    """
    state.failure = FAILED
    typed = Words(**words)
    options = typed.options(command)
    with session(state) as opened:
        status = run_container(opened, opened.containers.get(name), options, typed.runtime, typed.start())
    ctx.exit(status)


@container.command()
@json_option
@pass_state
def ls(state: State) -> None:
    """List the containers."""
    with session(state) as opened:
        rows, mounted = opened.containers.all(), opened.mounted()
        facts = [_listed(opened, row) | {"mounted": row.snapshot in mounted} for row in rows]
    output.show(state, facts, lambda: output.table(_HEADERS, list(map(_line, rows, facts))))


_HEADERS = ("NAME", "IMAGE", "CREATED", "SIZE", "MOUNTED", "RUNNING")


def _listed(opened: Session, row: ContainerRow) -> dict[str, Any]:
    image = opened.containers.image(row)
    return {
        "name": row.name,
        "image": reference.parse(image.names[0]).familiar if image.names else row.image,
        "image_id": row.image,
        "created": output.timestamp(row.created),
        "size": opened.containers.usage(row).size,
        "limit": opened.containers.limit(row),
        "running": opened.place(row.name).is_running(),
    }


def _line(row: ContainerRow, facts: dict[str, Any]) -> list[str]:
    image = facts["image"].removeprefix("sha256:")[:12] if facts["image"] == facts["image_id"] else facts["image"]
    return [
        row.name,
        image,
        output.moment(row.created),
        output.size(facts["size"]),
        output.yes(facts["mounted"]),
        output.yes(facts["running"]),
    ]


@container.command()
@click.argument("names", nargs=-1, required=True, metavar="CONTAINER...")
@click.option("-f", "--force", is_flag=True, help="Kill those that are running.")
@json_option
@pass_state
def rm(state: State, names: Sequence[str], force: bool) -> None:
    """Remove containers with all that they wrote."""
    with session(state) as opened:
        rows = [opened.containers.get(name) for name in dict.fromkeys(names)]
        for row in rows:
            with opened.place(row.name).held(force=force):
                opened.containers.remove(row)
    output.show(state, {"removed": [row.name for row in rows]}, lambda: "\n".join(row.name for row in rows))


@container.command()
@_name
@click.option("--as-block", is_flag=True, help="Devicemapper: as a block device, not mounted.")
@json_option
@pass_state
def mount(state: State, name: str, as_block: bool) -> None:
    """Mount a container's root, and print its path.

    It stays mounted until `umount`, or a reboot. With --as-block it is not mounted: the path is a block device's, for
    a virtual machine that mounts it itself.
    """
    with session(state) as opened:
        if as_block:
            _show_block(state, opened, name)
            return
        path = opened.containers.mount(opened.containers.get(name))
    output.show(state, {"name": name, "path": os.fspath(path)}, lambda: os.fspath(path))


def _show_block(state: State, opened: Session, name: str) -> None:
    driver = opened.engine.driver
    if not isinstance(driver, DeviceMapperDriver):
        raise Unsupported(f"the {driver.name} driver has no block devices", hint="the devicemapper driver has")
    found = opened.containers.snapshot(opened.containers.get(name))
    opened.engine.prepared(found)
    device = driver.as_block(found.id)
    facts = {"name": name, "path": os.fspath(device.path), **{key: getattr(device, key) for key in _BLOCK_FACTS}}
    output.show(state, facts, lambda: os.fspath(device.path))


_BLOCK_FACTS = ("filesystem", "options", "root")


@container.command()
@click.argument("names", nargs=-1, required=True, metavar="CONTAINER...")
@pass_state
def umount(state: State, names: Sequence[str]) -> None:
    """Unmount containers' root file systems."""
    with session(state) as opened:
        for row in [opened.containers.get(name) for name in names]:
            with opened.place(row.name).held():
                opened.containers.unmount(row)


@container.command()
@_name
@json_option
@pass_state
def diff(state: State, name: str) -> None:
    """List a container's changes: A added, C changed, D deleted."""
    with session(state) as opened:
        found = sorted(opened.containers.changes(opened.containers.get(name)), key=lambda change: change.path)
    facts = [{"kind": str(change.kind), "path": os.fsdecode(change.path)} for change in found]
    output.show(state, facts, lambda: "\n".join(f"{change.kind} {os.fsdecode(change.path)}" for change in found))


@container.command()
@_name
@click.argument("new", required=False, metavar="[NEWNAME]")
@click.option("-c", "--change", multiple=True, metavar="INSTRUCTION", help="As in a Dockerfile: -c 'CMD [\"sh\"]'.")
@click.option("-m", "--message", help="A comment for the image's history.")
@click.option("-a", "--author", help="Who made it.")
@json_option
@pass_state
def commit(
    state: State, name: str, new: str | None, change: Sequence[str], message: str | None, author: str | None
) -> None:
    """Make an image of a container, and print its id.

    It has the layers of the container's image, and one more with the container's changes. The same changes give
    the same layer.
    """
    options = ImportOptions(message=message, author=author).changed(change)
    with session(state) as opened:
        row = opened.containers.commit(opened.containers.get(name), [new] if new else [], options)
    output.show(state, {"id": row.id, "names": row.names}, lambda: row.id)
