"""Root file systems of other Debian releases, with their containerd and Docker; made once and kept in the cache."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement

from hpmapper.bench import gobuild
from hpmapper.bench.images import debootstrap, run

LOCKED = Path(__file__).parents[2] / "requirements/run.txt"
PLATFORMS = ("manylinux_2_28", "manylinux_2_17", "manylinux2014")

PACKAGES = (
    "ca-certificates", "containerd", "runc", "docker-registry", "iproute2", "busybox-static",
    "python3", "xfsprogs", "btrfs-progs", "e2fsprogs", "erofs-utils", "kmod", "libcap2-bin", "libnghttp2-14",
    *gobuild.PACKAGES,
)  # fmt: skip

EXTRA = {
    "bookworm": ("docker.io",),  # without a containerd image store yet, but with graph driver plugins
    "trixie": ("docker.io", "docker-cli", "docker-buildx"),
    "sid": ("docker.io", "docker-cli", "docker-buildx"),
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


def python_packages(tree: Path) -> Path:
    """What hpmapper needs from PyPI, as wheels for a tree's own interpreter; installed by the host's pip, by hash."""
    version = _python_version(tree)
    wanted = _requirements(version)
    target = gobuild.cache() / "python" / f"{version}-{hashlib.sha256(wanted.encode()).hexdigest()[:16]}"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".packages-", dir=target.parent) as temporary:
        work = Path(temporary)
        (work / "requirements.txt").write_text(wanted)
        options = ["--quiet", "--no-deps", "--require-hashes", "--no-compile", "--only-binary=:all:"]
        places = ["--implementation=cp", f"--python-version={version}", f"--target={work / 'packages'}"]
        platforms = [f"--platform={name}_{platform.machine()}" for name in PLATFORMS]
        pip = [sys.executable, "-m", "pip", "install", *options, *places, *platforms]
        run([*pip, "--requirement", str(work / "requirements.txt")], hint="needs PyPI or a mirror of it")
        (work / "packages").rename(target)
    return target


def _python_version(tree: Path) -> str:
    """ "3.13", by the name of the directory of its library."""
    return max((path.name for path in (tree / "usr/lib").glob("python3.*")), key=len).removeprefix("python")


def _requirements(version: str) -> str:
    """requirements/run.txt for an interpreter of that version; pip would ask the running one what applies."""
    lines = LOCKED.read_text().replace("\\\n", "").splitlines()
    return "".join(f"{line}\n" for line in lines if line and not line.startswith("#") and _applies(line, version))


def _applies(line: str, version: str) -> bool:
    marker = Requirement(line.partition("--hash")[0].strip()).marker
    return marker is None or marker.evaluate({"python_version": version, "python_full_version": f"{version}.0"})
