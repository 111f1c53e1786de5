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

from hpmapper.kernel import (
    aufs,
    btrfs,
    cachestat,
    clone,
    dm,
    fanotify,
    fs,
    fscontext,
    idmap,
    loop,
    mount,
    psi,
    qgroup,
    quota,
)

_DATA = b"the object's data"


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


class _Missing(Exception):
    """It is not there, though no system call failed."""


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
    except (OSError, _Missing) as error:
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


def _subdirectories(parent: Path, *names: str) -> list[Path]:
    paths = [parent / name for name in names]
    for path in paths:
        path.mkdir()
    return paths


def _memory(scratch: Path, fstype: str = "tmpfs") -> Path:
    """A file system in memory: what the kernel's overlayfs can do must not depend on what the scratch lies on."""
    (place,) = _subdirectories(scratch, "memory")
    mount.filesystem(fstype, "hpmapper-probe", place)
    return place


# --- file systems


def _mounting(scratch: Path) -> str:
    _memory(scratch)
    return "a tmpfs was mounted in a private namespace"


def _reflink(scratch: Path) -> str:
    kind = fs.filesystem_name(scratch)
    if not clone.can_clone(scratch):
        raise _Missing(f"{kind} refuses FICLONE")
    return f"{kind} clones"


def _file_types(scratch: Path) -> str:
    (scratch / "file").touch()
    if not fs.knows_file_types(scratch):
        raise _Missing(f"{fs.filesystem_name(scratch)} reports entries of unknown type")
    return "readdir reports them"


def _user_xattr(scratch: Path) -> str:
    os.setxattr(scratch, "user.hpmapper.probe", b"1")
    return f"{fs.filesystem_name(scratch)} stores them"


def _trusted_xattr(scratch: Path) -> str:
    os.setxattr(scratch, "trusted.hpmapper.probe", b"1")
    return f"{fs.filesystem_name(scratch)} stores them"


def _idmapped_mounts(scratch: Path) -> str:
    whole = [idmap.IdRange(0, 100_000, 65_536)]
    with idmap.user_namespace(whole, whole) as namespace:
        tree = fscontext.open_tree(scratch)
        try:
            fscontext.mount_setattr(tree, on=fscontext.MOUNT_ATTR_IDMAP, user_namespace=namespace)
            owner = os.stat(f"/proc/self/fd/{tree}").st_uid
        finally:
            os.close(tree)
    return f"{fs.filesystem_name(scratch)}: root's directory appeared as uid {owner}'s"


def _project_quota(scratch: Path) -> str:
    state = quota.project_quota_state(scratch)
    if not state.accounting:
        raise _Missing(f"{fs.filesystem_name(scratch)} does not count projects on this mount")
    return "counted" + (" and enforced" if state.enforcing else ", not enforced")


def _btrfs(scratch: Path) -> str:
    with fscontext.fsopen("btrfs", "hpmapper-probe"):
        return "the kernel has it"


def _subvolumes(scratch: Path) -> str:
    one, two = scratch / "one", scratch / "two"
    try:
        btrfs.create_subvolume(one)
    except OSError as error:
        if error.errno != errno.ENOTTY:
            raise
        raise _Missing(f"{fs.filesystem_name(scratch)} has none") from None
    btrfs.snapshot(one, two)
    btrfs.delete_subvolumes_in(scratch)
    return "a snapshot was made"


def _simple_quotas(scratch: Path) -> str:
    if not qgroup.knows_simple():
        raise _Missing("btrfs does not name them among its features")
    return "btrfs names them among its features"


def _zfs(scratch: Path) -> str:
    try:
        with fscontext.fsopen("zfs", "hpmapper-probe"):
            return "the kernel has it"
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
        raise _Missing("the kernel has no module of that name loaded") from None


# --- overlay


