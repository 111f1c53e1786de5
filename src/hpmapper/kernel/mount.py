"""Mounting and unmounting: overlay, EROFS, binds, any other file system, and a private namespace.

A mount becomes visible at its target whole, in one step, or not at all. No file descriptor of it is kept: an open one
would make umount say EBUSY.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import cast

from hpmapper.kernel import fscontext, loop
from hpmapper.kernel.fscontext import MOUNT_ATTR_RDONLY, Context
from hpmapper.kernel.mountinfo import Mount, is_mountpoint, mounts, mounts_below
from hpmapper.kernel.syscall import NR_MOUNT, NR_UMOUNT2, NR_UNSHARE, AnyPath, opened, syscall

__all__ = [
    "ErofsForm",
    "LayerForm",
    "Mount",
    "bind",
    "detached",
    "erofs",
    "filesystem",
    "is_mountpoint",
    "mounts",
    "mounts_below",
    "overlay",
    "private_namespace",
    "umount",
]

_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8
_MS_RDONLY, _MS_REC, _MS_PRIVATE = 1, 1 << 14, 1 << 18
_CLONE_NEWNS = 0x20000
_PAGE = 4096

Options = Mapping[str, str | None]
"""File system options; None as value: a flag."""


def filesystem(
    fstype: str, source: AnyPath, target: AnyPath, *, options: Options | None = None, attributes: int = 0
) -> None:
    """Mount `source` (a device, mostly) at `target`. `attributes`: fscontext.MOUNT_ATTR_…"""
    with fscontext.fsopen(fstype, source) as context:
        context.set("source", source)
        if attributes & MOUNT_ATTR_RDONLY:
            context.set("ro")  # the superblock too, or a read-only device is refused
        _set_options(context, options)
        _attach(context, target, attributes)


@contextmanager
def detached(fstype: str, source: AnyPath, *, options: Options | None = None, attributes: int = 0) -> Iterator[Path]:
    """A mount that is nowhere in the tree: its root, as a path for this process. It ends with the block or the process.

    With MOUNT_ATTR_RDONLY the superblock is read-only, too.
    """
    with fscontext.fsopen(fstype, source) as context:
        context.set("source", source)
        if attributes & MOUNT_ATTR_RDONLY:
            context.set("ro")
        _set_options(context, options)
        fd = context.mount(attributes)
    try:
        yield Path(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def bind(source: AnyPath, target: AnyPath, *, read_only: bool = False, recursive: bool = False) -> None:
    """Show `source` (directory or file) at `target` as well."""
    fd = fscontext.open_tree(source, recursive=recursive)
    try:
        if read_only:
            fscontext.mount_setattr(fd, on=MOUNT_ATTR_RDONLY, recursive=recursive)
        fscontext.move_mount(fd, target)
    finally:
        os.close(fd)


def umount(target: AnyPath, *, lazy: bool = False) -> None:
    """Unmount what is at `target`. `lazy`: hide it now, free it with its last user.

    Raises:
        OSError: EBUSY, files are open or mounts lie below; EINVAL, nothing is mounted there.
    """
    flags = _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0)
    syscall(NR_UMOUNT2, os.fsencode(target), flags, path=target)


def private_namespace() -> None:
    """Give the calling thread (and its later children) a mount namespace that nobody else sees."""
    syscall(NR_UNSHARE, _CLONE_NEWNS, path="mount namespace")
    syscall(NR_MOUNT, b"none", b"/", None, _MS_REC | _MS_PRIVATE, None, path="/")


def _set_options(context: Context, options: Options | None) -> None:
    for key, value in (options or {}).items():
        context.set(key, value)


def _attach(context: Context, target: AnyPath, attributes: int) -> None:
    fd = context.mount(attributes)
    try:
        fscontext.move_mount(fd, target)
    finally:
        os.close(fd)


# --- EROFS


class ErofsForm(StrEnum):
    """How an EROFS image is read."""

    FILE = "file"
    LOOP = "loop"


def erofs(
    image: AnyPath, target: AnyPath, *, form: ErofsForm | None = None, options: Options | None = None
) -> ErofsForm:
    """Mount the EROFS file `image` at `target`, read-only as EROFS always is; returns how.

    Args:
        form: None: straight from the file (Linux 6.12, commit fb176750266a), else through a loop device with direct
            I/O, which the kernel frees with the mount. The latter also serves images that lie on tmpfs or overlay.
    """
    if form is not ErofsForm.LOOP:
        try:
            filesystem("erofs", image, target, options=options, attributes=MOUNT_ATTR_RDONLY)
        except OSError as error:
            # ENOTBLK: the kernel wants a block device; ENODEV: the image's file system cannot feed EROFS.
            if form is ErofsForm.FILE or error.errno not in (errno.ENOTBLK, errno.ENODEV):
                raise
        else:
            return ErofsForm.FILE
    with loop.attached(image, read_only=True) as device:
        filesystem("erofs", device, target, options=options, attributes=MOUNT_ATTR_RDONLY)
    return ErofsForm.LOOP


# --- overlay


class LayerForm(StrEnum):
    """How a kernel takes an overlay's layers."""

    DESCRIPTORS = "descriptors"  # Linux 6.13, commit a08557d19ef4
    STRINGS = "strings"  # lowerdir+ and datadir+, Linux 6.7, commit 24e16e385f22
    ONE_STRING = "one string"  # lowerdir=a:b::c, Linux 6.5


