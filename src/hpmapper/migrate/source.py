"""What can be moved, as the place that has it describes it. Nothing here says how it is stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

from hpmapper.model import Kind


@dataclass(frozen=True, slots=True)
class LayerItem:
    """A layer. `name`: for messages; `diff_id`: "" for one that never was a tar; `size`: of its tar in bytes, about.

    `open` gives the tar, made again; it need not be believed: its digest is compared with the DiffID.
    """

    name: str
    diff_id: str
    size: int
    open: Callable[[], AbstractContextManager[BinaryIO]]


@dataclass(frozen=True, slots=True)
class ContainerItem:
    """What makes an active snapshot a container. `created`: nanoseconds since 1970."""

    name: str
    image: str
    created: int


@dataclass(frozen=True, slots=True)
class SnapshotItem:
    """A snapshot; see `hpmapper.meta.schema` for what the names mean.

    Attributes:
        key, parent: parents are named by their key.
        layer: of a committed one. applied: what a differ read for an active one.
        hidden_for: the key of the only snapshot that stands on this one, which nobody else sees.
        root: the root file system of one that can be written to, for reading; None: nothing was written to it.
        written: bytes that it alone occupies, about.
    """

    key: str
    kind: Kind
    parent: str | None
    created: int
    updated: int
    layer: LayerItem | None = None
    applied: LayerItem | None = None
    hidden_for: str | None = None
    chain_id: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    size_limit: int | None = None
    container: ContainerItem | None = None
    root: Callable[[], AbstractContextManager[Path]] | None = None
    written: int = 0


@dataclass(frozen=True, slots=True)
class ImageItem:
    """An image; `top` is its topmost snapshot's key, `profile` its start profile (b"" for none)."""

    id: str
    config: bytes
    top: str | None
    created: int
    names: tuple[str, ...]
    profile: bytes = b""


@dataclass(frozen=True, slots=True)
class Contents:
    """All that a source has.

    Attributes:
        snapshots: parents before their children.
        blobs: (digest, DiffID, tar's size in bytes) of compressed layers that were read.
    """

    snapshots: Sequence[SnapshotItem]
    images: Sequence[ImageItem]
    blobs: Sequence[tuple[str, str, int]] = ()


class Source(Protocol):
    """A place to move from. It is never written to."""

    name: str

    def contents(self) -> Contents:
        """What is there now.

        Raises:
            FailedPrecondition: something in it is in use. Corrupt: something is damaged; the message names it.
        """
