"""Root file systems of other Debian releases, with their containerd and Docker; made once and kept in the cache."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from hpmapper.bench import gobuild
from hpmapper.bench.images import debootstrap

PACKAGES = (
    "ca-certificates", "containerd", "runc", "docker.io", "docker-registry", "iproute2", "busybox-static",
    "python3", "python3-venv", "xfsprogs", "btrfs-progs", "e2fsprogs", "erofs-utils", "kmod", "libcap2-bin",
    *gobuild.PACKAGES,
)  # fmt: skip

EXTRA = {
    "bookworm": (),
    "trixie": ("docker-cli",),
    "sid": ("docker-cli",),
}
"""Releases, and what they have in packages of its own."""

_STALE = ("--aptopt=Acquire::Check-Valid-Until false", "--aptopt=Acquire::Check-Date false")
"""sid's index is valid for a week only: a mirror may be a little behind, and a host's clock wrong."""

_NO_DOCUMENTS = ("--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/man/*")


def made(release: str) -> Path:
    """The tree of a release, made now if it is not there. It takes a few minutes and up to 2 GB."""
    tree = gobuild.cache() / "trees" / release
    if tree.exists():
        return tree
    tree.parent.mkdir(parents=True, exist_ok=True)
    unfinished = tree.with_name(f".{release}-{os.getpid()}")
    try:
        options = [*_NO_DOCUMENTS, *(_STALE if release == "sid" else ())]
        debootstrap(unfinished, release, [*PACKAGES, *EXTRA[release]], options)
        unfinished.rename(tree)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return tree
