"""EROFS on disk: records, constants and feature bits, as far as an uncompressed image needs them.

From erofs-utils 1.9.3, include/erofs_fs.h. Little endian throughout; a field's order is its place on disk, and a
blank line ends each 16 bytes, so that a record lines up with a hexdump.

    0     1024        1152                                                    blocks × 4096
    | zero | superblock | root inode … | shared xattrs | inodes | directories | file data |

An inode number (nid) is its place in units of 32 bytes.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

BLOCK_BITS = 12
BLOCK = 1 << BLOCK_BITS
SLOT_BITS = 5
SLOT = 1 << SLOT_BITS
NULL_BLOCK = 0xFFFFFFFF

SUPERBLOCK_OFFSET = 1024
MAGIC = 0xE0F5E1E2

# Bits that a kernel may ignore. MTIME: the times are mtimes, not ctimes.
COMPAT_SB_CHKSUM = 0x1
COMPAT_MTIME = 0x2
COMPAT_XATTR_FILTER = 0x4

# Bits that a kernel must know, or it refuses to mount: use as few as possible.
INCOMPAT_CHUNKED_FILE = 0x4
INCOMPAT_KNOWN = INCOMPAT_CHUNKED_FILE


class Superblock(NamedTuple):
    """128 bytes at 1024. The checksum covers the rest of the first block, too."""

    magic: int = MAGIC
    checksum: int = 0
    feature_compat: int = 0
    block_bits: int = BLOCK_BITS
    ext_slots: int = 0
    root_nid: int = 0

    inodes: int = 0
    epoch: int = 0

    fixed_nsec: int = 0
    blocks: int = 0
    meta_block: int = 0
    xattr_block: int = 0

    uuid: bytes = bytes(16)

    volume_name: bytes = bytes(16)

    feature_incompat: int = 0
    compression: int = 0
    extra_devices: int = 0
    device_slot: int = 0
    directory_block_bits: int = 0
    xattr_prefixes: int = 0
    xattr_prefix_start: int = 0

    packed_nid: int = 0
    xattr_filter_reserved: int = 0

    build_time: int = 0


SUPERBLOCK = Struct("<IIIBBH Qq IIII 16s 16s IHHHBBI QB3x4x I12x")

# i_format: bit 0 = extended, bits 1-3 = where the data is.
EXTENDED = 1
LAYOUT_SHIFT = 1
LAYOUT_PLAIN = 0
LAYOUT_INLINE = 2
LAYOUT_CHUNK = 4
FORMAT_KNOWN = EXTENDED | 7 << LAYOUT_SHIFT


class CompactInode(NamedTuple):
    """32 bytes. Its mtime is the superblock's epoch; before Linux 6.15 the field `mtime` (a delta) was ignored."""

    format: int = 0
    xattr_count: int = 0
    mode: int = 0
    nlink: int = 0
    size: int = 0
    mtime: int = 0

    union: int = 0
    ino: int = 0
    uid: int = 0
    gid: int = 0


class ExtendedInode(NamedTuple):
    """64 bytes."""

    format: int = 0
    xattr_count: int = 0
    mode: int = 0
    size: int = 0

    union: int = 0
    ino: int = 0
    uid: int = 0
    gid: int = 0

    mtime: int = 0
    mtime_nsec: int = 0
    nlink: int = 0


COMPACT_INODE = Struct("<HHHHIIIIHH4x")
EXTENDED_INODE = Struct("<HHHxxQIIIIqII16x")

# `union` of a chunk-based file: bits 0-4 = log2(chunk / block). The entries, one per chunk, follow the xattrs.
CHUNK_MAX_BITS = 31
CHUNK_ENTRY = Struct("<I")
MAX_CHUNK_BITS = BLOCK_BITS + CHUNK_MAX_BITS

# A directory block: records, then the names; a record's count is the first name's offset / 12.
DIRENT = Struct("<QHBx")  # nid, offset of the name, type
NAME_MAX = 255
FILE_TYPES = {0x8: 1, 0x4: 2, 0x2: 3, 0x6: 4, 0x1: 5, 0xC: 6, 0xA: 7}  # by st_mode >> 12

# xattrs after the inode: header, ids of shared entries (u32, × 4 bytes), entries. All aligned to 4.
XATTR_HEADER = Struct("<IB7x")  # name filter, number of shared ids
XATTR_ENTRY = Struct("<BBH")  # length of the name, namespace, length of the value
XATTR_SHARED_ID = Struct("<I")
XATTR_ALIGN = 4
XATTR_MAX_SHARED = 0xFF
XATTR_MAX_COUNT = 0xFFFF  # of the inode's xattr_count = 1 + (bytes - header) / 4
XATTR_FILTER_NONE = 0xFFFFFFFF
XATTR_FILTER_SEED = 0x25BBE08F

XATTR_ACL_ACCESS = b"system.posix_acl_access"
XATTR_ACL_DEFAULT = b"system.posix_acl_default"
XATTR_NAMESPACES = {
    1: b"user.",
    2: XATTR_ACL_ACCESS,
    3: XATTR_ACL_DEFAULT,
    4: b"trusted.",
    6: b"security.",
}