_FORMS = tuple(LayerForm)
_SPECIAL = re.compile(r"[:,\\]")
_form_seen: LayerForm | None = None

_name = cast("Callable[[AnyPath | int], str]", os.fspath)
"""A layer's name; TypeError for a descriptor. (Bytes stay bytes.)"""


def overlay(
    target: AnyPath,
    *,
    lowers: Sequence[AnyPath | int],
    data: AnyPath | int | Sequence[AnyPath | int] | None = None,
    upper: AnyPath | int | None = None,
    work: AnyPath | int | None = None,
    options: Options | None = None,
    attributes: int = 0,
    form: LayerForm | None = None,
) -> LayerForm:
    """Mount an overlay at `target`; returns the form in which this kernel took the layers.

    Args:
        lowers: top layer first; paths, or fds of directories or of detached mounts (O_PATH fds: since Linux 6.15).
        data: data-only layers, reached by redirects alone (Linux 6.5; several are asked in order).
        upper, work: None for a read-only overlay, which needs two layers.
        form: forces one form; by default the best is found once per process and kept.
    """
    layers = [data] if isinstance(data, (str, bytes, int, os.PathLike)) else list(data or ())
    single = {"upperdir": upper, "workdir": work}
    if form is None and _by_plain_names(target, lowers, layers, single, options or {}, attributes):
        return LayerForm.ONE_STRING
    with ExitStack() as stack:
        fds = _Layers(
            [_open_layer(stack, one) for one in lowers],
            [_open_layer(stack, one) for one in layers],
            None if upper is None else _open_layer(stack, upper),
            None if work is None else _open_layer(stack, work),
        )
        return _overlay(target, fds, dict(options or {}), attributes, form)


def _by_plain_names(
    target: AnyPath,
    lowers: Sequence[AnyPath | int],
    data: Sequence[AnyPath | int],
    single: Mapping[str, AnyPath | int | None],
    options: Options,
    attributes: int,
) -> bool:
    """Mount with one call where every layer has a name, of characters that mean nothing special to mount(2).

    Takes a third of the time of the descriptors' way, with its open and fsconfig for each directory. False: that other
    way is needed, or will say what is wrong.
    """
    try:
        below = [_name(path) for path in lowers]
        data_only = [_name(path) for path in data]
        own = {key: _name(path) for key, path in single.items() if path is not None}
        if _SPECIAL.search("".join([*below, *data_only, *own.values()])):
            return False
    except TypeError:  # a descriptor, or bytes
        return False
    words = [f"lowerdir={'::'.join([':'.join(below), *data_only])}"]
    words += [f"{key}={name}" for key, name in own.items()]
    words += [key if value is None else f"{key}={value}" for key, value in options.items()]
    page = os.fsencode(",".join(words))
    if len(page) >= _PAGE:
        return False
    try:
        syscall(NR_MOUNT, b"overlay", os.fsencode(target), b"overlay", attributes & 0xF, page, path=target)
    except OSError:
        return False
    return True


