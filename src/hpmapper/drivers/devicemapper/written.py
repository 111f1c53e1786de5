"""Which inodes of a snapshot may have been changed since it was made, told by the blocks that were written.

A thin snapshot is a copy of its parent's file system, so a file that nobody touched has the same inode, at the same
place of the device. The pool's metadata tells which blocks of the device were written; XFS computes an inode's place
from its number. An inode in a block that was not written needs not be looked at. In one that was, its time of change
decides, which nobody can set: no file's data is compared, and one whose other times were set back is found.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from hpmapper.kernel.fs import XfsGeometry

IsWritten = Callable[[int], bool]
"""Whether the inode of that number lies where something was written; True if unsure."""


def anywhere(_: int) -> bool:
    """Nothing is known of what was written."""
    return True


def in_blocks(geometry: XfsGeometry, blocks: set[int], size: int) -> IsWritten:
    """Of an XFS, by the numbers of the device's blocks of `size` bytes that were written."""
    return lambda inode: geometry.inode_offset(inode) // size in blocks


def same(former: os.DirEntry[bytes], entry: os.DirEntry[bytes], is_written: IsWritten) -> bool:
    """Whether two entries of one name are one unchanged file; never of directories, below which much may be changed."""
    if entry.inode() != former.inode() or entry.is_dir(follow_symlinks=False):
        return False
    if not is_written(entry.inode()):
        return True
    times = (one.stat(follow_symlinks=False).st_ctime_ns for one in (former, entry))
    return len(set(times)) == 1
