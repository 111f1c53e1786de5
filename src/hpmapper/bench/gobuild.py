"""Small Go programs of ours, built from Debian's packaged containerd sources; nothing else is downloaded.

    tools = build_tools(cache())                       # with the host's compiler: snapserver and rpcbench
    suite = build(cache(), SOURCES / "x", test=True)   # a test binary
    suite = build(cache(), SOURCES / "x", tree=root)   # with the compiler and the containerd of another Debian

The programs are written against containerd 1.6 and 1.7. For containerd 2, whose packages have moved, the import paths
are rewritten. They are linked statically, so what was built in a tree runs on the host. A binary is kept under the
digest of its sources and the version of containerd, and built once.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpmapper.bench.images import run
from hpmapper.errors import NotFound

SOURCES = Path(__file__).parent / "go"

PACKAGES = ("golang-go", "golang-github-containerd-containerd-dev")
"""Debian's packages that it takes, on the host or in the tree."""

GOCODE = Path("usr/share/gocode")

_CONTAINERD = GOCODE / "src/github.com/containerd/containerd"
_IMPORT = re.compile(r'"github\.com/containerd/containerd/(snapshots(?:/\w+)?|mount|contrib/\w+)"')
_PLUGINS = ("snapshots/native", "snapshots/overlay")

# In a tree the compiler sees the sources and the cache where bind mounts put them.
_ENTER = """\
mount -t proc proc "$1/proc" && mount --rbind /dev "$1/dev" && mount -t tmpfs tmp "$1/tmp" &&
mkdir "$1/tmp/work" && mount --bind "$2" "$1/tmp/work" && tree=$1 && shift 2 && exec chroot "$tree" "$@"
"""


@dataclass(frozen=True)
class Tools:
    """The programs of `SOURCES`.

    Attributes:
        snapserver: containerd's own snapshotters behind a socket.
        rpcbench: load on a snapshotter behind a socket.
    """

    snapserver: Path
    rpcbench: Path


def cache() -> Path:
    """Where what takes minutes to make is kept: $HPMAPPER_CACHE, or ~/.cache/hpmapper."""
    return Path(os.environ.get("HPMAPPER_CACHE") or Path.home() / ".cache/hpmapper")


def build_tools(directory: Path) -> Tools:
    """Build all of `SOURCES` with the host's compiler."""
    return Tools(build(directory, SOURCES / "snapserver"), build(directory, SOURCES / "rpcbench"))


def build(directory: Path, source: Path, *, test: bool = False, tree: Path | None = None) -> Path:
    """Build the Go package in `source`, or its test binary, and return the path of the executable below `directory`.

    Args:
        tree: root of a Debian system with `PACKAGES`; the host's if None.

    Raises:
        NotFound: the compiler or the sources of containerd are not there. Unsupported: it does not compile.
    """
    top = tree or Path("/")
    if not (top / _CONTAINERD).exists() or not (top / "usr/bin/go").exists():
        raise NotFound(f"{top} has no Go sources of containerd, or no Go", hint=f"apt install {' '.join(PACKAGES)}")
    binary = directory / "go" / f"{source.name}-{_fingerprint(source, top)}"
    if binary.exists():
        return binary
    binary.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=binary.parent) as temporary:
        work = Path(temporary)
        _copy(source, work / "src" / source.name, moved=_is_version_2(top))
        command = ["go", "test", "-c"] if test else ["go", "build"]
        _compile([*command, "-o", "binary", source.name], work, tree)
        (work / "binary").rename(binary)
    return binary


def _compile(command: Sequence[str], work: Path, tree: Path | None) -> None:
    """Run the compiler in `work`, a GOPATH; what it compiles of others' packages stays beside it for the next one."""
    shared = work.parent.resolve() if tree is None else Path("/tmp/work")
    place = shared / work.name
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(place),
        "GOPATH": f"{place}:/{GOCODE}",
        "GOCACHE": str(shared / "compiled"),
        "GO111MODULE": "off",  # packages come from Debian's tree, whatever versions a go.mod may ask for
        "CGO_ENABLED": "0",  # static
    }
    line = ["env", "-i", f"--chdir={place}", *(f"{name}={value}" for name, value in environment.items()), *command]
    if tree is not None:
        line = [
            "unshare",
            "--mount",
            "--propagation=private",
            "sh",
            "-ec",
            _ENTER,
            "sh",
            str(tree),
            str(work.parent),
            *line,
        ]
    run(line)


def _copy(source: Path, target: Path, *, moved: bool) -> None:
    shutil.copytree(source, target)
    if moved:
        for file in target.glob("*.go"):
            file.write_text(_IMPORT.sub(_version_2, file.read_text()))


def _version_2(found: re.Match[str]) -> str:
    """The import of a package of containerd 1 as containerd 2 has it."""
    package = found[1]
    section = "plugins/" if package in _PLUGINS else "" if package.startswith("contrib/") else "core/"
    return f'"github.com/containerd/containerd/v2/{section}{package}"'


def _is_version_2(top: Path) -> bool:
    return (top / _CONTAINERD / "v2").is_dir()


def _fingerprint(source: Path, top: Path) -> str:
    """Names a binary by all that it is made of."""
    digest = hashlib.sha256(containerd_version(top).encode())
    for file in sorted(source.glob("*.go")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def containerd_version(top: Path = Path("/")) -> str:
    """The version of the containerd whose sources a system has, as Debian numbers it."""
    return run(["dpkg-query", f"--admindir={top / 'var/lib/dpkg'}", "--show", "--showformat=${Version}", PACKAGES[1]])
