"""Docker's storage directory of its devicemapper driver, as Docker 20.10 writes it (daemon/graphdriver/devmapper and
layer/filestore.go), with a pool of two sparse files made by the kernel's own device mapper.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import os
import stat
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hpmapper.check import check
from hpmapper.config import Config
from hpmapper.containers import Containers
from hpmapper.drivers.devicemapper import thin
from hpmapper.engine import chain_id
from hpmapper.errors import Corrupt
from hpmapper.image import oci
from hpmapper.images import Images
from hpmapper.kernel import dm, loop, mount
from hpmapper.meta import snapshots
from hpmapper.root import open_root
from hpmapper.store.workspace import remove_tree
from hpmapper.testing import trees
from hpmapper.testing.tars import LINK, SYMLINK, folder, member, tar

BASE_SIZE, DATA_SIZE, METADATA_SIZE = 512 << 20, 1 << 30, 16 << 20
_BLOCK = 128
CREATED = "2021-03-04T05:06:07.123456789Z"


def tar_split(layer: bytes) -> bytes:
    """What Docker keeps of a layer's tar."""
    lines: list[dict[str, Any]] = []
    at = 0

    def segment(end: int) -> None:
        lines.append({"type": 2, "payload": base64.b64encode(layer[at:end]).decode()})

    with tarfile.open(fileobj=io.BytesIO(layer)) as members:
        for one in members:
            if not (one.isreg() and one.size):
                continue
            segment(one.offset_data)
            at = one.offset_data + one.size
            lines.append({"type": 1, **_named(one.name), "size": one.size, "payload": "AAAAAAAAAAA="})
    segment(len(layer))
    numbered = [json.dumps({**line, "position": number}) for number, line in enumerate(lines)]
    return gzip.compress("\n".join(numbered).encode(), 1)


def _named(name: str) -> dict[str, str]:
    raw = os.fsencode(name)
    try:
        return {"name": raw.decode("utf-8")}
    except UnicodeDecodeError:
        return {"name_raw": base64.b64encode(raw).decode()}


