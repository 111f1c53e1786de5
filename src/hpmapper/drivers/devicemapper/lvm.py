"""Direct-lvm: from an empty block device to a thin pool that LVM grows by itself.

    physical volume on the device → volume group `hpmapper` → `thinpool` and its metadata → profile, monitoring

Each step looks first whether it has been done: a set-up that was cut short is finished by the next attempt, or undone
by `tear_down`. LVM is told through its tools, whose metadata is theirs; what they print is asked for as JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from pathlib import Path

from hpmapper import faults
from hpmapper.drivers.devicemapper.options import DirectLvm
from hpmapper.errors import FailedPrecondition, HpmapperError, NotFound
from hpmapper.kernel import dmudev, sync
from hpmapper.pool.filesystem import signature
from hpmapper.pool.tools import run_tool

GROUP, VOLUME = "hpmapper", "thinpool"
POOL = f"{GROUP}-{VOLUME}"
"""The pool's device-mapper name."""

CHUNK = "512K"
"""Docker's."""

_META = f"{VOLUME}meta"
_PROFILE = Path("/etc/lvm/profile", f"{POOL}.profile")
_NO_UDEV = (
    "activation { udev_sync = 0 udev_rules = 0 verify_udev_operations = 0 } "
    "devices { obtain_device_list_from_udev = 0 external_device_info_source = none }"
)
_CONFIG = "setup-config.json"
_PROGRAMS = ("pvcreate", "vgcreate", "lvcreate", "lvconvert", "lvchange", "thin_check")


def set_up(home: Path, wanted: DirectLvm) -> None:
    """Make the pool, or finish making it.

    Raises:
        FailedPrecondition: something is on the device, or the values differ from those of an attempt before.
        NotFound: there is no such device. Unsupported: LVM's tools are missing.
    """
    device = Path(wanted.device)
    if not device.is_block_device():
        raise NotFound(
            f"{device} is not available for use with devicemapper", hint="dm.directlvm_device: a block device"
        )
    require_same(home, wanted)
    if _stored(home) is None:
        _require_programs()
        _require_free(device, wanted)
        _remember(home, wanted)
        faults.point("lvm.intended")
    values = wanted.filled()
    if not _has("pvs", str(device)):
        if wanted.force:
            run_tool(["wipefs", "-q", "-a", device])
        _lvm("pvcreate", "-y", "-f", str(device))
        faults.point("lvm.volume-made")
    if not _has("vgs", GROUP):
        _clear_stale_links()
        _lvm("vgcreate", GROUP, str(device))
        faults.point("lvm.group-made")
    _make_pool(values)
    _write_profile(values)
    faults.point("lvm.profile-written")
    _lvm("lvchange", "--metadataprofile", POOL, f"{GROUP}/{VOLUME}")
    _lvm("lvchange", "--monitor", "y", f"{GROUP}/{VOLUME}")
    faults.point("lvm.monitored")


def _clear_stale_links() -> None:
    """Without udev nobody removes a group's links to volumes that are gone, and LVM refuses a name that is in /dev."""
    directory = Path("/dev", GROUP)
    if directory.is_dir():
        for link in directory.iterdir():
            if link.is_symlink() and not link.exists():
                link.unlink()
        with contextlib.suppress(OSError):  # what is left is somebody's, and LVM will say so
            directory.rmdir()


def _make_pool(values: DirectLvm) -> None:
    kind = _volume_kind(VOLUME)
    if kind == "thin-pool":
        return
    if kind is None:
        _lvm("lvcreate", "-y", "--wipesignatures", "y", "-n", VOLUME, GROUP, "--extents", f"{values.percent}%VG")
        faults.point("lvm.data-made")
    if _volume_kind(_META) is None:
        _lvm("lvcreate", "-y", "--wipesignatures", "y", "-n", _META, GROUP, "--extents", f"{values.metapercent}%VG")
        faults.point("lvm.metadata-made")
    volumes = f"{GROUP}/{VOLUME}", "--poolmetadata", f"{GROUP}/{_META}"
    # error when full: a queue of writes that nobody serves is a machine that hangs
    _lvm("lvconvert", "-y", "--zero", "n", "-c", CHUNK, "--errorwhenfull", "y", "--thinpool", *volumes)
    faults.point("lvm.converted")


def activate() -> None:
    """Have LVM activate the pool, as it does by itself after a reboot where its services run."""
    if not _has("vgs", GROUP):
        raise NotFound(f"volume group {GROUP} is not there", hint="is its disk?")
    _lvm("lvchange", "-ay", "-K", f"{GROUP}/{VOLUME}")


def grow(data: str, metadata: str, device: Path | None) -> None:
    """Grow the pool: with `device`, by that one as well. Sizes as lvextend takes them ("+10G", "+50%FREE", "").

    Raises:
        FailedPrecondition: something is on the device.
    """
    if device is not None:
        if not device.is_block_device():
            raise NotFound(f"{device} is no block device")
        if not _has("pvs", str(device)):
            _require_free(device, DirectLvm(device=str(device)))
            _lvm("pvcreate", "-y", str(device))
        if _group_of(device) != GROUP:
            _lvm("vgextend", GROUP, str(device))
        faults.point("lvm.group-extended")
    if metadata:
        _lvm("lvextend", "--poolmetadatasize", metadata, f"{GROUP}/{VOLUME}")
    size = data or ("+95%FREE" if device is not None else "")
    if size:
        _lvm("lvextend", "--extents" if "%" in size else "--size", size, f"{GROUP}/{VOLUME}")


