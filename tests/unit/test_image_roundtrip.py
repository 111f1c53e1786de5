"""Images that are saved and read again are the same images, for us and for skopeo."""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
import subprocess
import tarfile
import threading
from pathlib import Path
from typing import BinaryIO, cast

import pytest

from hpmapper.errors import AlreadyExists, Corrupt, InvalidArgument, NotFound
from hpmapper.image import codec, oci
from hpmapper.image.documents import ImportOptions, imported_config
from hpmapper.image.opening import SourceOptions, open_source
from hpmapper.image.save import SavedImage, SavedLayer, SaveForm, save, save_to_stream
from hpmapper.image.source import LayerBlob, SourceImage, Unpacked

needs_skopeo = pytest.mark.skipif(not shutil.which("skopeo"), reason="apt-get install skopeo to run it")


def tar_of(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return out.getvalue()


BASE, TOP = tar_of({"etc/os-release": b"ID=test\n" * 5000}), tar_of({"usr/bin/app": random.Random(1).randbytes(70_000)})
OTHER = tar_of({"opt/other": b"other" * 10_000})


def saved(layer: bytes) -> SavedLayer:
    return SavedLayer(oci.sha256(layer), len(layer), lambda: io.BytesIO(layer))


def an_image(*layers: bytes, names: tuple[str, ...] = (), cmd: str = "/usr/bin/app") -> SavedImage:
    layers_saved = tuple(map(saved, layers))
    config = imported_config([layer.diff_id for layer in layers_saved], ImportOptions(cmd=(cmd,)))
    # Bytes that a parser and a writer of JSON would not give back as they were.
    return SavedImage(names, b" " + config[:-1] + b' ,"x.unknown" : 1.50}\n', layers_saved)


IMAGES = [
    an_image(BASE, TOP, names=("debian:12", "registry.example.com/team/app:1.0")),
    an_image(BASE, names=("base",), cmd="/bin/sh"),
    an_image(BASE, BASE, TOP, cmd="/unnamed"),
]


def contents(layer: LayerBlob) -> bytes:
    """What the ingest side does with a layer, in short."""
    with layer.open() as raw:
        packed = raw.read()
    assert layer.size in (None, len(packed))
    assert layer.digest in (None, oci.sha256(packed))
    compression = oci.layer_compression(layer.media_type, "it")
    with codec.decompressed(io.BytesIO(packed), compression) as stream:
        plain = stream.read()
    assert layer.diff_id in (None, oci.sha256(plain))
    return plain


def finished(image: SourceImage) -> SourceImage:
    plain = [contents(layer) for layer in image.layers]
    return image.finish([Unpacked(oci.sha256(layer), len(layer)) for layer in plain])


@pytest.fixture
def options(tmp_path: Path) -> SourceOptions:
    spool = tmp_path / "spool"
    spool.mkdir()
    return SourceOptions(spool=spool)


def images_of(text: str, options: SourceOptions) -> list[SourceImage]:
    with open_source(text, options) as source:
        images = [finished(image) for image in source.images()]
    assert not any(options.spool.iterdir())
    return images


def facts(images: list[SourceImage]) -> dict[bytes, tuple[tuple[str, ...], list[str]]]:
    return {image.config_bytes: (image.names, image.config.diff_ids) for image in images}


EXPECTED = {
    IMAGES[0].config_bytes: (
        ("docker.io/library/debian:12", "registry.example.com/team/app:1.0"),
        [oci.sha256(BASE), oci.sha256(TOP)],
    ),
    IMAGES[1].config_bytes: (("docker.io/library/base:latest",), [oci.sha256(BASE)]),
    IMAGES[2].config_bytes: ((), [oci.sha256(BASE), oci.sha256(BASE), oci.sha256(TOP)]),
}


@pytest.mark.parametrize("compression", codec.COMPRESSIONS)
@pytest.mark.parametrize("form", SaveForm)
def test_saved_images_read_back(form: SaveForm, compression: str, tmp_path: Path, options: SourceOptions) -> None:
    target = tmp_path / "saved"
    save(IMAGES, target, form, compression=compression)
    assert facts(images_of(str(target), options)) == EXPECTED
    assert facts(images_of(f"{form}:{target}", options)) == EXPECTED
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["saved", "spool"]


@pytest.mark.parametrize("outer", ["gzip", "zstd"])
@pytest.mark.parametrize("form", [SaveForm.OCI_ARCHIVE, SaveForm.DOCKER_ARCHIVE])
def test_compressed_archives_and_standard_input(
    form: SaveForm, outer: str, tmp_path: Path, options: SourceOptions
) -> None:
    target = tmp_path / "saved"
    with target.open("wb") as out, codec.compressed(out, outer) as packed:
        save_to_stream(IMAGES, packed, form, spool=tmp_path)
    assert facts(images_of(str(target), options)) == EXPECTED
    for text in ("-", f"{form}:-"):
        with subprocess.Popen(["cat", target], stdout=subprocess.PIPE) as cat:
            stdin = cast(BinaryIO, cat.stdout)
            found = images_of(text, SourceOptions(spool=options.spool, stdin=stdin))
        assert facts(found) == EXPECTED


def test_a_docker_archive_is_also_read_by_its_manifest_json(tmp_path: Path, options: SourceOptions) -> None:
    save(IMAGES, tmp_path / "saved", SaveForm.DOCKER_ARCHIVE)
    [base] = images_of(f"docker-archive:{tmp_path}/saved:base", options)
    assert base.names == ("docker.io/library/base:latest",)
    made = oci.decode_manifest(base.manifest_bytes, "it")
    assert isinstance(made, oci.Manifest)
    assert [(layer.digest, layer.size) for layer in made.layers] == [(oci.sha256(BASE), len(BASE))]
    with pytest.raises(NotFound, match="debian:12"):
        images_of(f"docker-archive:{tmp_path}/saved:other", options)


@pytest.mark.parametrize("compression", codec.COMPRESSIONS)
@pytest.mark.parametrize("form", [SaveForm.OCI_ARCHIVE, SaveForm.DOCKER_ARCHIVE])
def test_the_same_images_give_the_same_bytes(form: SaveForm, compression: str, tmp_path: Path) -> None:
    save(IMAGES, tmp_path / "1", form, compression=compression)
    save([IMAGES[2], IMAGES[0], IMAGES[1], IMAGES[0]], tmp_path / "2", form, compression=compression)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    out = io.BytesIO()
    save_to_stream(reversed(IMAGES), out, form, compression=compression, spool=tmp_path)
    assert out.getvalue() == (tmp_path / "1").read_bytes()


def broken(data: bytes, size: int, content: bytes) -> SavedImage:
    layer = SavedLayer(oci.sha256(data), size, lambda: io.BytesIO(content))
    return SavedImage((), imported_config([layer.diff_id], ImportOptions()), (layer,))


def failing() -> BinaryIO:
    raise RuntimeError("no stream")


@pytest.mark.parametrize("compression", ["none", "gzip"])
@pytest.mark.parametrize("form", SaveForm)
@pytest.mark.parametrize(
    ("image", "error"),
    [
        (broken(OTHER, len(OTHER), OTHER[:-1]), Corrupt),
        (broken(OTHER, len(OTHER), OTHER + b"x"), Corrupt),
        (broken(OTHER, len(OTHER), TOP[: len(OTHER)].ljust(len(OTHER))), Corrupt),
        (broken(OTHER, len(OTHER) - 1, OTHER), Corrupt),
        (broken(OTHER, len(OTHER) + 1, OTHER), Corrupt),
        (an_image(OTHER)._replace(layers=(saved(OTHER)._replace(open=failing),)), RuntimeError),
    ],
    ids=["short", "long", "other", "size-1", "size+1", "failing"],
)
def test_a_save_that_goes_wrong_leaves_nothing(
    form: SaveForm, compression: str, image: SavedImage, error: type[Exception], tmp_path: Path
) -> None:
    target = tmp_path / "saved"
    if form is not SaveForm.LAYOUT:
        target.write_text("before")
    with pytest.raises(error):
        save([IMAGES[0], image], target, form, compression=compression)
    assert [path.read_text() for path in tmp_path.iterdir()] == ([] if form is SaveForm.LAYOUT else ["before"])


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    target = tmp_path / "saved"
    for images in ([], [IMAGES[0]._replace(layers=())], [IMAGES[0]._replace(names=("Bad Name",))]):
        with pytest.raises(InvalidArgument):
            save(images, target, SaveForm.OCI_ARCHIVE)
    with pytest.raises(InvalidArgument, match="plain file"):
        save(IMAGES, Path("/dev/null"), SaveForm.OCI_ARCHIVE)
    with pytest.raises(NotFound):
        save(IMAGES, tmp_path / "no" / "where", SaveForm.OCI_ARCHIVE)
    save(IMAGES, target, SaveForm.LAYOUT)
    with pytest.raises(AlreadyExists):
        save(IMAGES, target, SaveForm.LAYOUT)


def test_progress_counts_each_layer_once(tmp_path: Path) -> None:
    read: list[int] = []
    save(IMAGES, tmp_path / "saved", SaveForm.OCI_ARCHIVE, progress=read.append)
    assert sum(read) == len(BASE) + len(TOP)


# ── root file systems ──


@pytest.mark.parametrize("compression", codec.COMPRESSIONS)
@pytest.mark.parametrize("prefix", ["", "tar:"])
def test_a_root_file_system_tar(compression: str, prefix: str, tmp_path: Path, options: SourceOptions) -> None:
    packed = tmp_path / "root.tar"
    with packed.open("wb") as out:
        if compression == "none":
            out.write(BASE)
        else:
            with codec.compressed(out, compression) as stream:
                stream.write(BASE)
    imported = ImportOptions(cmd=("/bin/sh",), names=("mine:1",))
    [image] = images_of(f"{prefix}{packed}", SourceOptions(spool=options.spool, imported=imported))
    assert image.config.diff_ids == [oci.sha256(BASE)]
    assert image.config.settings.cmd == ["/bin/sh"]
    assert image.names == ("docker.io/library/mine:1",)
    assert isinstance(oci.decode_manifest(image.manifest_bytes, "it"), oci.Manifest)


def names_tar(directory: Path, out: BinaryIO) -> None:
    out.write(tar_of({path.name: b"x" * 300_000 for path in sorted(directory.iterdir())}))


def failing_tar(directory: Path, out: BinaryIO) -> None:
    out.write(b"x" * 300_000)
    raise Corrupt("the disk broke")


def test_a_root_file_system_directory(tmp_path: Path, options: SourceOptions) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "file").touch()
    with_tar = SourceOptions(spool=options.spool, tar_directory=names_tar)
    for text in (f"{tmp_path}/root", f"dir:{tmp_path}/root"):
        [image] = images_of(text, with_tar)
        assert image.config.diff_ids == [oci.sha256(tar_of({"file": b"x" * 300_000}))]
    with pytest.raises(InvalidArgument):
        open_source(f"dir:{tmp_path}/root", options)


