"""Images, their names, and containers in the database. Every function that writes takes the open transaction."""

from __future__ import annotations

import sqlite3
import time
from dataclasses import dataclass
from typing import Any

from hpmapper.errors import AlreadyExists, FailedPrecondition, NotFound
from hpmapper.meta.db import Database
from hpmapper.meta.snapshots import Transaction
from hpmapper.model import SnapshotId


@dataclass(frozen=True, slots=True)
class ImageRow:
    """An image as the database has it; `names` are its full references, `size` the bytes of its layers' tars."""

    id: str
    config: bytes
    top: SnapshotId | None
    size: int
    created: int
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ContainerRow:
    """A container as the database has it."""

    name: str
    snapshot: SnapshotId
    image: str
    created: int


def add_image(
    db: Transaction, image_id: str, config: bytes, top: SnapshotId | None, size: int, created: int | None = None
) -> None:
    """Record an image, `created` (None: now) in nanoseconds since 1970; one that is there stays as it is.

    Raises:
        NotFound: its top layer was collected meanwhile.
    """
    try:
        db.execute(
            "INSERT OR IGNORE INTO image VALUES (?, ?, ?, ?, ?)",
            (image_id, config, top, size, created or time.time_ns()),
        )
    except sqlite3.IntegrityError:
        raise NotFound(f"the layers of image {image_id} were removed meanwhile", hint="try again") from None


def tag(db: Transaction, name: str, image_id: str) -> None:
    """Let `name` mean that image from now on."""
    db.execute("INSERT OR REPLACE INTO tag VALUES (?, ?)", (name, image_id))


def untag(db: Transaction, name: str) -> None:
    """Forget a name."""
    db.execute("DELETE FROM tag WHERE name = ?", (name,))


def forget_image(db: Transaction, image_id: str) -> None:
    """Forget an image and all its names.

    Raises:
        FailedPrecondition: a container has it.
    """
    user = db.execute("SELECT name FROM container WHERE image = ? LIMIT 1", (image_id,)).fetchone()
    if user:
        raise FailedPrecondition(
            f"cannot remove image {image_id[:19]}: container {user[0]!r} has it",
            hint=f"remove it first: hpmapper container rm {user[0]}",
        )
    db.execute("DELETE FROM tag WHERE image = ?", (image_id,))
    db.execute("DELETE FROM image WHERE id = ?", (image_id,))


def images(db: Database) -> list[ImageRow]:
    """Every image, oldest first."""
    names: dict[str, list[str]] = {}
    for row in db.rows("SELECT name, image FROM tag ORDER BY name"):
        names.setdefault(row["image"], []).append(row["name"])
    return [_image(row, names.get(row["id"], [])) for row in db.rows("SELECT * FROM image ORDER BY created, id")]


def image_by_name(db: Database, name: str) -> ImageRow | None:
    """The image of a full reference."""
    row = db.row("SELECT image FROM tag WHERE name = ?", name)
    return image(db, row[0]) if row else None


def images_by_prefix(db: Database, hexadecimal: str) -> list[ImageRow]:
    """The images whose id begins so."""
    rows = db.rows("SELECT id FROM image WHERE substr(id, 8, ?) = ?", len(hexadecimal), hexadecimal)
    return [image(db, row[0]) for row in rows]


def image(db: Database, image_id: str) -> ImageRow:
    """The image of that id.

    Raises:
        NotFound: there is none.
    """
    row = db.row("SELECT * FROM image WHERE id = ?", image_id)
    if row is None:
        raise NotFound(f"image {image_id} does not exist")
    return _image(row, [name[0] for name in db.rows("SELECT name FROM tag WHERE image = ? ORDER BY name", image_id)])


def _image(row: Any, names: list[str]) -> ImageRow:
    return ImageRow(row["id"], row["config"], row["top"], row["size"], row["created"], tuple(names))


def add_container(db: Transaction, name: str, snapshot: SnapshotId, image_id: str, created: int | None = None) -> None:
    """Record a container, `created` (None: now) in nanoseconds since 1970.

    Raises:
        AlreadyExists: the name is taken. NotFound: the image is gone.
    """
    try:
        db.execute("INSERT INTO container VALUES (?, ?, ?, ?)", (name, snapshot, image_id, created or time.time_ns()))
    except sqlite3.IntegrityError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY:
            raise AlreadyExists(f"container {name!r} exists already", hint="choose another --name") from None
        raise NotFound(f"the image of container {name!r} was removed meanwhile") from None


def forget_container(db: Transaction, name: str) -> None:
    """Forget a container."""
    db.execute("DELETE FROM container WHERE name = ?", (name,))


def containers(db: Database) -> list[ContainerRow]:
    """Every container, oldest first."""
    return [ContainerRow(*row) for row in db.rows("SELECT * FROM container ORDER BY created, name")]


def container(db: Database, name: str) -> ContainerRow:
    """The container of that name.

    Raises:
        NotFound: there is none.
    """
    row = db.row("SELECT * FROM container WHERE name = ?", name)
    if row is None:
        raise NotFound(f"container {name!r} does not exist", hint="hpmapper container ls shows those that do")
    return ContainerRow(*row)