def _overlay(scratch: Path) -> str:
    lower, upper, work, merged = _subdirectories(scratch, "lower", "upper", "work", "merged")
    (lower / "file").write_bytes(_DATA)
    mount.overlay(merged, lowers=[lower], upper=upper, work=work)
    (merged / "file").write_bytes(b"new")
    if (lower / "file").read_bytes() != _DATA:
        raise _Missing("writing changed the lower layer")
    return f"upper and work directory on {fs.filesystem_name(scratch)}"


def _overlay_userxattr(scratch: Path) -> str:
    lower, upper, work, merged = _subdirectories(scratch, "lower", "upper", "work", "merged")
    for layer in (lower, upper):
        (layer / "directory").mkdir()
    (lower / "directory/file").touch()
    os.setxattr(upper / "directory", "user.overlay.opaque", b"y")
    mount.overlay(merged, lowers=[lower], upper=upper, work=work, options={"userxattr": None})
    if os.listdir(merged / "directory"):
        raise _Missing("an opaque directory is not taken for one")
    return "user.overlay.opaque was heeded"


def _layers_by(form: mount.LayerForm) -> Callable[[Path], str]:
    def attempt(scratch: Path) -> str:
        place = _memory(scratch)
        one, two, merged = _subdirectories(place, "one", "two", "merged")
        mount.overlay(merged, lowers=[one, two], form=form)
        return "two layers were mounted"

    return attempt


def _data_only(options: dict[str, str | None]) -> Callable[[Path], str]:
    def attempt(scratch: Path) -> str:
        place = _memory(scratch)
        _read_through_redirect(place, options)
        return ",".join(f"{key}={value}" for key, value in options.items()) + ": the object's data was read"

    return attempt


def _read_through_redirect(place: Path, options: dict[str, str | None]) -> None:
    lower, data, upper, work, merged = _subdirectories(place, "lower", "data", "upper", "work", "merged")
    (data / "object").write_bytes(_DATA)
    stub = lower / "file"
    stub.touch()
    os.truncate(stub, len(_DATA))
    os.setxattr(stub, "trusted.overlay.metacopy", b"")
    os.setxattr(stub, "trusted.overlay.redirect", b"/object")
    mount.overlay(merged, lowers=[lower], data=data, upper=upper, work=work, options=options)
    if (merged / "file").read_bytes() != _DATA:
        raise _Missing("the file was read as zeros")


# --- AUFS


def _aufs(scratch: Path) -> str:
    if not aufs.is_known():
        raise _Missing("/proc/filesystems does not name it")
    lower, upper, merged = _subdirectories(scratch, "lower", "upper", "merged")
    (lower / "file").write_bytes(_DATA)
    aufs.mount(merged, lowers=[lower], upper=upper)
    (merged / "file").unlink()
    if not (upper / ".wh.file").exists():
        raise _Missing("a deletion left no whiteout")
    return f"two branches on {fs.filesystem_name(scratch)}"


# --- EROFS and loop


def _erofs_file(scratch: Path) -> str:
    # ramfs: it feeds EROFS, as tmpfs does not, and spares ext4 a warning in the kernel's log (fs/ext4/inode.c:460, seen
    # on 6.18 with images on ext4).
    place = _memory(scratch, "ramfs")
    (target,) = _subdirectories(place, "target")
    image = _erofs_image(place)
    mount.erofs(image, target, form=mount.ErofsForm.FILE)
    return "an image was mounted without a loop device"


def _erofs_loop(scratch: Path) -> str:
    (target,) = _subdirectories(scratch, "target")
    mount.erofs(_erofs_image(scratch), target, form=mount.ErofsForm.LOOP)
    mount.umount(target)
    return "an image was mounted through a loop device"


def _loop_direct_io(scratch: Path) -> str:
    backing = scratch / "backing"
    backing.touch()
    os.truncate(backing, 1 << 20)
    with loop.attached(backing, block_size=4096) as device:
        status = loop.status(device)
    if status is None or not status.direct_io:
        raise _Missing(f"{fs.filesystem_name(scratch)} took the device, but buffered")
    return f"on {fs.filesystem_name(scratch)}"


