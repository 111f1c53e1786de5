"""hpmapper profile: what images' containers read while they start."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import click

from hpmapper.cache.beside import Beside, Side
from hpmapper.cache.names import names_of_image
from hpmapper.cache.profile import Profile
from hpmapper.cache.start import WINDOW, ImageFiles, StartSettings, load, record, store_beside
from hpmapper.cli import output
from hpmapper.cli.groups import NearestGroup
from hpmapper.cli.run import run_container
from hpmapper.cli.session import Session, session
from hpmapper.cli.state import State, json_option, pass_state
from hpmapper.errors import FailedPrecondition, NotFound
from hpmapper.meta import profiles
from hpmapper.meta.images import ImageRow
from hpmapper.runtime.run import find_runtime
from hpmapper.runtime.spec import Options

_READY_EVERY = 0.25
"""Seconds between two tries of the readiness command."""


@click.group(cls=NearestGroup)
def profile() -> None:
    """See, record and drop images' start profiles."""


_image = click.argument("image", metavar="IMAGE")


@profile.command()
@_image
@click.option("--files", is_flag=True, help="List the files.")
@json_option
@pass_state
def show(state: State, image: str, files: bool) -> None:
    """Show what is read ahead for IMAGE."""
    with session(state) as opened:
        row = opened.images.find(image)
        found = _load(opened, row)
        facts = _facts(row, found, _recorded(opened, row))
        if files:
            facts["files"] = _files(opened, row, found)
    output.show(state, facts, lambda: _text(facts))


def _load(opened: Session, row: ImageRow) -> Profile:
    found = load(opened.engine.db, row)
    if found is None:
        raise NotFound(
            f"image {_name(row)} has no start profile", hint=f"hpmapper profile record {_name(row)}, or run it once"
        )
    return found


def _recorded(opened: Session, row: ImageRow) -> int:
    found = profiles.find(opened.engine.db, row.id)
    return found[1] if found else 0


def _name(row: ImageRow) -> str:
    return (*row.names, row.id)[0]


def _facts(row: ImageRow, found: Profile, recorded: int) -> dict[str, Any]:
    return {
        "image": _name(row),
        "id": row.id,
        "recorded": output.timestamp(recorded),
        "cold": found.cold,
        "seconds": round(found.seconds, 3),
        "objects": len(found.objects),
        "bytes": found.size,
        "map_bytes": sum(run.end - run.start for run in found.map),
    }


def _files(opened: Session, row: ImageRow, found: Profile) -> list[dict[str, Any]]:
    files = ImageFiles(opened.engine.db, opened.engine.driver, row)
    names = names_of_image(files.map_file, {digest for digest, _ in found.objects}) if files.map_file else {}
    return [
        {"path": names.get(digest, digest.hex()), "ranges": [list(run) for run in runs]}
        for digest, runs in found.objects
    ]


def _text(facts: dict[str, Any]) -> str:
    lines = {
        "image": facts["image"],
        "recorded": f"{facts['recorded']}, {facts['seconds']} s, {'cold' if facts['cold'] else 'while it was cached'}",
        "objects": str(facts["objects"]),
        "read ahead": f"{output.size(facts['bytes'])}, of it {output.size(facts['map_bytes'])} of the map",
    }
    text = output.pairs(lines)
    if "files" in facts:
        rows = [(output.size(sum(end - start for start, end in one["ranges"])), one["path"]) for one in facts["files"]]
        text += "\n\n" + output.table(("READ AHEAD", "FILE"), rows)
    return text


@profile.command()
@_image
@json_option
@pass_state
def drop(state: State, image: str) -> None:
    """Forget the profile of IMAGE.

    The next `run` records another.
    """
    with session(state) as opened:
        row = opened.images.find(image)
        with opened.engine.db.transaction() as transaction:
            had = profiles.drop(transaction, row.id)
    if not had:
        raise NotFound(f"image {_name(row)} has no start profile")
    output.show(state, {"image": _name(row)}, lambda: "")


@profile.command("record", context_settings={"allow_interspersed_args": False})
@_image
@click.argument("command", nargs=-1)
@click.option("--window", type=click.FloatRange(min=0.1), default=WINDOW, metavar="SECONDS", help="By default 30.")
@click.option("--ready", metavar="COMMAND", help="A shell command on the host; once it succeeds, the start is over.")
@click.option("--runtime", metavar="NAME|PATH", help="crun or runc; by default the first that is installed.")
@json_option
@pass_state
def record_(
    state: State, image: str, command: Sequence[str], window: float, ready: str | None, runtime: str | None
) -> None:
    """Record a cold start of IMAGE.

    A container is run for that, and ended. Without COMMAND the image's own is run. The image's clean pages are dropped
    from the cache first. The container ends and is removed when its start is over: after --window, when --ready
    succeeds, or by itself.
    """
    find_runtime(runtime)
    with session(state) as opened:
        row = opened.images.find(image)
        files = ImageFiles(opened.engine.db, opened.engine.driver, row)
        if not files.objects:
            raise FailedPrecondition(f"image {_name(row)} has no files that could be read ahead")
        _record(opened, files, Options(command=tuple(command)), runtime, window, ready)
        found = _load(opened, row)
        facts = _facts(row, found, _recorded(opened, row))
    output.show(state, facts, lambda: _text(facts))


def _record(
    opened: Session, files: ImageFiles, options: Options, runtime: str | None, window: float, ready: str | None
) -> None:
    row = opened.containers.create(files.image.id)
    place = opened.place(row.name)
    try:
        opened.containers.mount(row)  # so that the image's map is there, whole
        files = ImageFiles(opened.engine.db, opened.engine.driver, files.image)
        files.forget()

        def accompany(side: Side) -> None:
            found = record(files, side, window, cold=True, is_ready=_readiness(ready, row.name))
            store_beside(opened.engine.db.path, files.image, found)
            place.kill()

        with Beside(accompany) as helper:
            helper.wait_ready()
            run_container(opened, row, options, runtime, StartSettings(replay=False, record=False))
    finally:
        opened.containers.remove(row)


def _readiness(command: str | None, container: str) -> Callable[[], bool]:
    if command is None:
        return lambda: False
    shell = ["timeout", "1", "sh", "-c", command]
    environment = os.environ | {"HPMAPPER_CONTAINER": container}
    due = time.monotonic()

    def is_ready() -> bool:
        nonlocal due
        if time.monotonic() < due:
            return False
        due = time.monotonic() + _READY_EVERY
        return subprocess.run(shell, env=environment, capture_output=True, check=False).returncode == 0

    return is_ready
