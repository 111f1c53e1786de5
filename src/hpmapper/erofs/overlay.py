"""How a tree's meaning is written in overlayfs's terms, and read back.

    meaning                      on disk
    data is object ab12…         trusted.overlay.metacopy = "", trusted.overlay.redirect = "/ab/12…"
    opaque directory             trusted.overlay.opaque = "y"
    whiteout                     character device 0/0 (nothing to do here)
    the image's own              trusted.overlay.overlay.X (overlayfs shows it as trusted.overlay.X
      trusted.overlay.X            through the mount, Linux 6.7, commit dad02fad84cb)

The first three names are written for nothing else, because every name of theirs that an image brings along is
escaped. So no image can point a path at another image's data, whatever its tar says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from hpmapper.errors import Corrupt
from hpmapper.model import ObjectDigest, object_path
from hpmapper.tree import Xattrs

OVERLAY = b"trusted.overlay."
ESCAPED = OVERLAY + b"overlay."
METACOPY = OVERLAY + b"metacopy"
REDIRECT = OVERLAY + b"redirect"
OPAQUE = OVERLAY + b"opaque"

DIGEST_SIZE = 32
REDIRECT_SIZE = 2 * DIGEST_SIZE + len("//")

_REDIRECT = re.compile(rb"/([0-9a-f]{2})/([0-9a-f]{62})")


class Meaning(NamedTuple):
    """What the xattrs of one inode on disk say."""

    xattrs: Xattrs
    digest: ObjectDigest | None = None
    opaque: bool = False


def redirect(digest: ObjectDigest) -> bytes:
    """The redirect's value: absolute, because only such a path leads into a data-only layer."""
    return b"/" + object_path(digest).encode("ascii")


def escape(xattrs: Xattrs) -> Xattrs:
    """An image's own xattrs under the names that they have on disk."""
    return tuple((_escape_name(name), value) for name, value in xattrs)


def written(xattrs: Xattrs, digest: ObjectDigest | None = None, *, opaque: bool = False) -> Xattrs:
    """All xattrs that an inode has on disk, sorted by name."""
    ours = []
    if digest is not None:
        ours += [(METACOPY, b""), (REDIRECT, redirect(digest))]
    if opaque:
        ours.append((OPAQUE, b"y"))
    return tuple(sorted((*escape(xattrs), *ours)))


def meaning(stored: Iterable[tuple[bytes, bytes]]) -> Meaning:
    """Take apart what `written` put together.

    Raises:
        Corrupt: an overlay xattr that `written` never makes.
    """
    own: list[tuple[bytes, bytes]] = []
    ours: dict[bytes, bytes] = {}
    for name, value in stored:
        if name.startswith(ESCAPED):
            own.append((OVERLAY + name[len(ESCAPED) :], value))
        elif name.startswith(OVERLAY):
            ours[name] = value
        else:
            own.append((name, value))
    digest, opaque = _digest(ours), _opaque(ours)
    if ours:
        raise Corrupt(f"unexpected xattr {sorted(ours)[0]!r}")
    return Meaning(tuple(sorted(own)), digest, opaque)


def _escape_name(name: bytes) -> bytes:
    return ESCAPED + name[len(OVERLAY) :] if name.startswith(OVERLAY) else name


def _opaque(ours: dict[bytes, bytes]) -> bool:
    value = ours.pop(OPAQUE, None)
    if value not in (None, b"y"):
        raise Corrupt(f"xattr {OPAQUE.decode()} is {value[:80]!r}")
    return value is not None


def _digest(ours: dict[bytes, bytes]) -> ObjectDigest | None:
    metacopy, target = ours.pop(METACOPY, None), ours.pop(REDIRECT, None)
    if metacopy is None and target is None:
        return None
    match = _REDIRECT.fullmatch(target or b"")
    if metacopy != b"" or match is None:
        raise Corrupt(f"xattrs metacopy {metacopy!r:.80} and redirect {target!r:.80} name no object")
    return ObjectDigest(bytes.fromhex((match[1] + match[2]).decode("ascii")))
