"""What loop and direct pools share: a file system on a block device, mounted at <root>/pool under a lock."""

from __future__ import annotations

import dataclasses
import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from hpmapper.errors import FailedPrecondition, InvalidArgument, NotFound
from hpmapper.kernel import fs, lock, mount
from hpmapper.model import Space
from hpmapper.pool import filesystem
from hpmapper.pool.base import LOCK_NAME, POOL_NAME, CheckReport, PoolConfig, format_size

_DETACH_HINT = "stop and unmount its containers, close its files, and try again"


class DevicePool(ABC):
    """A pool on a block device. Everything that changes what is attached happens under <root>/pool.lock."""

    discards = False
    """Whether freed blocks are given back at once (mount option discard) instead of by `trim`."""

    def __init__(self, root: Path, config: PoolConfig) -> None:
        self.root = root
        self._config = config

    @property
    def config(self) -> PoolConfig:
        return self._config

    @property
    def path(self) -> Path:
        return self.root / POOL_NAME

    # What differs

    @abstractmethod
    def _carrier(self) -> Path:
        """The device or file on which the file system lies; NotFound when it is not there."""

    @abstractmethod
    def _block_device(self) -> AbstractContextManager[Path]:
        """The device to mount from; it need not stay beyond the block unless it was mounted."""

    @abstractmethod
    def _release(self) -> None:
        """After unmounting: free what `_block_device` set up."""

    # What does not

    def is_attached(self) -> bool:
        return mount.is_mountpoint(self.path)

    def attach(self) -> Path:
        if not self.is_attached():
            with self._locked():
                if not self.is_attached():
                    self._attach()
        return self.path

    def _attach(self) -> None:
        self._verify(self._carrier())
        self.path.mkdir(mode=0o700, exist_ok=True)
        with self._block_device() as device:
            filesystem.attach(self.config.fs, device, self.path, discard=self.discards)

    def _verify(self, carrier: Path) -> None:
        """Refuse a device or file that carries something else: it may be another disk under an old name."""
        found = filesystem.signature(carrier)
        if found is None or (found.kind, found.uuid) != (self.config.fs, self.config.uuid):
            raise FailedPrecondition(
                f"{carrier} does not carry this pool: {self.config.fs} {self.config.uuid} is expected, "
                f"{found or 'nothing'} is there",
                hint="check which disk it is; 'hpmapper pool create' makes a new pool",
            )

    def detach(self) -> None:
        if not self.root.exists():
            return
        with self._locked():
            self._detach()

    def _detach(self) -> None:
        while self.is_attached():
            try:
                mount.umount(self.path)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                raise FailedPrecondition(
                    f"the pool at {self.path} is in use{self._users()}", hint=_DETACH_HINT
                ) from error
        self._release()

    def _users(self) -> str:
        below = [one.target for one in mount.mounts_below(self.path) if one.target != os.path.realpath(self.path)]
        return (
            f": {len(below)} mounts below, one is {below[0]}"
            if below
            else ": files are open, or another mount namespace still has one of its maps"
        )

    def space(self) -> Space:
        self._require_attached()
        return Space.of(self.path)

    def _require_attached(self) -> None:
        if not self.is_attached():
            raise FailedPrecondition(f"the pool at {self.path} is not attached")

    def _grow_to(self, device: Path) -> None:
        filesystem.grow_to_device(self.config.fs, self.path, device)

    def _refuse_shrinking(self, size: int, present: int) -> None:
        if size < present:
            raise InvalidArgument(
                f"the pool has {format_size(present)} and cannot shrink to {format_size(size)}",
                hint="make a smaller pool and pull the images again",
            )

    def check(self) -> CheckReport:
        with self._locked():
            if self.is_attached():
                return filesystem.check_attached(self.config.fs, self.path)
            return filesystem.check_detached(self.config.fs, self._carrier())

    def trim(self) -> int:
        self._require_attached()
        try:
            return fs.trim(self.path)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY):
                return 0
            raise

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            with lock.exclusive(self.root / LOCK_NAME):
                yield
        except FileNotFoundError as error:
            if error.filename == os.fspath(self.root / LOCK_NAME):
                raise NotFound(f"there is no pool in {self.root}: the directory does not exist") from None
            raise

    def _remember(self, **changes: int | str) -> PoolConfig:
        self._config = dataclasses.replace(self._config, **changes)  # type: ignore[arg-type]
        return self._config
