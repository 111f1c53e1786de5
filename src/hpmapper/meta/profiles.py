"""Start profiles in the database: one for an image, as bytes that `hpmapper.cache.profile` makes and reads."""

from __future__ import annotations

import sqlite3
import time

from hpmapper.errors import NotFound
from hpmapper.meta.db import Database
from hpmapper.meta.snapshots import Transaction


def find(db: Database, image_id: str) -> tuple[bytes, int] | None:
    """An image's profile and when it was recorded, in nanoseconds since 1970; None if it has none."""
    row = db.row("SELECT profile, recorded FROM start_profile WHERE image = ?", image_id)
    return (bytes(row[0]), int(row[1])) if row else None


def store(db: Transaction, image_id: str, profile: bytes) -> None:
    """Replace an image's profile.

    Raises:
        NotFound: the image is gone.
    """
    try:
        db.execute("INSERT OR REPLACE INTO start_profile VALUES (?, ?, ?)", (image_id, profile, time.time_ns()))
    except sqlite3.IntegrityError:
        raise NotFound(f"image {image_id} was removed meanwhile") from None


def drop(db: Transaction, image_id: str) -> bool:
    """Forget an image's profile; whether it had one."""
    return db.execute("DELETE FROM start_profile WHERE image = ?", (image_id,)).rowcount > 0
