"""Names of images, by Docker's rules (github.com/distribution/reference, grammar in reference.go).

`debian` means docker.io/library/debian:latest; what people see is the short form, what is stored the full one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from hpmapper.errors import InvalidArgument
from hpmapper.model import oci_digest

DEFAULT_DOMAIN = "docker.io"
DEFAULT_TAG = "latest"

_LABEL = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_DOMAIN = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[a-fA-F0-9:]+\])(?::[0-9]{{1,5}})?")
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_PATH = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,127}")
_IMAGE_ID = re.compile(r"[0-9a-f]{64}")
_MAX_NAME = 255


@dataclass(frozen=True, slots=True)
class Reference:
    """A parsed name: registry, repository path, and a tag or a digest or both or neither."""

    domain: str
    path: str
    tag: str | None = None
    digest: str | None = None

    @property
    def name(self) -> str:
        """The repository in full: docker.io/library/debian."""
        return f"{self.domain}/{self.path}"

    @property
    def familiar_name(self) -> str:
        """The repository as Docker shows it: debian."""
        if self.domain != DEFAULT_DOMAIN:
            return self.name
        short = self.path.removeprefix("library/")
        return self.path if "/" in short else short

    @property
    def _suffix(self) -> str:
        return (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")

    @property
    def familiar(self) -> str:
        return self.familiar_name + self._suffix

    def __str__(self) -> str:
        return self.name + self._suffix

    def tagged(self) -> Reference:
        """This name, with the default tag where neither a tag nor a digest was given."""
        return self if self.tag or self.digest else replace(self, tag=DEFAULT_TAG)


def parse(text: str) -> Reference:
    """Return the reference in `text`, normalised; a missing tag stays missing (see `Reference.tagged`).

    Raises:
        InvalidArgument: a part is malformed; it is named.
    """
    rest, at, digest = text.partition("@")
    head, colon, tag = rest.rpartition(":")
    if not colon or "/" in tag:  # no colon, or the one before a port
        head, tag = rest, ""
    if colon and not tag and head != rest:
        raise _refused(text, "the tag is empty")
    if tag and not _TAG.fullmatch(tag):
        raise _refused(text, f"{tag[:140]!r} is not a tag")
    domain, path = _split_domain(head)
    _check_name(text, domain, path)
    return Reference(domain, path, tag or None, _checked_digest(text, digest) if at else None)


def normalised(text: str) -> str:
    """Return the full, tagged form of `text`."""
    return str(parse(text).tagged())


def _split_domain(name: str) -> tuple[str, str]:
    first, slash, rest = name.partition("/")
    is_domain = slash and (first == "localhost" or first != first.lower() or any(c in first for c in ".:["))
    if not is_domain:
        first, rest = DEFAULT_DOMAIN, name
    if first == "index.docker.io":
        first = DEFAULT_DOMAIN
    if first == DEFAULT_DOMAIN and "/" not in rest:
        rest = f"library/{rest}"
    return first, rest


def _check_name(text: str, domain: str, path: str) -> None:
    if not _DOMAIN.fullmatch(domain):
        raise _refused(text, f"{domain[:100]!r} is not a host")
    repository = path.removeprefix("library/")
    if repository != repository.lower():
        raise _refused(text, "a repository's name must be in lower case")
    if not repository or not _PATH.fullmatch(path):
        raise _refused(text, f"{repository[:100]!r} is not a repository's name")
    if _IMAGE_ID.fullmatch(repository):
        raise _refused(text, "64 hexadecimal digits are an image's id, not a name")
    if len(domain) + 1 + len(path) > _MAX_NAME:
        raise _refused(text, f"the name has more than {_MAX_NAME} characters")


def _checked_digest(text: str, digest: str) -> str:
    try:
        return oci_digest(digest)
    except InvalidArgument as error:
        raise _refused(text, error.message) from None


def _refused(text: str, why: str) -> InvalidArgument:
    return InvalidArgument(
        f"{text[:200]!r} is not an image reference: {why}",
        hint="[HOST[:PORT]/]NAME[:TAG][@sha256:DIGEST], for example debian:12 or registry.example.com/team/app:1.2",
    )
