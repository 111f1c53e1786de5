"""Docker's own storage directory with the devicemapper driver (up to Docker 24), as a source. It is only read.

    image/devicemapper/repositories.json               names of images
    image/devicemapper/imagedb/content/sha256/ID       their configurations
    image/devicemapper/layerdb/sha256/CHAIN/           layers: diff, cache-id, size, tar-split.json.gz
    image/devicemapper/layerdb/mounts/CONTAINER/       mount-id, parent
    containers/CONTAINER/config.v2.json                containers
    devicemapper/metadata/NAME                         thin devices, by cache id or mount id
    devicemapper/data, metadata                        the pool's files, if it lies in such

What is in all these files is checked as input: a digest is computed from what it names, a name becomes a path only if
it is of Docker's form.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated, BinaryIO, TypeVar

import msgspec

from hpmapper.engine import chain_id
from hpmapper.errors import Corrupt, FailedPrecondition, InvalidArgument, NotFound, Unsupported
from hpmapper.image import oci, reference
from hpmapper.kernel import dm, lock
from hpmapper.migrate.source import ContainerItem, Contents, ImageItem, LayerItem, SnapshotItem
from hpmapper.migrate.tarsplit import assemble
from hpmapper.migrate.thinroot import PoolPlace, ThinRoots
from hpmapper.model import Kind, object_name, oci_digest
from hpmapper.pipe import piped
from hpmapper.pool.base import parse_size

_DRIVER = "devicemapper"
_ROOT_IN_DEVICE = "rootfs"
_HEX = re.compile(r"[0-9a-f]{64}")
_DEVICE_NAME = re.compile(r"[0-9a-f]{64}(-init)?")
_FRACTION = re.compile(r"\.\d+")
_HELD = ("volumes/metadata.db", "network/files/local-kv.db", "buildkit/metadata_v2.db")
"""Databases (bbolt) that dockerd keeps locked while it runs."""

_T = TypeVar("_T")


class _Repositories(msgspec.Struct, frozen=True, rename="pascal"):
    repositories: dict[str, dict[str, str]] = {}


class _Container(msgspec.Struct, frozen=True):
    id: str = msgspec.field(name="ID")
    name: str = msgspec.field(name="Name")
    image: str = msgspec.field(name="Image")
    created: str = msgspec.field(name="Created", default="")
    driver: str = msgspec.field(name="Driver", default="")


class _HostConfig(msgspec.Struct, frozen=True, rename="pascal"):
    storage_opt: dict[str, str] | None = None


class _Device(msgspec.Struct, frozen=True):
    device_id: Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFF)]
    size: Annotated[int, msgspec.Meta(ge=512, le=2**60)]
    deleted: bool = False


class DockerDevicemapper:
    """See the module's text, and `hpmapper.migrate.source.Source`."""

    def __init__(self, root: Path, roots: ThinRoots) -> None:
        self.name = f"Docker's directory {root}"
        self._root = root
        self._image = root / "image" / _DRIVER
        self._roots = roots

    def contents(self) -> Contents:
        images = list(self._images())
        layers: dict[str, SnapshotItem] = {}
        for image in images:
            self._chain(oci.decode_config(image.config, f"image {image.id}").diff_ids, layers, image)
        containers = list(self._containers(layers, {image.id: image for image in images}))
        return Contents([*layers.values(), *containers], images)

    # Images.

    def _images(self) -> Iterator[ImageItem]:
        names = self._names()
        for file in sorted((self._image / "imagedb/content/sha256").glob("*")):
            if not _HEX.fullmatch(file.name):
                raise Corrupt(f"{file} is not named as an image is")
            image = f"sha256:{file.name}"
            config = _read(file)
            if oci.sha256(config) != image:
                raise Corrupt(f"{file} is not the configuration that its name says: its digest is {oci.sha256(config)}")
            decoded = oci.decode_config(config, f"image {image}")
            diff_ids = decoded.diff_ids
            top = _chain_ids(diff_ids)[-1] if diff_ids else None
            yield ImageItem(image, config, top, file.stat().st_mtime_ns, tuple(sorted(names.get(image, ()))))

    def _names(self) -> Mapping[str, set[str]]:
        file = self._image / "repositories.json"
        found: dict[str, set[str]] = {}
        if not file.exists():
            return found
        for names in _decoded(file, _Repositories).repositories.values():
            for name, image in names.items():
                try:
                    found.setdefault(oci_digest(image), set()).add(reference.normalised(name))
                except InvalidArgument as error:
                    raise Corrupt(f"{file}: {error.message}") from None
        return found

    def _chain(self, diff_ids: Iterable[str], layers: dict[str, SnapshotItem], image: ImageItem) -> None:
        diff_ids = list(diff_ids)
        parent: str | None = None
        for chain, diff_id in zip(_chain_ids(diff_ids), diff_ids, strict=True):
            if chain not in layers:
                layers[chain] = SnapshotItem(
                    chain, Kind.COMMITTED, parent, image.created, image.created, self._layer(chain, diff_id)
                )
            parent = chain

    def _layer(self, chain: str, diff_id: str) -> LayerItem:
        place = self._image / "layerdb/sha256" / chain.removeprefix("sha256:")
        if not place.is_dir():
            raise Corrupt(f"layer {chain} is missing: there is no {place}")
        noted = _read(place / "diff").decode("ascii", "replace")
        if noted != diff_id:
            raise Corrupt(f"{place / 'diff'} says {noted[:100]!r}, but the image's layer is {diff_id}")
        device = self._device(_read(place / "cache-id").decode("ascii", "replace"))
        records = place / "tar-split.json.gz"
        return LayerItem(f"layer {chain}", diff_id, _number(place / "size"), lambda: self._tar(records, device))

    @contextmanager
    def _tar(self, records: Path, device: _Device) -> Iterator[BinaryIO]:
        with (
            self._roots.root(device.device_id, device.size, _ROOT_IN_DEVICE) as root,
            piped(lambda out: out.writelines(assemble(records, root))) as tar,
        ):
            yield tar

    def _device(self, name: str) -> _Device:
        if not _DEVICE_NAME.fullmatch(name):
            raise Corrupt(f"{name[:100]!r} is no name of a device of Docker's")
        file = self._root / "devicemapper/metadata" / name
        device = _decoded(file, _Device)
        if device.deleted:
            raise Corrupt(f"{file}: the device is marked as deleted")
        return device

    # Containers.

    def _containers(
        self, layers: Mapping[str, SnapshotItem], images: Mapping[str, ImageItem]
    ) -> Iterator[SnapshotItem]:
        for place in sorted((self._root / "containers").glob("*")):
            if not (place / "config.v2.json").exists():
                continue
            container = _decoded(place / "config.v2.json", _Container)
            if container.driver == _DRIVER:
                yield self._container(place, container, layers, images)

    def _container(
        self,
        place: Path,
        container: _Container,
        layers: Mapping[str, SnapshotItem],
        images: Mapping[str, ImageItem],
    ) -> SnapshotItem:
        if not _HEX.fullmatch(container.id) or container.id != place.name:
            raise Corrupt(f"{place / 'config.v2.json'} is not this container's: it says {container.id[:80]!r}")
        try:
            name = object_name(container.name.removeprefix("/"), "container")
        except InvalidArgument as error:
            raise Corrupt(f"{place / 'config.v2.json'}: {error.message}") from None
        image = images.get(container.image)
        if image is None:
            raise Corrupt(f"container {name!r}: its image {container.image[:80]} is not there")
        mounts = self._image / "layerdb/mounts" / container.id
        parent = _read(mounts / "parent").decode("ascii", "replace") if (mounts / "parent").exists() else None
        if parent != image.top or (parent is not None and parent not in layers):
            raise Corrupt(f"container {name!r} stands on {parent}, but its image's top layer is {image.top}")
        device = self._device(_read(mounts / "mount-id").decode("ascii", "replace"))
        created = _moment(container.created) or place.stat().st_mtime_ns
        return SnapshotItem(
            key=f"container-{name}",
            kind=Kind.ACTIVE,
            parent=parent,
            created=created,
            updated=created,
            size_limit=_size_limit(place / "hostconfig.json"),
            container=ContainerItem(name, image.id, created),
            root=partial(self._roots.root, device.device_id, device.size, _ROOT_IN_DEVICE),
        )


