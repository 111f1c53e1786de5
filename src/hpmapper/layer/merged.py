"""What a chain of layers shows when stacked, asked path by path: overlayfs's rules in user space."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import BinaryIO, Protocol

from hpmapper.tree import Inode


class LayerView(Protocol):
    """One layer by itself. Whiteouts and opaque directories show as what they are."""

    def lookup(self, path: bytes) -> Inode | None: ...
    def names(self, path: bytes) -> list[bytes]: ...
    def open(self, path: bytes) -> BinaryIO: ...


class Merged:
    """The merged view of layers, nearest first (`build.Below`)."""

    def __init__(self, layers: Sequence[LayerView]) -> None:
        self._layers = layers

    def lookup(self, path: bytes) -> Inode | None:
        """The visible inode at `path`, None if nothing is."""
        found = self._find(path)
        return found[0][1] if found else None

    def names(self, path: bytes) -> list[bytes]:
        """The visible names in the directory at `path`, sorted."""
        names: dict[bytes, bool] = {}
        for layer, _ in self._find(path):
            for name in layer.names(path):
                inode = layer.lookup(path + b"/" + name if path else name)
                names.setdefault(name, inode is not None and not inode.is_whiteout)
        return sorted(name for name, visible in names.items() if visible)

    def open(self, path: bytes) -> BinaryIO:
        """The data of the visible regular file at `path`."""
        return self._find(path)[0][0].open(path)

    def _find(self, path: bytes) -> list[tuple[LayerView, Inode]]:
        """The layers that take part in `path`, nearest first, each with its inode there: several for a directory."""
        parts = path.split(b"/") if path else []
        found = _visible(self._layers, b"")
        for depth in range(1, len(parts) + 1):
            if not found:
                break
            found = _visible([layer for layer, inode in found if inode.is_dir], b"/".join(parts[:depth]))
        return found


def _visible(layers: Sequence[LayerView], path: bytes) -> list[tuple[LayerView, Inode]]:
    found: list[tuple[LayerView, Inode]] = []
    for layer in layers:
        inode = layer.lookup(path)
        if inode is None:
            continue
        if inode.is_whiteout or (found and not inode.is_dir):
            break
        found.append((layer, inode))
        if not inode.is_dir or (inode.opaque and path):
            break
    return found


class Later:
    """A merged view that is only made when it is asked: most layers leave nothing to those below."""

    def __init__(self, make: Callable[[], Merged]) -> None:
        self._make = make
        self._made: Merged | None = None

    def _merged(self) -> Merged:
        # Not a cached_property: until Python 3.12 all instances share its lock, and making may wait for another layer.
        if self._made is None:
            self._made = self._make()
        return self._made

    def lookup(self, path: bytes) -> Inode | None:
        return self._merged().lookup(path)

    def names(self, path: bytes) -> list[bytes]:
        return self._merged().names(path)

    def open(self, path: bytes) -> BinaryIO:
        return self._merged().open(path)
