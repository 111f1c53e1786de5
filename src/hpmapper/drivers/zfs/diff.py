"""Which files may differ from those of the layer below, asked of `zfs diff`.

It names what has changed since a snapshot by reading changed blocks of inodes, not the tree. But it tells a file's path
by the directory where it was last linked: once that link is gone, while another is left, the file cannot be told any
more and is silently left out (OpenZFS: module/zfs/zfs_znode.c, zfs_obj_to_path_impl; seen with 2.3.9). So it is asked
only where no link of a file was removed in the layers below. What happened above shows nevertheless: a changed file
whose former path is known is at least "deleted", and a new one lies in a changed directory.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hpmapper.errors import HpmapperError
from hpmapper.kernel import mount
from hpmapper.kernel.fscontext import MOUNT_ATTR_RDONLY
from hpmapper.pool.tools import run_tool

log = logging.getLogger(__name__)

_ESCAPE = re.compile(rb"\\(\d{4})")


def suspects(origin: str, dataset: str, whole: Path, place: Path, contents: bytes) -> set[bytes] | None:
    """What may differ between a snapshot and the mounted dataset that is a clone of it; None if that cannot be told.

    These are paths without a leading slash, and with each of them all directories above.

    Args:
        whole: where the dataset is mounted as a whole.
        place: a directory where the snapshot's dataset can be mounted meanwhile, seen by nobody.
        contents: what in the dataset counts, such as b"layer/diff".
    """
    try:
        with ThreadPoolExecutor(1) as thread:
            said = thread.submit(_ask, origin, dataset, whole, place).result()
    except (HpmapperError, OSError) as error:
        log.info("zfs diff says nothing of %s, which is read as a whole: %s", dataset, error)
        return None
    found: set[bytes] = set()
    top = os.fsencode(whole) + b"/"
    for path in _paths(said.encode("ascii", "replace")):
        if not path.startswith(top):
            return None  # "???<object#7>"
        inside = path.removeprefix(top)
        if inside == contents or inside.startswith(contents + b"/"):
            _add(found, inside.removeprefix(contents).removeprefix(b"/"))
    return found


def _ask(origin: str, dataset: str, whole: Path, place: Path) -> str:
    """Run `zfs diff` in a mount namespace of its own.

    It wants a clone's origin mounted as well (libzfs_diff.c, get_mountpoints), and takes the first mount of a dataset
    that it finds, where one of a part would not do. All others are let go, too: nobody could destroy these meanwhile.
    """
    mount.private_namespace()
    ours = dataset.rpartition("/")[0] + "/"
    for one in reversed(mount.mounts()):
        if one.fstype == "zfs" and one.source.startswith(ours) and one.target != os.fspath(whole):
            mount.umount(one.target, lazy=True)
    mount.filesystem("zfs", origin.partition("@")[0], place, attributes=MOUNT_ATTR_RDONLY)
    return run_tool(["zfs", "diff", "-H", origin, dataset]).stdout


def _paths(said: bytes) -> Iterator[bytes]:
    """The paths in lines of "M\tPATH", "+\tPATH", "-\tPATH", "R\tPATH\tPATH", "M\tPATH\t(+1)"."""
    for line in said.splitlines():
        for word in line.split(b"\t")[1:]:
            if not word.startswith(b"("):
                yield _ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), word)


def _add(found: set[bytes], path: bytes) -> None:
    while path and path not in found:
        found.add(path)
        path = os.path.dirname(path)
