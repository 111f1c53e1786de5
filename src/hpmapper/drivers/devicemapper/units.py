"""Docker's ways with numbers in options and listings: sizes, percentages, truth values (go-units, Go's strconv)."""

from __future__ import annotations

import re

from hpmapper.errors import InvalidArgument

_SIZE = re.compile(r"(\d+(?:\.\d+)*) ?([kmgtp])?(?:i?b)?", re.IGNORECASE | re.ASCII)
_LABELS = ("B", "kB", "MB", "GB", "TB", "PB", "EB", "ZB", "YB")
_TRUE, _FALSE = ("1", "t", "T", "TRUE", "true", "True"), ("0", "f", "F", "FALSE", "false", "False")


def parse_size(text: str) -> int:
    """Bytes of "10G", "1.5 GiB", "512": multiples of 1024 whatever the letters (go-units, RAMInBytes).

    Raises:
        InvalidArgument: it is none.
    """
    match = _SIZE.fullmatch(text)
    if not match or match[1].count(".") > 1:
        raise InvalidArgument(f"invalid size: '{text}'", hint="a number and k, m, g, t or p")
    power = "bkmgtp".index((match[2] or "b").lower())
    whole, _, fraction = match[1].partition(".")
    scale: int = 1024**power
    return int(whole) * scale + (int(fraction) * scale // 10 ** len(fraction) if fraction else 0)


def human_size(size: int) -> str:
    """As `docker info` prints it: "10.74GB" (go-units, HumanSize)."""
    value, label = float(size), 0
    while value >= 1000 and label < len(_LABELS) - 1:
        value /= 1000
        label += 1
    return f"{value:.4g}{_LABELS[label]}"


def parse_bool(text: str) -> bool:
    """Go's strconv.ParseBool."""
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise InvalidArgument(f'strconv.ParseBool: parsing "{text}": invalid syntax', hint="write true or false")


def parse_percent(option: str, text: str, *, limit: int) -> int:
    """A whole percentage below or at `limit`; a "%" behind it is taken."""
    number = text.removesuffix("%")
    if not re.fullmatch(r"\d{1,20}", number):
        raise InvalidArgument(f"could not parse `{option}={text}`: it is not a whole number")
    if int(number) > limit:
        raise InvalidArgument(f"{option} must be greater than 0 and less than 100")
    return int(number)
