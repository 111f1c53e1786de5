"""What containerd asks for by a snapshot's labels."""

from __future__ import annotations

from collections.abc import Mapping

from hpmapper.errors import InvalidArgument
from hpmapper.kernel.idmap import IdMapping, IdRange

Labels = Mapping[str, str]

MAX_LABEL = 4096
"""Bytes of a label's name and value together, as in containerd (pkg/labels/validate.go)."""

TARGET_LABEL = "containerd.io/snapshot.ref"
"""The chain ID of the layer for which containerd prepares a snapshot, and by which it knows the committed one."""

DIFF_ID_LABEL = "containerd.io/snapshot/diff-id"
"""That layer's DiffID (containerd 2.3)."""

UID_LABEL, GID_LABEL = "containerd.io/snapshot/uidmapping", "containerd.io/snapshot/gidmapping"
"""Which ids of a user namespace appear as which on the host."""

MAX_SIZE_LABEL = "containerd.io/snapshot/max-size"
"""How many bytes an active snapshot may keep, as a decimal number (containerd 2.4, its pull request 13520)."""


def check_labels(labels: Labels) -> None:
    """Refuse labels that are too long, as InvalidArgument."""
    for name, value in labels.items():
        size = len(name.encode()) + len(value.encode())
        if size > MAX_LABEL:
            raise InvalidArgument(
                f"label {name[:64]!r} has {size} bytes with its value", hint=f"at most {MAX_LABEL} are allowed"
            )


def id_mapping(labels: Labels) -> IdMapping | None:
    """The mapping that the labels of a snapshot for a user namespace ask for: "inside:outside:length[,…]" each.

    Raises:
        InvalidArgument: malformed, or for users without groups.
    """
    texts = [labels.get(name) for name in (UID_LABEL, GID_LABEL)]
    if texts == [None, None]:
        return None
    uids, gids = (_id_ranges(text or "") for text in texts)
    return IdMapping(uids, gids)


def _id_ranges(text: str) -> list[IdRange]:
    try:
        ranges = [IdRange(*map(int, one.split(":"))) for one in text.split(",")]
        if all(0 <= number < 1 << 32 for one in ranges for number in one) and all(one.length for one in ranges):
            return ranges
    except (ValueError, TypeError):
        pass
    raise InvalidArgument(f"{text[:100]!r} is no mapping of ids", hint='"inside:outside:length", separated by commas')


def size_limit(labels: Labels) -> int | None:
    """How many bytes a snapshot may keep; None: nobody says.

    Raises:
        InvalidArgument: malformed.
    """
    text = labels.get(MAX_SIZE_LABEL)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise InvalidArgument(f"label {MAX_SIZE_LABEL} is {text[:64]!r}", hint="a number of bytes")
    return int(text)
