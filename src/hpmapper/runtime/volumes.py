"""-v HOST:CONTAINER[:ro]: directories and files of the host that a container sees."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hpmapper.errors import InvalidArgument, NotFound
from hpmapper.runtime.inside import parts

_FORM = "-v HOST:CONTAINER[:ro]"


@dataclass(frozen=True, slots=True)
class Volume:
    """One bind mount; `target` is absolute inside the container."""

    source: Path
    target: str
    read_only: bool = False


def parse_volume(text: str) -> Volume:
    """A volume as it is written on the command line.

    Raises:
        InvalidArgument: malformed. NotFound: the host has no such file or directory.
    """
    host, _, rest = text.partition(":")
    target, colon, mode = rest.partition(":")
    if not host or not target.startswith("/") or not parts(target):
        raise InvalidArgument(f"volume {text!r} is malformed", hint=f"{_FORM}, CONTAINER beginning with /")
    if colon and mode not in ("ro", "rw"):
        raise InvalidArgument(f"volume {text!r} has the mode {mode!r}", hint="ro or rw")
    source = Path(host).absolute()
    if not source.exists():
        raise NotFound(f"volume {text!r}: the host has no {source}", hint=f"mkdir -p {source}")
    return Volume(source, "/" + "/".join(parts(target)), mode == "ro")
