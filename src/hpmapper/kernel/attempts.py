"""How each feature of `hpmapper.kernel.probe` is tried: by doing it in an empty directory, its scratch.

An attempt says what it saw, or raises OSError or `Missing`. It may leave files and mounts in its scratch.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
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


class Missing(Exception):
    """It is not there, though no system call failed."""


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


def mounting(scratch: Path) -> str:
    _memory(scratch)
    return "a tmpfs was mounted in a private namespace"


def reflink(scratch: Path) -> str:
    kind = fs.filesystem_name(scratch)
    if not clone.can_clone(scratch):
        raise Missing(f"{kind} refuses FICLONE")
    return f"{kind} clones"


def file_types(scratch: Path) -> str:
    (scratch / "file").touch()
    if not fs.knows_file_types(scratch):
        raise Missing(f"{fs.filesystem_name(scratch)} reports entries of unknown type")
    return "readdir reports them"


def user_xattr(scratch: Path) -> str:
    os.setxattr(scratch, "user.hpmapper.probe", b"1")
    return f"{fs.filesystem_name(scratch)} stores them"


def trusted_xattr(scratch: Path) -> str:
    os.setxattr(scratch, "trusted.hpmapper.probe", b"1")
    return f"{fs.filesystem_name(scratch)} stores them"


def idmapped_mounts(scratch: Path) -> str:
    whole = [idmap.IdRange(0, 100_000, 65_536)]
    with idmap.user_namespace(whole, whole) as namespace:
        tree = fscontext.open_tree(scratch)
        try:
            fscontext.mount_setattr(tree, on=fscontext.MOUNT_ATTR_IDMAP, user_namespace=namespace)
            owner = os.stat(f"/proc/self/fd/{tree}").st_uid
        finally:
            os.close(tree)
    return f"{fs.filesystem_name(scratch)}: root's directory appeared as uid {owner}'s"


def project_quota(scratch: Path) -> str:
    state = quota.project_quota_state(scratch)
    if not state.accounting:
        raise Missing(f"{fs.filesystem_name(scratch)} does not count projects on this mount")
    return "counted" + (" and enforced" if state.enforcing else ", not enforced")


def btrfs_known(scratch: Path) -> str:
    with fscontext.fsopen("btrfs", "hpmapper-probe"):
        return "the kernel has it"


def subvolumes(scratch: Path) -> str:
    one, two = scratch / "one", scratch / "two"
    try:
        btrfs.create_subvolume(one)
    except OSError as error:
        if error.errno != errno.ENOTTY:
            raise
        raise Missing(f"{fs.filesystem_name(scratch)} has none") from None
    btrfs.snapshot(one, two)
    btrfs.delete_subvolumes_in(scratch)
    return "a snapshot was made"


def simple_quotas(scratch: Path) -> str:
    if not qgroup.knows_simple():
        raise Missing("btrfs does not name them among its features")
    return "btrfs names them among its features"


def zfs(scratch: Path) -> str:
    try:
        with fscontext.fsopen("zfs", "hpmapper-probe"):
            return "the kernel has it"
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
        raise Missing("the kernel has no module of that name loaded") from None


# --- overlay


def overlay(scratch: Path) -> str:
    lower, upper, work, merged = _subdirectories(scratch, "lower", "upper", "work", "merged")
    (lower / "file").write_bytes(_DATA)
    mount.overlay(merged, lowers=[lower], upper=upper, work=work)
    (merged / "file").write_bytes(b"new")
    if (lower / "file").read_bytes() != _DATA:
        raise Missing("writing changed the lower layer")
    return f"upper and work directory on {fs.filesystem_name(scratch)}"


def overlay_userxattr(scratch: Path) -> str:
    lower, upper, work, merged = _subdirectories(scratch, "lower", "upper", "work", "merged")
    for layer in (lower, upper):
        (layer / "directory").mkdir()
    (lower / "directory/file").touch()
    os.setxattr(upper / "directory", "user.overlay.opaque", b"y")
    mount.overlay(merged, lowers=[lower], upper=upper, work=work, options={"userxattr": None})
    if os.listdir(merged / "directory"):
        raise Missing("an opaque directory is not taken for one")
    return "user.overlay.opaque was heeded"


def layers_by(form: mount.LayerForm) -> Callable[[Path], str]:
    def attempt(scratch: Path) -> str:
        place = _memory(scratch)
        one, two, merged = _subdirectories(place, "one", "two", "merged")
        mount.overlay(merged, lowers=[one, two], form=form)
        return "two layers were mounted"

    return attempt


def data_only(options: dict[str, str | None]) -> Callable[[Path], str]:
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
        raise Missing("the file was read as zeros")


# --- AUFS


def aufs_union(scratch: Path) -> str:
    if not aufs.is_known():
        raise Missing("/proc/filesystems does not name it")
    lower, upper, merged = _subdirectories(scratch, "lower", "upper", "merged")
    (lower / "file").write_bytes(_DATA)
    aufs.mount(merged, lowers=[lower], upper=upper)
    (merged / "file").unlink()
    if not (upper / ".wh.file").exists():
        raise Missing("a deletion left no whiteout")
    return f"two branches on {fs.filesystem_name(scratch)}"


# --- EROFS and loop


def erofs_file(scratch: Path) -> str:
    # ramfs: it feeds EROFS, as tmpfs does not, and spares ext4 a warning in the kernel's log (fs/ext4/inode.c:460, seen
    # on 6.18 with images on ext4).
    place = _memory(scratch, "ramfs")
    (target,) = _subdirectories(place, "target")
    image = erofs_image(place)
    mount.erofs(image, target, form=mount.ErofsForm.FILE)
    return "an image was mounted without a loop device"


def erofs_loop(scratch: Path) -> str:
    (target,) = _subdirectories(scratch, "target")
    mount.erofs(erofs_image(scratch), target, form=mount.ErofsForm.LOOP)
    mount.umount(target)
    return "an image was mounted through a loop device"


def loop_direct_io(scratch: Path) -> str:
    backing = scratch / "backing"
    backing.touch()
    os.truncate(backing, 1 << 20)
    with loop.attached(backing, block_size=4096) as device:
        status = loop.status(device)
    if status is None or not status.direct_io:
        raise Missing(f"{fs.filesystem_name(scratch)} took the device, but buffered")
    return f"on {fs.filesystem_name(scratch)}"


def erofs_image(place: Path) -> Path:
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


def cached_pages(scratch: Path) -> str:
    file = scratch / "file"
    file.write_bytes(bytes(64 * 1024))
    found = cachestat.cachestat(file)
    if not found.cached:
        raise Missing("a file just written has no cached pages")
    return f"{found.cached} pages of a file just written"


def opens_reported(scratch: Path) -> str:
    file = scratch / "file"
    file.touch()
    with fanotify.watching(scratch, fanotify.FAN_OPEN) as fd:
        file.read_bytes()
        events = fanotify.read_events(fd)
    for event in events:
        if event.fd >= 0:
            os.close(event.fd)
    if not events:
        raise Missing("no event came")
    return f"opening a file on {fs.filesystem_name(scratch)} was reported"


def pressure(scratch: Path) -> str:
    with psi.trigger("memory", stall_us=150_000, window_us=2_000_000):
        return "a trigger was set on memory"


def device_mapper(scratch: Path) -> str:
    control = dm.CONTROL
    if not control.exists():
        control = scratch / "control"
        dm.make_control(control)
    return "interface {}.{}.{}".format(*dm.version(control))
