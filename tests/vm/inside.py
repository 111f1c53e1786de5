"""In the guest: load what the chosen tests need, run them with pytest, and send each report to the host as it comes.

/source/selection holds what the host wants: {"features": […], "arguments": [pytest's]}. Reports go as lines of JSON to
the virtio port "reports"; their form is pytest's own (what pytest-xdist sends). With {"module": NAME} that module is
run instead, and what it prints is sent (tests.vm.program).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import pytest

SOURCE = Path("/source")

MODULES = {
    "dm": ("dm_mod", "dm_thin_pool", "dm_snapshot", "dm_flakey", "loop", "xfs", "overlay", "erofs"),
    "lvm": ("dm_mod", "dm_thin_pool", "loop", "xfs", "virtio_blk"),
    "quota": ("xfs", "loop", "overlay", "erofs", "quota_v2"),
    "overlay": ("xfs", "loop", "overlay", "erofs"),
    "docker": ("dm_mod", "dm_thin_pool", "dm_snapshot", "loop", "xfs", "overlay"),
    "zfs": ("loop", "xfs"),
}
"""What each feature of `@pytest.mark.guest(FEATURE)` needs loaded of the kernel's own modules."""

BROUGHT = {"zfs": ("spl.ko", "zfs.ko")}
"""Modules that lie on a disk with the feature's name for a serial number, in the order in which they are loaded."""


TREES = {"docker": Path("/root/.cache/hpmapper/trees/docker20")}
"""Where the benchmark looks for a root file system that lies on a disk with the feature's name for a serial number."""

_KERNEL_LINES = 60


class Sender:
    """Sends reports (a pytest plugin)."""

    def __init__(self, config: pytest.Config, port: TextIO) -> None:
        self._config = config
        self._port = port

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._send({"report": data})

    def pytest_warning_recorded(self, warning_message: Any, nodeid: str) -> None:
        self._send({"warning": str(warning_message.message), "nodeid": nodeid})

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._send({"collection": f"{report.nodeid}: {report.longreprtext}"})

    def _send(self, line: dict[str, Any]) -> None:
        self._port.write(json.dumps(line) + "\n")
        self._port.flush()


class Loader:
    """Gives the sender the configuration it needs (a pytest plugin)."""

    def __init__(self, port: TextIO) -> None:
        self._port = port

    def pytest_configure(self, config: pytest.Config) -> None:
        config.pluginmanager.register(Sender(config, self._port), "guest-sender")


def main() -> int:
    """Run the chosen tests, or the module; returns the exit status."""
    wanted = json.loads((SOURCE / "selection").read_text())
    modules = sorted({module for feature in wanted["features"] for module in MODULES.get(feature, ())})
    if modules:
        subprocess.run(["modprobe", "-a", *modules], check=True)
    for feature in wanted["features"]:
        _load(feature, BROUGHT.get(feature, ()))
    with _port("reports").open("w", encoding="ascii") as port:
        if wanted["module"]:
            for feature in TREES.keys() & wanted["features"]:
                _mount_disk(feature, TREES[feature], "rw")
            return _run_module(wanted["module"], wanted["arguments"], port)
        return _run_tests(wanted["arguments"], port)


def _load(feature: str, modules: Sequence[str]) -> None:
    if not modules:
        return
    place = Path("/run", feature)
    _mount_disk(feature, place, "ro")
    for name in modules:
        subprocess.run(["insmod", place / name], check=True)


def _mount_disk(serial: str, place: Path, option: str) -> None:
    place.mkdir(parents=True)
    (disk,) = (file.parent.name for file in Path("/sys/block").glob("*/serial") if file.read_text().strip() == serial)
    subprocess.run(["mount", "-o", option, f"/dev/{disk}", place], check=True)


def _run_tests(arguments: list[str], port: TextIO) -> int:
    status = int(pytest.main(["-p", "no:cacheprovider", *arguments], plugins=[Loader(port)]))
    if status:
        said = subprocess.run(["dmesg", "--notime"], capture_output=True, text=True, check=False).stdout
        port.write(json.dumps({"kernel": "\n".join(said.splitlines()[-_KERNEL_LINES:])}) + "\n")
    return status


def _run_module(name: str, arguments: list[str], port: TextIO) -> int:
    done = subprocess.run([sys.executable, "-m", name, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    port.write(json.dumps({"output": done.stdout, "status": done.returncode}) + "\n")
    return done.returncode


def _port(name: str) -> Path:
    """The virtio port's device; udev, which would name it, does not run."""
    for entry in Path("/sys/class/virtio-ports").iterdir():
        if (entry / "name").read_text().strip() == name:
            return Path("/dev", entry.name)
    raise FileNotFoundError(f"virtio port {name}")


if __name__ == "__main__":
    os.chdir(SOURCE)
    sys.exit(main())
