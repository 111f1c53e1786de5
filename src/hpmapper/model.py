"""The values that travel between the stages: frozen, small, without behaviour beyond their own form."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple, NewType

from hpmapper.errors import InvalidArgument

SnapshotId = NewType("SnapshotId", int)
"""Names a snapshot's storage. Short and numeric, because it ends up in paths and mount options."""

ObjectDigest = NewType("ObjectDigest", bytes)
"""BLAKE3-256 of a regular file's contents, 32 raw bytes."""

_OCI_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}")


def oci_digest(text: str) -> str:
    """Return `text` if it is a well-formed sha256 digest (OCI image spec, descriptor.md).

    Digests become file names and database keys, so nothing else may pass.

    Raises:
        InvalidArgument: it is not one.
    """
    if not _OCI_DIGEST.fullmatch(text):
        raise InvalidArgument(f"{text[:100]!r} is not a digest", hint="expected sha256: and 64 hexadecimal digits")
    return text


def object_name(name: str, what: str) -> str:
    """Return `name` if it may name a container or similar (Docker's rule: [a-zA-Z0-9][a-zA-Z0-9_.-]*).

    Raises:
        InvalidArgument: it may not.
    """
    if not _NAME.fullmatch(name):
        raise InvalidArgument(
            f"{name[:140]!r} is not a valid {what} name",
            hint="letters, digits, '_', '.' and '-', at most 128, beginning with a letter or digit",
        )
    return name


def object_path(digest: ObjectDigest) -> str:
    """Where an object lies in the object store, and what a map's redirect names: "ab/cdef…"."""
    name = digest.hex()
    return f"{name[:2]}/{name[2:]}"


class Kind(StrEnum):
    """What a snapshot is (containerd's terms)."""

    ACTIVE = "active"
    VIEW = "view"
    COMMITTED = "committed"


class ChangeKind(StrEnum):
    """Docker's letters for what a container did to a path."""

    ADDED = "A"
    CHANGED = "C"
    DELETED = "D"


class Change(NamedTuple):
    """One path (absolute inside the container, bytes) that differs from the image."""

    kind: ChangeKind
    path: bytes


@dataclass(frozen=True, slots=True)
class Usage:
    """What a snapshot alone occupies: deleting it would give this back. `size` in bytes."""

    size: int
    inodes: int


@dataclass(frozen=True, slots=True)
class Space:
    """A file system's bytes: total, and free without what it reserves for root."""

    total: int
    free: int

    @property
    def used(self) -> int:
        return self.total - self.free

    @classmethod
    def of(cls, path: Path) -> Space:
        """The space of the file system that holds `path`."""
        status = os.statvfs(path)
        return cls(status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize)
