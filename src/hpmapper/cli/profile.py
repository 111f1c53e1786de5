"""hpmapper profile: what images' containers read while they start."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from hpmapper.cache.beside import Beside, Side
from hpmapper.cache.names import names_of_image
from hpmapper.cache.profile import Profile, decode
from hpmapper.cache.start import WINDOW, ImageFiles, StartSettings, keep, load, record_exactly, store_beside
from hpmapper.cli import output
from hpmapper.cli.groups import NearestGroup
from hpmapper.cli.run import run_container
from hpmapper.cli.session import Session, session
from hpmapper.cli.state import State, json_option, pass_state
from hpmapper.errors import FailedPrecondition, NotFound
from hpmapper.image import artifact
from hpmapper.meta import profiles, snapshots
from hpmapper.meta.images import ImageRow
from hpmapper.model import SnapshotId
from hpmapper.runtime.run import find_runtime
from hpmapper.runtime.spec import Options

_READY_EVERY = 0.25
"""Seconds between two tries of the readiness command."""


@click.group(cls=NearestGroup)
def profile() -> None:
    """See, record and drop images' start profiles."""


_image = click.argument("image", metavar="IMAGE")


@dataclasses.dataclass(frozen=True, slots=True)
class _Layers:
    """What has a profile: an image of ours, or layers of containerd's or Docker's, told by their chain ID."""

    name: str
    top: SnapshotId | None
    image: ImageRow | None = None


def _find(opened: Session, word: str) -> _Layers:
    """An image by its name or id, or layers by their chain ID.

    Raises:
        NotFound: there is neither.
    """
    try:
        row = opened.images.find(word)
    except NotFound:
        known = snapshots.with_chain_id(opened.engine.db, word) or profiles.labelled(opened.engine.db, word)
        if not known:
            raise
        return _Layers(word, known[0].id)
    return _Layers((*row.names, row.id)[0], row.top, row)


@profile.command("ls")
@json_option
@pass_state
def list_(state: State) -> None:
    """List the layers that have a profile.

    By chain ID, with the names of our images that consist of them; containerd and Docker know the names of theirs.
    """
    with session(state) as opened:
        db = opened.engine.db
        names: dict[str, list[str]] = {}
        for row in opened.images.all():
            found = profiles.chain_of(db, row.top)
            if found:
                names.setdefault(found[0], []).extend(row.names or (row.id,))
        facts = [_listed(one, names.get(one.chain_id, [])) for one in profiles.all_of(db)]
    rows = [
        (one["chain_id"], output.size(one["bytes"]), str(one["objects"]), ", ".join(one["images"]) or "-")
        for one in facts
    ]
    output.show(state, facts, lambda: output.table(("LAYERS", "READ AHEAD", "OBJECTS", "IMAGES"), rows))


def _listed(one: profiles.Stored, names: list[str]) -> dict[str, Any]:
    found = decode(one.profile, f"start profile of {one.chain_id}")
    facts = {"chain_id": one.chain_id, "images": names, "recorded": output.timestamp(one.recorded)}
    return facts | {"cold": found.cold, "objects": len(found.objects), "bytes": found.size}


@profile.command()
@_image
@click.option("--files", is_flag=True, help="List the files.")
@json_option
@pass_state
def show(state: State, image: str, files: bool) -> None:
    """Show what is read ahead for IMAGE."""
    with session(state) as opened:
        layers = _find(opened, image)
        found = _load(opened, layers)
        facts = _facts(opened, layers, found)
        if files:
            facts["files"] = _files(opened, layers, found)
    output.show(state, facts, lambda: _text(facts))


def _load(opened: Session, layers: _Layers) -> Profile:
    found = load(opened.engine.db, layers.top)
    if found is None:
        raise NotFound(
            f"{layers.name} has no start profile", hint=f"hpmapper profile record {layers.name}, or run it once"
        )
    return found


def _facts(opened: Session, layers: _Layers, found: Profile) -> dict[str, Any]:
    named = profiles.chain_of(opened.engine.db, layers.top)
    stored = profiles.find(opened.engine.db, named[0]) if named else None
    return {
        "image": layers.name,
        "id": layers.image.id if layers.image else None,
        "chain_id": named[0] if named else None,
        "recorded": output.timestamp(stored[1] if stored else 0),
        "cold": found.cold,
        "seconds": round(found.seconds, 3),
        "objects": len(found.objects),
        "bytes": found.size,
        "map_bytes": sum(run.end - run.start for run in found.map),
    }


def _files(opened: Session, layers: _Layers, found: Profile) -> list[dict[str, Any]]:
    files = ImageFiles(opened.engine.db, opened.engine.driver, layers.top)
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
        layers = _find(opened, image)
        named = profiles.chain_of(opened.engine.db, layers.top)
        with opened.engine.db.transaction() as transaction:
            had = named is not None and profiles.drop(transaction, named[0])
    if not had:
        raise NotFound(f"{layers.name} has no start profile")
    output.show(state, {"image": layers.name}, lambda: "")


@profile.command("save")
@_image
@click.argument("file", type=click.Path(path_type=Path))
@json_option
@pass_state
def save_(state: State, image: str, file: Path) -> None:
    """Write the profile of IMAGE to FILE, as an OCI artifact.

    An archive that `skopeo copy` and `oras` bring to any registry, for nodes whose images come through containerd.
    IMAGE may be layers' chain ID.
    """
    with session(state) as opened:
        layers = _find(opened, image)
        found = _load(opened, layers)
        named = profiles.chain_of(opened.engine.db, layers.top)
        assert named is not None  # else it had no profile
        artifact.save(file, named[0], found.encode())
    output.show(state, {"chain_id": named[0], "file": str(file)}, lambda: "")


@profile.command("load")
@click.argument("file", type=click.Path(path_type=Path))
@json_option
@pass_state
def load_(state: State, file: Path) -> None:
    """Take the profile that FILE holds.

    An archive or layout of `profile save`. Its layers have to be here. What they do not have is left out of it.
    """
    chain_id, data = artifact.read(file)
    with session(state) as opened:
        layers = _find(opened, chain_id)
        files = ImageFiles(opened.engine.db, opened.engine.driver, layers.top)
        found = keep(opened.engine.db, files, decode(data, f"start profile in {file}"))
        facts = _facts(opened, layers, found)
    output.show(state, facts, lambda: _text(facts))


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
    succeeds, or by itself. Meanwhile the kernel reads next to nothing ahead on the pool's device, if it is the pool's
    alone, so that only what is needed is recorded.
    """
    find_runtime(runtime)
    with session(state) as opened:
        row = opened.images.find(image)
        layers = _find(opened, image)
        if not ImageFiles(opened.engine.db, opened.engine.driver, row.top).objects:
            raise FailedPrecondition(f"image {layers.name} has no files that could be read ahead")
        _record(opened, row, Options(command=tuple(command)), runtime, window, ready)
        facts = _facts(opened, layers, _load(opened, layers))
    output.show(state, facts, lambda: _text(facts))


def _record(
    opened: Session, image: ImageRow, options: Options, runtime: str | None, window: float, ready: str | None
) -> None:
    row = opened.containers.create(image.id)
    place = opened.place(row.name)
    try:
        opened.containers.mount(row)  # so that the image's map is there, whole
        files = ImageFiles(opened.engine.db, opened.engine.driver, image.top)
        files.forget()

        def accompany(side: Side) -> None:
            found = record_exactly(files, side, window, is_ready=_readiness(ready, row.name))
            store_beside(opened.engine.db.path, files, found)
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
