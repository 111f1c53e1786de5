"""Real images to measure with, as OCI layouts, from Debian's packages and PyPI only.

    images = Path("cache")
    source = debian_python(images)            # two gzip layers, some 24,000 entries, 0.5 GB
    a, b = two_versions(images, source)       # the same, flat; and flat with every tenth file changed
    small = debian_minimal(images)            # what the quickstart runs

Every function returns the layout's directory and is instant when that already exists: a layout is built beside
its place and renamed into it when whole. `python -m hpmapper.bench.images DIR` builds all of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from hpmapper.errors import InvalidArgument, NotFound, Unsupported

EPOCH = 1_790_000_000
"""The latest time stamp in an image (2026-09-21): one build differs from the next in nothing but its packages."""

CREATED = "2026-09-21T13:33:20Z"

PYTHON_TARGET = "usr/local/lib/python3.11/dist-packages"
"""Where bookworm's interpreter looks for what did not come from Debian."""

PYTHON_PACKAGES = (
    "asgiref==3.13.0",
    "contourpy==1.3.3",
    "cycler==0.12.1",
    "django==5.2.19",
    "fonttools==4.68.0",
    "kiwisolver==1.5.1",
    "matplotlib==3.11.2",
    "numpy==2.4.6",
    "packaging==26.3",
    "pandas==3.1.1",
    "pillow==13.0.0",
    "pyparsing==3.3.3",
    "python-dateutil==4.0.0",
    "scipy==1.17.1",
    "sqlalchemy==2.1.9",
    "sqlparse==0.6.1",
    "typing-extensions==4.16.0",
)
"""Pinned, so that figures taken months apart are figures of the same bytes."""

WEB_PACKAGES = (
    "flask==3.0.3",
    "werkzeug==3.0.4",
    "jinja2==3.1.4",
    "markupsafe==2.1.5",
    "itsdangerous==2.2.0",
    "click==8.1.7",
    "blinker==1.8.2",
    "sqlalchemy==2.0.35",
    "typing_extensions==4.12.2",
    "greenlet==3.1.1",
)

CHANGED_PART = 10
"""Version B changes one file in this many."""

SEED = 20191120
CHUNK = 1 << 20

_NEXT_BYTE = bytes((*range(1, 256), 0))
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass(frozen=True)
class Layer:
    """One layer in a layout, compressed by gzip or (then `digest` is `diff_id`) not."""

    digest: str
    diff_id: str
    size: int
    comment: str

    @property
    def media_type(self) -> str:
        return "application/vnd.oci.image.layer.v1.tar" + ("" if self.digest == self.diff_id else "+gzip")


# ---------------------------------------------------------------------------------------------------- the images


def debian_python(directory: Path) -> Path:
    """Bookworm with an interpreter, and on top of it the packages of a data analyst: two layers."""

    def build(new: Path, scratch: Path) -> None:
        system, packages = scratch / "system", scratch / "packages"
        debootstrap(system, "bookworm", ("python3", "ca-certificates"))
        pip_install(packages / PYTHON_TARGET, PYTHON_PACKAGES, "3.11")
        layers = [write_layer(new, system, "debian"), write_layer(new, packages, "python packages")]
        write_layout(new, "debian-python", layers)

    return cached(directory / "debian-python", build)


def debian_minimal(directory: Path, suite: str = "bookworm") -> Path:
    """The smallest Debian that can run Python: one layer, made in about a quarter of a minute."""

    def build(new: Path, scratch: Path) -> None:
        debootstrap(scratch / "system", suite, ("python3-minimal",))
        write_layout(new, "debian-minimal", [write_layer(new, scratch / "system", "debian")])

    return cached(directory / "debian-minimal", build)


