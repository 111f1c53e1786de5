"""The image that clients are tried with: four layers with all that layers do, and busybox to run."""

from __future__ import annotations

import gzip
import hashlib
import io
import random
import tarfile
from pathlib import Path

from hpmapper.bench.images import Layer, layer_blobs, write_layout

APPLETS = (
    "sh",
    "cat",
    "chmod",
    "chown",
    "dd",
    "id",
    "ln",
    "ls",
    "mkdir",
    "mknod",
    "mount",
    "mv",
    "rm",
    "sleep",
    "stat",
)

LARGE = 3 << 20
"""Bytes of the large file, which an upper layer changes the mode of."""

NET_RAW = "\x01\0\0\x02" + "\0\x20\0\0" + "\0" * 12
"""The attribute security.capability: cap_net_raw=ep (struct vfs_cap_data, revision 2)."""

_TIME, _STEP = 1_600_000_000, 7
_OPAQUE = ".wh..wh..opq"


class _Tar:
    """A layer in the making. Names are as tars of layers have them: without a leading slash."""

    def __init__(self, number: int) -> None:
        self._bytes = io.BytesIO()
        self._tar = tarfile.TarFile(fileobj=self._bytes, mode="w", format=tarfile.PAX_FORMAT)
        self._time = _TIME + 100_000 * number

    def _add(
        self, name: str, kind: bytes, mode: int, owner: tuple[int, int], data: bytes = b"", **more: object
    ) -> None:
        entry = tarfile.TarInfo(name)
        entry.type, entry.mode, (entry.uid, entry.gid), entry.size = kind, mode, owner, len(data)
        entry.mtime = self._time
        for field, value in more.items():
            setattr(entry, field, value)
        self._time += _STEP
        self._tar.addfile(entry, io.BytesIO(data))

    def directory(self, *names: str, mode: int = 0o755, owner: tuple[int, int] = (0, 0)) -> None:
        for name in names:
            self._add(name, tarfile.DIRTYPE, mode, owner)

    def file(
        self,
        name: str,
        data: bytes = b"",
        mode: int = 0o644,
        owner: tuple[int, int] = (0, 0),
        xattrs: dict[str, str] | None = None,
    ) -> None:
        headers = {f"SCHILY.xattr.{key}": value for key, value in (xattrs or {}).items()}
        self._add(name, tarfile.REGTYPE, mode, owner, data, pax_headers=headers)

    def symlink(self, name: str, target: str) -> None:
        self._add(name, tarfile.SYMTYPE, 0o777, (0, 0), linkname=target)

    def link(self, name: str, target: str, owner: tuple[int, int]) -> None:
        """A second name of a file, and what counts of its mode, owner and time."""
        self._add(name, tarfile.LNKTYPE, 0o644, owner, linkname=target)

    def device(self, name: str, major: int, minor: int) -> None:
        self._add(name, tarfile.CHRTYPE, 0o666, (0, 0), devmajor=major, devminor=minor)

    def fifo(self, name: str) -> None:
        self._add(name, tarfile.FIFOTYPE, 0o600, (0, 0))

    def gone(self, name: str) -> None:
        """A whiteout."""
        folder, slash, last = name.rpartition("/")
        self.file(f"{folder}{slash}.wh.{last}")

    def opaque(self, name: str) -> None:
        self.directory(name)
        self.file(f"{name}/{_OPAQUE}")

    def done(self) -> bytes:
        self._tar.close()
        return self._bytes.getvalue()


def _random(name: str, size: int) -> bytes:
    return random.Random(name).randbytes(size)


def _base(busybox: bytes) -> bytes:
    tar = _Tar(0)
    tar.directory("bin", "dev", "etc", "proc", "sys", "data", "data/dir", "data/dir/sub", "data/before", "data/covered")
    tar.directory("tmp", mode=0o1777)
    tar.directory("run", "root", mode=0o700)
    tar.directory("data/shared", mode=0o2775, owner=(1000, 1001))
    tar.file("bin/busybox", busybox, 0o755)
    for applet in APPLETS:
        tar.symlink(f"bin/{applet}", "busybox")
    tar.file("etc/hosts")  # the runtime mounts the host's over these two
    tar.file("etc/resolv.conf")
    tar.file("etc/passwd", b"root:x:0:0::/root:/bin/sh\napp:x:1000:1001::/data:/bin/sh\n")
    tar.file("etc/group", b"root:x:0:\napp:x:1001:\nextra:x:55:app\n")
    tar.file("bin/setuid", busybox[:4096], 0o4755)
    tar.file("bin/capable", _random("capable", 5000), 0o755, xattrs={"security.capability": NET_RAW})
    tar.file("bin/capable-once", _random("capable", 5000), 0o755, xattrs={"security.capability": NET_RAW})
    tar.link("bin/capable-no-more", "bin/capable-once", owner=(0, 0))
    tar.file("data/one-name", b"data", xattrs={"user.one": "1"})
    tar.link("data/another-name", "data/one-name", owner=(9, 9))
    tar.file("data/attributed", b"small", xattrs={"user.one": "1", "user.two": "a longer value " * 20})
    tar.file("data/large", _random("large", LARGE), 0o640, owner=(1000, 1001))
    tar.file("data/linked", _random("linked", 9000), 0o600, owner=(5, 6))
    tar.link("data/linked-too", "data/linked", owner=(7, 8))
    for letter in "abcdef":
        tar.file(f"data/dir/{letter}", letter.encode() * 2000)
    tar.file("data/dir/sub/deep", b"deep\n")
    for number in range(40):
        tar.file(f"data/before/{number}", _random(f"moved {number}", 100 * number))
    tar.file("data/covered/old", b"old\n")
    tar.file("data/file-then-directory", b"file\n")
    tar.directory("data/directory-then-file")
    tar.file("data/directory-then-file/inside", b"inside\n")
    tar.device("data/zero", 1, 5)
    tar.fifo("data/pipe")
    tar.file("data/spaces and ünïcode", b"name\n")
    tar.file("data/" + "long-name-" * 20, b"long\n")
    tar.symlink("data/dangling", "../../no/such/" + "x" * 150)
    return tar.done()


