"""Documents, platforms and references: values in, values or one clear error out."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpmapper.errors import Corrupt, HpmapperError, InvalidArgument, Unsupported
from hpmapper.image import oci, platforms, reference
from hpmapper.image.documents import ImportOptions, committed_config, imported_config, manifest
from hpmapper.image.platforms import Platform

A, B, C = (f"sha256:{letter * 64}" for letter in "abc")


def descriptor(**changes: Any) -> dict[str, Any]:
    return {"mediaType": oci.OCI_LAYER, "digest": A, "size": 3} | changes


def a_manifest(**changes: Any) -> bytes:
    whole = {"schemaVersion": 2, "config": descriptor(), "layers": [descriptor()]} | changes
    return json.dumps(whole).encode()


def a_config(**changes: Any) -> bytes:
    whole = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [A]}} | changes
    return json.dumps(whole).encode()


def test_chain_id_follows_the_specification() -> None:
    assert oci.chain_id([A]) == A
    two = oci.sha256(f"{A} {B}".encode())
    assert oci.chain_id([A, B]) == two
    assert oci.chain_id([A, B, C]) == oci.sha256(f"{two} {C}".encode())
    with pytest.raises(InvalidArgument):
        oci.chain_id([])
    with pytest.raises(InvalidArgument):
        oci.chain_id([A, "sha256:../../etc/passwd"])


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"layers": [descriptor(digest="sha256:../../../etc/passwd")]}, "$.layers[0]"),
        ({"layers": [descriptor(), descriptor(digest="md5:" + "a" * 32)]}, "$.layers[1]"),
        ({"layers": [descriptor(size=-1)]}, "$.layers[0].size"),
        ({"layers": [descriptor(size=10**30)]}, "$.layers[0].size"),
        ({"layers": [descriptor(size="3")]}, "$.layers[0].size"),
        ({"layers": {}}, "$.layers"),
        ({"config": None}, "$.config"),
        ({"config": descriptor(mediaType=7)}, "$.config.mediaType"),
        ({"schemaVersion": 1}, "schemaVersion"),
    ],
)
def test_a_bad_manifest_is_named_with_its_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(Corrupt) as caught:
        oci.decode_manifest(a_manifest(**changes), "manifest X")
    assert "manifest X" in str(caught.value)
    assert field in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b'{"a":"\xff"}', b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"{} x"],
    ids=["empty", "cut", "list", "null", "utf8", "deep", "tail"],
)
def test_malformed_json_is_corrupt(data: bytes) -> None:
    for kind in (oci.Manifest, oci.Index, oci.ImageConfig):
        with pytest.raises(Corrupt):
            oci.decode(data, kind, "it")


def test_a_document_has_a_limit() -> None:
    with pytest.raises(Corrupt, match="more than"):
        oci.decode(b" " * (oci.MAX_JSON + 1), oci.Manifest, "it")


def test_a_manifest_that_is_also_an_index_is_refused() -> None:
    with pytest.raises(Corrupt, match="both"):
        oci.decode_manifest(a_manifest(manifests=[]), "it")
    with pytest.raises(Corrupt, match="mediaType"):
        oci.decode_manifest(a_manifest(mediaType=oci.OCI_INDEX), "it")


def test_schema_1_is_explained() -> None:
    with pytest.raises(Unsupported, match="schema 1"):
        oci.decode_manifest(b'{"schemaVersion":1,"fsLayers":[]}', "it")


def test_docker_and_oci_manifests_are_read_alike() -> None:
    for media_type in oci.MANIFEST_TYPES:
        assert isinstance(oci.decode_manifest(a_manifest(mediaType=media_type), "it"), oci.Manifest)


_FIELDS = (
    *("schemaVersion", "manifests", "layers", "config", "digest", "size", "mediaType", "rootfs", "diff_ids"),
    *("type", "Env", "Cmd", "history", "platform", "os", "unknown"),
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(_FIELDS), inner, max_size=6),
    max_leaves=20,
)


@pytest.mark.parametrize("kind", [oci.Manifest, oci.Index, oci.ImageConfig])
@given(document=_JSON)
def test_any_json_is_read_or_refused_but_never_worse(kind: type, document: object) -> None:
    data = json.dumps(document).encode()
    try:
        oci.decode(data, kind, "it")
    except HpmapperError:
        pass
    try:
        oci.decode_manifest(data, "it")
    except HpmapperError:
        pass


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with pytest.raises(HpmapperError):
        oci.decode_config(data, "it")


def test_a_config_keeps_go_s_nulls_apart_from_errors() -> None:
    settings = {"Env": None, "Cmd": None, "Entrypoint": None, "Labels": None, "Volumes": None, "User": ""}
    config = oci.decode_config(a_config(config=settings, history=None, unknown={"a": [1]}), "it", 1)
    assert config.settings == oci.Settings()
    with pytest.raises(Corrupt, match="for 2 layers"):
        oci.decode_config(a_config(), "it", 2)
    with pytest.raises(Corrupt, match="rootfs"):
        oci.decode_config(a_config(rootfs={"type": "layers", "diff_ids": ["sha256:x"]}), "it")
    with pytest.raises(Corrupt, match="NUL"):
        oci.decode_config(a_config(config={"Cmd": ["a\0b"]}), "it")


def test_layer_types() -> None:
    assert oci.layer_compression("application/vnd.docker.image.rootfs.diff.tar.gzip", "it") == "gzip"
    assert oci.layer_compression("application/vnd.oci.image.layer.v1.tar+zstd", "it") == "zstd"
    with pytest.raises(Unsupported, match="squashfs"):
        oci.layer_compression("application/squashfs", "it")


# ── platforms ──


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        ("x86_64", "linux/amd64"),
        ("aarch64", "linux/arm64/v8"),
        ("armv7l", "linux/arm/v7"),
        ("armv6l", "linux/arm/v6"),
        ("i686", "linux/386"),
        ("riscv64", "linux/riscv64"),
        ("s390x", "linux/s390x"),
        ("loongarch64", "linux/loong64"),
    ],
)
def test_this_machine(machine: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert str(platforms.this_machine()) == expected


def test_platforms_as_users_write_them() -> None:
    assert platforms.parse("amd64") == platforms.parse("linux/x86_64") == Platform("linux", "amd64")
    assert platforms.parse("linux/arm64") == Platform("linux", "arm64", "v8")
    assert platforms.parse("linux/arm/6") == Platform("linux", "arm", "v6")
    for bad in ("", "a/b/c/d", "linux/", "linux/a b"):
        with pytest.raises(InvalidArgument):
            platforms.parse(bad)


@pytest.mark.parametrize(
    ("wanted", "offered", "chosen"),
    [
        ("amd64", ["arm64", "amd64", "386"], "amd64"),
        ("amd64", ["arm64", "386"], "386"),
        ("amd64", ["linux/amd64/v3"], None),
        ("amd64", ["linux/amd64/v3", "linux/amd64/v1"], "linux/amd64/v1"),
        ("linux/amd64/v3", ["amd64", "linux/amd64/v2"], "linux/amd64/v2"),
        ("arm64", ["linux/arm/v7", "linux/arm64"], "arm64"),
        ("arm64", ["linux/arm/v5", "linux/arm/v7"], "linux/arm/v7"),
        ("linux/arm/v7", ["linux/arm/v5", "linux/arm/v6", "linux/arm64"], "linux/arm/v6"),
        ("linux/arm/v6", ["linux/arm/v7"], None),
        ("amd64", ["windows/amd64", "unknown/unknown"], None),
        ("amd64", [], None),
    ],
)
def test_choice(wanted: str, offered: list[str], chosen: str | None) -> None:
    offers = [(platforms.parse(text), platforms.parse(text)) for text in offered]
    expected = platforms.parse(chosen) if chosen else None
    assert platforms.choose(platforms.parse(wanted), offers) == expected


# ── references ──


@pytest.mark.parametrize(
    ("text", "full", "familiar"),
    [
        ("debian", "docker.io/library/debian:latest", "debian:latest"),
        ("debian:12", "docker.io/library/debian:12", "debian:12"),
        ("team/app", "docker.io/team/app:latest", "team/app:latest"),
        ("docker.io/debian", "docker.io/library/debian:latest", "debian:latest"),
        ("index.docker.io/library/debian:12", "docker.io/library/debian:12", "debian:12"),
        ("localhost/x", "localhost/x:latest", "localhost/x:latest"),
        ("127.0.0.1:5000/a/b_c.d-e:T.1", "127.0.0.1:5000/a/b_c.d-e:T.1", "127.0.0.1:5000/a/b_c.d-e:T.1"),
        ("[::1]:5000/x", "[::1]:5000/x:latest", "[::1]:5000/x:latest"),
        ("UPPER/x", "UPPER/x:latest", "UPPER/x:latest"),
        (f"x@{A}", f"docker.io/library/x@{A}", f"x@{A}"),
        (f"ghcr.io/x/y:1@{A}", f"ghcr.io/x/y:1@{A}", f"ghcr.io/x/y:1@{A}"),
    ],
)
def test_references(text: str, full: str, familiar: str) -> None:
    parsed = reference.parse(text).tagged()
    assert str(parsed) == full
    assert parsed.familiar == familiar
    assert reference.parse(full) == parsed


@pytest.mark.parametrize(
    "text",
    [
        *("", ":", "x:", "Debian", "a//b", "/a", "a/", "../a", "a/../b", "x:y z", "x@", "x@sha256:12", "a:b:c"),
        *("x\n", "x\0", "a" * 64, "-a", "a..b", "h:port/x", "x:" + "t" * 129, "é", "a" * 300),
        *("host.de:123456/x", "docker.io/library/"),
    ],
)
def test_what_is_not_a_reference(text: str) -> None:
    with pytest.raises(InvalidArgument):
        reference.parse(text)


@given(st.text(alphabet="abcZ09.:/@-_[] \n\0", max_size=30))
def test_a_reference_is_refused_or_stable(text: str) -> None:
    try:
        parsed = reference.parse(text).tagged()
    except InvalidArgument:
        return
    assert reference.parse(str(parsed)) == parsed
    assert reference.parse(parsed.familiar) == parsed
    assert not {*str(parsed)} & {*" \n\0"}


# ── made documents ──


def test_changes_are_read_as_in_a_dockerfile() -> None:
    options = ImportOptions().changed(
        [
            'CMD ["sh", "-l"]',
            "entrypoint /run me",
            'ENV A=1 B="two words"',
            "ENV C three words",
            "EXPOSE 80 53/udp",
            "LABEL a.b=c",
            "VOLUME /data /more",
            "WORKDIR /srv",
            "WORKDIR app",
            "USER 1000:1000",
            "STOPSIGNAL SIGINT",
        ]
    )
    settings = oci.decode_config(imported_config([A], options), "it", 1).settings
    assert settings == oci.Settings(
        user="1000:1000",
        env=["A=1", "B=two words", "C=three words"],
        entrypoint=["/bin/sh", "-c", "/run me"],
        cmd=["sh", "-l"],
        working_dir="/srv/app",
        labels={"a.b": "c"},
        exposed_ports={"80/tcp": {}, "53/udp": {}},
        volumes={"/data": {}, "/more": {}},
        stop_signal="SIGINT",
    )


@pytest.mark.parametrize("change", ["", "CMD", "RUN x", 'CMD ["a"', "CMD [1]", "ENV A", "EXPOSE x", "LABEL ="])
def test_bad_changes_are_refused(change: str) -> None:
    with pytest.raises(InvalidArgument):
        ImportOptions().changed([change])


def test_an_imported_config_is_the_same_every_day() -> None:
    options = ImportOptions(platform=platforms.parse("linux/arm64"))
    assert imported_config([A], options) == imported_config([A], options)
    config = oci.decode_config(imported_config([A], options), "it", 1)
    assert (config.architecture, config.variant, config.created) == ("arm64", "v8", None)


def test_a_commit_adds_a_layer_and_keeps_what_it_does_not_know() -> None:
    settings = {"Env": ["PATH=/bin", "X=1"], "Cmd": ["old"], "Healthcheck": {"Test": ["NONE"]}, "Labels": None}
    parent = a_config(config=settings, history=[{"created_by": "base"}], moby="kept", container="stale")
    options = ImportOptions(
        env=("X=2", "Y=3"), entrypoint=("/e",), labels=(("a", "b"),), created="2026-01-01T00:00:00Z"
    )
    made = committed_config(parent, B, options, created_by="sh -c make")
    raw = json.loads(made)
    assert raw["moby"] == "kept"
    assert "container" not in raw
    assert raw["config"]["Healthcheck"] == {"Test": ["NONE"]}
    config = oci.decode_config(made, "it", 2)
    assert config.diff_ids == [A, B]
    assert config.settings.env == ["PATH=/bin", "X=2", "Y=3"]
    assert (config.settings.entrypoint, config.settings.cmd) == (["/e"], None)
    assert config.history
    assert [entry.created_by for entry in config.history] == ["base", "sh -c make"]


def test_a_commit_of_settings_only_adds_no_layer() -> None:
    config = oci.decode_config(committed_config(a_config(), None, ImportOptions(cmd=("x",))), "it", 1)
    assert config.history
    assert config.history[-1].empty_layer


def test_a_made_manifest_reads_back() -> None:
    layers = [oci.Descriptor(oci.OCI_LAYER, A, 5)]
    made = oci.decode_manifest(manifest(a_config(), layers), "it")
    assert isinstance(made, oci.Manifest)
    assert made.layers == layers
    assert made.config.digest == oci.sha256(a_config())