def _erofs_image(place: Path) -> Path:
    """One block with an empty root directory: superblock at 1024, the root inode behind it, its entries inline."""
    nid = 40
    block = bytearray(4096)
    _put(block, 1024, 4, 0xE0F5E1E2)
    _put(block, 1036, 1, 12)  # block size as a power of two
    _put(block, 1038, 2, nid)
    _put(block, 1040, 8, 1)  # inodes
    _put(block, 1060, 4, 1)  # blocks
    inode = 32 * nid
    entries = b"".join(nid.to_bytes(8, "little") + offset.to_bytes(2, "little") + b"\x02\x00" for offset in (24, 25))
    names = b"..."  # "." and "..", one behind the other
    _put(block, inode, 2, 0b101)  # extended, data inline
    _put(block, inode + 4, 2, 0o40755)
    _put(block, inode + 8, 8, len(entries + names))
    _put(block, inode + 20, 4, 1)  # inode number
    _put(block, inode + 44, 4, 2)  # links
    block[inode + 64 : inode + 64 + len(entries + names)] = entries + names
    image = place / "image"
    image.write_bytes(block)
    return image


def _put(block: bytearray, offset: int, width: int, value: int) -> None:
    block[offset : offset + width] = value.to_bytes(width, "little")


# --- memory and events


def _cachestat(scratch: Path) -> str:
    file = scratch / "file"
    file.write_bytes(bytes(64 * 1024))
    found = cachestat.cachestat(file)
    if not found.cached:
        raise _Missing("a file just written has no cached pages")
    return f"{found.cached} pages of a file just written"


def _fanotify(scratch: Path) -> str:
    file = scratch / "file"
    file.touch()
    with fanotify.watching(scratch, fanotify.FAN_OPEN) as fd:
        file.read_bytes()
        events = fanotify.read_events(fd)
    for event in events:
        if event.fd >= 0:
            os.close(event.fd)
    if not events:
        raise _Missing("no event came")
    return f"opening a file on {fs.filesystem_name(scratch)} was reported"


def _pressure(scratch: Path) -> str:
    with psi.trigger("memory", stall_us=150_000, window_us=2_000_000):
        return "a trigger was set on memory"


def _device_mapper(scratch: Path) -> str:
    control = dm.CONTROL
    if not control.exists():
        control = scratch / "control"
        dm.make_control(control)
    return "interface {}.{}.{}".format(*dm.version(control))


