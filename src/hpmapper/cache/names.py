"""What objects are called in images: an object itself knows only its digest."""

from __future__ import annotations

import os
from collections.abc import Collection

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
        with Map.open(files[0]) as image_map:
            for path, inode in walk(image_map.tree()):
                if isinstance(inode.content, bytes) and inode.content in left:
                    digest = ObjectDigest(inode.content)
                    left.discard(digest)
                    found[digest] = f"{image.name}:/{os.fsdecode(path)}"
    return found
