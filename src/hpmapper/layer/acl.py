"""POSIX ACLs between a tar's text and the kernel's xattr (acl(5); linux/posix_acl_xattr.h)."""

from __future__ import annotations

import struct

from hpmapper.errors import InvalidArgument

XFS_NAMES = frozenset((b"trusted.SGI_ACL_FILE", b"trusted.SGI_ACL_DEFAULT"))
"""By which XFS lists an ACL a second time, in its own form. Elsewhere they would be attributes that mean nothing."""

_VERSION = struct.pack("<I", 2)
_ENTRY = struct.Struct("<HHI")
_NO_ID = 0xFFFFFFFF
_TAGS = {  # word -> (tag without a qualifier, tag with one)
    b"user": (0x01, 0x02),
    b"u": (0x01, 0x02),
    b"group": (0x04, 0x08),
    b"g": (0x04, 0x08),
    b"mask": (0x10, 0x10),
    b"m": (0x10, 0x10),
    b"other": (0x20, 0x20),
    b"o": (0x20, 0x20),
}


def acl_from_text(text: bytes) -> bytes:
    """The value of `system.posix_acl_*` for the long text form that star, bsdtar and GNU tar write.

    Entries are "tag:qualifier:perms[:id]"; the numeric id, where present, counts more than the name, which
    only the host that wrote the tar can resolve.

    Raises:
        InvalidArgument: not an ACL, or a name without a number.
    """
    entries = [_entry(item.strip()) for item in text.replace(b"\n", b",").split(b",") if item.strip()]
    entries.sort(key=lambda entry: (entry[0], entry[2]))  # as acl_set_file(3) has them: by tag, then by id
    return _VERSION + b"".join(_ENTRY.pack(*entry) for entry in entries)


def _entry(item: bytes) -> tuple[int, int, int]:
    parts = item.split(b"#", 1)[0].strip().split(b":")
    if len(parts) < 3 or parts[0] not in _TAGS:
        raise InvalidArgument(f"the layer's tar has an access control entry that is none: {item[:80]!r}")
    tag, qualifier, permissions = parts[:3]
    if not qualifier:
        return _TAGS[tag][0], _permissions(permissions), _NO_ID
    number = parts[3] if len(parts) > 3 else qualifier
    if not number.isdigit() or int(number) >= _NO_ID:
        raise InvalidArgument(
            f"the layer's tar has an access control entry without a numeric id: {item[:80]!r}",
            hint="write it with numeric ids (tar --numeric-owner)",
        )
    return _TAGS[tag][1], _permissions(permissions), int(number)


def _permissions(text: bytes) -> int:
    return sum(bit for letter, bit in ((b"r", 4), (b"w", 2), (b"x", 1)) if letter in text)