def test_a_failing_tar_writer_is_not_the_end_of_the_file(tmp_path: Path, options: SourceOptions) -> None:
    with_tar = SourceOptions(spool=options.spool, tar_directory=failing_tar)
    with pytest.raises(Corrupt, match="the disk broke"):
        images_of(f"dir:{tmp_path}", with_tar)
    threads = threading.active_count()
    with open_source(f"dir:{tmp_path}", with_tar) as source:
        stream = source.images()[0].layers[0].open()
        stream.read(10)
        stream.close()  # the writer is in the middle of its writing
    assert threading.active_count() == threads


def test_other_contents_than_the_config_says_are_refused(tmp_path: Path, options: SourceOptions) -> None:
    save(IMAGES, tmp_path / "saved", SaveForm.OCI_ARCHIVE)
    with open_source(str(tmp_path / "saved"), options) as source, pytest.raises(Corrupt, match="DiffID"):
        source.images()[0].finish([])


def test_a_layer_cannot_be_opened_once_its_source_is_closed(tmp_path: Path, options: SourceOptions) -> None:
    save(IMAGES, tmp_path / "saved", SaveForm.OCI_ARCHIVE)
    with open_source(str(tmp_path / "saved"), options) as source:
        layer = source.images()[0].layers[0]
        stream = layer.open()
    with stream:
        assert len(stream.read()) == layer.size
    with pytest.raises(ValueError, match="closed"):
        layer.open()