def debian_web(directory: Path) -> Path:
    """Bookworm with Python, and on top of it what a small web application stands on: two layers."""

    def build(new: Path, scratch: Path) -> None:
        system, packages = scratch / "system", scratch / "packages"
        debootstrap(system, "bookworm", ("python3",))
        pip_install(packages / PYTHON_TARGET, WEB_PACKAGES, "3.11")
        compile_python(packages, (3, 11))
        write_layout(
            new, "debian-web", [write_layer(new, system, "debian"), write_layer(new, packages, "web packages")]
        )

    return cached(directory / "debian-web", build)


def debian_database(directory: Path) -> Path:
    """Bookworm with PostgreSQL and an empty cluster, as its package makes it: one layer."""

    def build(new: Path, scratch: Path) -> None:
        debootstrap(scratch / "system", "bookworm", ("postgresql-15",))
        write_layout(new, "debian-database", [write_layer(new, scratch / "system", "debian")])

    return cached(directory / "debian-database", build)


RELEASED = ("asgiref==3.13.0", "pillow==13.0.0", "sqlalchemy==2.1.9", "sqlparse==0.6.1", "typing-extensions==4.16.0")
"""What the application of `releases` needs, in each of them the same."""


def releases(directory: Path, count: int) -> list[Path]:
    """Releases of one application, as its builds would make them: a Debian layer that they share, and above it one
    layer of what `pip install` brings, Django 5.2.1 and up with its dependencies."""

    def build(new: Path, scratch: Path) -> None:
        debootstrap(scratch / "system", "bookworm", ("python3",))
        for number in range(1, count + 1):
            layout, packages = new / str(number), scratch / f"packages-{number}"
            pip_install(packages / PYTHON_TARGET, (f"django==5.2.{number}", *RELEASED), "3.11")
            layers = [write_layer(layout, scratch / "system", "debian"), write_layer(layout, packages, "application")]
            write_layout(layout, "application", layers)
            shutil.rmtree(packages)

    target = cached(directory / f"releases-{count}", build)
    return [target / str(number) for number in range(1, count + 1)]


APPLICATIONS = ("postgresql-15", "nginx-light", "apache2-utils", "sqlite3", "git", "python3")

_FURNISH = """\
mkdir -p /data/sqlite /data/git /data/web
sqlite3 /data/sqlite/db "create table t (id integer primary key, v text);
  with recursive n(i) as (select 1 union all select i + 1 from n where i < 500000)
  insert into t select i, hex(randomblob(100)) from n;"
cd /data/git && git init -q . && git config user.email x@example.org && git config user.name x
for d in $(seq 200); do mkdir d$d; for f in $(seq 100); do echo "$d $f" >d$d/f$f; done; done
git add . && git commit -q -m files
for f in $(seq 1000); do head -c 16384 /dev/urandom >/data/web/$f; done
cat >/data/nginx.conf <<'END'
daemon off; error_log /dev/null; pid /tmp/nginx.pid; user root;
events { worker_connections 512; }
http { access_log off; server { listen 127.0.0.1:8080; root /data/web; sendfile on; } }
END
bin=/usr/lib/postgresql/15/bin
mkdir -p /data/pg && chown postgres /data/pg
su postgres -s /bin/sh -c "$bin/initdb -D /data/pg >/dev/null &&
  $bin/pg_ctl -D /data/pg -w -o '-k /tmp -c listen_addresses=' start >/dev/null &&
  createdb -h /tmp bench && pgbench -h /tmp -q -i -s 10 bench 2>/dev/null && $bin/pg_ctl -D /data/pg -w stop >/dev/null"
"""


def applications(directory: Path) -> Path:
    """Bookworm with a database server, a web server, SQLite, git and Python; above it a layer with data for each of
    them: 500,000 rows, a repository of 20,000 files, 1,000 static files, pgbench's tables at scale 10."""

    def build(new: Path, scratch: Path) -> None:
        system = scratch / "system"
        debootstrap(system, "bookworm", APPLICATIONS)
        layers = [write_layer(new, system, "debian")]
        run(inside(system, _FURNISH))
        data = scratch / "data"
        data.mkdir()
        (system / "data").rename(data / "data")
        write_layout(new, "applications", [*layers, write_layer(new, data, "data")])

    return cached(directory / "applications", build)


