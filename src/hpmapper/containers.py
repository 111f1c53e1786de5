"""Containers: a writable snapshot of an image, under a name."""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Iterator
from pathlib import Path

from hpmapper.engine import Engine
from hpmapper.errors import AlreadyExists
from hpmapper.image import documents, reference
from hpmapper.image.documents import ImportOptions
from hpmapper.images import Images
from hpmapper.meta import images as meta
from hpmapper.meta import snapshots
from hpmapper.meta.images import ContainerRow, ImageRow
from hpmapper.meta.snapshots import Snapshot
from hpmapper.model import Change, Usage, object_name


class Containers:
    """The containers of one root."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._db = engine.db
        self._images = Images(engine)

    def create(self, image: str, name: str | None = None, *, size: int | None = None) -> ContainerRow:
        """Make a container of an image (see `Images.find`); without a name it gets a random one.

        It may keep `size` bytes; None: the driver's default, mostly without limit.

        Raises:
            AlreadyExists: the name is taken. NotFound: there is no such image. NoSpace: the pool is too full.
            Unsupported: no limit is possible here. InvalidArgument: the limit is too small.
        """
        row = self._images.find(image)
        name = object_name(name, "container") if name is not None else secrets.token_hex(6)
        try:
            self._engine.prepare(
                f"container-{name}",
                self._images.top(row),
                size=size or self._engine.driver.capabilities.default_size,
                also=lambda transaction, snapshot: meta.add_container(transaction, name, snapshot, row.id),
                undo=lambda transaction, _: meta.forget_container(transaction, name),
            )
        except AlreadyExists:
            raise AlreadyExists(
                f"container {name!r} exists already",
                hint=f"choose another --name, or run it once more: hpmapper container start {name}",
            ) from None
        return meta.container(self._db, name)

    def all(self) -> list[ContainerRow]:
        """Every container, oldest first."""
        return meta.containers(self._db)

    def get(self, name: str) -> ContainerRow:
        """The container of that name; NotFound if there is none."""
        return meta.container(self._db, name)

    def image(self, container: ContainerRow) -> ImageRow:
        """The image it was made from."""
        return meta.image(self._db, container.image)

    def snapshot(self, container: ContainerRow) -> Snapshot:
        """Its writable snapshot."""
        return snapshots.by_id(self._db, container.snapshot)

    def mount(self, container: ContainerRow) -> Path:
        """Its root file system's path."""
        return self._engine.mount(self.snapshot(container))

    def unmount(self, container: ContainerRow) -> None:
        """Take its root file system away; FailedPrecondition when in use."""
        self._engine.unmount(self.snapshot(container))

    def changes(self, container: ContainerRow) -> Iterator[Change]:
        """What it changed, in path order."""
        return self._engine.changes(self.snapshot(container))

    def limit(self, container: ContainerRow) -> int | None:
        """How much it may keep, in bytes; None: without limit."""
        return snapshots.size_limit(self._db, container.snapshot)

    def usage(self, container: ContainerRow) -> Usage:
        """What it alone occupies."""
        return self._engine.usage(self.snapshot(container))

    def remove(self, container: ContainerRow) -> None:
        """Remove it with all that it wrote; FailedPrecondition when in use."""
        self._engine.remove(
            self.snapshot(container), also=lambda transaction, _: meta.forget_container(transaction, container.name)
        )

    def commit(self, container: ContainerRow, names: list[str], options: ImportOptions) -> ImageRow:
        """Make an image of the container's image and its changes. The container stays as it is."""
        base = self.image(container)
        with self._engine.lease() as lease:
            top = self._engine.commit(self.snapshot(container), lease).snapshot
            assert top.layer is not None
            layer = snapshots.layer(self._db, top.layer)
            config = documents.committed_config(
                base.config,
                layer.diff_id,
                options,
                created_by=f"hpmapper container commit {shlex.quote(container.name)}",
            )
            self._engine.finish(top)
            return self._images.record(
                config, top, base.size + layer.tar_size, [reference.normalised(name) for name in names]
            )
