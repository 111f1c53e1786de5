"""Docker's documented procedures for devicemapper with our commands, run for real: docs/devicemapper-transcript.md.

What the guest answers is compared with the document; `./test --vm --write-documents` writes it anew.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from hpmapper.cli.main import cli
from hpmapper.drivers.devicemapper import lvm
from hpmapper.kernel import dm
from tests.kernel.test_devicemapper_lvm import _disk
from tests.unit.test_cli_json import rootfs

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.guest("dm", short=True),
    pytest.mark.guest("lvm", short=True),
    pytest.mark.timeout(1200),
]

DOCUMENT = Path(__file__).parents[2] / "docs" / "devicemapper-transcript.md"
ROOT = "/var/lib/hpmapper"

_PROLOGUE = """# Docker's devicemapper procedures, with hpmapper

Written by tests/kernel/test_devicemapper_transcript.py from what the commands really did and printed, on a kernel with
dm-thin and LVM. Numbers that change from run to run stand as `N`. The headings are those of Docker's documentation of
its devicemapper driver; see [devicemapper.md](devicemapper.md) for what is behind the commands.
"""

_CHANGING = (
    (re.compile(r"hpmapper-\d+:\d+-\d+"), "hpmapper-MAJOR:MINOR-INODE"),
    (re.compile(r"\b\d+(\.\d+)?%"), "N%"),
    (re.compile(r"(?m)^( *(?:Data|Metadata) Space (?:Used|Available) +).*$"), r"\1N"),
    (re.compile(r"/dev/loop\d+"), "/dev/loopN"),
    (re.compile(r"/dev/vdb"), "/dev/sdb"),
    (re.compile(r"/dev/vdc"), "/dev/sdc"),
    (re.compile(r"ioctl \d+\.\d+\.\d+"), "ioctl N"),
    (re.compile(r"(?m)\d+(\.\d+)? [KMG]?i?B\b"), "N"),
    (re.compile(r"(used_ratio\{[^}]*\}) [\d.e-]+"), r"\1 N"),
    (re.compile(r"(?m)\d+\.\d s$"), "N s"),
    (re.compile(r"\b[0-9a-f]{12}\b"), "IMAGE"),
    (re.compile(r"(?m) +$"), ""),
)


class Transcript:
    """Commands typed and what they answered, in Markdown."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lines: list[str] = [_PROLOGUE]

    def chapter(self, title: str, text: str) -> None:
        self._lines.append(f"## {title}\n\n{text}\n")

    def step(self, *words: str | Path, status: int = 0) -> None:
        """Run a command line, and write down what it printed."""
        typed = [str(word) for word in words]
        result = CliRunner().invoke(cli, ["--root", str(self._root), *typed])
        assert result.exit_code == status, (typed, result.output)
        shown = " ".join(word if re.fullmatch(r"[\w./:=+%-]+", word) else f"'{word}'" for word in typed)
        said = f"# hpmapper {shown}\n{result.output}" + (f"# exit status {status}\n" if status else "")
        self._lines.append(f"```\n{_steady(said.replace(str(self._root), ROOT)).rstrip()}\n```\n")

    def text(self) -> str:
        return "\n".join(self._lines)


def _steady(text: str) -> str:
    for pattern, replacement in _CHANGING:
        text = pattern.sub(replacement, text)
    return re.sub(r"(?<=\S) {2,}(?=N\b)", "   ", text)  # columns are as wide as their numbers


def _loop(said: Transcript, tar: Path) -> None:
    loop = ["--storage-opt", "dm.basesize=512M", "--storage-opt", "dm.loopdatasize=2G"]
    loop += ["--storage-opt", "dm.loopmetadatasize=64M"]
    said.chapter("Configure loop-lvm mode for testing", "Nothing has to be prepared. The pool is made on first use.")
    said.step("--storage-driver", "devicemapper", *loop, "pool", "create")
    said.step("image", "import", tar, "base:1")
    said.step("container", "create", "--name", "one", "base:1")
    said.chapter(
        "Use operating system utilities: resize the loop-lvm pool", "truncate, losetup and dmsetup are not needed."
    )
    said.step("pool", "grow", "3G", "--metadata", "128M")
    said.chapter("Monitor the thin pool", "For Nagios, and for Prometheus's textfile collector.")
    said.step("pool", "watch")
    said.step("pool", "watch", "--warning", "0.1", status=1)
    said.step("pool", "watch", "--metrics")
    said.step("pool", "usage")
    said.chapter("Activate the devicemapper after reboot", "Any command does it. This one does nothing else.")
    said.step("pool", "detach")
    said.step("pool", "watch", status=3)
    said.step("pool", "activate")
    said.chapter("Check and repair", "With the pool at work, and taken down.")
    said.step("pool", "check")
    said.step("pool", "repair")
    said.chapter("A block device for a virtual machine", "Kata and Firecracker mount it themselves.")
    said.step("container", "mount", "--as-block", "one")
    said.step("container", "umount", "one")
    said.step("pool", "rm", "--force")


def _direct(said: Transcript, tar: Path) -> None:
    first, second = _disk("spare0"), _disk("spare1")
    said.chapter("Configure direct-lvm mode for production", "Docker's fourteen steps by hand are one command.")
    options = ["--storage-opt", f"dm.directlvm_device={first}", "--storage-opt", "dm.basesize=512M"]
    said.step("--storage-driver", "devicemapper", *options, "pool", "create")
    said.step("image", "import", tar, "base:1")
    said.chapter("Resize a direct-lvm thin pool", "vgextend and lvextend are done for you; containers go on.")
    said.step("pool", "grow", "--add-device", second)
    said.step("pool", "watch")
    said.chapter("Change what cannot be changed", "Other values than those of the set-up are refused.")
    said.step("--storage-opt", f"dm.directlvm_device={second}", "pool", "activate", status=5)
    said.chapter("Begin anew", "The volume group goes with the root.")
    said.step("pool", "rm", "--force")


def test_transcript(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    said = Transcript(tmp_path / "root")
    tar = rootfs(tmp_path / "base.tar")
    _loop(said, tar)
    _direct(said, tar)
    assert not [name for name in dm.devices() if name.startswith("hpmapper-")]
    assert lvm.POOL not in dm.devices()
    text = said.text().replace(str(tmp_path), "/root")
    record_property(f"document {DOCUMENT.name}", text)
    if not DOCUMENT.with_name("WRITE").exists():
        assert text == DOCUMENT.read_text(), "./test --vm --write-documents writes it anew"
