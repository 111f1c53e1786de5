"""Which version of a program is installed."""

from __future__ import annotations

import re
import subprocess
from typing import NamedTuple

from hpmapper.errors import InvalidArgument, NotFound, Unsupported

_NUMBERS = re.compile(r"(?<![\d.])v?(\d{1,4})\.(\d{1,4})\.(\d{1,4})(?!\d)")

_SECONDS = 20
"""How long a program may take to say its version: a cold disk, not a hanging program."""


class Version(NamedTuple):
    """A released version; what follows the numbers (`~ds1`, `-rc.1`) makes no difference to what is configured."""

    major: int
    minor: int
    patch: int

    def __str__(self) -> str:
        return ".".join(map(str, self))


def parse(text: str) -> Version:
    """Read "1.7.24", "v2.1.9" or "1.6.20~ds1".

    Raises:
        InvalidArgument: it does not have three numbers; which features there are depends on the third, too.
    """
    found = _NUMBERS.match(text)
    if not found:
        raise InvalidArgument(f"{text!r} is not a version", hint="three numbers, as in 1.7.24")
    return Version(*map(int, found.groups()))


def installed(program: str) -> Version:
    """Ask a program, by name or path, for its version.

    Raises:
        NotFound: there is no such program. Unsupported: it says no version.
    """
    hint = "name it with --program, or say which version is meant with --for"
    try:
        done = subprocess.run(
            [program, "--version"], capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False
        )
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"there is no program {program}", hint=hint) from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unsupported(f"{program} --version does not run: {error}", hint=hint) from None
    found = _NUMBERS.search(done.stdout)
    if done.returncode or not found:
        said = (done.stdout or done.stderr).strip().partition("\n")[0] or "nothing"
        raise Unsupported(f"{program} --version tells no version but {said!r}", hint=hint)
    return Version(*map(int, found.groups()))
