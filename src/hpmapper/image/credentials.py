"""Registry credentials from where Docker keeps them, in a form that skopeo reads.

skopeo reads Docker's config.json itself, except for `credsStore`: it knows helpers per registry only, and asks them
for docker.io where Docker has stored https://index.docker.io/v1/. So the helper is run here and its answer
goes into a file of mode 0600: never on a command line, where `ps` shows it.
"""

from __future__ import annotations

import base64
import os
import re
import subprocess
from pathlib import Path

import msgspec

from hpmapper.errors import FailedPrecondition, InvalidArgument

_DOCKER_HUB = "https://index.docker.io/v1/"
_HELPER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_TOKEN_USER = "<token>"


class _Config(msgspec.Struct, rename="camel"):
    creds_store: str = ""
    cred_helpers: dict[str, str] | None = None


class _Answer(msgspec.Struct, rename="pascal"):
    username: str
    secret: str


def config_path() -> Path:
    """Return Docker's configuration file, which need not exist."""
    directory = os.environ.get("DOCKER_CONFIG")
    return (Path(directory) if directory else Path.home() / ".docker") / "config.json"


def authfile(host: str, temporary: Path) -> Path | None:
    """Return a file for skopeo's --authfile with the credentials for `host`; None when Docker has no configuration.

    Raises:
        InvalidArgument: Docker's configuration is malformed.
        FailedPrecondition: the credential helper that it names failed.
    """
    path = config_path()
    try:
        config = msgspec.json.decode(path.read_bytes(), type=_Config)
    except FileNotFoundError:
        return None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{path} is malformed: {error}", hint="repair it, or log in again") from error
    except OSError as error:
        raise InvalidArgument(f"{path} cannot be read: {error.strerror}") from error
    server = _DOCKER_HUB if host == "docker.io" else host
    helper = (config.cred_helpers or {}).get(server, config.creds_store)
    if not helper:
        return path
    answer = _ask(helper, server, path)
    return _written(temporary / "auth.json", host, answer) if answer else None


def _ask(helper: str, server: str, config: Path) -> _Answer | None:
    """Return what docker-credential-HELPER knows (protocol: github.com/docker/docker-credential-helpers)."""
    if not _HELPER.fullmatch(helper):
        raise InvalidArgument(f"{config} names a credential helper {helper[:100]!r}", hint="a plain name was expected")
    command = [f"docker-credential-{helper}", "get"]
    try:
        done = subprocess.run(command, input=server.encode(), capture_output=True, timeout=60, check=False)
    except FileNotFoundError as error:
        raise FailedPrecondition(f"{config} names {command[0]}, which is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise FailedPrecondition(f"{command[0]} did not answer within a minute") from error
    if done.returncode:
        # The helpers' own text, and the only sign that there is merely nothing stored.
        if b"credentials not found" in done.stdout:
            return None
        raise FailedPrecondition(f"{command[0]} failed: {done.stdout.decode(errors='replace').strip()[:300]}")
    try:
        return msgspec.json.decode(done.stdout, type=_Answer)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        # without `from`: the exception may quote the secret
        raise FailedPrecondition(f"{command[0]} answered with something else than credentials") from None


def _written(path: Path, host: str, answer: _Answer) -> Path:
    if answer.username == _TOKEN_USER:
        entry = {"identitytoken": answer.secret}
    else:
        entry = {"auth": base64.b64encode(f"{answer.username}:{answer.secret}".encode()).decode()}
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(msgspec.json.encode({"auths": {host: entry}}))
    return path
