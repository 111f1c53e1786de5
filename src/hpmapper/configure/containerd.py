"""What containerd's configuration file must say, for each version of containerd and of the file.

    1.6       proxy snapshotter                                                  file version 2
    1.6.32    … and the directory that CRI measures (`exports`; in 1.7 from 1.7.16)
    1.7.4     … and the proxy differ, first in the differs' order
    1.7.23    … and capabilities: remap-ids
    2.0       … and an entry for the transfer service, which pulls by default     file version 3

Sources: `ProxyPlugin` in cmd/containerd/server/config/config.go (1.x: services/server/config), `transferConfig` in
plugins/transfer/plugin.go and its defaults beside it, of the tags that first have each.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from hpmapper.configure.document import read_toml
from hpmapper.configure.draft import ABSENT, Draft, Path, dotted
from hpmapper.configure.version import Version
from hpmapper.errors import FailedPrecondition, Unsupported

DEFAULT_FILE = "/etc/containerd/config.toml"

OLDEST = Version(1, 6, 0)
_PROXY_DIFF = Version(1, 7, 4)  # containerd #8985
_CAPABILITIES = Version(1, 7, 23)  # containerd #10732
_TRANSFER = Version(2, 0, 0)  # since when `ctr images pull` (from 2.1 CRI, too) goes through it
_EROFS_ENTRY = Version(2, 3, 0)  # since when the transfer service's default has a second entry
_FILE_VERSION_3 = Version(2, 0, 0)
_FILE_VERSION_4 = Version(2, 3, 0)

_DIFF_SERVICE = "io.containerd.service.v1.diff-service"
_TRANSFER_SERVICE = "io.containerd.transfer.v1.local"
_CRI_OLD = "io.containerd.grpc.v1.cri"
_CRI_NEW = "io.containerd.cri.v1.images"

_WALKING = "walking"
"""Layers that containerd unpacks at a time: as many as the engine reads (`hpmapper.engine`)."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the operator wants of containerd.

    Attributes:
        name: of the snapshotter; the differ is called the same with `-diff`.
        address: the daemon's socket.
        storage: the directory of the layers, a pool's mount point where there is a pool: CRI measures the file system
            that it is on as the images'.
        platform: of this machine, as containerd writes it: linux/amd64.
        cri: Kubernetes is to use hpmapper, too.
        differ: layers go straight from the registry into the pool.
        remap_ids: the daemon can idmap what it hands out.
    """

    name: str
    address: str
    storage: str
    platform: str
    cri: bool = True
    differ: bool = True
    remap_ids: bool = True

    @property
    def differ_name(self) -> str:
        return f"{self.name}-diff"


def draft(content: Mapping[str, Any], version: Version, wishes: Wishes) -> Draft:
    """Compare a file's content with what it should say.

    Raises:
        Unsupported: containerd is too old. FailedPrecondition: the file's own version is not the program's.
    """
    if version < OLDEST:
        raise Unsupported(f"containerd {version} is too old", hint=f"{OLDEST} or newer is needed")
    result = Draft(dict(content))
    file_version = _file_version(result, version)
    _snapshotter(result, version, wishes)
    with_differ = wishes.differ and version >= _PROXY_DIFF
    if with_differ:
        _differ(result, wishes)
    else:
        result.note(_why_no_differ(version, wishes))
    _transfer(result, version, wishes, with_differ=with_differ)
    _cri(result, file_version, wishes)
    return result


def _file_version(result: Draft, version: Version) -> int:
    """The version of the file's format; a file without one is brought to where the others are understood."""
    newest = 4 if version >= _FILE_VERSION_4 else 3 if version >= _FILE_VERSION_3 else 2
    stated = result.get(("version",))
    if isinstance(stated, int) and 2 <= stated <= newest:
        return stated
    if stated not in (ABSENT, 1):
        raise FailedPrecondition(
            f"the file has the format version {stated!r}, and containerd {version} reads those up to {newest}",
            hint="is it the file of this containerd? See --file and --for",
        )
    if result.content:
        return _from_version_1(result)
    wanted = min(newest, 3)
    result.set(("version",), wanted, f"the file's format; containerd {version} has this one")
    return wanted