_IN_ANOTHER = re.compile(r"/proc/(\d+)/root(/.*)")
"""A path in another process's mount namespace."""


def inside(root: Path, script: str) -> list[str]:
    """The command that runs a shell script with that root directory, in mounts, processes and a network of its own.

    `root` may lie in another mount namespace, as Docker's does: nothing can be mounted there but from within.
    """
    enter = """\
mount --rbind /dev "$1/dev" && mount -t proc proc "$1/proc" && mount -t tmpfs tmp "$1/tmp" &&
exec chroot "$1" /bin/sh -ec "$2"
"""
    another = _IN_ANOTHER.fullmatch(str(root))
    namespace = ["nsenter", "--target", another[1], "--mount", "--root"] if another else []
    mounts = ["unshare", "--mount", "--propagation=private", "sh", "-ec", enter, "sh"]
    kinds = ["--pid", "--net", "--ipc", "--fork", "--kill-child"]
    line = [*namespace, *mounts, another[2] if another else str(root), script]
    return ["unshare", *kinds, "sh", "-ec", 'ip link set lo up && exec "$@"', "sh", *line]


def two_versions(directory: Path, source: Path) -> tuple[Path, Path]:
    """`source` flattened to one layer (A), and the same with every tenth file changed, at equal size (B)."""

    def build(new: Path, scratch: Path) -> None:
        root = scratch / "root"
        flatten(source, root)
        write_layout(new / "a", "two-versions-a", [write_layer(new / "a", root, "version a")])
        change_files(root)
        write_layout(new / "b", "two-versions-b", [write_layer(new / "b", root, "version b")])

    target = cached(directory / "two-versions", build)
    return target / "a", target / "b"


def cached(target: Path, build: Callable[[Path, Path], None]) -> Path:
    """Return `target`, made by `build(new layout, scratch)` when it is not there yet."""
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
        new, scratch = Path(temporary, "new"), Path(temporary, "scratch")
        new.mkdir()
        scratch.mkdir(mode=0o755)
        Path(temporary).chmod(0o755)  # apt's own user walks through here
        build(new, scratch)
        new.rename(target)
    return target


# ------------------------------------------------------------------------------------------------- file systems


def debootstrap(root: Path, suite: str, packages: Sequence[str], options: Sequence[str] = ()) -> None:
    """Make a Debian root file system in `root`, as small as mmdebstrap makes it, without translations."""
    command = [
        "mmdebstrap",
        "--quiet",
        "--mode=root",
        "--variant=minbase",
        "--dpkgopt=path-exclude=/usr/share/locale/*",
        "--dpkgopt=path-include=/usr/share/locale/locale.alias",
        f"--include={','.join(packages)}",
        *options,
    ]
    if not _can_mount():
        command.append("--skip=check/canmount")
    run([*command, suite, str(root), *host_mirror()], hint="needs root and Debian's package mmdebstrap")


def host_mirror() -> list[str]:
    """The mirror this host's apt uses for Debian's main archive, or nothing: mmdebstrap knows a default."""
    if shutil.which("apt-get") is None:
        return []
    listing = run(["apt-get", "indextargets", "--format", "$(COMPONENT) $(REPO_URI)", "Identifier: Packages"])
    for line in listing.splitlines():
        component, _, uri = line.partition(" ")
        if component == "main" and uri.rstrip("/").endswith("/debian"):
            return [uri.rstrip("/")]
    return []


def pip_install(target: Path, packages: Sequence[str], version: str) -> None:
    """Install pinned wheels for another interpreter than ours (CPython `version`) into `target`."""
    if importlib.util.find_spec("pip") is None:
        raise Unsupported("cannot install Python packages: this interpreter has no pip", hint="python3 -m ensurepip")
    machine = platform.machine()
    platforms = [f"--platform={name}_{machine}" for name in ("manylinux_2_28", "manylinux_2_17", "manylinux2014")]
    target.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-compile", "--only-binary=:all:", "--implementation=cp", f"--python-version={version}"]
    run([*command, *platforms, f"--target={target}", *packages], hint="needs PyPI or a mirror of it")


