"""What is written down of thin devices: a pool does not know their sizes, nor what they are for.

    deviceset         the pool and its base device, durable
    a/ID/device       a snapshot's device        l/ID/device   a layer's
    …/device.new      one that is being made: whoever finds it starts anew, or takes it away
    d/DEVICE          a device that is to be deleted, as soon as nobody has it open

Only layers and the set are synced. Power loss may take the record of a container's device: the pool then has a device
more than is known, which `audit` finds and deletes.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from hpmapper.drivers.devicemapper.thin import MAX_DEVICE_ID
from hpmapper.errors import Corrupt
from hpmapper.kernel import sync
from hpmapper.model import SnapshotId

DEVICE, UNFINISHED = "device", "device.new"
BASE = 0
"""The thin id of the base device."""


class Role(StrEnum):
    """What a device is for: the directory that its record lies in."""

    SNAPSHOT = "a"
    LAYER = "l"


@dataclass(frozen=True, slots=True)
class Record:
    """A thin device. `device`: its id in the pool; `size` in bytes; `parent`: the layer it is a snapshot of."""

    number: SnapshotId
    device: int
    size: int
    parent: SnapshotId | None = None
    transaction: int = 0


@dataclass(frozen=True, slots=True)
class DeviceSet:
    """A pool as it was set up, for life. Sizes in bytes.

    Attributes:
        kind: see `hpmapper.drivers.devicemapper.backing`.
        pool, datadev, metadatadev: what was named, if anything: for kinds that have a name or devices.
        initialized: the base device has its file system.
        transaction: the pool's, when the last layer was recorded: an older pool has lost layers.
    """

    kind: str
    block: int
    base_size: int
    base_fs: str
    pool: str = ""
    datadev: str = ""
    metadatadev: str = ""
    base_uuid: str = ""
    initialized: bool = False
    transaction: int = 0


class Records:
    """The records below a directory."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def make_directories(self) -> None:
        """Make what has to be there, once."""
        for name in ("a", "l", "d", "t"):
            (self.home / name).mkdir(mode=0o700, parents=True, exist_ok=True)

    def place(self, role: Role, number: SnapshotId) -> Path:
        """The directory of a snapshot or layer."""
        return self.home / role / str(number)

    def find(self, role: Role, number: SnapshotId) -> Record | None:
        """A finished device's record."""
        return _read(self.place(role, number) / DEVICE)

    def unfinished(self, role: Role, number: SnapshotId) -> Record | None:
        """The record of one that is being made, or whose making was cut short."""
        return _read(self.place(role, number) / UNFINISHED)

    def begin(self, role: Role, number: SnapshotId, record: Record) -> None:
        """Write down what is about to be made."""
        place = self.place(role, number)
        place.mkdir(mode=0o700, exist_ok=True)
        (place / UNFINISHED).write_text(_encoded(record), encoding="ascii")

    def finish(self, role: Role, number: SnapshotId, record: Record, *, durable: bool = False) -> None:
        """It is made."""
        place = self.place(role, number)
        with (place / UNFINISHED).open("w", encoding="ascii") as file:
            file.write(_encoded(record))
            file.flush()
            if durable:
                os.fsync(file.fileno())
        (place / UNFINISHED).rename(place / DEVICE)
        if durable:
            sync.fdatasync(place)
            sync.fdatasync(place.parent)

    def bury(self, role: Role, number: SnapshotId, record: Record) -> None:
        """From now on the device is one to be deleted."""
        self.place(role, number).rename(self.grave(record.device))

    def grave(self, device: int) -> Path:
        """The directory of a device to be deleted."""
        return self.home / "d" / str(device)

    def buried_ids(self) -> set[int]:
        """The thin ids of devices to be deleted."""
        return {int(entry.name) for entry in os.scandir(self.home / "d") if entry.name.isdigit()}

    def buried(self) -> list[Record]:
        """The devices to be deleted."""
        graves = {device: self.grave(device) for device in self.buried_ids()}
        found = {device: _read(grave / DEVICE) or _read(grave / UNFINISHED) for device, grave in graves.items()}
        # Without a record there is nothing to discard by, but the id is known all the same.
        return [record or Record(SnapshotId(0), device, 0) for device, record in found.items()]

    def everything(self) -> Iterator[tuple[Role, SnapshotId, Record]]:
        """All records but those of devices to be deleted, finished or not."""
        for role in Role:
            for entry in os.scandir(self.home / role):
                if entry.name.isdigit():
                    number = SnapshotId(int(entry.name))
                    record = self.find(role, number) or self.unfinished(role, number)
                    if record is not None:
                        yield role, number, record

    def used_ids(self) -> set[int]:
        """The thin ids that belong to somebody."""
        return {BASE, *self.buried_ids(), *(record.device for _, _, record in self.everything())}

    def device_set(self) -> DeviceSet | None:
        """How the pool was set up; None: it has not been."""
        content = _json(self.home / "deviceset")
        return _made(DeviceSet, content, self.home / "deviceset") if content is not None else None

    def remember(self, device_set: DeviceSet) -> None:
        """Write it down durably."""
        new = self.home / "deviceset.new"
        with new.open("w", encoding="ascii") as file:
            file.write(json.dumps(dataclasses.asdict(device_set)))
            file.flush()
            os.fsync(file.fileno())
        new.rename(self.home / "deviceset")
        sync.fdatasync(self.home)


def candidate(number: int) -> int:
    """The thin id to try first for a snapshot: its own number, as far as the pool can count."""
    return number & MAX_DEVICE_ID or 1


def _read(path: Path) -> Record | None:
    content = _json(path)
    if content is None:
        return None
    record: Record = _made(Record, content, path)
    if not (isinstance(record.device, int) and 0 <= record.device <= MAX_DEVICE_ID and isinstance(record.size, int)):
        raise Corrupt(f"{path} is damaged: {content}", hint="hpmapper fsck")
    return record


def _json(path: Path) -> dict[str, Any] | None:
    try:
        text = path.read_text(encoding="ascii")
    except FileNotFoundError:
        return None
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        # Power loss may leave a file without its data where nothing was synced: as good as no file.
        if not text.strip("\0"):
            return None
        raise Corrupt(f"{path} is damaged", hint="hpmapper fsck")
    return content


def _made(kind: type[Any], content: dict[str, Any], path: Path) -> Any:
    try:
        return kind(**content)
    except TypeError:
        raise Corrupt(f"{path} is damaged: {content}", hint="hpmapper fsck") from None


def _encoded(record: Record) -> str:
    return json.dumps(dataclasses.asdict(record))
