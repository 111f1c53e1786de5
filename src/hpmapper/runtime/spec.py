"""config.json for an OCI runtime (github.com/opencontainers/runtime-spec), with Docker's defaults.

Capabilities, masked paths, devices and mounts are those of `docker run` (moby, daemon/pkg/oci/defaults.go), so that
images find what they expect. There is no seccomp filter: this is for judging storage, not for hostile code. The
network is the host's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpmapper.errors import InvalidArgument
from hpmapper.kernel.fs import filesystem_name
from hpmapper.runtime.inside import parts
from hpmapper.runtime.users import Account
from hpmapper.runtime.volumes import Volume

_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_CAPABILITIES = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
]
_MASKED = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
]
_READ_ONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
_SHARED_WITH_HOST = ("/etc/resolv.conf", "/etc/hosts")
_CGROUP = Path("/sys/fs/cgroup")

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Defaults:
    """What the image says about running it."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    user: str = ""
    workdir: str = ""


@dataclass(frozen=True, slots=True)
class Options:
    """What the user says about it; None leaves the image's choice.

    Attributes:
        command: instead of the image's command, behind its entrypoint.
        entrypoint: instead of the image's, whose command is dropped then.
        terminal: give it a terminal. interactive: leave standard input open.
    """

    command: tuple[str, ...] = ()
    entrypoint: str | None = None
    env: tuple[str, ...] = ()
    user: str | None = None
    workdir: str | None = None
    volumes: tuple[Volume, ...] = ()
    hostname: str | None = None
    terminal: bool = False
    interactive: bool = False


def arguments(defaults: Defaults, options: Options) -> list[str]:
    """The command that is run.

    Raises:
        InvalidArgument: neither the image nor the user names one.
    """
    if options.entrypoint is not None:
        words = [*([options.entrypoint] if options.entrypoint else []), *options.command]
    else:
        words = [*defaults.entrypoint, *(options.command or defaults.cmd)]
    if not words:
        raise InvalidArgument("the image names no command to run", hint="give one: hpmapper run IMAGE COMMAND…")
    return words


def environment(defaults: Defaults, options: Options, hostname: str, home: str) -> list[str]:
    """The environment: Docker's own variables, the image's, then the user's; of these, NAME alone is hpmapper's own.

    Raises:
        InvalidArgument: a variable without a name.
    """
    own = [_PATH, f"HOSTNAME={hostname}", *(["TERM=xterm"] if options.terminal else [])]
    merged: dict[str, str | None] = {}
    for entry in (*own, *defaults.env, *options.env):
        name, equals, value = entry.partition("=")
        if not name:
            raise InvalidArgument(f"{entry!r} is not an environment variable", hint="-e NAME=VALUE, or -e NAME")
        merged[name] = value if equals else os.environ.get(name)
    merged.setdefault("HOME", home)
    return [f"{name}={value}" for name, value in merged.items() if value is not None]


def workdir(defaults: Defaults, options: Options) -> str:
    """The working directory, absolute inside the container."""
    return "/" + "/".join(parts(options.workdir if options.workdir is not None else defaults.workdir))


def make_spec(root: Path, identity: tuple[str, str], defaults: Defaults, options: Options, account: Account) -> Json:
    """The whole document for a container whose root file system is mounted at `root`; `identity`: name and cgroup."""
    name, cgroup = identity
    hostname = options.hostname or name[:64]
    return {
        "ociVersion": "1.0.2",
        "root": {"path": str(root), "readonly": False},
        "hostname": hostname,
        "mounts": mounts(options.volumes),
        "process": {
            "terminal": options.terminal,
            "user": {"uid": account.uid, "gid": account.gid, "additionalGids": list(account.groups)},
            "args": arguments(defaults, options),
            "env": environment(defaults, options, hostname, account.home),
            "cwd": workdir(defaults, options),
            "capabilities": _capabilities(account),
        },
        "linux": _linux(cgroup),
    }


def encode(spec: Json) -> bytes:
    """The document's bytes.

    Raises:
        InvalidArgument: a command, variable or path is not UTF-8, which JSON cannot carry.
    """
    try:
        return json.dumps(spec, ensure_ascii=False, indent=1).encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument(f"{error.object[:100]!a} is not UTF-8") from None


def mounts(volumes: Iterable[Volume]) -> list[Json]:
    """Docker's mounts, the host's resolver files, then the volumes, outer ones first."""
    hidden = ["nosuid", "noexec", "nodev"]
    own = [
        _mount("/proc", "proc", hidden),
        _mount("/dev", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
        _mount("/dev/pts", "devpts", ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
        _mount("/dev/shm", "tmpfs", [*hidden, "mode=1777", "size=65536k"], "shm"),
        _mount("/dev/mqueue", "mqueue", hidden),
        _mount("/sys", "sysfs", [*hidden, "ro"]),
        _mount("/sys/fs/cgroup", "cgroup", [*hidden, "relatime", "ro"]),
    ]
    shared = [Volume(Path(path), path, read_only=True) for path in _SHARED_WITH_HOST if Path(path).is_file()]
    by_target = {volume.target: volume for volume in (*shared, *volumes)}
    chosen = [one for one in own if one["destination"] not in by_target]
    return chosen + [_bind(by_target[target]) for target in sorted(by_target, key=lambda path: path.count("/"))]


def _mount(target: str, kind: str, options: list[str], source: str = "") -> Json:
    return {"destination": target, "type": kind, "source": source or kind, "options": options}


def _bind(volume: Volume) -> Json:
    options = ["rbind", "rprivate", "ro" if volume.read_only else "rw"]
    return {"destination": volume.target, "type": "bind", "source": str(volume.source), "options": options}


def _capabilities(account: Account) -> Json:
    """Root has them; anybody else may only get them from a set-user-ID binary."""
    held = _CAPABILITIES if account.uid == 0 else []
    return {"bounding": _CAPABILITIES, "effective": held, "permitted": held}


def _linux(cgroup: str) -> Json:
    kinds = ["pid", "ipc", "uts", "mount"]
    if _CGROUP.is_dir() and filesystem_name(_CGROUP) == "cgroup2":
        kinds.append("cgroup")  # as Docker: with version 1 the paths in /proc/self/cgroup would lie
    return {
        "namespaces": [{"type": kind} for kind in kinds],
        "cgroupsPath": cgroup,
        # CAP_MKNOD is among the capabilities: without this rule a container could make the host's disks for itself.
        "resources": {"devices": [{"allow": False, "access": "rwm"}]},
        "maskedPaths": _MASKED,
        "readonlyPaths": _READ_ONLY,
    }