def compile_python(top: Path, version: tuple[int, int]) -> None:
    """Compile modules as an image's build does: else each start would. Needs an interpreter of that version."""
    name = ".".join(map(str, version))
    interpreter = sys.executable if sys.version_info[:2] == version else shutil.which(f"python{name}")
    if interpreter is None:
        raise Unsupported(f"cannot compile Python modules: there is no python{name}", hint=f"apt install python{name}")
    run([interpreter, "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", "-s", str(top), str(top)])


def flatten(layout: Path, root: Path) -> None:
    """Unpack the layers of a layout's only image over each other; layers that delete files are refused."""
    root.mkdir()
    for blob in layer_blobs(layout):
        run(["tar", "-xpzf", str(blob), "--numeric-owner", "--xattrs", "--xattrs-include=*", "-C", str(root)])
    for path in root.rglob(".wh.*"):
        raise InvalidArgument(f"cannot flatten {layout}: a layer deletes {path.relative_to(root)}")


def change_files(root: Path) -> int:
    """Change every byte of a tenth of the files below `root`, chosen by a fixed seed; return how many."""
    files = list(_regular_files(root))
    chosen = random.Random(SEED).sample(files, len(files) // CHANGED_PART)
    for path in chosen:
        attributes = path.stat()
        path.write_bytes(path.read_bytes().translate(_NEXT_BYTE))
        path.chmod(attributes.st_mode)
        os.utime(path, (EPOCH, attributes.st_mtime - 1))
    return len(chosen)


def _regular_files(root: Path) -> Iterator[Path]:
    """Regular files with content, in one order on every machine, hard-linked ones once."""
    seen: set[int] = set()
    for folder, folders, names in os.walk(root):
        folders.sort()
        for path in (Path(folder, name) for name in sorted(names)):
            if path.is_symlink() or not path.is_file():
                continue
            status = path.stat()
            if status.st_size and status.st_ino not in seen:
                seen.add(status.st_ino)
                yield path


# ----------------------------------------------------------------------------------------------------- OCI layouts


def write_layer(layout: Path, root: Path, comment: str) -> Layer:
    """Put `root` into the layout as a gzip layer.

    In the form Docker gives one: no access times, whole seconds, and an empty /dev, for a container gets its own.
    """
    command = ["tar", "--create", "--sort=name", "--numeric-owner", "--xattrs", "--xattrs-include=*"]
    command += ["--pax-option=delete=atime,delete=ctime", f"--mtime=@{EPOCH}", "--clamp-mtime"]
    command += ["--anchored", "--exclude=dev/*", "--directory", str(root), "--", *sorted(os.listdir(root))]
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=blobs, delete=False) as out, _piped(command) as tar:
        diff_id, digest = _compress(tar, out)
        size = out.tell()
    os.chmod(out.name, 0o644)
    os.rename(out.name, blobs / digest)
    return Layer(f"sha256:{digest}", f"sha256:{diff_id}", size, comment)


def _compress(tar: IO[bytes], out: IO[bytes]) -> tuple[str, str]:
    """Copy a tar stream into a gzip file; return both digests."""
    inner, outer = hashlib.sha256(), hashlib.sha256()
    deflate = zlib.compressobj(6, wbits=31)

    def write(data: bytes) -> None:
        outer.update(data)
        out.write(data)

    while chunk := tar.read(CHUNK):
        inner.update(chunk)
        write(deflate.compress(chunk))
    write(deflate.flush())
    return inner.hexdigest(), outer.hexdigest()


