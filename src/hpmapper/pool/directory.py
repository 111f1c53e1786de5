"""The guest's pool: a directory on a reflink file system that is already there and belongs to the host.

A marker file with the pool's UUID tells it from an empty mount point: when the host's file system is not mounted, the
directory below it must not be taken for a pool that has lost everything.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from hpmapper.errors import AlreadyExists, FailedPrecondition, NotFound, Unsupported
from hpmapper.kernel import btrfs, clone, fs, lock, sync
from hpmapper.model import Space
from hpmapper.pool.base import LOCK_NAME, POOL_NAME, CheckReport, PoolConfig

MARKER_NAME = "hpmapper-pool"


class DirectoryPool:
    """See the module's text. There is nothing to attach or to grow."""

    def __init__(self, root: Path, config: PoolConfig) -> None:
        self.root = root
        self._config = config

    @property
    def config(self) -> PoolConfig:
        return self._config

    @property
    def path(self) -> Path:
        return self._config.directory or self.root / POOL_NAME

    @property
    def _marker(self) -> Path:
        return self.path / MARKER_NAME

    def create(self, *, force: bool = False) -> PoolConfig:
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with lock.exclusive(self.root / LOCK_NAME):
            self._config = self._config.with_uuid()
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self.is_attached():
                self._require_empty(force)
                self._require_reflink()
                self._mark()
            return self._config

    def _require_empty(self, force: bool) -> None:
        present = next(self.path.iterdir(), None)
        if present is None:
            return
        if not force:
            raise AlreadyExists(
                f"{self.path} is not empty: it has {present.name}",
                hint="name a new directory, or have it emptied with --force",
            )
        _empty(self.path)

    def _require_reflink(self) -> None:
        if clone.can_clone(self.path):
            return
        raise Unsupported(
            f"{self.path} lies on {fs.filesystem_name(self.path)}, which cannot share extents between files",
            hint="use XFS made with reflink=1, or btrfs; or make a loop pool, which brings its own XFS",
        )

    def _mark(self) -> None:
        unfinished = self.path / f"{MARKER_NAME}.new"
        unfinished.write_text(self._config.uuid + "\n", encoding="ascii")
        sync.fdatasync(unfinished)
        unfinished.rename(self._marker)
        sync.fdatasync(self.path)

    def is_attached(self) -> bool:
        try:
            return self._marker.read_text(encoding="ascii").strip() == self._config.uuid
        except FileNotFoundError:
            return False

    def attach(self) -> Path:
        if self.is_attached():
            return self.path
        if self._marker.exists():
            raise FailedPrecondition(
                f"{self.path} is another pool, not {self._config.uuid}", hint="name the right directory"
            )
        raise NotFound(
            f"there is no pool in {self.path}", hint="is its file system mounted? Else: hpmapper pool create"
        )

    def detach(self) -> None:
        """Nothing to do: the file system is the host's."""

    def space(self) -> Space:
        self._require_attached()
        return Space.of(self.path)

    def _require_attached(self) -> None:
        if not self.is_attached():
            raise FailedPrecondition(f"the pool at {self.path} is not attached")

    def grow(self, size: int = 0) -> PoolConfig:
        raise Unsupported(
            f"a directory pool is as large as the file system of {self.path}", hint="enlarge that file system"
        )

    def check(self) -> CheckReport:
        self._require_attached()
        reflink = "works" if clone.can_clone(self.path) else "does not work"
        return CheckReport(
            sound=None,
            checked=f"the marker is there, sharing extents {reflink}",
            unchecked=f"the {fs.filesystem_name(self.path)} itself, which is the host's: check it with its own tools",
        )

    def trim(self) -> int:
        """Nothing: trimming the host's file systems is the host's affair (fstrim.timer)."""
        return 0

    def facts(self) -> dict[str, str]:
        facts = {"directory": str(self.path), "uuid": self._config.uuid}
        if self.path.exists():
            facts["file system"] = fs.filesystem_name(self.path)
        return facts

    def destroy(self) -> None:
        if not self.path.exists() or not self._marker.exists():
            return
        with lock.exclusive(self.root / LOCK_NAME):
            self.attach()
            _empty(self.path)
            if self._config.directory is None:
                self.path.rmdir()


def _empty(directory: Path) -> None:
    """Delete what is in a directory, the marker last, so that a deletion that was cut off can be asked for again."""
    for entry in sorted(directory.iterdir(), key=lambda one: one.name == MARKER_NAME):
        if entry.is_dir() and not entry.is_symlink():
            btrfs.delete_subvolumes_in(entry)  # also read-only ones
            shutil.rmtree(entry)
        else:
            entry.unlink()
