"""The extended attributes by which directories on disk speak to overlayfs, and to us.

In a user namespace nobody may set `trusted.` attributes. overlayfs takes `user.overlay.` ones there, with its option
userxattr (Linux 5.11, commit 2d2f2d7322ff); so a root is of use either inside such a namespace or outside.
"""

from __future__ import annotations

from hpmapper.kernel.idmap import in_user_namespace

IN_USER_NAMESPACE = in_user_namespace()

_SPACE = b"user." if IN_USER_NAMESPACE else b"trusted."

OVERLAY = _SPACE + b"overlay."
ESCAPED = OVERLAY + b"overlay."
OPAQUE = OVERLAY + b"opaque"
METACOPY = OVERLAY + b"metacopy"
REDIRECT = OVERLAY + b"redirect"

IMPLIED_ROOT = _SPACE + b"hpmapper.implied"
"""Marks a root directory that the tar does not mention, whose attributes are therefore those of the layer below."""

USERXATTR: dict[str, str | None] = {"userxattr": None} if IN_USER_NAMESPACE else {}
"""What tells overlayfs."""
