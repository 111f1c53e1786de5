"""Images in registries, fetched with skopeo.

skopeo knows the registries' protocols, tokens, mirrors (registries.conf) and certificates, and is in every
distribution; none of that is worth having twice. It copies into its `dir` format rather than an OCI layout, because
that one keeps manifest, config and layers as the registry has them: on its way to a layout a Docker image's
config is rewritten (another image id) and plain layers are compressed (time for nothing).
"""

from __future__ import annotations

import ipaddress
import re
import subprocess
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from hpmapper.errors import Corrupt, FailedPrecondition, HpmapperError, NotFound, Unsupported
from hpmapper.image import credentials, platforms, reference
from hpmapper.image.files import DirectoryFiles, read_all
from hpmapper.image.layout import Blobs, read_image
from hpmapper.image.platforms import Platform
from hpmapper.image.reference import Reference
from hpmapper.image.source import SourceImage

_RETRIES = 3
_FATAL = re.compile(r'level=fatal msg="((?:[^"\\]|\\.)*)"')


class RegistrySource:
    """One image of a registry as a source: downloaded on entry, deleted on exit."""

    def __init__(
        self,
        name: str,
        *,
        spool: Path,
        platform: Platform | None = None,
        insecure: bool = False,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self._reference = reference.parse(name).tagged()
        self._spool = spool
        self._platform = platform or platforms.this_machine()
        self._insecure = insecure
        self._progress = progress or (lambda line: None)
        self._stack = ExitStack()
        self._directory = spool

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            temporary = tempfile.TemporaryDirectory(prefix="pull-", dir=self._spool)
            work = Path(stack.enter_context(temporary))
            self._directory = work / "image"
            self._directory.mkdir()
            self._download(work)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def images(self) -> list[SourceImage]:
        files = DirectoryFiles(self._directory)
        manifest = read_all(files, "manifest.json")
        if manifest is None:
            raise Corrupt(f"skopeo left no manifest of {self._reference}")
        names = (f"{self._reference.name}:{self._reference.tag}",) if self._reference.tag else ()
        return [read_image(Blobs(files, directory=""), manifest, names, f"the manifest of {self._reference}")]

    def _download(self, work: Path) -> None:
        command = self._command(credentials.authfile(self._reference.domain, work))
        status, errors = run(command, self._progress)
        if status:
            raise explained(errors, self._reference)

    def _command(self, authfile: Path | None) -> list[str]:
        command = ["skopeo"]
        if not _has_policy():
            command.append("--insecure-policy")  # as Docker: without a policy, every signature will do
        command += ["--override-os", self._platform.os, "--override-arch", self._platform.architecture]
        if self._platform.variant:
            command += ["--override-variant", self._platform.variant]
        command += ["copy", "--retry-times", str(_RETRIES)]
        if authfile:
            command += ["--src-authfile", str(authfile)]
        if self._insecure or is_loopback(self._reference.domain):
            command.append("--src-tls-verify=false")
        return [*command, f"docker://{skopeo_name(self._reference)}", f"dir:{self._directory}"]


def _has_policy() -> bool:
    own = Path.home() / ".config/containers/policy.json"
    return own.exists() or Path("/etc/containers/policy.json").exists()


def skopeo_name(name: Reference) -> str:
    """Return `name` as skopeo takes it: it refuses a tag beside a digest, and the digest decides anyway."""
    return f"{name.name}@{name.digest}" if name.digest else str(name)


def is_loopback(domain: str) -> bool:
    """Whether a registry's `host[:port]` is this machine, to which plain HTTP is safe."""
    host = domain[1:].partition("]")[0] if domain.startswith("[") else domain.partition(":")[0]
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def run(command: list[str], progress: Callable[[str], None]) -> tuple[int, str]:
    """Run `command`, handing its output on line by line; return its exit status and the end of its error output."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    except FileNotFoundError as error:
        raise Unsupported(
            "images cannot be pulled from a registry, because skopeo is not installed",
            hint="on Debian: apt-get install skopeo",
        ) from error
    with process:
        try:
            return _followed(process, progress)
        except BaseException:
            process.kill()
            raise


def _followed(process: subprocess.Popen[str], progress: Callable[[str], None]) -> tuple[int, str]:
    assert process.stdout is not None
    assert process.stderr is not None
    errors: list[str] = []
    # Two pipes read by one thread would block the one that is not being read.
    reader = threading.Thread(target=_collect, args=(process.stderr, errors), daemon=True)
    reader.start()
    for line in process.stdout:
        progress(line.rstrip("\n"))
    reader.join()
    return process.wait(), "".join(errors)


def _collect(stream: IO[str], into: list[str]) -> None:
    for line in stream:
        into.append(line)
        del into[:-50]


# skopeo has one exit status and Go's error chains; what they say in common, over versions 1.4 to 1.18.
_CAUSES: tuple[tuple[str, type[HpmapperError], str, str], ...] = (
    (
        r"no image found in (?:manifest list|image index)",
        NotFound,
        "{name} does not exist for this platform",
        "choose another one with --platform",
    ),
    (
        r"unauthorized|authentication required|\b401\b|\b403\b|denied|invalid username/password",
        FailedPrecondition,
        "{host} refuses access to {name}",
        "it does not exist, or needs a login: docker login {host} (or skopeo login {host})",
    ),
    (
        r"manifest unknown|name unknown|repository name not known|\b404\b|not found",
        NotFound,
        "{host} has no image {name}",
        "check the name and the tag",
    ),
    (
        r"server gave HTTP response to HTTPS client|x509|certificate|tls:",
        FailedPrecondition,
        "{host} cannot be trusted",
        "install its certificate in /etc/containers/certs.d/{host}, or allow an insecure registry for this one",
    ),
    (
        r"no such host|dial tcp|connection refused|timeout|unreachable|connection reset|\bEOF\b",
        FailedPrecondition,
        "{host} cannot be reached",
        "check the network, the name and the proxy settings (HTTPS_PROXY)",
    ),
    (
        r"toomanyrequests|\b429\b",
        FailedPrecondition,
        "{host} limits the rate of requests",
        "wait, or log in: docker login {host}",
    ),
)


def explained(errors: str, name: Reference) -> HpmapperError:
    """Return the error that skopeo's error output amounts to."""
    fatal = _FATAL.search(errors)
    detail = (fatal[1].replace('\\"', '"') if fatal else errors.strip())[-500:]
    for pattern, kind, message, hint in _CAUSES:
        # The image's own name may contain any of the words.
        if re.search(pattern, detail.replace(name.name, "").replace(name.path, ""), re.IGNORECASE):
            words = {"host": name.domain, "name": name.familiar}
            return kind(f"{message.format(**words)}: {detail}", hint=hint.format(**words))
    return FailedPrecondition(f"{name.familiar} cannot be pulled: {detail}")
