"""Which drivers there are, whether each works on this host, and how one is made."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hpmapper.drivers import devicemapper, zfs
from hpmapper.drivers.aufs import AufsDriver
from hpmapper.drivers.base import Driver, Verdict
from hpmapper.drivers.btrfs import BtrfsDriver
from hpmapper.drivers.devicemapper.units import parse_bool
from hpmapper.drivers.hpmapper import HpmapperDriver
from hpmapper.drivers.overlay import OverlayDriver
from hpmapper.drivers.vfs import VfsDriver
from hpmapper.errors import HpmapperError, InvalidArgument, Unsupported
from hpmapper.kernel.probe import Feature, probe_all
from hpmapper.pool import open_pool
from hpmapper.pool.base import PoolConfig, PoolFs, PoolKind, parse_size

POOL_OPTIONS = ("pool.kind", "pool.size", "pool.device", "pool.directory", "pool.fs", "min_free_space")
"""Options that every driver takes; those of the pool count for a driver that needs one."""


@dataclass(frozen=True, slots=True)
class Registered:
    """A driver by name.

    Attributes:
        make: builds it for a root directory, with its own options by name; the pool is for those that need one.
        options: names of its own storage options. repeatable: those of which every value counts, one a line.
        needs: features of the host (hpmapper.kernel.probe), tried on a scratch directory in the root; of a group of
            several, one is enough.
        automatic: may be chosen without having been asked for.
        pool_fs: the file system that its pool must be; None: any.
        require: raises what is missing for a root directory beside what it `needs`, given the driver's own options.
        destroy: undoes what it made outside its directory, once it is detached.
    """

    name: str
    make: Callable[[Path, PoolConfig, Mapping[str, str]], Driver]
    needs: tuple[tuple[str, ...], ...]
    options: tuple[str, ...] = ()
    repeatable: tuple[str, ...] = ()
    needs_pool: bool = False
    pool_fs: PoolFs | None = None
    automatic: bool = True
    require: Callable[[Path, Mapping[str, str]], None] = lambda root, options: None
    destroy: Callable[[Driver], None] = lambda driver: None


def _overlay(root: Path, options: Mapping[str, str]) -> OverlayDriver:
    # Docker's check of the kernel's version, and so its option against it, went with 20.10: here the kernel is tried.
    parse_bool(options.get("overlay2.override_kernel_check", "false"))
    return OverlayDriver(root / "overlay", _size(options, "overlay2.size"))


def _size(options: Mapping[str, str], name: str) -> int | None:
    return parse_size(options[name]) if name in options else None


DRIVERS = (
    Registered(
        "hpmapper",
        lambda root, pool, options: HpmapperDriver(open_pool(root, pool)),
        needs=(
            ("mounting",),
            ("overlay-data-only", "overlay-data-only-metacopy"),
            ("erofs-file", "erofs-loop"),
            ("trusted-xattr",),
        ),
        needs_pool=True,
    ),
    Registered(
        "overlay",
        lambda root, pool, options: _overlay(root, options),
        needs=(("mounting",), ("overlay",), ("d_type",), ("trusted-xattr", "overlay-userxattr")),
        options=("overlay2.size", "overlay2.override_kernel_check"),
    ),
    Registered(
        "btrfs",
        lambda root, pool, options: BtrfsDriver(
            open_pool(root, pool), min_space=parse_size(options.get("btrfs.min_space", "0"))
        ),
        needs=(("mounting",), ("btrfs",)),
        options=("btrfs.min_space",),
        needs_pool=True,
        pool_fs=PoolFs.BTRFS,
    ),
    Registered(
        "zfs",
        lambda root, pool, options: zfs.ZfsDriver(root / "zfs", options.get(zfs.FSNAME)),
        needs=(("mounting",), ("zfs",)),
        options=(zfs.FSNAME,),
        require=zfs.require,
        destroy=zfs.destroy,
    ),
    Registered(
        "aufs",
        lambda root, pool, options: AufsDriver(root / "aufs"),
        needs=(("mounting",), ("aufs",)),
    ),
    Registered(
        "devicemapper",
        lambda root, pool, options: devicemapper.DeviceMapperDriver(
            root / "devicemapper", devicemapper.parse(options.items())
        ),
        needs=(("mounting",), ("device-mapper",)),
        options=devicemapper.NAMES,
        repeatable=devicemapper.REPEATABLE,
        automatic=False,  # its pool is the operator's to think about
        destroy=devicemapper.destroy,
    ),
    Registered(
        "vfs",
        lambda root, pool, options: VfsDriver(root / "vfs", _size(options, "vfs.size")),
        needs=(),
        options=("vfs.size",),
    ),
)
"""In the order in which they are preferred."""

NEVER_PRIOR = ("vfs",)
"""Drivers whose data does not speak for them, as in Docker."""

REPEATABLE = {option for driver in DRIVERS for option in driver.repeatable}


def by_name(name: str) -> Registered:
    """The driver of that name; Docker's names for ours are taken too.

    Raises:
        InvalidArgument: there is none; the hint has the nearest.
    """
    name = {"overlay2": "overlay"}.get(name, name)
    for registered in DRIVERS:
        if registered.name == name:
            return registered
    raise InvalidArgument(f"there is no storage driver {name!r}", hint=nearest(name, [each.name for each in DRIVERS]))


def probe(
    registered: Registered, directory: Path, pool: PoolConfig, options: Mapping[str, str] | None = None
) -> Verdict:
    """Try on this host what a driver needs; `directory` is where its data would lie, `options` are its own."""
    wanted = [name for group in registered.needs for name in group]
    seen = {feature.name: feature for feature in probe_all(directory, wanted)}
    if registered.needs_pool:
        seen |= _pool_features(directory, pool)
    missing = [group for group in _groups(registered, pool) if not any(seen[name].available for name in group)]
    if not missing:
        return _required(registered, directory, options or {})
    # Of a group any will do: the one that can be had, or else the first.
    lacking = [next((seen[name] for name in group if seen[name].remedy), seen[group[0]]) for group in missing]
    why = "; ".join(f"{one.name}: {one.detail}" + ("" if one.remedy else f"; needs {one.how}") for one in lacking)
    return Verdict(False, why, "; ".join(one.remedy for one in lacking) if all(one.remedy for one in lacking) else "")


def _required(registered: Registered, directory: Path, options: Mapping[str, str]) -> Verdict:
    try:
        registered.require(directory, options)
    except HpmapperError as error:
        return Verdict(False, error.message, error.hint)
    return Verdict(True, "all it needs was tried and works")


def _groups(registered: Registered, pool: PoolConfig) -> list[tuple[str, ...]]:
    groups = list(registered.needs)
    if registered.pool_fs is PoolFs.BTRFS and pool.kind is PoolKind.DIRECTORY:
        groups.append(("btrfs-subvolumes",))
    elif registered.needs_pool:
        groups.append(_POOL_NEEDS[pool.kind])
    return groups


_POOL_NEEDS = {
    PoolKind.LOOP: ("loop-direct-io",),
    PoolKind.DIRECT: ("mounting",),
    PoolKind.DIRECTORY: ("reflink",),
}


def _pool_features(directory: Path, pool: PoolConfig) -> dict[str, Feature]:
    chosen = pool.directory if pool.kind is PoolKind.DIRECTORY and pool.directory else directory
    place = next(path for path in (chosen, *chosen.absolute().parents) if path.is_dir())  # what is not made yet
    return {feature.name: feature for feature in probe_all(place, ["loop-direct-io", "reflink", "btrfs-subvolumes"])}


def choose(
    directory: Path,
    pool_of: Callable[[Registered], PoolConfig],
    options_of: Callable[[Registered], Mapping[str, str]] = lambda registered: {},
) -> tuple[Registered, Mapping[str, Verdict]]:
    """The first driver that works here, and the verdicts on it and those before it.

    `pool_of` tells the pool that a driver would get, `options_of` its own options.
    """
    verdicts: dict[str, Verdict] = {}
    for registered in (one for one in DRIVERS if one.automatic):
        verdicts[registered.name] = probe(registered, directory, pool_of(registered), options_of(registered))
        if verdicts[registered.name].works:
            return registered, verdicts
    raise Unsupported("no storage driver works here", hint="hpmapper doctor says what is missing")


def prior(root: Path) -> list[Registered]:
    """The drivers that have left something in a root directory, in the order in which they are preferred.

    Of those that need a pool only the first is named: a pool does not tell whose it is.
    """
    found = []
    pool_seen = False
    for registered in DRIVERS:
        if registered.needs_pool:
            if not pool_seen and ((root / "pool.img").exists() or _has_entries(root / "pool")):
                found.append(registered)
                pool_seen = True
        elif registered.name not in NEVER_PRIOR and _has_entries(root / registered.name):
            found.append(registered)
    return found


def _has_entries(directory: Path) -> bool:
    return directory.is_dir() and next(directory.iterdir(), None) is not None


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that names what was probably meant, or all there is."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, 1)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
