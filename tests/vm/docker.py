"""A disk with Debian 12 and its Docker 20.10, the last Debian release whose Docker has the devicemapper driver: built
by the host, and cached.

    CACHE/docker-KEY.img    ext4, the disk "docker" of guests with that feature; to be entered with chroot
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from tests.vm.image import cache, run

SUITE = "bookworm"
PACKAGES = ("docker.io", "containerd", "runc", "dmsetup", "lvm2", "thin-provisioning-tools", "xfsprogs", "e2fsprogs")
_SIZE = "4G"


def cached() -> Path | None:
    """The disk's image, if it has been built."""
    place = _place()
    return place if place.exists() else None


def build() -> Path:
    """The disk's image, built now if it has not been (a minute; needs root, mmdebstrap and a Debian mirror)."""
    place = _place()
    if not place.exists():
        cache().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache(), prefix="building-") as name:
            tree, made = Path(name, "tree"), Path(name, "image")
            run(
                "mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", f"--include={','.join(PACKAGES)}",
                "--aptopt=APT::Install-Recommends false", SUITE, tree,
            )  # fmt: skip
            run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", tree, made, _SIZE)
            made.rename(place)
    return place


def _place() -> Path:
    key = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    return cache() / f"docker-{key}.img"


if __name__ == "__main__":
    print(build())
