"""Layouts and archives made to hurt: each is refused with one of our errors, and nothing outside is ever read."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpmapper.errors import Corrupt, HpmapperError, NoSpace, NotFound, Unsupported
from hpmapper.image import codec, oci, platforms
from hpmapper.image.documents import ImportOptions, imported_config
from hpmapper.image.opening import SourceOptions, open_source
from hpmapper.image.source import Form, SourceImage

LAYER = b"a layer's bytes, which nobody looks at here"
CONFIG = imported_config([oci.sha256(LAYER)], ImportOptions(platform=platforms.parse("linux/amd64")))


def hexdigest(data: bytes) -> str:
    return oci.sha256(data).removeprefix("sha256:")


def refers(data: bytes, media_type: str, **more: Any) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": oci.sha256(data), "size": len(data)} | more


def named(name: str) -> dict[str, str]:
    return {oci.REF_NAME: name}


class Layout:
    """A layout under construction: its files by path."""

    def __init__(self) -> None:
        self.files = {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}'}

    def blob(self, document: object) -> bytes:
        data = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.files[f"blobs/sha256/{hexdigest(data)}"] = data
        return data

    def manifest(self, config: bytes = CONFIG, layers: list[dict[str, Any]] | None = None, **more: Any) -> bytes:
        self.blob(LAYER)
        described = [refers(LAYER, oci.OCI_LAYER)] if layers is None else layers
        whole = {"schemaVersion": 2, "config": refers(self.blob(config), oci.OCI_CONFIG), "layers": described}
        return self.blob(whole | more)

    def index(self, *entries: dict[str, Any]) -> bytes:
        return self.blob({"schemaVersion": 2, "mediaType": oci.OCI_INDEX, "manifests": list(entries)})

    def top(self, *entries: dict[str, Any]) -> Layout:
        self.files["index.json"] = json.dumps({"schemaVersion": 2, "manifests": list(entries)}).encode()
        return self

    def simple(self) -> Layout:
        return self.top(refers(self.manifest(), oci.OCI_MANIFEST))

    def write(self, root: Path) -> Path:
        for path, data in self.files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(data)
        return root

    def tar(self, path: Path) -> Path:
        path.write_bytes(tar_of([member(name, data) for name, data in self.files.items()]))
        return path


Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> Member:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname, entry.size = kind, link, len(data)
    return entry, data


def tar_of(members: list[Member]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for entry, data in members:
            tar.addfile(entry, io.BytesIO(data))
    return out.getvalue()


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    (tmp_path / "spool").mkdir()
    return tmp_path / "spool"


def read(text: str | Path, spool: Path, platform: str = "amd64") -> list[SourceImage]:
    with open_source(str(text), SourceOptions(spool=spool, platform=platforms.parse(platform))) as source:
        images = source.images()
        for image in images:
            for layer in image.layers:
                with layer.open() as stream:
                    stream.read()
    return images


@pytest.fixture(params=["directory", "archive"])
def read_layout(request: pytest.FixtureRequest, tmp_path: Path, spool: Path) -> Callable[..., list[SourceImage]]:
    """Read a layout as either kind."""

    def read_it(layout: Layout, ref: str = "", platform: str = "amd64") -> list[SourceImage]:
        suffix = f":{ref}" if ref else ""
        if request.param == "directory":
            return read(f"oci:{layout.write(tmp_path / 'app')}{suffix}", spool, platform)
        return read(f"oci-archive:{layout.tar(tmp_path / 'app.tar')}{suffix}", spool, platform)

    return read_it


Read = Callable[..., list[SourceImage]]

# ── layouts ──


def test_a_good_one_is_read(read_layout: Read) -> None:
    [image] = read_layout(Layout().simple())
    assert (image.config_bytes, image.names) == (CONFIG, ())
    assert image.layers[0].diff_id == oci.sha256(LAYER)


def test_names_come_from_annotations(read_layout: Read) -> None:
    layout = Layout()
    data = layout.manifest()
    entries = [
        refers(data, oci.OCI_MANIFEST, annotations={oci.CONTAINERD_NAME: "docker.io/library/a:1", oci.REF_NAME: "1"}),
        refers(data, oci.OCI_MANIFEST, annotations=named("b:2")),
        refers(data, oci.OCI_MANIFEST, annotations=named("3")),
        refers(data, oci.OCI_MANIFEST, annotations=named("../../Not a name")),
    ]
    [image] = read_layout(layout.top(*entries))
    assert image.names == ("docker.io/library/a:1", "docker.io/library/b:2", "localhost/app:3")
    [image] = read_layout(layout, ref="b:2")
    assert image.names == ("docker.io/library/b:2",)
    [image] = read_layout(layout, ref="a:1")
    assert image.names == ("docker.io/library/a:1",)
    with pytest.raises(NotFound, match="b:2"):
        read_layout(layout, ref="c")


def test_the_platform_decides_within_an_index(read_layout: Read) -> None:
    layout = Layout()
    entries = []
    for architecture in ("arm64", "amd64", "unknown"):
        config = imported_config([oci.sha256(LAYER)], ImportOptions(platform=platforms.parse(architecture)))
        data = layout.manifest(config)
        entries.append(refers(data, oci.OCI_MANIFEST, platform={"architecture": architecture, "os": "linux"}))
    inner = layout.index(*entries)
    layout.top(refers(layout.index(refers(inner, oci.OCI_INDEX)), oci.OCI_INDEX, annotations=named("multi:1")))
    for architecture in ("arm64", "amd64"):
        [image] = read_layout(layout, platform=architecture)
        assert image.config.architecture == architecture
        assert image.names == ("docker.io/library/multi:1",)
    with pytest.raises(NotFound, match="linux/arm64"):
        read_layout(layout, platform="s390x")
    layout.top(*entries)  # as some tools write it: the platforms at the top
    [image] = read_layout(layout, platform="arm64")
    assert image.config.architecture == "arm64"


def endless(layout: Layout) -> Layout:
    """Digests cannot form a cycle, but a chain may be as long as anyone likes."""
    inner = layout.manifest()
    kind = oci.OCI_MANIFEST
    for _ in range(1000):
        inner, kind = layout.index(refers(inner, kind)), oci.OCI_INDEX
    return layout.top(refers(inner, kind))


def layout_with(change: Callable[[Layout], Any]) -> Layout:
    layout = Layout()
    entry = change(layout)
    return entry if isinstance(entry, Layout) else layout.top(entry)


def without(path: str) -> Callable[[Layout], Layout]:
    def change(layout: Layout) -> Layout:
        del layout.simple().files[path]
        return layout

    return change


def replaced(path: str, data: bytes) -> Callable[[Layout], Layout]:
    def change(layout: Layout) -> Layout:
        layout.simple().files[path] = data
        return layout

    return change


CONFIG_BLOB = f"blobs/sha256/{hexdigest(CONFIG)}"
LAYER_BLOB = f"blobs/sha256/{hexdigest(LAYER)}"

HOSTILE_LAYOUTS: dict[str, Callable[[Layout], Any]] = {
    "traversal in the index": lambda layout: refers(b"", oci.OCI_MANIFEST, digest="sha256:../../../../etc/passwd"),
    "traversal in a manifest": lambda layout: refers(
        layout.manifest(layers=[refers(LAYER, oci.OCI_LAYER, digest="../" * 9 + "etc/passwd")]), oci.OCI_MANIFEST
    ),
    "another algorithm": lambda layout: refers(b"", oci.OCI_MANIFEST, digest="sha512:" + "a" * 128),
    "endless indexes": endless,
    "no index": without("index.json"),
    "no config": without(CONFIG_BLOB),
    "no layer": without(LAYER_BLOB),
    "config of other contents": replaced(CONFIG_BLOB, CONFIG.replace(b"amd64", b"arm64")),
    "layer of other size": replaced(LAYER_BLOB, LAYER + b"x"),
    "huge size": lambda layout: refers(
        layout.manifest(layers=[refers(LAYER, oci.OCI_LAYER, size=2**62)]), oci.OCI_MANIFEST
    ),
    "huge index": replaced("index.json", b" " * (oci.MAX_JSON + 1)),
    "huge manifest": lambda layout: refers(layout.blob(b" " * (oci.MAX_JSON + 1)), oci.OCI_MANIFEST),
    "fewer diff_ids than layers": lambda layout: refers(
        layout.manifest(layers=[refers(LAYER, oci.OCI_LAYER)] * 2), oci.OCI_MANIFEST
    ),
    "more diff_ids than layers": lambda layout: refers(layout.manifest(layers=[]), oci.OCI_MANIFEST),
    "a manifest that is an index": lambda layout: refers(layout.manifest(manifests=[]), oci.OCI_MANIFEST),
    "an index called a manifest": lambda layout: refers(layout.index(), oci.OCI_MANIFEST),
    "a manifest called an index": lambda layout: refers(layout.manifest(), oci.OCI_INDEX),
    "malformed index": replaced("index.json", b"{"),
    "malformed marker": replaced("oci-layout", b"[]"),
}


@pytest.mark.parametrize("change", HOSTILE_LAYOUTS.values(), ids=HOSTILE_LAYOUTS)
def test_hostile_layouts(change: Callable[[Layout], Any], read_layout: Read) -> None:
    with pytest.raises(Corrupt):
        read_layout(layout_with(change))


def test_what_is_no_image_is_said_to_be_none(read_layout: Read) -> None:
    with pytest.raises(NotFound, match="nothing"):
        read_layout(Layout().top())
    layout = Layout()
    helm = layout.blob({"schemaVersion": 2, "config": refers(b"{}", "application/vnd.cncf.helm"), "layers": []})
    layout.blob(b"{}")
    with pytest.raises(Unsupported, match="helm"):
        read_layout(layout.top(refers(helm, oci.OCI_MANIFEST)))
    with pytest.raises(NotFound, match="x/y"):
        read_layout(layout.top(refers(helm, "x/y")))
    squash = layout.manifest(layers=[refers(LAYER, "application/squashfs")])
    with pytest.raises(Unsupported, match="squashfs"):
        read_layout(layout.top(refers(squash, oci.OCI_MANIFEST)))
    layout.files["oci-layout"] = b'{"imageLayoutVersion":"2.0.0"}'
    with pytest.raises(Unsupported, match="version"):
        read_layout(layout)


@given(
    index=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["schemaVersion", "manifests", "mediaType", "digest", "size", "platform"]), inner
            )
        ),
    )
)
@settings(max_examples=50, deadline=None)
def test_any_index_is_read_or_refused(index: object, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("layout")
    layout = Layout().simple()
    layout.files["index.json"] = json.dumps(index).encode()
    with pytest.raises(HpmapperError):
        read(f"oci:{layout.write(root)}", root)
    shutil.rmtree(root)


# ── files that are not files ──


@pytest.mark.parametrize("path", ["index.json", "oci-layout", CONFIG_BLOB, LAYER_BLOB, "blobs", "blobs/sha256"])
@pytest.mark.parametrize("kind", ["inside", "outside", "fifo", "directory"])
def test_a_layout_directory_has_only_plain_files(path: str, kind: str, tmp_path: Path, spool: Path) -> None:
    root = Layout().simple().write(tmp_path / "app")
    away = tmp_path / "away" if kind == "outside" else root / "away"
    (root / path).rename(away)
    if kind == "fifo":
        os.mkfifo(root / path)
    elif kind == "directory":
        (root / path).mkdir()
    else:
        (root / path).symlink_to(away)
    with pytest.raises(Corrupt):
        read(f"oci:{root}", spool)


def test_a_blob_that_shrinks_while_it_is_read(tmp_path: Path, spool: Path) -> None:
    root = Layout().simple().write(tmp_path / "app")
    with open_source(f"oci:{root}", SourceOptions(spool=spool, platform=platforms.parse("amd64"))) as source:
        layer = source.images()[0].layers[0]
        os.truncate(root / LAYER_BLOB, 5)
        with layer.open() as stream, pytest.raises(Corrupt, match="early"):
            stream.read()
        (root / LAYER_BLOB).unlink()
        with pytest.raises(Corrupt, match="vanished"):
            layer.open()


# ── docker archives ──

LEGACY_ID = "1" * 64


def docker_manifest(**changes: Any) -> bytes:
    entry = {"Config": f"{hexdigest(CONFIG)}.json", "RepoTags": ["app:1"], "Layers": [f"{LEGACY_ID}/layer.tar"]}
    return json.dumps([entry | changes]).encode()


def legacy(*more: Member, manifest: bytes | None = None, layer: Member | None = None) -> list[Member]:
    return [
        layer or member(f"{LEGACY_ID}/layer.tar", LAYER),
        member(f"{LEGACY_ID}/VERSION", b"1.0"),
        member(f"{hexdigest(CONFIG)}.json", CONFIG),
        *more,
        member("manifest.json", manifest or docker_manifest()),
        member("repositories", b"{}"),
    ]


def read_tar(members: list[Member], tmp_path: Path, spool: Path, form: str = "") -> list[SourceImage]:
    archive = tmp_path / "saved.tar"
    archive.write_bytes(tar_of(members))
    return read(f"{form}{archive}", spool)


def through(kind: bytes, *targets: str) -> list[Member]:
    """An archive whose layer is a link, to a link, …, to the data."""
    names = [f"{LEGACY_ID}/layer.tar", *(f"link{number}" for number in range(1, len(targets)))]
    links = [member(name, kind=kind, link=target) for name, target in zip(names, targets, strict=True)]
    return legacy(*links[1:], layer=links[0])


GOOD_ARCHIVES = {
    "legacy": legacy(),
    "dots": [(entry, data) for entry, data in ((member(f"./{e.name}", d)) for e, d in legacy())],
    "symlink": [*through(tarfile.SYMTYPE, "../2222/layer.tar"), member("2222/layer.tar", LAYER)],
    "hard link": [*through(tarfile.LNKTYPE, "2222/layer.tar"), member("2222/layer.tar", LAYER)],
    "two symlinks": [*through(tarfile.SYMTYPE, "../link1", "there"), member("there", LAYER)],
    "blobs": [
        member("blobs", kind=tarfile.DIRTYPE),
        member("blobs/", kind=tarfile.DIRTYPE),
        member(CONFIG_BLOB, CONFIG),
        member(LAYER_BLOB, LAYER),
        member("manifest.json", docker_manifest(Config=CONFIG_BLOB, Layers=[LAYER_BLOB])),
    ],
}


@pytest.mark.parametrize("members", GOOD_ARCHIVES.values(), ids=GOOD_ARCHIVES)
def test_docker_archives_of_all_ages(members: list[Member], tmp_path: Path, spool: Path) -> None:
    [image] = read_tar(members, tmp_path, spool)
    assert image.names == ("docker.io/library/app:1",)
    assert image.config_bytes == CONFIG
    with_digest = "blobs" in members[0][0].name
    assert image.layers[0].digest == (oci.sha256(LAYER) if with_digest else None)


def sparse() -> list[Member]:
    layer = member(f"{LEGACY_ID}/layer.tar", LAYER)
    layer[0].pax_headers = {"GNU.sparse.map": "0,1,5,1", "GNU.sparse.size": "9"}
    return legacy(layer=layer)


HOSTILE_ARCHIVES = {
    "link out": through(tarfile.SYMTYPE, "../../etc/passwd"),
    "absolute link": through(tarfile.SYMTYPE, "/etc/passwd"),
    "hard link out": through(tarfile.LNKTYPE, "../etc/passwd"),
    "link to itself": through(tarfile.SYMTYPE, "layer.tar"),
    "circle": through(tarfile.SYMTYPE, "../link1", f"{LEGACY_ID}/layer.tar"),
    "link to a directory": [*through(tarfile.SYMTYPE, "../blobs"), member("blobs", kind=tarfile.DIRTYPE)],
    "device": legacy(layer=member(f"{LEGACY_ID}/layer.tar", kind=tarfile.CHRTYPE)),
    "two configs": legacy(member(f"{hexdigest(CONFIG)}.json", CONFIG.replace(b"amd64", b"arm64"))),
    "two manifests": legacy(member("./manifest.json", docker_manifest(RepoTags=["other:1"]))),
    "member outside": legacy(member("../../etc/cron.d/x", b"x")),
    "absolute member": legacy(member("/etc/cron.d/x", b"x")),
    "layer outside": legacy(manifest=docker_manifest(Layers=["../../etc/passwd"])),
    "absolute layer": legacy(manifest=docker_manifest(Layers=["/etc/passwd"])),
    "missing layer": legacy(manifest=docker_manifest(Layers=["nowhere"])),
    "missing config": legacy(manifest=docker_manifest(Config="nowhere")),
    "config is a directory": legacy(member("d", kind=tarfile.DIRTYPE), manifest=docker_manifest(Config="d")),
    "config of other contents": legacy(
        member(f"{'0' * 64}.json", CONFIG), manifest=docker_manifest(Config=f"{'0' * 64}.json")
    ),
    "fewer layers": legacy(manifest=docker_manifest(Layers=None)),
    "more layers": legacy(manifest=docker_manifest(Layers=[f"{LEGACY_ID}/layer.tar"] * 2)),
    "malformed manifest": legacy(manifest=b"{}"),
    "sparse": sparse(),
}


@pytest.mark.parametrize("members", HOSTILE_ARCHIVES.values(), ids=HOSTILE_ARCHIVES)
def test_hostile_archives(members: list[Member], tmp_path: Path, spool: Path) -> None:
    with pytest.raises((Corrupt, Unsupported)):
        read_tar(members, tmp_path, spool, f"{Form.DOCKER}:")
    assert not any(spool.iterdir())


def test_no_image_in_it(tmp_path: Path, spool: Path) -> None:
    with pytest.raises(NotFound, match="has none"):
        read_tar(legacy(manifest=b"[]"), tmp_path, spool)
    with pytest.raises(Corrupt, match="manifest"):
        read_tar([member("repositories", b"{}")], tmp_path, spool, f"{Form.DOCKER}:")


def test_a_cut_archive_is_refused_wherever_it_is_cut(tmp_path: Path, spool: Path) -> None:
    whole = tar_of(legacy())
    archive = tmp_path / "cut.tar"
    end = len(whole.rstrip(b"\0"))
    for length in range(0, end, 256):
        archive.write_bytes(whole[:length])
        with pytest.raises(Corrupt):
            read(f"docker-archive:{archive}", spool)


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_a_damaged_compressed_archive_is_refused(compression: str, tmp_path: Path, spool: Path) -> None:
    packed = io.BytesIO()
    with codec.compressed(packed, compression) as stream:
        stream.write(tar_of(legacy()))
    data = packed.getvalue()
    archive = tmp_path / "damaged.tar"
    for bad in (data[:-3], data[: len(data) // 2], data[:40] + bytes(40) + data[80:], data[:8]):
        archive.write_bytes(bad)
        for text in (f"docker-archive:{archive}", str(archive)):
            with pytest.raises(Corrupt):
                read(text, spool)
    assert not any(spool.iterdir())


def header(name: bytes, kind: bytes, size: bytes) -> bytes:
    """A tar header with a size that no library would write."""
    block = bytearray(512)
    block[0 : len(name)] = name
    block[100:108] = b"0000644\0"
    block[124:136] = size.ljust(12, b"\0")
    block[148:156] = b" " * 8
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    "data",
    [
        header(b"x", b"0", b"\xff" * 12) + bytes(1024),
        header(b"x", b"0", b"\xff" * 10 + b"\xfa\x00") + bytes(1024),  # CVE-2025-8194: goes backwards for ever
        header(b"x", b"L", b"\x80" + b"\x00" * 6 + b"\x7f" * 5) + bytes(1024),  # a name of terabytes
        header(b"x", b"x", b"77777777777\0") + bytes(1024),  # a pax header of 8 GiB
        header(b"x", b"0", b"77777777777\0") + bytes(1024),  # data of 8 GiB
        header(b"x", b"0", b"00000000000\0") + b"garbage".ljust(512, b"!") + bytes(1024),
        b"not a tar at all" * 100,
        b"",
    ],
    ids=["-1", "negative", "long name", "pax", "data", "garbage", "text", "empty"],
)
def test_hostile_tars(data: bytes, tmp_path: Path, spool: Path) -> None:
    archive = tmp_path / "hostile.tar"
    archive.write_bytes(data)
    for text in (f"docker-archive:{archive}", f"oci-archive:{archive}", str(archive)):
        with pytest.raises(Corrupt):
            read(text, spool)


def test_other_compressions_are_named(tmp_path: Path, spool: Path) -> None:
    for magic, name in ((b"\xfd7zXZ\0", "xz"), (b"BZh91A", "bzip2")):
        (tmp_path / "x.tar").write_bytes(magic + bytes(1000))
        with pytest.raises(Unsupported, match=name):
            read(tmp_path / "x.tar", spool)


def test_a_bomb_stops_before_the_disk_is_full(tmp_path: Path, spool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "_SPOOL_FLOOR", 2.0)
    with (tmp_path / "bomb").open("wb") as out, codec.compressed(out, "gzip") as packed:
        packed.write(tar_of(legacy()))
    with pytest.raises(NoSpace):
        read(f"docker-archive:{tmp_path}/bomb", spool)
    assert not any(spool.iterdir())


@given(
    names=st.lists(
        st.sampled_from(["etc", "usr/bin/x", "blobs", "manifest.json", "./app", "a/b", "index.json", "../x"]),
        unique=True,
        max_size=6,
    ),
    cut=st.integers(0, 4096),
)
@settings(max_examples=100, deadline=None)
def test_any_tar_is_read_or_refused(names: list[str], cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("tar")
    data = tar_of([member(name, b"x") for name in names])
    (root / "it.tar").write_bytes(data[:-cut] if cut else data)
    try:
        read(root / "it.tar", root)
    except HpmapperError:
        pass
    shutil.rmtree(root)