def write_layout(layout: Path, name: str, layers: Sequence[Layer], command: Sequence[str] = ("/bin/bash",)) -> None:
    """Complete a layout whose layers are written: config, manifest, index and the version file."""
    config = write_blob(layout, _config(layers, command))
    manifest = write_blob(layout, _manifest(config, layers))
    entry = manifest | {
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "platform": {"architecture": architecture(), "os": "linux"},
        "annotations": {
            "org.opencontainers.image.ref.name": "latest",
            "io.containerd.image.name": f"localhost/{name}:latest",
        },
    }
    index = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [entry]}
    (layout / "index.json").write_bytes(_json(index))
    (layout / "oci-layout").write_bytes(_json({"imageLayoutVersion": "1.0.0"}))


def _config(layers: Sequence[Layer], command: Sequence[str]) -> dict[str, object]:
    return {
        "created": CREATED,
        "architecture": architecture(),
        "os": "linux",
        "config": {
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "Cmd": list(command),
            "WorkingDir": "/",
        },
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
        "history": [{"created": CREATED, "created_by": layer.comment} for layer in layers],
    }


def _manifest(config: dict[str, object], layers: Sequence[Layer]) -> dict[str, object]:
    return {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config | {"mediaType": "application/vnd.oci.image.config.v1+json"},
        "layers": [{"mediaType": layer.media_type, "digest": layer.digest, "size": layer.size} for layer in layers],
    }


def write_blob(layout: Path, value: dict[str, object]) -> dict[str, object]:
    """Store a document by its digest; return the digest and size for a descriptor."""
    data = _json(value)
    digest = hashlib.sha256(data).hexdigest()
    (layout / "blobs" / "sha256" / digest).write_bytes(data)
    return {"digest": f"sha256:{digest}", "size": len(data)}


def layer_blobs(layout: Path) -> list[Path]:
    """The layers of a layout's only image, bottom first."""
    index = json.loads((layout / "index.json").read_bytes())
    if len(index["manifests"]) != 1:
        raise InvalidArgument(f"{layout} holds {len(index['manifests'])} images, not one")
    manifest = json.loads(_blob(layout, index["manifests"][0]).read_bytes())
    return [_blob(layout, layer) for layer in manifest["layers"]]


def _blob(layout: Path, descriptor: dict[str, str]) -> Path:
    algorithm, _, digest = descriptor["digest"].partition(":")
    return layout / "blobs" / algorithm / digest


def architecture() -> str:
    """This machine's architecture as OCI calls it."""
    machine = platform.machine()
    return _ARCHITECTURES.get(machine, machine)


def _json(value: dict[str, object]) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


# -------------------------------------------------------------------------------------------------------- programs


def run(command: Sequence[str], *, hint: str = "") -> str:
    """Run a program and return its output; its last words become the error's."""
    environment = os.environ | {"LC_ALL": "C.UTF-8", "SOURCE_DATE_EPOCH": str(EPOCH)}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=True)
    except FileNotFoundError as error:
        raise NotFound(f"{command[0]} is not installed", hint=hint) from error
    except subprocess.CalledProcessError as error:
        last = "; ".join(error.stderr.strip().splitlines()[-3:])
        raise Unsupported(f"{command[0]} failed with status {error.returncode}: {last}", hint=hint) from error
    return done.stdout


@contextlib.contextmanager
def _piped(command: Sequence[str]) -> Iterator[IO[bytes]]:
    """A program's output as a stream; a failure of the program is ours."""
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield process.stdout
        process.stdout.read()
    if process.returncode:
        raise Unsupported(f"{command[0]} failed with status {process.returncode}")


def _can_mount() -> bool:
    """Whether this process may mount; mmdebstrap must be told when not."""
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode == 0


def main(arguments: Sequence[str]) -> None:
    """Build every image in the directory given."""
    if len(arguments) != 1:
        raise SystemExit("usage: python -m hpmapper.bench.images DIRECTORY")
    directory = Path(arguments[0])
    print(debian_minimal(directory))
    print(source := debian_python(directory))
    print(*two_versions(directory, source), sep="\n")
    print(debian_web(directory), debian_database(directory), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
