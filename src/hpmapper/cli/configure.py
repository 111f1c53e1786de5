"""hpmapper config containerd and docker: what they must be told, printed, checked or merged into their files."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from hpmapper.cli import output
from hpmapper.cli.groups import NearestGroup
from hpmapper.cli.session import config_of
from hpmapper.cli.state import State, json_option, pass_state
from hpmapper.config import Config
from hpmapper.configure import containerd as for_containerd
from hpmapper.configure import docker as for_docker
from hpmapper.configure import document, file
from hpmapper.configure.draft import Draft, dotted
from hpmapper.configure.version import Version, installed, parse
from hpmapper.drivers.base import Driver
from hpmapper.drivers.registry import DRIVERS, by_name
from hpmapper.errors import FailedPrecondition, InvalidArgument, NotFound
from hpmapper.image.platforms import this_machine
from hpmapper.kernel.probe import probe_all
from hpmapper.root import driver_name, driver_of

DEFAULT_ADDRESS = "/run/hpmapper/hpmapper.sock"

_SECONDS = 60

_Command = TypeVar("_Command", bound=Callable[..., Any])


@click.group(cls=NearestGroup)
def config() -> None:
    """Make containerd or Docker use hpmapper."""


def _common(program: str, default: str) -> Callable[[_Command], _Command]:
    """The options that both commands have."""
    options = (
        click.option("--file", "path", type=click.Path(path_type=Path), default=default, metavar="FILE", help=default),
        click.option("--apply", is_flag=True, help="Merge it into the file, keeping a backup."),
        click.option("--check", is_flag=True, help="Say what the file lacks; ends with 5 if anything."),
        click.option(
            "--program", default=program, metavar="PROGRAM", help=f"Ask this one for its version [{program}]."
        ),
        click.option("--for", "wanted", metavar="VERSION", help="For this version, without asking."),
        click.option("--name", default="hpmapper", show_default=True, metavar="NAME", help="What they call hpmapper."),
        json_option,
    )

    def decorate(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@config.command()
@_common("containerd", for_containerd.DEFAULT_FILE)
@click.option("--address", default=DEFAULT_ADDRESS, metavar="SOCKET", help=f"Of hpmapper serve [{DEFAULT_ADDRESS}].")
@click.option("--platform", metavar="OS/ARCH", help="Of the images to be unpacked [this machine's].")
@click.option("--no-cri", is_flag=True, help="Leave Kubernetes' snapshotter as it is.")
@click.option("--no-differ", is_flag=True, help="Let containerd unpack layers itself.")
@click.option("--remap-ids/--no-remap-ids", default=None, help="Idmapped mounts [if they work here].")
@pass_state
def containerd(
    state: State,
    path: Path,
    apply: bool,
    check: bool,
    program: str,
    wanted: str | None,
    name: str,
    address: str,
    platform: str | None,
    no_cri: bool,
    no_differ: bool,
    remap_ids: bool | None,
) -> None:
    """Make containerd use hpmapper.

    Without --apply or --check, prints what a file of its own would say, with reasons.
    """
    version = parse(wanted) if wanted else installed(program)
    settings = config_of(state)
    driver = _driver(settings)
    wishes = for_containerd.Wishes(
        name=for_docker.require_name(name),
        address=_absolute(address),
        storage=str(driver.scratch.parent),
        platform=platform or str(this_machine()),
        cri=not no_cri,
        differ=not no_differ,
        remap_ids=_maps_ids(settings, driver) if remap_ids is None else remap_ids,
    )
    target = _Target(
        "containerd",
        version,
        path,
        read=document.read_toml,
        draft=lambda content: for_containerd.draft(content, version, wishes),
        write=document.write_toml,
        validate=lambda new: None if wanted else _run(path, [program, "-c", str(new), "config", "dump"]),
        others=for_containerd.imported,
    )
    _do(state, target, apply=apply, check=check)


@config.command()
@_common("dockerd", for_docker.DEFAULT_FILE)
@click.option("--way", type=click.Choice(list(map(str, for_docker.Way))), help="[image-store, before 24 plugin]")
@pass_state
def docker(
    state: State,
    path: Path,
    apply: bool,
    check: bool,
    program: str,
    wanted: str | None,
    name: str,
    way: str | None,
) -> None:
    """Make Docker use hpmapper.

    Docker 24 and newer by containerd's image store (configure containerd as well), older ones by a plugin.
    """
    version = parse(wanted) if wanted else installed(program)
    for_docker.require_name(name)
    can_validate = not wanted and version >= (23, 0, 0)  # since when dockerd has --validate
    target = _Target(
        "docker",
        version,
        path,
        read=document.read_json,
        draft=lambda content: for_docker.draft(content, version, name, for_docker.Way(way) if way else None),
        write=lambda _, text, draft: document.write_json(text, draft),
        validate=lambda new: _run(path, [program, "--validate", f"--config-file={new}"]) if can_validate else None,
        others=None,
    )
    _do(state, target, apply=apply, check=check)


@dataclass(frozen=True, slots=True)
class _Target:
    """A program's file, and how it is read, judged and written."""

    program: str
    version: Version
    path: Path
    read: Callable[[Path, str], dict[str, Any]]
    draft: Callable[[dict[str, Any]], Draft]
    write: Callable[[Path, str, Draft], str]
    validate: file.Validate
    others: Callable[[Path, Draft], None] | None


