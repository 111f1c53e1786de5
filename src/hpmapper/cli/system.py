"""hpmapper info, doctor, drivers, gc and fsck: the root and the host as a whole."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click

from hpmapper.check import Finding, check
from hpmapper.cli import output
from hpmapper.cli.session import Session, config_of, session
from hpmapper.cli.state import State, json_option, pass_state
from hpmapper.config import Config
from hpmapper.drivers.registry import DRIVERS, probe
from hpmapper.errors import Corrupt, NotFound
from hpmapper.kernel.fs import filesystem_name
from hpmapper.kernel.probe import Feature, probe_all
from hpmapper.meta import snapshots
from hpmapper.runtime import place

_TOOLS = (
    ("crun", "`hpmapper run`", "apt install crun"),
    ("runc", "`hpmapper run`, where crun is missing or refuses control groups of both versions", "apt install runc"),
    ("skopeo", "`hpmapper image pull`", "apt install skopeo"),
    ("mkfs.xfs", "loop and direct pools", "apt install xfsprogs"),
    ("mkfs.btrfs", "pools with --fs btrfs", "apt install btrfs-progs"),
    ("containerd", "an engine that storage drivers are made for", "apt install containerd"),
    ("docker", "the other one", "apt install docker.io"),
)
"""Programs: their names, what each gives, and how to get it."""

_NONE = "there is none yet"


@click.command()
@json_option
@pass_state
def info(state: State) -> None:
    """Show what is in use.

    The driver, the pool and its sizes, counts, and the kernel's features.
    """
    config = config_of(state)
    with session(state) as opened:
        facts = _info(config, opened)
    output.show(state, facts, lambda: _info_text(facts))


def _info(config: Config, opened: Session) -> dict[str, Any]:
    driver, db = opened.engine.driver, opened.engine.db
    space = driver.space()
    home = driver.scratch.parent
    return {
        "root": str(config.root),
        "driver": driver.name,
        "capabilities": dataclasses.asdict(driver.capabilities),
        "pool": {"kind": str(opened.opened.pool.config.kind)} if opened.opened.pool else None,
        "status": driver.status(),
        "backing_filesystem": filesystem_name(home),
        "root_filesystem": filesystem_name(config.root),
        "total": space.total,
        "used": space.used,
        "free": space.free,
        "floor": config.floor().of(space),
        "images": len(opened.images.all()),
        "containers": len(opened.containers.all()),
        "running": len(place.running(config.root)),
        "layers": len(snapshots.layers(db)),
        "objects": sum(1 for _ in snapshots.objects(db)),
        "features": {feature.name: feature.available for feature in probe_all(home)},
    }


def _info_text(facts: dict[str, Any]) -> str:
    features = facts["features"]
    shown = {
        "root": f"{facts['root']} ({facts['root_filesystem']})",
        "driver": facts["driver"],
        "pool": facts["pool"]["kind"] if facts["pool"] else "none",
        **{f"  {key}": value for key, value in facts["status"].items()},
        "backing file system": facts["backing_filesystem"],
        "size": output.size(facts["total"]),
        "used": output.size(facts["used"]),
        "free": f"{output.size(facts['free'])}, of which {output.size(facts['floor'])} must stay free",
        "images": str(facts["images"]),
        "containers": f"{facts['containers']}, {facts['running']} running",
        "layers": str(facts["layers"]),
        "objects": str(facts["objects"]),
        "kernel has": ", ".join(name for name, found in features.items() if found),
        "kernel lacks": ", ".join(name for name, found in features.items() if not found) or "nothing",
    }
    return output.pairs(shown)


_directory = click.option(
    "--directory",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Try on this directory's file system instead of the root's.",
)


@click.command()
@_directory
@json_option
@pass_state
def doctor(state: State, directory: Path | None) -> None:
    """Try what this host can do.

    Each feature is really tried; what it gives is said, and how to get it.
    """
    config = config_of(state)
    where = _place(config, directory)
    features = [*probe_all(where), *map(_tool, _TOOLS)]
    facts = {
        "directory": str(where),
        "filesystem": filesystem_name(where),
        "features": list(map(dataclasses.asdict, features)),
    }
    output.show(state, facts, lambda: _features_text(where, features))


def _tool(row: tuple[str, str, str]) -> Feature:
    name, gives, how = row
    path = shutil.which(name)
    if path is None:
        return Feature(name, False, gives, "is not installed", how)
    version = _version(path)
    return Feature(name, True, gives, f"{path}: {version}" if version else f"{path} does not run", "")


def _version(path: str) -> str:
    """The first line of what a program says of its version; "" when it does not run."""
    option = "-V" if Path(path).name == "mkfs.xfs" else "--version"
    try:
        done = subprocess.run([path, option], capture_output=True, text=True, errors="replace", timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[0].strip() if lines else ""


def _features_text(where: Path, features: list[Feature]) -> str:
    lines = [f"tried on {where} ({filesystem_name(where)})"]
    for feature in features:
        lines.append(f"{'yes' if feature.available else 'no ':<3}  {feature.name:<26} {feature.gives}")
        lines.append(f"     {'':<26} {feature.detail}")
        if feature.how:
            lines.append(f"     {'':<26} to get it: {feature.how}")
    return "\n".join(lines)


@click.command()
@_directory
@json_option
@pass_state
def drivers(state: State, directory: Path | None) -> None:
    """List the storage drivers and whether they work here.

    The preferred ones come first. What each needs is really tried; if it does not work, it is said what makes it, or
    why nothing does with this kernel.
    """
    config = config_of(state)
    where = _place(config, directory)
    used = _used_driver(state)
    facts = [
        {
            "name": one.name,
            "in_use": one.name == used,
            "automatic": one.automatic,
            **dataclasses.asdict(probe(one, where, config.pool(one), config.own_options(one))),
        }
        for one in DRIVERS
    ]
    output.show(state, facts, lambda: "\n".join(map(_driver_line, facts)))


def _driver_line(facts: dict[str, Any]) -> str:
    name = f"{facts['name']}{' (in use)' if facts['in_use'] else ''}"
    if facts["works"]:
        verdict = "works here" if facts["automatic"] else "works here, when it is asked for"
    elif facts["how"]:
        verdict = f"could work: {facts['how']} ({facts['why']})"
    else:
        verdict = f"cannot work here: {facts['why']}"
    return f"{name:<22}  {verdict}"


def _used_driver(state: State) -> str | None:
    try:
        with session(state) as opened:
            return opened.engine.driver.name
    except NotFound:
        return None


def _place(config: Config, directory: Path | None) -> Path:
    """Where to try things: a directory, or what there is of the root's path."""
    if directory is not None:
        if not directory.is_dir():
            raise NotFound(f"there is no directory {directory}")
        return directory
    return next(path for path in (config.root, *config.root.parents) if path.is_dir())


