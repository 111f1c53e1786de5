"""The guest's image: Debian 13 with a kernel that has what hosts may lack, built from Debian packages, and cached.

    CACHE/KEY/kernel     the kernel, uncompressed: QEMU starts that a second or two sooner (PVH)
    CACHE/KEY/initramfs  loads the driver of the disks, and mounts the root
    CACHE/KEY/root.img   ext4: the system, and in /opt/python what the tests import
    CACHE/KEY/versions   the kernel's release, and the version of ZFS's programs (whose modules: tests/vm/zfs.py)

KEY is a digest of this file, the guest's init and the locked requirements, so that a change of any builds a new image.
CACHE is $HPMAPPER_VM_CACHE, or hpmapper-vm in the user's cache directory. Nothing of it is ever written to by a run.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from backports import zstd  # type: ignore[import-not-found,unused-ignore]

from hpmapper.kernel import lock

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
REQUIREMENTS = REPOSITORY / "requirements" / "dev.txt"

SUITE = "trixie"
PYTHON = "3.13"
KERNEL = "linux-image-cloud-amd64"
"""Small, with ext4 and virtio built in. NVMe is, too, but QEMU 7.2's loses commands, each of which then takes 30 s."""

PACKAGES = (
    "python3", "udev", "kmod", "busybox-static", "mount", "procps",
    "dmsetup", "lvm2", "thin-provisioning-tools", "xfsprogs", "e2fsprogs", "btrfs-progs", "erofs-utils",
    "stress-ng", "fio", "quota", "acl", "attr", "libcap2-bin", "tar", "zstd", "crun", "runc",
    "zfsutils-linux",
)  # fmt: skip

_NOT_IN_GUEST = ("ruff", "mypy", "import-linter", "grimp", "librt", "ast-serialize")
"""Of the locked requirements: what no test imports."""

_SIZE = "8G"


class Image(NamedTuple):
    """What a guest is started from."""

    kernel: Path
    initramfs: Path
    root: Path
    versions: Path


