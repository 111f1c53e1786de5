"""Pulling with skopeo from a small registry on this machine, and what goes wrong on the way."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import stat
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from hpmapper.errors import FailedPrecondition, HpmapperError, InvalidArgument, NotFound, Unsupported
from hpmapper.image import credentials, oci, platforms, reference
from hpmapper.image.documents import ImportOptions, imported_config
from hpmapper.image.opening import SourceOptions, open_source
from hpmapper.image.registry import explained, is_loopback
from hpmapper.image.source import SourceImage

needs_skopeo = pytest.mark.skipif(not shutil.which("skopeo"), reason="apt-get install skopeo to run it")

LAYER = b"layer" * 1000
USER, PASSWORD = "me", "secret"


class Registry(ThreadingHTTPServer):
    """The reading half of the distribution protocol, for one repository."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, tuple[str, bytes]] = {}
        self.password_needed = False
        self.host = f"127.0.0.1:{self.server_port}"

    def add(self, tag: str, media_type: str, data: bytes) -> dict[str, object]:
        self.manifests[tag] = self.manifests[oci.sha256(data)] = (media_type, data)
        return {"mediaType": media_type, "digest": oci.sha256(data), "size": len(data)}

    def blob(self, media_type: str, data: bytes) -> dict[str, object]:
        self.blobs[oci.sha256(data)] = data
        return {"mediaType": media_type, "digest": oci.sha256(data), "size": len(data)}


