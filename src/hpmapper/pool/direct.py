"""The production pool: a whole block device, partition or logical volume given by the operator.

Freed blocks are not given back at once: what a discard costs depends on the device, and `trim` does it in one sweep.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hpmapper.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from hpmapper.kernel import fs, sync
from hpmapper.pool import filesystem
from hpmapper.pool.base import PoolConfig, format_size
from hpmapper.pool.device import DevicePool
from hpmapper.pool.tools import run_tool


class DirectPool(DevicePool):
    """See the module's text."""

    @property
    def device(self) -> Path:
        """The device as it was configured; its name may belong to another disk after a reboot."""
        if self.config.device is None:
            raise InvalidArgument("a direct pool needs a device")
        return self.config.device

    def create(self, *, force: bool = False) -> PoolConfig:
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._locked():
            self._config = self._config.with_uuid()
            _require_block_device(self.device)
            found = filesystem.signature(self.device)
            if found is not None and found.uuid == self.config.uuid:
                return self._config
            if found is not None and not force:
                raise AlreadyExists(
                    f"{self.device} carries data: {found}",
                    hint="choose another device, or have it overwritten with --force",
                )
            self._make()
            return self._config

    def _make(self) -> None:
        filesystem.check_size(self.config.fs, fs.device_size(self.device))
        _require_unused(self.device)
        # mkfs leaves what lies elsewhere, such as a partition table's second copy at the end.
        run_tool(["wipefs", "-q", "-a", self.device])
        filesystem.make(self.config.fs, self.device, self.config.uuid)
        sync.fdatasync(self.device)

    def _carrier(self) -> Path:
        """The configured device, or, when that is gone or another disk, whichever carries the recorded UUID."""
        found = filesystem.signature(self.device) if self.device.exists() else None
        if found is not None and found.uuid == self.config.uuid:
            return self.device
        elsewhere = filesystem.device_of(self.config.uuid)
        if elsewhere is not None:
            return elsewhere
        if not self.device.exists():
            raise NotFound(
                f"the pool's device {self.device} is not there, nor any other with the UUID {self.config.uuid}",
                hint="connect the disk or activate its volume group",
            )
        return self.device

    @contextmanager
    def _block_device(self) -> Iterator[Path]:
        yield self._carrier()

    def _release(self) -> None:
        """Nothing was set up."""

    def grow(self, size: int = 0) -> PoolConfig:
        self.attach()
        with self._locked():
            device = self._carrier()
            present = fs.device_size(device)
            if size > present:
                raise FailedPrecondition(
                    f"{device} has {format_size(present)}: a direct pool is as large as its device",
                    hint=f"enlarge that first, for instance: lvextend -L {size}b {device}",
                )
            self._refuse_shrinking(size or present, self.space().total)
            self._grow_to(device)
            return self._config

    def facts(self) -> dict[str, str]:
        return {
            "device": str(self.device),
            "file system": str(self.config.fs),
            "uuid": self.config.uuid,
        }

    def destroy(self) -> None:
        if not self.root.exists():
            return
        with self._locked():
            self._detach()
            if not self.device.exists():
                return
            found = filesystem.signature(self.device)
            if found is not None:
                self._verify(self.device)
                _require_unused(self.device)
                run_tool(["wipefs", "-q", "-a", self.device])
            if self.path.exists():
                self.path.rmdir()


def _require_block_device(path: Path) -> None:
    if not path.is_absolute() or not path.is_block_device():
        raise InvalidArgument(
            f"{path} is not a block device", hint="name one by its absolute path, for instance /dev/vg0/pool"
        )


def _require_unused(device: Path) -> None:
    """Refuse a device that is mounted, swapped to, or part of a RAID or volume group, also when forced."""
    try:
        # O_EXCL without O_CREAT asks a block device for exclusive use, which the kernel's own users hold (open(2)).
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise FailedPrecondition(
                f"{device} is in use: mounted, swap, or part of a RAID or volume group",
                hint="release it first; lsblk shows by what",
            ) from error
        raise
