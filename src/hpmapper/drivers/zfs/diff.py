"""Which files may differ from those of the layer below, asked of `zfs diff`.

It names what has changed since a snapshot by reading changed blocks of inodes, not the tree. But it tells a file's path
by the directory where it was last linked: once that link is gone, while another is left, the file cannot be told any
more and is silently left out (OpenZFS: module/zfs/zfs_znode.c, zfs_obj_to_path_impl; seen with 2.3.9). So it is asked
only where no link of a file was removed in the layers below. What happened above shows nevertheless: a changed file
whose former path is known is at least "deleted", and a new one lies in a changed directory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from hpmapper.errors import HpmapperError
from hpmapper.pool.tools import run_tool

_ESCAPE = re.compile(rb"\\(\d{4})")
_UNKNOWN = b"???<object#"


def suspects(origin: str, dataset: str, mounted: bytes, contents: bytes) -> set[bytes] | None:
    """What may differ between a snapshot and the mounted dataset that is a clone of it; None if that cannot be told.

    These are paths without a leading slash, and with each of them all directories above.

    Args:
        mounted: where the dataset is mounted as a whole, in this namespace, before anywhere else.
        contents: what in it counts, such as b"layer/diff".
    """
    try:
        said = run_tool(["zfs", "diff", "-H", origin, dataset]).stdout
    except HpmapperError:
        return None
    found: set[bytes] = set()
    for path in _paths(said.encode("ascii", "replace")):
        if not path.startswith(mounted + b"/") or path.startswith(_UNKNOWN):
            return None
        inside = path.removeprefix(mounted + b"/")
        if inside == contents or inside.startswith(contents + b"/"):
            _add(found, inside.removeprefix(contents).removeprefix(b"/"))
    return found


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