DOCKER_DEVICEMAPPER = "docker-devicemapper"
"""What the source is called where a driver is named."""


@contextmanager
def docker_devicemapper(root: Path, options: Mapping[str, str]) -> Iterator[DockerDevicemapper]:
    """Docker's directory at `root`, held so that no dockerd starts on it; `options` say where its pool is.

    Raises:
        NotFound: there is none. FailedPrecondition: dockerd, or a container of its, uses it.
    """
    home = root / _DRIVER
    if not (home / "metadata").is_dir() and not (home / "data").exists():
        raise NotFound(f"{root} has no devicemapper directory of Docker's", hint="name Docker's data-root: --from-root")
    _require_device_mapper()
    with ExitStack() as stack:
        for name in _HELD:
            _hold(root / name, stack)
        prefix = _prefix(home)
        active = [name for name in dm.devices() if name.startswith(f"docker-{prefix}-")]
        if active:
            raise FailedPrecondition(
                f"Docker's directory {root} is in use: the device {active[0]} is active",
                hint="stop Docker and its containers: systemctl stop docker.socket docker; dmsetup remove what is left",
            )
        with ThinRoots(_place(home, options), f"hpmapper-import-{prefix}") as roots:
            yield DockerDevicemapper(root, roots)


def _require_device_mapper() -> None:
    try:
        dm.version()
    except OSError as error:
        raise Unsupported(
            f"Docker's thin pools cannot be read here: {error.strerror}", hint="modprobe dm_thin_pool dm_snapshot"
        ) from None


