"""What objects are called in images: an object itself knows only its digest."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from hpmapper.cache.inventory import Inventory
from hpmapper.erofs.reader import Map
from hpmapper.model import ObjectDigest
from hpmapper.tree import walk


def names_of(inventory: Inventory, wanted: Collection[ObjectDigest]) -> dict[ObjectDigest, str]:
    """A name "IMAGE:/path" for each object that an image shows; reads maps until all are found."""
    left = set(wanted)
    found: dict[ObjectDigest, str] = {}
    for image in inventory.images:
        files = inventory.places.map_files(image.chain)
        if not left or not files:
            continue
        if left.isdisjoint(inventory.objects_of(image.chain)):
            continue
        for digest, path in names_of_image(files[0], left).items():
            left.discard(digest)
            found[digest] = f"{image.name}:{path}"
    return found


def names_of_image(map_file: Path, wanted: Collection[ObjectDigest]) -> dict[ObjectDigest, str]:
    """A path "/…" for each object that the image of this map shows."""
    found: dict[ObjectDigest, str] = {}
    with Map.open(map_file) as image_map:
        for path, inode in walk(image_map.tree()):
            if isinstance(inode.content, bytes) and inode.content in wanted:
                found.setdefault(ObjectDigest(inode.content), f"/{os.fsdecode(path)}")
    return found