def repair() -> None:
    """Have LVM rebuild the pool's metadata into its spare; nothing on the pool may be active."""
    _lvm("lvchange", "-an", f"{GROUP}/{VOLUME}")
    _lvm("lvconvert", "-y", "--repair", f"{GROUP}/{VOLUME}")
    activate()


def is_monitored() -> bool:
    """Whether dmeventd watches the pool, without which it does not grow by itself."""
    report = _report("lvs", "-o", "seg_monitor", f"{GROUP}/{VOLUME}")
    return any(row.get("seg_monitor") == "monitored" for row in report)


def tear_down(home: Path) -> None:
    """Undo a set-up, finished or not: everything in the group is lost. What is not there is no error."""
    stored = _stored(home)
    if stored is None:
        return
    if _has("vgs", GROUP):
        _lvm("vgremove", "-f", "-y", GROUP)
    if _has("pvs", stored.device):
        _lvm("pvremove", "-y", stored.device)
    _PROFILE.unlink(missing_ok=True)
    (home / _CONFIG).unlink()


def require_same(home: Path, wanted: DirectLvm) -> None:
    """Refuse other values than those that the pool was set up with; no values at all are fine.

    Raises:
        FailedPrecondition: they differ.
    """
    stored = _stored(home)
    if stored is None or not wanted.device:
        return
    if dataclasses.replace(wanted, force=False) != stored:
        raise FailedPrecondition(
            "changing direct-lvm config is not supported",
            hint=f"it was set up on {stored.device}; hpmapper pool grow makes it larger",
        )


def _stored(home: Path) -> DirectLvm | None:
    """The values of a set-up that was begun, in the form of Docker's setup-config.json."""
    try:
        content = json.loads((home / _CONFIG).read_text(encoding="utf-8"))
        return DirectLvm(
            device=content["Device"],
            percent=content["ThinpPercent"],
            metapercent=content["ThinpMetaPercent"],
            autoextend_threshold=content["AutoExtendThreshold"],
            autoextend_percent=content["AutoExtendPercent"],
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise FailedPrecondition(f"{home / _CONFIG} is damaged", hint="restore it, or remove the pool") from None


def _remember(home: Path, wanted: DirectLvm) -> None:
    content = {
        "Device": wanted.device,
        "ThinpPercent": wanted.percent,
        "ThinpMetaPercent": wanted.metapercent,
        "AutoExtendPercent": wanted.autoextend_percent,
        "AutoExtendThreshold": wanted.autoextend_threshold,
    }
    _write_durably(home / _CONFIG, json.dumps(content))


def _write_profile(values: DirectLvm) -> None:
    _PROFILE.parent.mkdir(parents=True, exist_ok=True)
    lines = (
        "activation {",
        f"    thin_pool_autoextend_threshold={values.autoextend_threshold}",
        f"    thin_pool_autoextend_percent={values.autoextend_percent}",
        "}",
    )
    _write_durably(_PROFILE, "\n".join([*lines, ""]))


def _write_durably(path: Path, text: str) -> None:
    new = path.with_name(f".{path.name}.new")
    with new.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.chmod(0o600)
    new.rename(path)
    sync.fdatasync(path.parent)


def _require_programs() -> None:
    for program in _PROGRAMS:
        run_tool([program, "--version" if program != "thin_check" else "-V"])


def _require_free(device: Path, wanted: DirectLvm) -> None:
    group = _group_of(device)
    if group:
        raise FailedPrecondition(
            f'{device} is already part of a volume group "{group}": must remove this device from any volume group or '
            "provide a different device"
        )
    found = signature(device)
    if found is not None and not wanted.force:
        raise FailedPrecondition(
            f"{device} has a filesystem already, use dm.directlvm_device_force=true if you want to wipe the device",
            hint=f"it carries {found}",
        )


def _group_of(device: Path) -> str:
    if not _has("pvs", str(device)):
        return ""
    return next((row["vg_name"] for row in _report("pvs", "-o", "vg_name", str(device))), "")


def _volume_kind(name: str) -> str | None:
    if not _has("lvs", f"{GROUP}/{name}"):
        return None
    return next(row["segtype"] for row in _report("lvs", "-o", "segtype", f"{GROUP}/{name}"))


def _has(command: str, name: str) -> bool:
    return run_tool(_command(command, "--noheadings", name), accept=(0, 5)).code == 0


def _report(command: str, *arguments: str) -> list[dict[str, str]]:
    said = run_tool(_command(command, "--reportformat", "json", *arguments)).stdout
    try:
        rows: list[dict[str, str]] = next(iter(json.loads(said)["report"][0].values()))
    except (ValueError, LookupError, StopIteration) as error:
        raise HpmapperError(f"what {command} says is not understood: {said[:200]!r}") from error
    return rows


def _lvm(*command: str) -> None:
    run_tool(_command(*command))


def _command(*command: str) -> list[str]:
    """Without udev, LVM would wait for links that nobody makes."""
    if dmudev.is_running():
        return list(command)
    return [command[0], "--config", _NO_UDEV, *command[1:]]