def test_unknown_sources(options: SourceOptions) -> None:
    with pytest.raises(NotFound, match="docker://debian"):
        open_source("debian", options)
    with pytest.raises(InvalidArgument):
        open_source("oci:", options)
    with pytest.raises(InvalidArgument, match="image reference"):
        open_source("docker://Bad", options)
    for text in ("oci:/no/such", "tar:/no/such", "oci-archive:/no/such"):
        with pytest.raises(NotFound), open_source(text, options):
            pass


# ── skopeo as the judge ──


def skopeo(*arguments: str) -> str:
    return subprocess.run(["skopeo", *arguments], check=True, capture_output=True, text=True).stdout


@needs_skopeo
@pytest.mark.parametrize("compression", codec.COMPRESSIONS)
def test_skopeo_reads_our_layout(compression: str, tmp_path: Path) -> None:
    save(IMAGES[:1], tmp_path / "saved", SaveForm.LAYOUT, compression=compression)
    told = json.loads(skopeo("inspect", f"oci:{tmp_path}/saved:12"))
    assert told["Architecture"] == "amd64"
    assert len(told["Layers"]) == 2
    raw = skopeo("inspect", "--config", "--raw", f"oci:{tmp_path}/saved:12")
    assert raw.encode() == IMAGES[0].config_bytes


@needs_skopeo
@pytest.mark.parametrize("compression", ["none", "gzip"])
@pytest.mark.parametrize(
    ("form", "source"),
    [
        (SaveForm.DOCKER_ARCHIVE, "docker-archive:{}:docker.io/library/base:latest"),
        (SaveForm.OCI_ARCHIVE, "oci-archive:{}:latest"),
    ],
)
def test_skopeo_copies_our_archives_and_we_read_its_copies(
    form: SaveForm, source: str, compression: str, tmp_path: Path, options: SourceOptions
) -> None:
    save(IMAGES, tmp_path / "saved", form, compression=compression)
    ours = source.format(tmp_path / "saved")
    for target in ("oci:{}/1:base:v1", "oci-archive:{}/2:base:v1", "docker-archive:{}/3:base:v1"):
        theirs = target.format(tmp_path)
        skopeo("copy", ours, theirs)
        for text in (theirs, theirs.partition(":")[2].partition(":")[0]):
            [image] = images_of(text, options)
            assert image.config.diff_ids == [oci.sha256(BASE)]
            assert image.config.settings.cmd == ["/bin/sh"]
            assert image.names == ("docker.io/library/base:v1",)


@needs_skopeo
def test_digests_are_what_sha256sum_says(tmp_path: Path) -> None:
    save(IMAGES, tmp_path / "saved", SaveForm.LAYOUT, compression="gzip")
    for blob in (tmp_path / "saved" / "blobs" / "sha256").iterdir():
        assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name
