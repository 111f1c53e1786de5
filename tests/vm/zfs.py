"""A disk with ZFS's kernel modules for the guest: built by the host from Debian's zfs-dkms in its own tree; cached.

    CACHE/zfs-VERSION-RELEASE.img    ext4, the disk "zfs" of guests with that feature: spl.ko, zfs.ko

VERSION is that of the image's own zfsutils-linux, RELEASE its kernel's. The build takes five to fifteen minutes (hours,
if it were emulated), so that ./test leaves it to ./test --vm.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.vm.image import SUITE, Image, building, cache, run, versions
from tests.vm.inside import BROUGHT

_SIZE = "64M"


def cached(image: Image) -> Path | None:
    """The disk's image for an image of the system, if it has been built."""
    place = _place(image)
    return place if place.exists() else None


def build(image: Image) -> Path:
    """The disk's image, built now if it has not been (needs root, mmdebstrap and a Debian mirror)."""
    if found := cached(image):
        return found
    with building() as work:
        if found := cached(image):
            return found  # somebody else was building it
        modules, made = work / "modules", work / "image"
        modules.mkdir()
        _compile(work / "tree", modules, *versions(image))
        run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", modules, made, _SIZE)
        made.rename(_place(image))
    return _place(image)


def _place(image: Image) -> Path:
    release, version = versions(image)
    return cache() / f"zfs-{version}-{release}.img"


def _compile(tree: Path, target: Path, release: str, version: str) -> None:
    # The package builds for every kernel whose headers it finds when it is configured.
    run(
        "mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", "--components=main,contrib",
        f"--include=build-essential,linux-headers-{release},zfs-dkms={version}",
        "--aptopt=APT::Install-Recommends false", SUITE, tree,
    )  # fmt: skip
    for name in BROUGHT["zfs"]:
        (built,) = (tree / "usr/lib/modules" / release).glob(f"updates/dkms/{name}*")
        shutil.copy2(built, target)
        if built.suffix == ".xz":
            run("unxz", target / built.name)


if __name__ == "__main__":
    from tests.vm import image

    print(build(image.build()))