class _Layers:
    """An overlay's directories as file descriptors: in whatever form they go in, no name needs escaping.

    (The rules differ by kernel and option: `lowerdir` unescapes ":" and "\\", `lowerdir+` takes names as they are,
    mount(2) splits at ",", and fsconfig ends strings at 255 characters. /proc/self/fd/7 is immune to all of it.)
    """

    def __init__(self, lowers: list[int], data: list[int], upper: int | None, work: int | None) -> None:
        self.lowers = lowers
        self.data = data
        self.upper = upper
        self.work = work

    def options(self) -> list[tuple[str, int]]:
        """(option, fd) in the order in which overlayfs wants them."""
        single = [("upperdir", self.upper), ("workdir", self.work)]
        return (
            [("lowerdir+", fd) for fd in self.lowers]
            + [("datadir+", fd) for fd in self.data]
            + [(key, fd) for key, fd in single if fd is not None]
        )


def _open_layer(stack: ExitStack, layer: AnyPath | int) -> int:
    # Not O_PATH, which overlayfs takes since 6.15 only.
    return stack.enter_context(opened(layer, os.O_RDONLY | os.O_DIRECTORY))


def _overlay(
    target: AnyPath, layers: _Layers, options: dict[str, str | None], attributes: int, form: LayerForm | None
) -> LayerForm:
    global _form_seen
    refusals: list[str] = []
    for attempt in _FORMS[_FORMS.index(form or _form_seen or _FORMS[0]) :]:
        try:
            _MAKERS[attempt](target, layers, options, attributes)
        except OSError as error:
            if attempt is form or not _refuses_form(error, attempt):
                for line in refusals:
                    error.add_note(line)
                raise
            refusals += [f"as {attempt}: {error.strerror}", *getattr(error, "__notes__", [])]
        else:
            _form_seen = _form_seen if form else attempt
            return attempt
    raise AssertionError("unreachable: the last form returned or raised")


def _refuses_form(error: OSError, form: LayerForm) -> bool:
    """Whether an older form may succeed.

    EINVAL is what a kernel says to a form that it does not know (and to much else, so a form that has worked is
    believed); EBADF is what Linux 6.13 and 6.14, which know the form, say to an O_PATH fd.
    """
    if form is _FORMS[-1]:
        return False
    return error.errno == errno.EBADF or (error.errno == errno.EINVAL and form is not _form_seen)


def _by_descriptors(target: AnyPath, layers: _Layers, options: Options, attributes: int) -> None:
    _by_context(target, layers.options(), options, attributes)


def _by_strings(target: AnyPath, layers: _Layers, options: Options, attributes: int) -> None:
    _by_context(target, [(key, _proc_name(fd)) for key, fd in layers.options()], options, attributes)


def _by_context(target: AnyPath, layers: Sequence[tuple[str, str | int]], options: Options, attributes: int) -> None:
    with fscontext.fsopen("overlay", target) as context:
        context.set("source", "overlay")
        for key, value in layers:
            context.set(key, value)
        _set_options(context, options)
        _attach(context, target, attributes)


def _by_one_string(target: AnyPath, layers: _Layers, options: Options, attributes: int) -> None:
    """mount(2), whose page of options holds about 220 layers; fsconfig's 255 characters hold a dozen."""
    lowerdir = ":".join(map(_proc_name, layers.lowers)) + "".join(f"::{_proc_name(fd)}" for fd in layers.data)
    words = [f"lowerdir={lowerdir}"]
    words += [f"{key}={_proc_name(fd)}" for key, fd in layers.options() if not key.endswith("+")]
    words += [key if value is None else f"{key}={value}" for key, value in options.items()]
    page = ",".join(words).encode()
    if len(page) >= _PAGE:
        raise OSError(errno.E2BIG, "too many layers for one mount option string", os.fsdecode(target))
    # The first attributes have the same numbers in both interfaces: read-only, nosuid, nodev, noexec.
    syscall(NR_MOUNT, b"overlay", os.fsencode(target), b"overlay", attributes & 0xF, page, path=target)


def _proc_name(fd: int) -> str:
    return f"/proc/self/fd/{fd}"


_MAKERS = {
    LayerForm.DESCRIPTORS: _by_descriptors,
    LayerForm.STRINGS: _by_strings,
    LayerForm.ONE_STRING: _by_one_string,
}
