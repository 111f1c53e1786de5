"""Who keeps a device busy: the processes in whose mount namespace it is mounted, and devices on top of it."""

from __future__ import annotations

import os
from pathlib import Path

from hpmapper.kernel import dm

_SHOWN = 5


def holders(name: str) -> str:
    """A phrase that names who uses the device-mapper device, "" if nobody can be told."""
    device = dm.find(name)
    found = [*_devices_above(device), *_mounts(device)] if device else []
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + more


def _devices_above(device: dm.Device) -> list[str]:
    above = Path("/sys/block", device.kernel_name, "holders")
    return [f"device {entry.name} lies on it" for entry in above.iterdir()] if above.is_dir() else []


def _mounts(device: dm.Device) -> list[str]:
    """One line for each mount namespace that has it mounted: the first process in it, and where."""
    seen: set[str] = set()
    found = []
    for process in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            namespace = os.readlink(f"/proc/{process}/ns/mnt")
            if namespace in seen:
                continue
            seen.add(namespace)
            lines = Path(f"/proc/{process}/mountinfo").read_text(errors="surrogateescape").splitlines()
            program = Path(f"/proc/{process}/comm").read_text().strip()
        except OSError:
            continue  # it ended meanwhile, or is not ours to see
        for line in lines:
            fields = line.split()
            if fields[2] == device.dev:
                found.append(f"process {process} ({program}) has it mounted at {fields[4]}")
                break
    return found
