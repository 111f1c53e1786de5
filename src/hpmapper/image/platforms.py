"""Which of a multi-platform image's entries this machine runs.

The names are Go's (GOARCH), as the OCI image spec asks; the fallbacks are those of github.com/containerd/platforms.
"""

from __future__ import annotations

import platform as machine_facts
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from hpmapper.errors import InvalidArgument

_T = TypeVar("_T")

_PART = re.compile(r"[A-Za-z0-9_.-]{1,32}")

# What `uname -m` and people say, and what Go says.
_ALIASES = {
    "x86_64": ("amd64", ""),
    "x86-64": ("amd64", ""),
    "i386": ("386", ""),
    "i486": ("386", ""),
    "i586": ("386", ""),
    "i686": ("386", ""),
    "aarch64": ("arm64", "v8"),
    "arm64": ("arm64", "v8"),
    "armhf": ("arm", "v7"),
    "armv8l": ("arm", "v8"),
    "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
    "armv5tel": ("arm", "v5"),
    "armel": ("arm", "v6"),
    "arm": ("arm", "v7"),
    "loongarch64": ("loong64", ""),
}


@dataclass(frozen=True, slots=True)
class Platform:
    """An operating system, a processor and its variant, normalised."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))


def normalise(os: str, architecture: str, variant: str = "") -> Platform:
    """Return the platform in Go's words, with the variant that a missing one stands for."""
    name, default = _ALIASES.get(architecture.lower(), (architecture.lower(), ""))
    variant = variant.lower() or default
    if variant and variant[0].isdigit():
        variant = f"v{variant}"
    if (name, variant) == ("amd64", "v1"):
        variant = ""
    return Platform(os.lower(), name, variant)


def parse(text: str) -> Platform:
    """Return the platform that a user wrote: `os/arch[/variant]`, or `arch` alone."""
    parts = text.split("/")
    if len(parts) > 3 or not all(_PART.fullmatch(part) for part in parts):
        raise InvalidArgument(f"{text[:100]!r} is not a platform", hint="for example linux/amd64 or linux/arm/v7")
    if len(parts) == 1:
        parts = ["linux", *parts]
    return normalise(*parts)


def this_machine() -> Platform:
    """Return the platform of the running kernel."""
    return normalise("linux", machine_facts.machine())


def _acceptable(wanted: Platform) -> list[Platform]:
    """What `wanted` runs, best first."""
    own = [wanted]
    arch, variant = wanted.architecture, wanted.variant
    level = int(variant[1:]) if re.fullmatch(r"v[0-9]", variant) else 0
    if arch in ("amd64", "arm64") and level:
        own += [Platform(wanted.os, arch, f"v{lower}") for lower in range(level - 1, 0, -1)]
    if arch == "amd64":
        own += [Platform(wanted.os, "amd64"), Platform(wanted.os, "386")]
    if arch in ("arm", "arm64"):
        own += [Platform(wanted.os, "arm", f"v{lower}") for lower in range(min(level, 8), 4, -1)]
    return own


def choose(wanted: Platform, offers: Sequence[tuple[Platform, _T]]) -> _T | None:
    """Return the offer that suits `wanted` best (the first among equals), None when none does."""
    for acceptable in _acceptable(wanted):
        for offered, value in offers:
            if offered == acceptable:
                return value
    return None