class Handler(BaseHTTPRequestHandler):
    server: Registry

    def do_GET(self) -> None:
        if self.server.password_needed and self.headers.get("Authorization") != f"Basic {token(USER, PASSWORD)}":
            self.answer(401, "application/json", error("UNAUTHORIZED"), {"WWW-Authenticate": 'Basic realm="test"'})
            return
        if self.path == "/v2/":
            self.answer(200, "application/json", b"{}")
            return
        match = re.fullmatch(r"/v2/team/app/(manifests|blobs)/([^/]+)", self.path)
        found = self.find(match) if match else None
        if found is None:
            self.answer(404, "application/json", error("MANIFEST_UNKNOWN" if match else "NAME_UNKNOWN"))
        else:
            self.answer(200, *found)

    do_HEAD = do_GET

    def find(self, match: re.Match[str]) -> tuple[str, bytes] | None:
        if match[1] == "manifests":
            return self.server.manifests.get(match[2])
        data = self.server.blobs.get(match[2])
        return None if data is None else ("application/octet-stream", data)

    def answer(self, status: int, kind: str, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def error(code: str) -> bytes:
    return json.dumps({"errors": [{"code": code, "message": code.lower().replace("_", " ")}]}).encode()


def token(user: str, password: str) -> str:
    return base64.b64encode(f"{user}:{password}".encode()).decode()


def an_image(server: Registry, architecture: str = "amd64", *, docker: bool = True) -> bytes:
    """Store a config and a layer, return the manifest."""
    config = imported_config([oci.sha256(LAYER)], ImportOptions(platform=platforms.parse(architecture)))
    config = config[:-1] + b' , "container_config": {"Hostname": "kept"}}'
    kinds = (oci.DOCKER_MANIFEST, oci.DOCKER_CONFIG, "application/vnd.docker.image.rootfs.diff.tar")
    if not docker:
        kinds = (oci.OCI_MANIFEST, oci.OCI_CONFIG, oci.OCI_LAYER)
    whole = {
        "schemaVersion": 2,
        "mediaType": kinds[0],
        "config": server.blob(kinds[1], config),
        "layers": [server.blob(kinds[2], LAYER)],
    }
    return json.dumps(whole).encode()


@pytest.fixture
def registry() -> Iterator[Registry]:
    with Registry() as server:
        server.add("docker", oci.DOCKER_MANIFEST, an_image(server))
        server.add("oci", oci.OCI_MANIFEST, an_image(server, docker=False))
        entries = [
            server.add(name, oci.OCI_MANIFEST, an_image(server, name, docker=False))
            | {"platform": {"os": "linux", "architecture": name}}
            for name in ("s390x", "arm64", "amd64")
        ]
        index = {"schemaVersion": 2, "mediaType": oci.OCI_INDEX, "manifests": entries}
        server.add("multi", oci.OCI_INDEX, json.dumps(index).encode())
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def docker_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Docker's configuration, in a place of its own; so that nobody's real one is read."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "none.json"))
    (tmp_path / "docker").mkdir()
    return tmp_path / "docker" / "config.json"


def pull(name: str, spool: Path, platform: str = "amd64", lines: list[str] | None = None) -> SourceImage:
    options = SourceOptions(
        spool=spool,
        platform=platforms.parse(platform),
        progress=lines.append if lines is not None else None,
    )
    try:
        with open_source(f"docker://{name}", options) as source:
            [image] = source.images()
            with image.layers[0].open() as stream:
                assert stream.read() == LAYER
            return image
    finally:
        assert not [*spool.glob("pull-*")]


@needs_skopeo
@pytest.mark.parametrize("tag", ["docker", "oci"])
def test_a_pull_keeps_every_document_as_it_is(tag: str, registry: Registry, tmp_path: Path) -> None:
    lines: list[str] = []
    image = pull(f"{registry.host}/team/app:{tag}", tmp_path, lines=lines)
    assert image.manifest_bytes == registry.manifests[tag][1]
    assert image.image_id in registry.blobs
    assert image.names == (f"{registry.host}/team/app:{tag}",)
    assert any("Copying" in line for line in lines)


@needs_skopeo
def test_the_platform_is_chosen(registry: Registry, tmp_path: Path) -> None:
    for name in ("arm64", "amd64"):
        image = pull(f"{registry.host}/team/app:multi", tmp_path, name)
        assert image.config.architecture == name
    with pytest.raises(NotFound, match="platform"):
        pull(f"{registry.host}/team/app:multi", tmp_path, "riscv64")


@needs_skopeo
def test_a_digest_names_no_tag(registry: Registry, tmp_path: Path) -> None:
    digest = oci.sha256(registry.manifests["oci"][1])
    image = pull(f"{registry.host}/team/app@{digest}", tmp_path)
    assert image.names == ()
    assert pull(f"{registry.host}/team/app:v@{digest}", tmp_path).names == (f"{registry.host}/team/app:v",)


@needs_skopeo
def test_credentials_are_docker_s(registry: Registry, tmp_path: Path, docker_config: Path) -> None:
    registry.password_needed = True
    name = f"{registry.host}/team/app:oci"
    with pytest.raises(FailedPrecondition, match="login"):
        pull(name, tmp_path)
    docker_config.write_text(json.dumps({"auths": {registry.host: {"auth": token(USER, "wrong")}}}))
    with pytest.raises(FailedPrecondition, match="login"):
        pull(name, tmp_path)
    docker_config.write_text(json.dumps({"auths": {registry.host: {"auth": token(USER, PASSWORD)}}}))
    pull(name, tmp_path)


@needs_skopeo
def test_a_credential_store_is_asked(
    registry: Registry, tmp_path: Path, docker_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.password_needed = True
    helper(tmp_path, monkeypatch, json.dumps({"Username": USER, "Secret": PASSWORD}))
    docker_config.write_text('{"auths": {}, "credsStore": "test"}')
    pull(f"{registry.host}/team/app:oci", tmp_path)
    assert (tmp_path / "asked").read_text() == registry.host


@needs_skopeo
def test_what_is_not_there(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="team/app:nothing"):
        pull(f"{registry.host}/team/app:nothing", tmp_path)
    with pytest.raises(NotFound, match="other/app"):
        pull(f"{registry.host}/other/app", tmp_path)


@needs_skopeo
def test_what_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpmapper.image.registry._RETRIES", 0)
    with pytest.raises(FailedPrecondition, match="reached"):
        pull("127.0.0.1:1/team/app", tmp_path)


def test_skopeo_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unsupported, match="apt-get install skopeo"):
        pull("debian", tmp_path)


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "skopeo").write_text("#!/bin/sh\necho started\nexec sleep 100\n")
    (tmp_path / "skopeo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def interrupt(line: str) -> None:
        raise KeyboardInterrupt(line)

    spool = tmp_path / "spool"
    spool.mkdir()
    with (
        pytest.raises(KeyboardInterrupt, match="started"),
        open_source("docker://debian", SourceOptions(spool=spool, progress=interrupt)),
    ):
        pass
    assert not any(spool.iterdir())


# ── the parts ──


def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, status: int = 0) -> None:
    program = tmp_path / "docker-credential-test"
    program.write_text(f"#!/bin/sh\ncat >{tmp_path}/asked\necho '{answer}'\nexit {status}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/local/bin:/usr/bin:/bin")