class DockerDirectory:
    """One being made, or looked at. The pool is active only in `active`."""

    def __init__(self, root: Path, kind: str = "xfs") -> None:
        self.root = root
        self.home = root / "devicemapper"
        self.kind = kind
        self.image = root / "image/devicemapper"
        self._names: dict[str, dict[str, str]] = {}
        self.app = ""
        self._next = 1
        self._transaction = 0
        self.expected: dict[str, dict[bytes, trees.Facts]] = {}
        for directory in (self.home / "metadata", self.home / "devicemapper", self.home / "mnt", root / "containers"):
            directory.mkdir(parents=True)

    @property
    def prefix(self) -> str:
        status = self.home.stat()
        return f"docker-{os.major(status.st_dev)}:{os.minor(status.st_dev)}-{status.st_ino}"

    @property
    def files(self) -> tuple[Path, Path]:
        return self.home / "devicemapper/data", self.home / "devicemapper/metadata"

    @contextmanager
    def active(self) -> Iterator[None]:
        """As while dockerd runs."""
        data, metadata = self.files
        for path, size in ((data, DATA_SIZE), (metadata, METADATA_SIZE)):
            if not path.exists():
                path.touch()
                os.truncate(path, size)
        pool = f"{self.prefix}-pool"
        with loop.attached(data) as one, loop.attached(metadata) as two:
            table = thin.PoolTable(DATA_SIZE // dm.SECTOR, str(two), str(one), _BLOCK, 0, ("skip_block_zeroing",))
            dm.activate(pool, [table.target()])
            try:
                yield
            finally:
                dm.remove(pool)

    def make_base(self) -> None:
        """The base device, empty but for the root directory."""
        with self._device("base", None) as path:
            subprocess.run([f"mkfs.{self.kind}", "-q", path], check=True)
            with self._mounted(path) as top:
                (top / "rootfs").mkdir(mode=0o755)
                (top / "id").write_text("base")

    def add_image(self, names: Sequence[str], layers: Sequence[bytes], **config: Any) -> str:
        """An image of these tars; returns its id."""
        diff_ids = [oci.sha256(layer) for layer in layers]
        chain: str | None = None
        for layer, diff_id in zip(layers, diff_ids, strict=True):
            parent, chain = chain, chain_id(chain, diff_id)
            self._layer(chain, parent, diff_id, layer)
        document = {"architecture": "amd64", "os": "linux", "config": config, "created": CREATED}
        document["rootfs"] = {"type": "layers", "diff_ids": diff_ids}
        data = json.dumps(document).encode()
        image = oci.sha256(data)
        _write(self.image / "imagedb/content/sha256" / image[7:], data)
        for name in names:
            self._names.setdefault(name.rpartition(":")[0], {})[name] = image
        _write(self.image / "repositories.json", json.dumps({"Repositories": self._names}).encode())
        return image

    def _layer(self, chain: str, parent: str | None, diff_id: str, layer: bytes) -> None:
        place = self.image / "layerdb/sha256" / chain[7:]
        if place.exists():
            return
        cache = hashlib.sha256(chain.encode()).hexdigest()
        below = self._cache(parent) if parent else "base"
        with self._device(cache, below) as path, self._mounted(path) as top:
            _apply(layer, top / "rootfs")
            self.expected[chain] = trees.read_tree(top / "rootfs")
        _write(place / "cache-id", cache.encode())
        _write(place / "diff", diff_id.encode())
        _write(place / "size", str(len(layer)).encode())
        _write(place / "tar-split.json.gz", tar_split(layer))
        if parent:
            _write(place / "parent", parent.encode())

    def _cache(self, chain: str) -> str:
        return (self.image / "layerdb/sha256" / chain[7:] / "cache-id").read_text()

    def add_container(self, name: str, image: str, operations: Sequence[trees.Operation], *, clean: bool = True) -> str:
        """A stopped container; not `clean`: one whose machine lost power, so that its journal is to be replayed."""
        config = json.loads((self.image / "imagedb/content/sha256" / image[7:]).read_bytes())
        chain: str | None = None
        for diff_id in config["rootfs"]["diff_ids"]:
            chain = chain_id(chain, diff_id)
        assert chain
        number = hashlib.sha256(name.encode()).hexdigest()
        mount_id = hashlib.sha256(number.encode()).hexdigest()
        with self._device(f"{mount_id}-init", self._cache(chain)) as path, self._mounted(path) as top:
            (top / "rootfs/.dockerenv").touch()
        last = mount_id if clean else f"{mount_id[:-1]}x"
        with self._device(last, f"{mount_id}-init") as path, self._mounted(path) as top:
            trees.apply(operations, top / "rootfs")
            self.expected[name] = trees.read_tree(top / "rootfs")
            if not clean:
                self._cut(last, mount_id, top)
        mounts = self.image / "layerdb/mounts" / number
        _write(mounts / "mount-id", mount_id.encode())
        _write(mounts / "init-id", f"{mount_id}-init".encode())
        _write(mounts / "parent", chain.encode())
        facts = {"ID": number, "Name": f"/{name}", "Image": image, "Created": CREATED, "Driver": "devicemapper"}
        _write(self.root / "containers" / number / "config.v2.json", json.dumps(facts | {"State": {}}).encode())
        _write(self.root / "containers" / number / "hostconfig.json", b'{"StorageOpt": null}')
        return number

    def _cut(self, device: str, copy: str, top: Path) -> None:
        """Copy a device as it is while its file system is at work: all is in the journal, little where it belongs."""
        fd = os.open(top, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        for here, _, files in os.walk(top):
            for one in files:
                path = os.path.join(here, one)
                if stat.S_ISREG(os.lstat(path).st_mode):
                    fd = os.open(path, os.O_RDONLY)
                    os.fsync(fd)
                    os.close(fd)
        dm.suspend(f"{self.prefix}-{device}", freeze=False)
        try:
            self._make(copy, device)
        finally:
            dm.resume(f"{self.prefix}-{device}")

    def _make(self, name: str, parent: str | None) -> int:
        pool, number = f"{self.prefix}-pool", self._note(name)
        if parent is None:
            thin.create(pool, number)
        else:
            thin.snapshot(pool, number, self._number(parent))
        thin.set_transaction(pool, self._transaction - 1, self._transaction)
        return number

    def _note(self, name: str) -> int:
        """Record the next device; its number."""
        number = self._next
        self._next += 1
        self._transaction += 1
        facts = {"device_id": number, "size": BASE_SIZE, "transaction_id": self._transaction, "initialized": False}
        _write(self.home / "metadata" / name, json.dumps(facts | {"deleted": False}).encode())
        return number

    def _number(self, name: str) -> int:
        return int(json.loads((self.home / "metadata" / name).read_bytes())["device_id"])

    @contextmanager
    def _device(self, name: str, parent: str | None) -> Iterator[Path]:
        number = self._make(name, parent)
        device = f"{self.prefix}-{name}"
        dm.activate(device, [thin.thin_target(f"{self.prefix}-pool", number, BASE_SIZE)])
        try:
            yield dm.path(device)
        finally:
            dm.remove(device)

    @contextmanager
    def _mounted(self, path: Path) -> Iterator[Path]:
        options = {"nouuid": None} if self.kind == "xfs" else {}
        with mount.detached(self.kind, path, options=options) as top:
            yield Path(str(top).replace("self", str(os.getpid())))  # for programs that are started meanwhile, too

    def digests(self) -> list[str]:
        """Of the data in the pool's files: whether a byte was changed."""
        return [_digest(path) for path in self.files]


class PlainDirectory(DockerDirectory):
    """The same with directories for devices: what is said of them can be tried on hosts without device mapper.

    It stands for `hpmapper.migrate.thinroot.ThinRoots`, too.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._devices = root.parent / "devices"
        self._devices.mkdir()

    def make_base(self) -> None:
        with self._device("base", None) as path:
            (path / "rootfs").mkdir(mode=0o755)

    @contextmanager
    def root_of(self, device: int, size: int, directory: str) -> Iterator[Path]:
        """As `ThinRoots.root`."""
        place = self._devices / str(device) / directory
        if size != BASE_SIZE or not place.exists():
            raise Corrupt(f"there is no thin device {device} of {size} bytes")
        yield place

    def _make(self, name: str, parent: str | None) -> int:
        number = self._note(name)
        place = self._devices / str(number)
        if parent is None:
            place.mkdir()
        else:
            subprocess.run(["cp", "-a", self._devices / str(self._number(parent)), place], check=True)
        return number

    @contextmanager
    def _device(self, name: str, parent: str | None) -> Iterator[Path]:
        yield self._devices / str(self._make(name, parent))

    @contextmanager
    def _mounted(self, path: Path) -> Iterator[Path]:
        yield path


def _apply(layer: bytes, root: Path) -> None:
    """Unpack a layer as Docker does: deletions delete."""
    command = ["tar", "--extract", "--numeric-owner", "--same-permissions", "--xattrs", "--xattrs-include=*"]
    subprocess.run([*command, f"--directory={root}/."], input=layer, check=True)
    for marker in list(root.rglob(".wh.*")):
        marker.unlink()
        victim = marker.with_name(marker.name.removeprefix(".wh."))
        if victim.is_dir():
            remove_tree(victim)
        else:
            victim.unlink(missing_ok=True)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _digest(path: Path) -> str:
    digest, end = hashlib.sha256(), 0
    with path.open("rb") as file:
        while True:
            try:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError:
                return digest.hexdigest()
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            file.seek(start)
            digest.update(b"%d:%d:" % (start, end) + file.read(end - start))


LAYERS = [
    tar(
        folder(b"etc/"),
        member(b"etc/motd", b"hello"),
        member(b"etc/shadow", b"secret", mode=0o600, uid=1, gid=2),
        member(b"etc/hard", kind=LINK, link=b"etc/motd"),
        folder(b"usr/"),
        folder(b"usr/lib/"),
        member(b"lib", kind=SYMLINK, link=b"usr/lib"),
        member(b"usr/lib/data", bytes(range(256)) * 700),
        folder(b"opt/"),
        member(b"opt/gone", b"gone"),
    ),
    tar(folder(b"etc/"), member(b"etc/new", b"n" * 5000), member(b"opt/.wh.gone"), member(b"lib/late", b"late" * 999)),
    tar(member(b"top", b"top")),
]

CHANGES = [
    trees.write("etc/motd", b"HELLO"),
    trees.remove("etc/new"),
    trees.write("usr/lib/data", b"!", 70_000),
    trees.directory("made"),
    trees.symlink("nowhere", "made/link"),
    trees.chown("etc/shadow", 5, 6),
    trees.set_xattr("etc/shadow", "user.note", b"noted"),
]


def fill(made: DockerDirectory) -> None:
    """Two images that share layers, and a container."""
    made.make_base()
    made.app = made.add_image(["app:1", "app:latest"], LAYERS[:2], Cmd=["sh"])
    made.add_image(["registry.example.com:5000/team/app:2"], LAYERS)
    made.add_container("stopped", made.app, CHANGES)


def assert_moved(target: Config, docker: DockerDirectory) -> None:
    """Fail unless a root has what `fill` made, and other containers of this directory."""
    with open_root(target) as opened:
        images, containers = Images(opened.engine), Containers(opened.engine)
        names = {name for row in images.all() for name in row.names}
        assert names == {
            "docker.io/library/app:1",
            "docker.io/library/app:latest",
            "registry.example.com:5000/team/app:2",
        }
        for row in images.all():
            config = docker.image / "imagedb/content/sha256" / row.id[7:]
            assert row.config == config.read_bytes()
            assert row.size == sum(len(layer) for layer in LAYERS[: len(images.layers(row))])
            for snapshot in images.layers(row):
                assert snapshot.layer is not None
                layer = snapshots.layer(opened.engine.db, snapshot.layer)
                assert b"".join(opened.engine.read_tar(snapshot)) in LAYERS
                assert layer.diff_id
        assert {row.name for row in containers.all()} == {name for name in docker.expected if ":" not in name}
        for container in containers.all():
            found = trees.read_tree(containers.mount(container))
            assert found == docker.expected[container.name], container.name
            assert container.created == 1614834367_123456789
            containers.unmount(container)
        assert list(check(opened.engine)) == []