def _from_version_1(result: Draft) -> int:
    """Bring a file of the first format, in which plugins have short names, to the second if that is only names."""
    if any("." not in name for name in result.get(("plugins",)) or {}):
        raise FailedPrecondition(
            "the file has the format version 1, whose plugins have other names",
            hint="convert it first: `containerd config migrate` of containerd 2, or by hand, prints it in a new format",
        )
    for key in ("disabled_plugins", "required_plugins"):
        words = result.words((key,)) or []
        unknown = [word for word in words if "." not in word and word != "cri"]
        if unknown:
            raise FailedPrecondition(
                f"the file has the format version 1, and {key} has {unknown[0]!r}",
                hint="write plugins' full names, and version = 2",
            )
        full = [_CRI_OLD if word == "cri" else word for word in words]
        if full != words:
            result.set((key,), full, "the plugin's name in a file of version 2")
    result.set(("version",), 2, "a file without a version has version 1, where plugins have other names")
    return 2


def _snapshotter(result: Draft, version: Version, wishes: Wishes) -> None:
    proxy: Path = ("proxy_plugins", wishes.name)
    _proxy(result, proxy, "snapshot", wishes.address, "the snapshotter: `hpmapper serve` answers at this socket")
    _capabilities(result, (*proxy, "capabilities"), version, wishes)
    if (version >= (1, 7, 16)) or (1, 6, 32) <= version < (1, 7, 0):
        why = "Kubernetes measures the images' file system here"
        result.want((*proxy, "exports", "root"), wishes.storage, why, hint="see hpmapper --root")
    else:
        result.note(
            f"exports.root is not set: containerd {version} does not know it (1.6.32 and 1.7.16 do), so Kubernetes "
            "cannot measure the images' file system"
        )


def _proxy(result: Draft, path: Path, kind: str, address: str, why: str) -> None:
    other = "another plugin has this name: rename it, or ours with --name"
    result.want((*path, "type"), kind, why, hint=other)
    result.want((*path, "address"), address, "", hint="see --address, or correct the file")


def _capabilities(result: Draft, path: Path, version: Version, wishes: Wishes) -> None:
    """Exactly what is true of ours; words that are not ours to judge stay."""
    possible = {
        "rebase": "a layer is read on top of those below it, which its deletions and links may refer to",
        "remap-ids": _why_no_remap(version, wishes),
    }
    for word, why_not in possible.items():
        if why_not:
            result.note(f"the capability {word} is not set: {why_not}")
    stated = result.words(path) or []
    kept = [word for word in stated if not possible.get(word)]
    added = [word for word, why_not in possible.items() if not why_not and word not in kept]
    if kept + added != stated:
        meanings = {
            "remap-ids": "remap-ids: user namespaces by idmapped mounts, without a copy",
        }
        gone = [word for word in stated if word not in kept]
        why = "; ".join([meanings[word] for word in added] + [f"not {word}: {possible[word]}" for word in gone])
        result.set(path, kept + added, why)


def _why_no_remap(version: Version, wishes: Wishes) -> str:
    if not wishes.remap_ids:
        return "not wanted, or the driver or this host cannot (`hpmapper doctor`)"
    if version < _CAPABILITIES:
        return f"containerd {version} asks no proxy for it, {_CAPABILITIES} does"
    return ""


def _differ(result: Draft, wishes: Wishes) -> None:
    proxy: Path = ("proxy_plugins", wishes.differ_name)
    why = "the differ: layers go straight from the registry into the pool, and commits read only what was written"
    _proxy(result, proxy, "diff", wishes.address, why)
    path: Path = ("plugins", _DIFF_SERVICE, "default")
    order = result.words(path)
    if result.get(path) is not ABSENT and order is None:
        return  # a conflict already
    ours = "ours comes first: it declines what is not its own, and the next one is asked; walking never declines"
    if order is None:
        result.set(path, [wishes.differ_name, _WALKING], ours)
    elif wishes.differ_name not in order[: order.index(_WALKING) if _WALKING in order else None]:
        rest = [name for name in order if name != wishes.differ_name]
        result.set(path, [wishes.differ_name, *rest], ours)


def _why_no_differ(version: Version, wishes: Wishes) -> str:
    reason = "not wanted" if not wishes.differ else f"containerd {version} cannot have one, {_PROXY_DIFF} can"
    return f"no differ is set: {reason}. containerd unpacks layers itself, and they become objects afterwards"


