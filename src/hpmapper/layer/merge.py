"""A chain of layers flattened to one tree: what overlayfs would show, decided once instead of at every lookup."""

from __future__ import annotations

from collections.abc import Iterable

from hpmapper.layer.build import IMPLIED_ROOT
from hpmapper.tree import Inode, directory


def merge(layers: Iterable[Inode]) -> Inode:
    """Flatten layers, the lowest first, into a tree without whiteouts or opaque directories.

    Consumes the layers: the result holds their inodes. Hard links stay links.
    """
    root = directory(0o755)
    for layer in layers:
        _apply(root, layer)
    return root


def _apply(root: Inode, layer: Inode) -> None:
    if (IMPLIED_ROOT, b"y") not in layer.xattrs:
        _copy_attributes(layer, root)
    pending = [(root, layer)]
    while pending:
        below, above = pending.pop()
        entries = below.entries()
        for name, child in above.entries().items():
            if child.is_whiteout:
                entries.pop(name, None)
            elif child.is_dir:
                pending.append((_directory(entries, name, child), child))
            else:
                entries[name] = child


def _directory(entries: dict[bytes, Inode], name: bytes, above: Inode) -> Inode:
    """The directory that `above` is merged into: the one there, or a new one where it hides what is there."""
    below = entries.get(name)
    if below is None or not below.is_dir or above.opaque:
        below = entries[name] = directory()
    _copy_attributes(above, below)
    return below


def _copy_attributes(source: Inode, target: Inode) -> None:
    target.mode, target.uid, target.gid = source.mode, source.uid, source.gid
    target.mtime_ns, target.xattrs = source.mtime_ns, source.xattrs