def cache() -> Path:
    """Where images are kept."""
    chosen = os.environ.get("HPMAPPER_VM_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hpmapper-vm"


def key() -> str:
    """Names the image that this checkout needs."""
    parts = (Path(__file__), HERE / "init.sh", HERE / "initramfs.sh", REQUIREMENTS)
    return hashlib.sha256(b"\0".join(part.read_bytes() for part in parts)).hexdigest()[:16]


def cached() -> Image | None:
    """The image, if it has been built."""
    image = _at(cache() / key())
    return image if image.root.exists() else None


def versions(image: Image) -> tuple[str, str]:
    """An image's kernel release, and its version of ZFS."""
    release, zfs = image.versions.read_text(encoding="ascii").split()
    return release, zfs


@contextmanager
def building() -> Iterator[Path]:
    """A directory in the cache to build something in; one process does at a time."""
    cache().mkdir(parents=True, exist_ok=True)
    with lock.exclusive(cache() / "lock"), tempfile.TemporaryDirectory(dir=cache(), prefix="building-") as name:
        yield Path(name)


def build() -> Image:
    """The image, built now if it has not been (some minutes; needs root, mmdebstrap and a Debian mirror)."""
    if found := cached():
        return found
    with building() as work:
        if found := cached():
            return found  # somebody else was building it
        tree, made = work / "tree", work / "image"
        made.mkdir()
        _debian(tree)
        release = _kernel(tree, work / "linux", _at(made).kernel)
        zfs = run("dpkg-query", "--admindir", tree / "var/lib/dpkg", "-W", "-f", "${Version}", "zfsutils-linux")
        _at(made).versions.write_text(f"{release} {zfs}\n", encoding="ascii")
        _initramfs(tree, work / "early", _at(made).initramfs)
        _python(tree)
        shutil.copy2(HERE / "init.sh", tree / "sbin" / "vminit")
        run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", tree, _at(made).root, _SIZE)
        made.rename(cache() / key())
    return _at(cache() / key())


def _at(directory: Path) -> Image:
    return Image(directory / "kernel", directory / "initramfs", directory / "root.img", directory / "versions")


def _debian(tree: Path) -> None:
    """The system, and beside it the kernel's package: installed, it would only make an initramfs."""
    download = f"apt-get download \\$(apt-cache depends {KERNEL} | grep -o 'linux-image-[0-9][^ ]*')"
    run(
        "mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", "--components=main,contrib",
        f"--include={','.join(PACKAGES)}",
        "--aptopt=APT::Install-Recommends false",
        f'--customize-hook=chroot "$1" sh -c "{download}"',
        SUITE, tree,
    )  # fmt: skip


def _kernel(tree: Path, linux: Path, target: Path) -> str:
    """Put the kernel at `target` and its modules into the tree; returns its release."""
    (package,) = tree.glob("linux-image-*.deb")
    run("dpkg-deb", "-x", package, linux)
    package.unlink()
    (boot,) = (linux / "boot").glob("vmlinuz-*")
    target.write_bytes(_uncompressed(boot.read_bytes()))
    release = boot.name.removeprefix("vmlinuz-")
    (modules,) = linux.glob(f"**/modules/{release}")
    # Compressed modules take twice as long to load under emulation.
    run("find", modules, "-name", "*.ko.xz", "-exec", "unxz", "{}", "+")
    shutil.copytree(modules, tree / "usr/lib/modules" / release, symlinks=True)
    run("chroot", tree, "depmod", release)
    return release


def _initramfs(tree: Path, early: Path, target: Path) -> None:
    """What the kernel starts first (Linux: Documentation/filesystems/ramfs-rootfs-initramfs.rst)."""
    (module,) = tree.glob("usr/lib/modules/*/kernel/drivers/block/virtio_blk.ko")
    (early / "bin").mkdir(parents=True)
    for name in ("dev", "proc", "sys", "root"):
        (early / name).mkdir()
    shutil.copy2(module, early)
    shutil.copy2(tree / "usr/bin/busybox", early / "bin" / "busybox")
    shutil.copy2(HERE / "initramfs.sh", early / "init")
    names = "\n".join(str(path.relative_to(early)) for path in sorted(early.rglob("*")))
    pack = [str(tree / "usr/bin/busybox"), "cpio", "-o", "-H", "newc"]
    packed = subprocess.run(pack, cwd=early, input=names.encode(), capture_output=True, check=True)
    target.write_bytes(packed.stdout)


def _uncompressed(bzimage: bytes) -> bytes:
    """The ELF kernel in a bzImage (Linux: Documentation/arch/x86/boot.rst, payload_offset and payload_length)."""
    setup = (bzimage[0x1F1] + 1) * 512
    offset, length = struct.unpack_from("<II", bzimage, 0x248)
    payload = bzimage[setup + offset : setup + offset + length - 4]  # the last four bytes are the size
    return zstd.ZstdDecompressor().decompress(payload)  # type: ignore[no-any-return,unused-ignore]


def _python(tree: Path) -> None:
    """What the tests import, for the guest's Python, from the locked requirements."""
    wanted = [part for part in _blocks(REQUIREMENTS.read_text()) if not part.startswith(_NOT_IN_GUEST)]
    target = tree / "opt/python"
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("".join(wanted))
        file.flush()
        run(
            sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-deps", "--target",
            target, "--python-version", PYTHON, "--platform", "manylinux_2_28_x86_64", "--platform",
            "manylinux2014_x86_64", "--only-binary=:all:", "--require-hashes", "-r", file.name,
        )  # fmt: skip
    run("chroot", tree, "python3", "-m", "compileall", "-q", "/opt/python", "/usr/lib/python3")


def _blocks(requirements: str) -> list[str]:
    """A lock file's requirements, each with the lines of its hashes."""
    blocks: list[str] = []
    for line in requirements.splitlines(keepends=True):
        if line[:1].isspace() or not blocks:
            blocks[-1:] = [("".join(blocks[-1:])) + line]
        else:
            blocks.append(line)
    return blocks


def run(*command: str | Path) -> str:
    """Run a program and return what it printed; RuntimeError with that if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    print(build().root)
