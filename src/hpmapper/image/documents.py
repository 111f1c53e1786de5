"""Making image documents: configs for imported and committed images, manifests for layers without one.

The same input gives the same bytes, hence the same image id: fields in a fixed order and no time but the caller's.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import msgspec

from hpmapper.errors import InvalidArgument
from hpmapper.image import oci
from hpmapper.image.platforms import Platform, this_machine

_PORT = re.compile(r"([0-9]{1,5})(?:-[0-9]{1,5})?(?:/(?:tcp|udp|sctp))?")


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """What a made-up config says. None leaves a field as it is (commit) or unset (import).

    `created` is an RFC 3339 time; without it the image of the same files has the same id on any day.
    """

    cmd: tuple[str, ...] | None = None
    entrypoint: tuple[str, ...] | None = None
    env: tuple[str, ...] = ()
    workdir: str | None = None
    user: str | None = None
    labels: tuple[tuple[str, str], ...] = ()
    exposed_ports: tuple[str, ...] = ()
    volumes: tuple[str, ...] = ()
    stop_signal: str | None = None
    platform: Platform | None = None
    created: str | None = None
    author: str | None = None
    message: str | None = None
    names: tuple[str, ...] = field(default=())

    def changed(self, instructions: Iterable[str]) -> ImportOptions:
        """Return the options with `--change` instructions of `docker import` applied in order."""
        options = self
        for instruction in instructions:
            keyword, _, rest = instruction.strip().partition(" ")
            apply = _INSTRUCTIONS.get(keyword.upper())
            if apply is None or not rest.strip():
                raise _refused(instruction, "known are " + ", ".join(sorted(_INSTRUCTIONS)))
            options = apply(options, rest.strip())
        return options


def _refused(instruction: str, why: str) -> InvalidArgument:
    return InvalidArgument(f"{instruction[:200]!r} is not a change that can be made", hint=why)


def _command(text: str) -> tuple[str, ...]:
    """An exec form (JSON) as it is, a shell form through sh, as in a Dockerfile."""
    if not text.startswith("["):
        return ("/bin/sh", "-c", text)
    try:
        return msgspec.json.decode(text, type=tuple[str, ...])
    except msgspec.MsgspecError as error:
        raise _refused(text, f"expected a JSON list of texts: {error}") from error


def _words(text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise _refused(text, str(error)) from error


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    """`A=1 B="two words"`, or the old `A 1`."""
    key, space, value = text.partition(" ")
    if space and "=" not in key:
        return ((key, value.strip()),)
    pairs = [word.partition("=") for word in _words(text)]
    if any(not name or not equals for name, equals, _ in pairs):
        raise _refused(text, "expected NAME=VALUE")
    return tuple((name, value) for name, _, value in pairs)


def _env(options: ImportOptions, text: str) -> ImportOptions:
    return replace(options, env=options.env + tuple(f"{name}={value}" for name, value in _pairs(text)))


def _expose(options: ImportOptions, text: str) -> ImportOptions:
    ports = _words(text)
    if not all(_PORT.fullmatch(port) for port in ports):
        raise _refused(text, "expected PORT[/tcp|/udp|/sctp]")
    return replace(options, exposed_ports=options.exposed_ports + ports)


def _volume(options: ImportOptions, text: str) -> ImportOptions:
    paths = _command(text) if text.startswith("[") else _words(text)
    return replace(options, volumes=options.volumes + paths)


def _workdir(options: ImportOptions, text: str) -> ImportOptions:
    return replace(options, workdir=text if text.startswith("/") else f"{(options.workdir or '').rstrip('/')}/{text}")


_INSTRUCTIONS: dict[str, Callable[[ImportOptions, str], ImportOptions]] = {
    "CMD": lambda options, text: replace(options, cmd=_command(text)),
    "ENTRYPOINT": lambda options, text: replace(options, entrypoint=_command(text)),
    "ENV": _env,
    "EXPOSE": _expose,
    "LABEL": lambda options, text: replace(options, labels=options.labels + _pairs(text)),
    "STOPSIGNAL": lambda options, text: replace(options, stop_signal=text),
    "USER": lambda options, text: replace(options, user=text),
    "VOLUME": _volume,
    "WORKDIR": _workdir,
}


def imported_config(diff_ids: Sequence[str], options: ImportOptions) -> bytes:
    """Return the config of an image that was a root file system before."""
    platform = options.platform or this_machine()
    config: oci.Json = {"architecture": platform.architecture, "os": platform.os}
    if platform.variant:
        config["variant"] = platform.variant
    return _finished(config, options, diff_ids, _history(options, "", "Imported from a root file system"))


def committed_config(parent: bytes, diff_id: str | None, options: ImportOptions, created_by: str = "") -> bytes:
    """Return `parent`'s config with one more layer (None: with changed settings only).

    Fields that this project knows nothing of (Healthcheck, OnBuild, …) are kept.
    """
    diff_ids = oci.decode_config(parent, "the parent's config").diff_ids
    config = oci.decode(parent, oci.Json, "the parent's config")
    for stale in ("created", "container", "container_config", "docker_version", "id", "parent"):
        config.pop(stale, None)
    entry = _history(options, created_by, "")
    if diff_id is None:
        entry["empty_layer"] = True
    return _finished(config, options, [*diff_ids, *([diff_id] if diff_id else [])], entry)


def _history(options: ImportOptions, created_by: str, comment: str) -> oci.Json:
    texts = {
        "created": options.created,
        "created_by": created_by,
        "author": options.author,
        "comment": options.message or comment,
    }
    return {key: text for key, text in texts.items() if text}


def _finished(config: oci.Json, options: ImportOptions, diff_ids: Sequence[str], entry: oci.Json) -> bytes:
    if options.created:
        config["created"] = options.created
    if options.author:
        config["author"] = options.author
    settings = dict(_table(config, "config"))
    _apply(settings, options)
    config["config"] = settings
    config["rootfs"] = {"type": "layers", "diff_ids": list(diff_ids)}
    config["history"] = [*cast(list[object], config.get("history") or []), entry]
    data = msgspec.json.encode(config)
    oci.decode_config(data, "the new image's config", len(diff_ids))  # what we write we also read
    return data


def _apply(settings: oci.Json, options: ImportOptions) -> None:
    texts = {"User": options.user, "WorkingDir": options.workdir, "StopSignal": options.stop_signal}
    settings.update({key: text for key, text in texts.items() if text is not None})
    if options.entrypoint is not None:
        # As in a Dockerfile: the old command was meant for the old entrypoint.
        settings.update(Entrypoint=list(options.entrypoint), Cmd=None)
    if options.cmd is not None:
        settings["Cmd"] = list(options.cmd)
    if options.env:
        settings["Env"] = _merged_env(cast(list[str], settings.get("Env") or []), options.env)
    tables: dict[str, oci.Json] = {
        "Labels": dict(options.labels),
        "ExposedPorts": {port if "/" in port else f"{port}/tcp": {} for port in options.exposed_ports},
        "Volumes": {path: {} for path in options.volumes},
    }
    settings.update({key: {**_table(settings, key), **table} for key, table in tables.items() if table})


def _table(of: oci.Json, key: str) -> oci.Json:
    return cast(oci.Json, of.get(key) or {})


def _merged_env(old: Sequence[str], new: Sequence[str]) -> list[str]:
    """Return `old` with `new` over it; a name keeps its place."""
    merged = {entry.partition("=")[0]: entry for entry in old}
    merged.update((entry.partition("=")[0], entry) for entry in new)
    return list(merged.values())


def manifest_of(config: bytes, layers: Iterable[tuple[str, int]]) -> bytes:
    """Return the manifest of an image whose layers, (DiffID, size), are uncompressed."""
    return manifest(config, [oci.Descriptor(oci.OCI_LAYER, diff_id, size) for diff_id, size in layers])


def manifest(config: bytes, layers: Sequence[oci.Descriptor]) -> bytes:
    """Return the OCI manifest of `config` and `layers`."""
    of_config = oci.Descriptor(oci.OCI_CONFIG, oci.sha256(config), len(config))
    return msgspec.json.encode(oci.Manifest(2, of_config, list(layers), media_type=oci.OCI_MANIFEST))
