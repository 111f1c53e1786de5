"""One guest: started on QEMU with this checkout in it, its reports read as they come.

QEMU 7.2 (Debian 12) under emulation has two bugs that crash Linux: one in CMPXCHG16B, one with several processors.
Hence `-smp 1 -cpu max,-cx16`, which ran 10 of 10 boots where the plain form lost 2 of 5. KVM is not used: on hosts that
are guests themselves, /dev/kvm often opens and then hangs. Its NVMe disks lose a command now and then, which the guest
then waits 30 to 60 seconds for; so the disks are virtio's.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.vm.image import REPOSITORY, Image

QEMU = "qemu-system-x86_64"

MEMORY = "2048"
SPARES = {"spare0": "8G", "spare1": "8G"}
"""Empty virtio disks by serial number: for LVM, direct pools, ZFS."""

_BOOT_SECONDS = 120
"""An emulated boot takes 5 to 15 seconds; one that has hung takes for ever."""

_SOURCES = ("src", "tests", "docs", "pyproject.toml", "README.md")


class Died(Exception):
    """The guest ended, or hung, before it had sent all reports; the text is the end of its console."""


class Machine:
    """A guest that runs some tests, or one module. As a context manager: at its end nothing of it is left.

    Args:
        features: what the guest has to have, see `tests.vm.inside.MODULES`.
        arguments: pytest's, or the module's.
        module: a module to be run instead of pytest.
        disks: images of more disks, by their serial numbers; they are not written to.
        write_documents: tells the tests to write their documents instead of comparing them.
    """

    def __init__(
        self,
        image: Image,
        features: Sequence[str],
        arguments: Sequence[str],
        *,
        module: str = "",
        disks: Mapping[str, Path] | None = None,
        write_documents: bool = False,
    ) -> None:
        self._image = image
        self._disks = {"root": image.root, **(disks or {})}
        self._write_documents = write_documents
        self._selection = {"features": list(features), "arguments": list(arguments), "module": module}
        self._qemu: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self.boots = 0
        self.started = time.monotonic()

    def __enter__(self) -> Machine:
        self._directory = tempfile.TemporaryDirectory(prefix="hpmapper-vm-", dir="/var/tmp")
        self._work = Path(self._directory.name)
        self._make_disks()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._work / "reports.sock"))
        self._listener.listen()
        self._boot()
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        self._listener.close()
        self._directory.cleanup()

    def _make_disks(self) -> None:
        stage = self._work / "source"
        stage.mkdir()
        for name in _SOURCES:
            source = REPOSITORY / name
            if source.is_dir():
                shutil.copytree(source, stage / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source, stage / name)
        if self._write_documents:
            (stage / "docs" / "WRITE").touch()  # tells the tests not to compare
        (stage / "selection").write_text(json.dumps(self._selection))
        self._disk("source").touch()
        subprocess.run(
            ["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", stage, self._disk("source"), "128M"], check=True
        )
        for name, size in SPARES.items():
            subprocess.run(["truncate", "-s", size, self._disk(name)], check=True)

    def _disk(self, name: str) -> Path:
        return self._work / f"{name}.img"

    @property
    def _console(self) -> Path:
        return self._work / "console"

    def _command(self) -> list[str]:
        kernel = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr"
        command = [
            QEMU, "-M", "pc", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-accel", "tcg,tb-size=512", "-cpu", "max,-cx16", "-smp", "1", "-m", MEMORY,
            "-serial", f"file:{self._console}",
            "-kernel", str(self._image.kernel), "-initrd", str(self._image.initramfs), "-append", kernel,
            "-device", "virtio-serial-pci",
            "-chardev", f"socket,id=reports,path={self._work / 'reports.sock'}",
            "-device", "virtserialport,chardev=reports,name=reports",
        ]  # fmt: skip
        # snapshot=on: the image is never written to; what is written lies in TMPDIR and goes with QEMU.
        disks = {name: f"{self._disk(name)},discard=unmap" for name in ("source", *SPARES)}
        disks |= {name: f"{path},snapshot=on" for name, path in self._disks.items()}
        for name, file in disks.items():
            command += ["-drive", f"file={file},format=raw,if=none,id={name},cache=unsafe"]
            command += ["-device", f"virtio-blk-pci,drive={name},serial={name}"]
        return command

    def _boot(self) -> None:
        """Start the guest, and once more if it does not come up: emulated boots do hang, rarely."""
        while self.boots < 2:
            self.boots += 1
            self._console.write_bytes(b"")
            environment = {**os.environ, "TMPDIR": str(self._work)}
            self._qemu = subprocess.Popen(self._command(), env=environment, stdin=subprocess.DEVNULL)
            self._connection = self._accept()
            deadline = time.monotonic() + _BOOT_SECONDS
            while time.monotonic() < deadline and self._qemu.poll() is None:
                if b"VMREADY" in self._console.read_bytes():
                    return
                time.sleep(0.1)
            self._kill()
        raise Died(f"the guest did not come up, twice:\n{self.tail(40)}")

    def _accept(self) -> socket.socket:
        self._listener.settimeout(_BOOT_SECONDS)
        try:
            return self._listener.accept()[0]
        except TimeoutError:
            raise Died("QEMU does not start") from None

    def lines(self) -> Iterator[dict[str, Any]]:
        """What the guest sends, until it ends."""
        assert self._connection is not None, "not entered"
        with self._connection.makefile("r", encoding="ascii") as stream:
            for line in stream:
                yield json.loads(line)

    def tail(self, lines: int) -> str:
        """The end of what the console showed."""
        text = self._console.read_text(errors="replace").replace("\r", "")
        return "\n".join(text.splitlines()[-lines:])

    def _kill(self) -> None:
        if self._qemu is not None:
            self._qemu.kill()
            self._qemu.wait()
            self._qemu = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None