_LOWEST = 19
"""Niceness. On one processor a start beside the deletion of 100 layers takes 1.5 times as long, else 2.9 times."""


@contextmanager
def _at_lowest_priority() -> Iterator[None]:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, 0, _LOWEST)
    try:
        yield
    finally:
        with suppress(PermissionError):  # only root may go up again
            os.setpriority(os.PRIO_PROCESS, 0, before)


@click.command()
@json_option
@pass_state
def gc(state: State) -> None:
    """Remove what nothing refers to.

    Layers that no image has, and objects that no layer needs. Anything else may go on meanwhile, and comes first: this
    runs at the lowest priority.
    """
    with _at_lowest_priority(), session(state) as opened:
        collected = opened.engine.rubbish.collect()
    output.show(
        state,
        dataclasses.asdict(collected),
        lambda: (
            f"removed {collected.layers} layers and {collected.objects} objects, freed {output.size(collected.bytes)}"
            + ("; some is still in use, or waits for an image that is being brought in" if collected.waiting else "")
        ),
    )


@click.command()
@click.option("--repair", is_flag=True, help="Mend what can be mended.")
@json_option
@pass_state
def fsck(state: State, repair: bool) -> None:
    """Check all that is stored, byte by byte.

    Everything is compared with its digest, and the database with the disk. Ends with 8 when something is wrong
    that was not repaired.
    """
    with session(state) as opened:
        findings = list(_told(check(opened.engine, repair=repair), quiet=state.json))
    left = [finding for finding in findings if not finding.mended]
    facts = {"findings": list(map(dataclasses.asdict, findings)), "unrepaired": len(left)}
    output.show(state, facts, lambda: "" if findings else "all is well")
    if left:
        hint = "pull again the images that need them" if repair else "hpmapper fsck --repair mends what can be mended"
        raise Corrupt(f"{len(left)} things are wrong", hint=hint)


def _told(findings: Iterator[Finding], *, quiet: bool) -> Iterator[Finding]:
    for finding in findings:
        if not quiet:
            done = f"; {finding.repair}" if finding.repair else ""
            click.echo(f"{finding.invariant}: {finding.subject}: {finding.problem}{done}")
        yield finding
