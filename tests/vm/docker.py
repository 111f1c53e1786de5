"""A disk with Debian 12 and its Docker 20.10, the last Debian release whose Docker has the devicemapper driver: built
by the host, and cached.

    CACHE/docker-KEY.img    ext4, the disk "docker" of guests with that feature; to be entered with chroot
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from tests.vm.image import building, cache, run

SUITE = "bookworm"
PACKAGES = ("docker.io", "containerd", "runc", "dmsetup", "lvm2", "thin-provisioning-tools", "xfsprogs", "e2fsprogs")
_SIZE = "4G"


def cached() -> Path | None:
    """The disk's image, if it has been built."""
    place = _place()
    return place if place.exists() else None


def build() -> Path:
    """The disk's image, built now if it has not been (a minute; needs root, mmdebstrap and a Debian mirror)."""
    if found := cached():
        return found
    with building() as work:
        if found := cached():
            return found  # somebody else was building it
        tree, made = work / "tree", work / "image"
        run(
            "mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", f"--include={','.join(PACKAGES)}",
            "--aptopt=APT::Install-Recommends false", SUITE, tree,
        )  # fmt: skip
        run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", tree, made, _SIZE)
        made.rename(_place())
    return _place()


def _place() -> Path:
    key = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    return cache() / f"docker-{key}.img"


if __name__ == "__main__":
    print(build())