def _do(state: State, target: _Target, *, apply: bool, check: bool) -> None:
    if apply and check:
        raise InvalidArgument("--apply and --check exclude each other")
    if not apply and not check:
        _print(state, target)
        return
    old = file.read(target.path)
    draft = target.draft(target.read(target.path, old.text))
    if target.others:
        target.others(old.file, draft)
    if check:
        _check(state, target, draft)
    else:
        _apply(state, target, draft, old)


def _print(state: State, target: _Target) -> None:
    """What an empty file would have to say."""
    draft = target.draft({})
    text = target.write(target.path, "", draft)
    notes = document.remarks([f"for {target.program} {target.version}, in {target.path}", *draft.notes])
    if target.read is document.read_toml:
        output.show(state, _facts(target, draft) | {"text": text}, lambda: f"{notes}\n{text}".rstrip())
        return
    if not state.json:
        click.echo(notes, nl=False, err=True)  # JSON has no comments
    output.show(state, _facts(target, draft) | {"text": text}, text.rstrip)


def _check(state: State, target: _Target, draft: Draft) -> None:
    facts = _facts(target, draft) | {"complete": not draft.changes and not draft.conflicts}
    output.show(state, facts, lambda: _report(draft, "missing"))
    problems = len(draft.changes) + len(draft.conflicts)
    if problems:
        hint = "hpmapper config --help" if draft.conflicts else f"hpmapper config {target.program} --apply"
        raise FailedPrecondition(
            f"{target.path} is not as hpmapper needs it: {problems} setting{'s' * (problems > 1)}", hint=hint
        )


def _apply(state: State, target: _Target, draft: Draft, old: file.Text) -> None:
    if draft.conflicts:
        raise FailedPrecondition(
            f"{target.path} decides otherwise, and nothing was changed: {'; '.join(draft.conflicts)}"
        )
    backup = None
    if draft.changes:
        backup = file.replace(old, target.write(target.path, old.text, draft), target.validate)
    facts = _facts(target, draft) | {"applied": bool(draft.changes), "backup": str(backup) if backup else None}
    output.show(state, facts, lambda: _report(draft, "set") + _next(target, draft, backup))


def _facts(target: _Target, draft: Draft) -> dict[str, object]:
    return {
        "program": target.program,
        "version": str(target.version),
        "file": str(target.path),
        "changes": [
            {"setting": dotted(change.path), "was": change.was, "now": change.now, "why": change.why}
            for change in draft.changes
        ],
        "conflicts": draft.conflicts,
        "notes": draft.notes,
    }


def _report(draft: Draft, word: str) -> str:
    lines = [f"{word}: {change}" for change in draft.changes]
    lines += [f"conflict: {text}" for text in draft.conflicts]
    lines += [f"note: {text}" for text in draft.notes]
    if not draft.changes and not draft.conflicts:
        lines.insert(0, "everything is set")
    return "\n".join(lines)


def _next(target: _Target, draft: Draft, backup: Path | None) -> str:
    if not draft.changes:
        return ""
    kept = f"\nthe file as it was: {backup}" if backup else ""
    return f"{kept}\nnow: systemctl restart {target.program}"


def _run(path: Path, command: list[str]) -> None:
    """Let the program itself read the new file, before it is in place."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FailedPrecondition(f"{command[0]} could not check the new {path}: {error}") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise InvalidArgument(f"{command[0]} would refuse the new {path}, so it was not changed: {said}")


def _absolute(address: str) -> str:
    path = address.removeprefix("unix://")
    if not Path(path).is_absolute():
        raise InvalidArgument(f"{address!r} is no socket's address", hint="an absolute path")
    return path


def _driver(config: Config) -> Driver:
    """The root's driver, not attached; where there is no root yet, the one that is asked for or preferred."""
    try:
        return driver_of(config)
    except NotFound:
        registered = by_name(driver_name(config))
    except PermissionError:
        registered = DRIVERS[0]  # somebody else than root may still look
    return registered.make(config.root, config.pool(registered), config.own_options(registered))


def _maps_ids(config: Config, driver: Driver) -> bool:
    """Whether the root's driver and this host can show files under other owners."""
    if not driver.capabilities.maps_ids:
        return False
    where = next(path for path in (config.root, *config.root.parents) if path.is_dir())
    return any(feature.available for feature in probe_all(where, ["idmapped-mounts"]))