def _transfer(result: Draft, version: Version, wishes: Wishes, *, with_differ: bool) -> None:
    """The transfer service has one differ for each entry and asks no second one."""
    service: Path = ("plugins", _TRANSFER_SERVICE)
    path: Path = (*service, "unpack_config")
    if version < _TRANSFER and not with_differ:
        result.note(f"the transfer service needs nothing: containerd {version} pulls without it")
        return
    entries = result.get(path)
    if entries is not ABSENT and not _are_entries(entries):
        result.conflicts.append(f"plugins.{_TRANSFER_SERVICE}.unpack_config is not a list of tables")
        return
    if entries is ABSENT:
        _default_entries(result, path, version, wishes)
    elif version < (2, 1, 0) and with_differ:
        _name_differs(result, path, entries)
    if version >= _TRANSFER:
        _our_entry(result, path, wishes.differ_name if with_differ else _WALKING, wishes)


def _are_entries(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def _default_entries(result: Draft, path: Path, version: Version, wishes: Wishes) -> None:
    """A list of ours replaces containerd's own, so what that has must be said."""
    why = "containerd's own entry, which a list of entries replaces; its differ is named, for now there are two"
    result.set((*path, 0), _entry(wishes.platform, "overlayfs", _WALKING), why)
    if version >= _EROFS_ENTRY:
        system, _, processor = wishes.platform.partition("/")
        erofs = _entry(f"{system}(+erofs)/{processor}", "erofs", "erofs") | {"optional": True}
        result.set((*path, 1), erofs, "containerd's own second entry")


def _name_differs(result: Draft, path: Path, entries: list[dict[str, Any]]) -> None:
    """Before 2.1 an entry without a differ gets any of the two that there are now."""
    for place, entry in enumerate(entries):
        if not entry.get("differ"):
            why = "there are two differs now, and this entry would get any of them"
            result.set((*path, place, "differ"), _WALKING, why)


def _our_entry(result: Draft, path: Path, differ: str, wishes: Wishes) -> None:
    entries = result.get(path)
    for place, entry in enumerate(entries):
        if entry.get("snapshotter") == wishes.name:
            instead = ("", _WALKING, wishes.differ_name)
            result.want((*path, place, "differ"), differ, "the differ for our snapshotter", instead_of=instead)
            return
    why = "without an entry, `ctr images pull` and Kubernetes refuse to unpack for this snapshotter"
    result.set((*path, len(entries)), _entry(wishes.platform, wishes.name, differ), why)


def _entry(platform: str, snapshotter: str, differ: str) -> dict[str, Any]:
    return {"platform": platform, "snapshotter": snapshotter, "differ": differ}


def _cri(result: Draft, file_version: int, wishes: Wishes) -> None:
    old: Path = ("plugins", _CRI_OLD, "containerd", "snapshotter")
    path = old if file_version == 2 else ("plugins", _CRI_NEW, "snapshotter")
    if not wishes.cri:
        result.note("Kubernetes (CRI) is left with its snapshotter, as asked")
        return
    disabled = result.words(("disabled_plugins",)) or []
    if _CRI_OLD in disabled or _CRI_NEW in disabled:
        result.note("Kubernetes (CRI) is left alone: disabled_plugins has it")
        return
    why = "what Kubernetes uses; a single runtime class can name its own snapshotter (see the manual)"
    hint = "--no-cri leaves it; or say so in the file yourself"
    result.want(path, wishes.name, why, instead_of=("", "overlayfs"), hint=hint)


def imported(file: FilePath, result: Draft) -> None:
    """Add conflicts for settings that files named in `imports` make as well: they are read later, and win.

    Raises:
        InvalidArgument: one of them is malformed.
    """
    for pattern in result.words(("imports",)) or []:
        for other in sorted(glob.glob(str(file.parent / pattern))):  # as resolveImports does; absolute ones stay so
            path = FilePath(other)
            content = Draft(read_toml(path, path.read_text(encoding="utf-8")))
            for setting in _ours(result):
                if content.get(setting) not in (ABSENT, result.get(setting)):
                    result.conflicts.append(f"{path}, which the file imports, sets {dotted(setting)}: correct it there")


def _ours(result: Draft) -> list[Path]:
    """The settings that matter to us, without places in lists: lists of several files are joined."""
    return [change.path for change in result.changes if not any(isinstance(key, int) for key in change.path)]