def _changes() -> bytes:
    tar = _Tar(1)
    tar.directory("data", "data/dir")
    tar.gone("data/dir/b")
    tar.gone("data/dir/sub")
    tar.opaque("data/covered")
    tar.file("data/covered/new", b"new\n")
    tar.file("data/large", _random("large", LARGE), 0o600, owner=(1000, 1001))
    tar.file("data/dir/c", b"changed\n")
    return tar.done()


def _rename() -> bytes:
    tar = _Tar(2)
    tar.directory("bin", "data")
    tar.directory("data/after", mode=0o750)
    for number in range(40):
        tar.file(f"data/after/{number}", _random(f"moved {number}", 100 * number))
    tar.gone("data/before")
    tar.gone("data/file-then-directory")
    tar.directory("data/file-then-directory")
    tar.file("data/file-then-directory/inside", b"inside\n")
    tar.file("data/directory-then-file", b"file\n")
    tar.file("bin/capable", _random("capable", 5000), 0o755)
    return tar.done()


def _top() -> bytes:
    tar = _Tar(3)
    tar.directory("data")
    tar.directory("data/after", mode=0o750)
    tar.directory("data/dir", mode=0o711, owner=(5, 6))
    tar.file("data/dir/b", b"again\n", 0o444)
    tar.file("data/after/0", b"first\n")
    tar.gone("data/after/39")
    return tar.done()


def make(directory: Path, busybox: Path) -> Path:
    """Write the image as an OCI layout and return its directory. containerd imports it as localhost/demo:latest."""
    layers = [_base(busybox.read_bytes()), _changes(), _rename(), _top()]
    write_layout(directory, "demo", [_blob(directory, tar, f"layer {i}") for i, tar in enumerate(layers)])
    return directory


def tall(directory: Path, busybox: Path, height: int) -> Path:
    """Write an image of many layers: `height`, each with one file more, and above all busybox."""
    layers = []
    for number in range(height):
        tar = _Tar(number)
        tar.directory("data")
        tar.file(f"data/{number}", f"{number}\n".encode())
        layers.append(tar.done())
    tar = _Tar(height)
    tar.directory("bin", "dev", "etc", "proc", "sys")
    tar.file("etc/hosts")
    tar.file("etc/resolv.conf")
    tar.file("bin/busybox", busybox.read_bytes(), 0o755)
    for applet in APPLETS:
        tar.symlink(f"bin/{applet}", "busybox")
    layers.append(tar.done())
    write_layout(directory, "tall", [_blob(directory, data, f"layer {i}") for i, data in enumerate(layers)])
    return directory


def pause(directory: Path, busybox: Path) -> Path:
    """Write an image of one layer whose command does nothing, for ever: what holds a pod's namespaces."""
    tar = _Tar(0)
    tar.directory("bin", "dev", "etc", "proc", "sys")
    tar.file("bin/busybox", busybox.read_bytes(), 0o755)
    tar.symlink("bin/sleep", "busybox")
    write_layout(directory, "pause", [_blob(directory, tar.done(), "pause")], ["/bin/sleep", "1000000"])
    return directory


def extended(directory: Path, below: Path, name: str, blob: bytes) -> Path:
    """Write the image that has one layer more than the one in `below`; `blob` is the layer, gzip compressed."""
    tars = [gzip.decompress(data) for data in (*(file.read_bytes() for file in layer_blobs(below)), blob)]
    write_layout(directory, name, [_blob(directory, tar, f"layer {i}") for i, tar in enumerate(tars)])
    return directory


def _blob(layout: Path, tar: bytes, comment: str) -> Layer:
    data = gzip.compress(tar, mtime=0)
    digest = hashlib.sha256(data).hexdigest()
    blobs = layout / "blobs/sha256"
    blobs.mkdir(parents=True, exist_ok=True)
    (blobs / digest).write_bytes(data)
    return Layer(f"sha256:{digest}", f"sha256:{hashlib.sha256(tar).hexdigest()}", len(data), comment)
