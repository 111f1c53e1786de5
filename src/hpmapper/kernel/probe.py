"""What this machine can do, found out by doing it in a scratch directory.

Kernel versions are never asked: distributions carry features back and leave others out. The probes run in a thread with
a mount namespace of its own, so that nobody sees their mounts and none can stay; loop devices are such that the kernel
frees them. Each takes milliseconds.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hpmapper.kernel import attempts, mount


@dataclass(frozen=True, slots=True)
class Feature:
    """One answer.

    Attributes:
        name: short and fixed: what code and `--json` ask for.
        available: whether it worked.
        gives: what it is good for.
        detail: what was seen.
        how: how to get it.
        remedy: what gets it on this machine with the kernel that runs; "" if nothing does.
    """

    name: str
    available: bool
    gives: str
    detail: str
    how: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class _Probe:
    name: str
    gives: str
    how: str
    attempt: Callable[[Path], str]
    module: str = ""
    """The kernel module that it is in."""
    by_place: bool = False
    """Whether another directory may have it on the same kernel."""


def probe_all(directory: Path, names: Sequence[str] | None = None) -> tuple[Feature, ...]:
    """Try every feature (or those named, in the table's order), on the file system of `directory` where it matters."""
    chosen = [one for one in PROBES if names is None or one.name in names]
    features: list[Feature] = []
    thread = threading.Thread(target=lambda: features.extend(_try_all(chosen, directory)), name="probe")
    thread.start()
    thread.join()
    return tuple(features)


def probe(name: str, directory: Path) -> Feature:
    """Try one feature; KeyError for a name that is none."""
    if name not in FEATURE_NAMES:
        raise KeyError(name)
    return probe_all(directory, [name])[0]


def _try_all(probes: Sequence[_Probe], directory: Path) -> Iterator[Feature]:
    try:
        mount.private_namespace()
    except OSError:
        pass  # then mounting fails too, and the probes that need it say so
    for one in probes:
        yield _try(one, directory)


def _try(one: _Probe, directory: Path) -> Feature:
    try:
        with _scratch(directory) as scratch:
            detail, available = one.attempt(scratch), True
    except (OSError, attempts.Missing) as error:
        detail, available = _explain(error), False
    if available:
        return Feature(one.name, True, one.gives, detail, "")
    return Feature(one.name, False, one.gives, detail, one.how, _remedy(one))


def _remedy(one: _Probe) -> str:
    if one.module and not _is_loaded(one.module):
        return f"modprobe {one.module}" if _is_loadable(one.module) else ""
    return one.how if one.by_place else ""


def _is_loaded(module: str) -> bool:
    """Whether the running kernel has a module in it, loaded or built in."""
    known = Path("/proc/filesystems").read_bytes().split()
    return os.fsencode(module) in known or Path("/sys/module", module).exists()


def _is_loadable(module: str) -> bool:
    """Whether modprobe knows how to load a module into the running kernel."""
    try:
        done = subprocess.run(["modprobe", "-n", "-q", module], capture_output=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _explain(error: Exception) -> str:
    if not isinstance(error, OSError):
        return str(error)
    code = errno.errorcode.get(error.errno or 0, "?")
    notes = "; ".join(getattr(error, "__notes__", ()))
    return f"{code}: {error.strerror}" + (f" ({notes})" if notes else "")


@contextmanager
def _scratch(directory: Path) -> Iterator[Path]:
    """An empty directory that is gone afterwards, with all that was mounted in it."""
    path = Path(tempfile.mkdtemp(prefix=".probe-", dir=directory))
    try:
        yield path
    finally:
        for below in mount.mounts_below(path):
            mount.umount(below.target, lazy=True)
        shutil.rmtree(path)


PROBES: tuple[_Probe, ...] = (
    _Probe(
        "mounting",
        "every driver but vfs",
        "run as root on the host, or in a container with CAP_SYS_ADMIN and its own /dev",
        attempts.mounting,
    ),
    _Probe(
        "reflink",
        "copies and copy-ups that share blocks, in constant time",
        "use XFS (mkfs.xfs -m reflink=1) or btrfs; a loop pool brings its own",
        attempts.reflink,
        by_place=True,
    ),
    _Probe(
        "overlay",
        "the overlay driver with its directories here",
        "a file system of the host's, such as XFS, btrfs or ext4; not overlay or NFS",
        attempts.overlay,
        module="overlay",
        by_place=True,
    ),
    _Probe(
        "overlay-userxattr",
        "the overlay driver in a user namespace",
        "Linux 5.11 or newer",
        attempts.overlay_userxattr,
        module="overlay",
        by_place=True,
    ),
    _Probe(
        "overlay-data-only",
        "the hpmapper driver, with whole copy-ups that any differ can read",
        "Linux 6.16 or newer",
        attempts.data_only({"metacopy": "off", "redirect_dir": "nofollow"}),
    ),
    _Probe(
        "overlay-data-only-metacopy",
        "the hpmapper driver, with metadata-only copy-ups",
        "Linux 6.5 or newer",
        attempts.data_only({"metacopy": "on", "redirect_dir": "on"}),
    ),
    _Probe(
        "overlay-layers-by-fd",
        "mounts of up to 500 layers, with any names",
        "Linux 6.13 or newer",
        attempts.layers_by(mount.LayerForm.DESCRIPTORS),
    ),
    _Probe(
        "overlay-layers-by-string",
        "mounts of up to 500 layers where layers by descriptor are missing; without either about 200",
        "Linux 6.7 or newer",
        attempts.layers_by(mount.LayerForm.STRINGS),
    ),
    _Probe(
        "erofs-file",
        "layers' maps mounted straight from their files",
        "Linux 6.12 or newer with CONFIG_EROFS_FS_BACKED_BY_FILE",
        attempts.erofs_file,
        module="erofs",
    ),
    _Probe(
        "erofs-loop",
        "layers' maps mounted through loop devices, cached once",
        "CONFIG_EROFS_FS and CONFIG_BLK_DEV_LOOP (modprobe erofs loop), and access to /dev/loop-control",
        attempts.erofs_loop,
        module="erofs",
    ),
    _Probe(
        "loop-direct-io",
        "loop pools whose data is not cached twice",
        "put the root directory on XFS, btrfs or ext4",
        attempts.loop_direct_io,
        module="loop",
        by_place=True,
    ),
    _Probe(
        "project-quota",
        "size limits for single containers",
        "XFS or ext4 mounted with prjquota, on a kernel with CONFIG_XFS_QUOTA or CONFIG_QFMT_V2; or btrfs instead",
        attempts.project_quota,
        by_place=True,
    ),
    _Probe(
        "btrfs",
        "the btrfs driver, and pools with btrfs",
        "CONFIG_BTRFS_FS (modprobe btrfs)",
        attempts.btrfs_known,
        module="btrfs",
    ),
    _Probe(
        "btrfs-subvolumes",
        "the btrfs driver with a directory here",
        "a file system that is btrfs; a loop pool brings its own",
        attempts.subvolumes,
        module="btrfs",
        by_place=True,
    ),
    _Probe(
        "btrfs-simple-quotas",
        "size limits for single containers on btrfs",
        "Linux 6.7 or newer, and btrfs loaded (modprobe btrfs)",
        attempts.simple_quotas,
    ),
    _Probe(
        "zfs",
        "the zfs driver",
        "modprobe zfs (Debian: apt install zfs-dkms zfsutils-linux)",
        attempts.zfs,
        module="zfs",
    ),
    _Probe(
        "aufs",
        "the aufs driver with its directories here",
        "a kernel with AUFS, which no mainline kernel has; and XFS or ext4",
        attempts.aufs_union,
        module="aufs",
        by_place=True,
    ),
    _Probe(
        "idmapped-mounts",
        "images shared by containers with user namespaces of their own",
        "Linux 5.12 or newer, and XFS, ext4 or btrfs",
        attempts.idmapped_mounts,
    ),
    _Probe(
        "d_type",
        "deleted files that stay hidden in overlays",
        "XFS made with ftype=1 (mkfs.xfs's default), or another file system",
        attempts.file_types,
        by_place=True,
    ),
    _Probe(
        "trusted-xattr",
        "overlay's own marks in layers",
        "CAP_SYS_ADMIN in the first user namespace, and a file system with extended attributes",
        attempts.trusted_xattr,
    ),
    _Probe("user-xattr", "images with user attributes", "a file system with extended attributes", attempts.user_xattr),
    _Probe("cachestat", "counting what the page cache holds, by file", "Linux 6.5 or newer", attempts.cached_pages),
    _Probe(
        "fanotify",
        "recording what a container reads while it starts",
        "CAP_SYS_ADMIN, and CONFIG_FANOTIFY",
        attempts.opens_reported,
    ),
    _Probe(
        "pressure",
        "giving memory back when it becomes short, and background work that waits",
        "CONFIG_PSI, and psi=1 on the kernel's command line",
        attempts.pressure,
    ),
    _Probe(
        "device-mapper",
        "the devicemapper driver",
        "CONFIG_BLK_DEV_DM and CONFIG_DM_THIN_PROVISIONING (modprobe dm_thin_pool)",
        attempts.device_mapper,
        module="dm_thin_pool",
    ),
)
"""Every feature, the most needed first."""

FEATURE_NAMES = tuple(one.name for one in PROBES)