def test_the_hub_s_credentials_have_an_old_name(
    tmp_path: Path, docker_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper(tmp_path, monkeypatch, json.dumps({"Username": "<token>", "Secret": "t"}))
    docker_config.write_text('{"credsStore": "test"}')
    path = credentials.authfile("docker.io", tmp_path)
    assert path
    assert json.loads(path.read_text()) == {"auths": {"docker.io": {"identitytoken": "t"}}}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (tmp_path / "asked").read_text() == "https://index.docker.io/v1/"


def test_helpers_that_fail(tmp_path: Path, docker_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docker_config.write_text('{"credHelpers": {"ghcr.io": "test", "quay.io": "missing", "evil.io": "../../bin/sh"}}')
    helper(tmp_path, monkeypatch, "credentials not found in native keychain", 1)
    assert credentials.authfile("ghcr.io", tmp_path) is None
    assert credentials.authfile("docker.io", tmp_path) == docker_config
    helper(tmp_path, monkeypatch, "the keychain is locked", 1)
    with pytest.raises(FailedPrecondition, match="locked"):
        credentials.authfile("ghcr.io", tmp_path)
    helper(tmp_path, monkeypatch, '{"Username": "me", "Secret": 1, "x": "hidden"}')
    with pytest.raises(FailedPrecondition) as caught:
        credentials.authfile("ghcr.io", tmp_path)
    assert "hidden" not in str(caught.value)
    with pytest.raises(FailedPrecondition, match="not installed"):
        credentials.authfile("quay.io", tmp_path)
    with pytest.raises(InvalidArgument, match="plain name"):
        credentials.authfile("evil.io", tmp_path)


def test_a_malformed_docker_config_is_named(tmp_path: Path, docker_config: Path) -> None:
    docker_config.write_text('{"auths":')
    with pytest.raises(InvalidArgument, match=r"config\.json"):
        credentials.authfile("docker.io", tmp_path)


@pytest.mark.parametrize("host", ["localhost", "localhost:5000", "127.0.0.1:80", "127.9.9.9", "[::1]:5000"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["docker.io", "localhost.evil.com", "10.0.0.1:80", "127.0.0.1.nip.io", "[fe80::1]"])
def test_not_loopback(host: str) -> None:
    assert not is_loopback(host)


# As skopeo 1.4 to 1.18 print them, shortened.
@pytest.mark.parametrize(
    ("text", "kind", "word"),
    [
        ("reading manifest 1 in h/x: unauthorized: authentication required", FailedPrecondition, "login"),
        (
            "reading manifest 1 in h/x: errors:\\ndenied: requested access to the resource is denied",
            FailedPrecondition,
            "login",
        ),
        ("reading manifest 1 in h/x: manifest unknown", NotFound, "no image"),
        (
            'choosing an image from manifest list docker://h/x: no image found in image index for architecture \\"s\\"',
            NotFound,
            "platform",
        ),
        (
            'pinging container registry h: Get \\"https://h/v2/\\": dial tcp: lookup h: no such host',
            FailedPrecondition,
            "reached",
        ),
        (
            "pinging container registry h: http: server gave HTTP response to HTTPS client",
            FailedPrecondition,
            "trusted",
        ),
        (
            "tls: failed to verify certificate: x509: certificate signed by unknown authority",
            FailedPrecondition,
            "trusted",
        ),
        ("toomanyrequests: You have reached your pull rate limit", FailedPrecondition, "rate"),
        ("something new", FailedPrecondition, "something new"),
    ],
)
def test_skopeo_s_errors_are_explained(text: str, kind: type[HpmapperError], word: str) -> None:
    name = reference.parse("h.example/denied/not-found:1")
    output = io.StringIO(f'time="2026-01-01T00:00:00Z" level=fatal msg="{text}"\n').read()
    found = explained(output.replace("h/x", name.name), name)
    assert type(found) is kind
    assert word in str(found)
    assert "h.example" in str(found)