PROBES: tuple[_Probe, ...] = (
    _Probe(
        "mounting",
        "every driver but vfs",
        "run as root on the host, or in a container with CAP_SYS_ADMIN and its own /dev",
        _mounting,
    ),
    _Probe(
        "reflink",
        "copies and copy-ups that share blocks, in constant time",
        "use XFS (mkfs.xfs -m reflink=1) or btrfs; a loop pool brings its own",
        _reflink,
        by_place=True,
    ),
    _Probe(
        "overlay",
        "the overlay driver with its directories here",
        "a file system of the host's, such as XFS, btrfs or ext4; not overlay or NFS",
        _overlay,
        module="overlay",
        by_place=True,
    ),
    _Probe(
        "overlay-userxattr",
        "the overlay driver in a user namespace",
        "Linux 5.11 or newer",
        _overlay_userxattr,
        module="overlay",
        by_place=True,
    ),
    _Probe(
        "overlay-data-only",
        "the hpmapper driver, with whole copy-ups that any differ can read",
        "Linux 6.16 or newer",
        _data_only({"metacopy": "off", "redirect_dir": "nofollow"}),
    ),
    _Probe(
        "overlay-data-only-metacopy",
        "the hpmapper driver, with metadata-only copy-ups",
        "Linux 6.5 or newer",
        _data_only({"metacopy": "on", "redirect_dir": "on"}),
    ),
    _Probe(
        "overlay-layers-by-fd",
        "mounts of up to 500 layers, with any names",
        "Linux 6.13 or newer",
        _layers_by(mount.LayerForm.DESCRIPTORS),
    ),
    _Probe(
        "overlay-layers-by-string",
        "mounts of up to 500 layers where layers by descriptor are missing; without either about 200",
        "Linux 6.7 or newer",
        _layers_by(mount.LayerForm.STRINGS),
    ),
    _Probe(
        "erofs-file",
        "layers' maps mounted straight from their files",
        "Linux 6.12 or newer with CONFIG_EROFS_FS_BACKED_BY_FILE",
        _erofs_file,
        module="erofs",
    ),
    _Probe(
        "erofs-loop",
        "layers' maps mounted through loop devices, cached once",
        "CONFIG_EROFS_FS and CONFIG_BLK_DEV_LOOP (modprobe erofs loop), and access to /dev/loop-control",
        _erofs_loop,
        module="erofs",
    ),
    _Probe(
        "loop-direct-io",
        "loop pools whose data is not cached twice",
        "put the root directory on XFS, btrfs or ext4",
        _loop_direct_io,
        module="loop",
        by_place=True,
    ),
    _Probe(
        "project-quota",
        "size limits for single containers",
        "XFS or ext4 mounted with prjquota, on a kernel with CONFIG_XFS_QUOTA or CONFIG_QFMT_V2; or btrfs instead",
        _project_quota,
        by_place=True,
    ),
    _Probe(
        "btrfs",
        "the btrfs driver, and pools with btrfs",
        "CONFIG_BTRFS_FS (modprobe btrfs)",
        _btrfs,
        module="btrfs",
    ),
    _Probe(
        "btrfs-subvolumes",
        "the btrfs driver with a directory here",
        "a file system that is btrfs; a loop pool brings its own",
        _subvolumes,
        module="btrfs",
        by_place=True,
    ),
    _Probe(
        "btrfs-simple-quotas",
        "size limits for single containers on btrfs",
        "Linux 6.7 or newer, and btrfs loaded (modprobe btrfs)",
        _simple_quotas,
    ),
    _Probe(
        "zfs",
        "the zfs driver",
        "modprobe zfs (Debian: apt install zfs-dkms zfsutils-linux)",
        _zfs,
        module="zfs",
    ),
    _Probe(
        "aufs",
        "the aufs driver with its directories here",
        "a kernel with AUFS, which no mainline kernel has; and XFS or ext4",
        _aufs,
        module="aufs",
        by_place=True,
    ),
    _Probe(
        "idmapped-mounts",
        "images shared by containers with user namespaces of their own",
        "Linux 5.12 or newer, and XFS, ext4 or btrfs",
        _idmapped_mounts,
    ),
    _Probe(
        "d_type",
        "deleted files that stay hidden in overlays",
        "XFS made with ftype=1 (mkfs.xfs's default), or another file system",
        _file_types,
        by_place=True,
    ),
    _Probe(
        "trusted-xattr",
        "overlay's own marks in layers",
        "CAP_SYS_ADMIN in the first user namespace, and a file system with extended attributes",
        _trusted_xattr,
    ),
    _Probe("user-xattr", "images with user attributes", "a file system with extended attributes", _user_xattr),
    _Probe("cachestat", "counting what the page cache holds, by file", "Linux 6.5 or newer", _cachestat),
    _Probe(
        "fanotify",
        "recording what a container reads while it starts",
        "CAP_SYS_ADMIN, and CONFIG_FANOTIFY",
        _fanotify,
    ),
    _Probe(
        "pressure",
        "giving memory back when it becomes short, and background work that waits",
        "CONFIG_PSI, and psi=1 on the kernel's command line",
        _pressure,
    ),
    _Probe(
        "device-mapper",
        "the devicemapper driver",
        "CONFIG_BLK_DEV_DM and CONFIG_DM_THIN_PROVISIONING (modprobe dm_thin_pool)",
        _device_mapper,
        module="dm_thin_pool",
    ),
)
"""Every feature, the most needed first."""

FEATURE_NAMES = tuple(one.name for one in PROBES)
