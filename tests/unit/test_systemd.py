"""The units: well formed by systemd's own judgement, and without anything that would hide our mounts."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from hpmapper.cli.configure import DEFAULT_ADDRESS
from hpmapper.config import DEFAULT_ROOT

UNITS = Path(__file__).parents[2] / "packaging" / "systemd"
SERVICE, SOCKET = UNITS / "hpmapper.service", UNITS / "hpmapper.socket"

OWN_NAMESPACE = re.compile(
    r"Bind(ReadOnly)?Paths|DynamicUser|(No)?ExecPaths|InaccessiblePaths|ReadOnlyPaths|ReadWritePaths|LogNamespace"
    r"|Mount(APIVFS|Flags|Images)|Private(Devices|IPC|Mounts|Tmp|Users)|ProcSubset"
    r"|Protect(ControlGroups|Home|Hostname|Kernel(Logs|Modules|Tunables)|Proc|System)"
    r"|Root(Directory|Image)|TemporaryFileSystem|Extension(Images|Directories)"
    r"|(Runtime|State|Cache|Logs)Directory"
)
"""Settings with which systemd (or some version of it) gives a service a mount namespace; directories can, too."""


def settings(unit: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in re.findall(r"^(\w+)=(.*)$", unit.read_text(), re.MULTILINE):
        found.setdefault(name, []).append(value)
    return found


def test_mounts_are_seen_by_the_host() -> None:
    assert not [name for name in settings(SERVICE) if OWN_NAMESPACE.fullmatch(name)]


def test_the_daemon_is_where_clients_are_told_it_is() -> None:
    service, socket = settings(SERVICE), settings(SOCKET)
    assert socket["ListenStream"] == [DEFAULT_ADDRESS]
    assert socket["SocketMode"] == ["0600"]
    assert service["ExecStart"][0].endswith(f" serve --address {DEFAULT_ADDRESS}")
    assert service["RequiresMountsFor"] == [str(DEFAULT_ROOT)]
    assert service["Type"] == ["notify"]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="NOT RUN: there is no systemd-analyze here")
def test_systemd_takes_them(tmp_path: Path) -> None:
    for unit in (SERVICE, SOCKET):
        # The program itself need not be installed where the tests run.
        (tmp_path / unit.name).write_text(unit.read_text().replace("/usr/bin/hpmapper", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *map(str, sorted(tmp_path.iterdir()))],
        capture_output=True,
        text=True,
        check=False,
    )
    ours = [line for line in done.stderr.splitlines() if "hpmapper" in line]
    assert not ours
    assert done.returncode == 0, done.stderr