def _hold(file: Path, stack: ExitStack) -> None:
    """Share dockerd's lock on one of its databases, without opening it for writing."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    stack.callback(os.close, fd)
    try:
        stack.enter_context(lock.shared(fd, timeout=0))
    except BlockingIOError:
        raise FailedPrecondition(
            f"dockerd is running: it holds {file}", hint="stop it: systemctl stop docker.socket docker"
        ) from None


def _prefix(home: Path) -> str:
    """What Docker puts into the names of a directory's devices (daemon/graphdriver/devmapper, initDevmapper)."""
    status = home.stat()
    return f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}-{status.st_ino}"


def _place(home: Path, options: Mapping[str, str]) -> PoolPlace:
    if "dm.thinpooldev" in options:
        return PoolPlace(active=options["dm.thinpooldev"].removeprefix("/dev/mapper/"))
    if "dm.datadev" in options or "dm.metadatadev" in options:
        if not {"dm.datadev", "dm.metadatadev"} <= options.keys():
            raise InvalidArgument("dm.datadev and dm.metadatadev belong together")
        return PoolPlace(data=Path(options["dm.datadev"]), metadata=Path(options["dm.metadatadev"]))
    if (home / "setup-config.json").exists():
        return PoolPlace(active="docker-thinpool")  # direct-lvm as Docker sets it up
    data, metadata = home / "devicemapper/data", home / "devicemapper/metadata"
    if not data.exists():
        raise NotFound(
            f"the thin pool of {home} is not in files", hint="name it as in daemon.json: --from-opt dm.thinpooldev=NAME"
        )
    return PoolPlace(data=data, metadata=metadata)


def _chain_ids(diff_ids: Iterable[str]) -> list[str]:
    found: list[str] = []
    for diff_id in diff_ids:
        found.append(chain_id(found[-1] if found else None, diff_id))
    return found


def _read(file: Path) -> bytes:
    try:
        with file.open("rb") as data:
            content = data.read(oci.MAX_JSON + 1)
    except OSError as error:
        raise Corrupt(f"{file} cannot be read: {error.strerror}") from None
    if len(content) > oci.MAX_JSON:
        raise Corrupt(f"{file} has more than {oci.MAX_JSON} bytes")
    return content


def _decoded(file: Path, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(_read(file), type=kind)
    except msgspec.DecodeError as error:
        raise Corrupt(f"{file} is not understood: {error}") from None


def _number(file: Path) -> int:
    text = _read(file)
    if not text.isdigit() or len(text) > 18:
        raise Corrupt(f"{file} has no number: {text[:40]!r}")
    return int(text)


def _moment(text: str) -> int | None:
    """A time as Docker writes it, in nanoseconds since 1970; None for none."""
    try:
        moment = datetime.fromisoformat(_FRACTION.sub("", text))
    except ValueError:
        return None
    fraction = _FRACTION.search(text)
    return int(moment.timestamp()) * 10**9 + (int(fraction[0][1:10].ljust(9, "0")) if fraction else 0)


def _size_limit(file: Path) -> int | None:
    """A container's own size; one of the base device's size has no limit of its own."""
    if not file.exists():
        return None
    size = (_decoded(file, _HostConfig).storage_opt or {}).get("size")
    if size is None:
        return None
    try:
        return parse_size(size)
    except InvalidArgument as error:
        raise Corrupt(f"{file}: {error.message}") from None
