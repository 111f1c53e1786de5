"""What differs between two trees, as the tree of a layer that would lead from one to the other."""

from __future__ import annotations

import stat

from hpmapper.layer.build import Below
from hpmapper.tree import Inode, walk, whiteout


def compare(before: Inode, after: Inode) -> Inode:
    """The tree of changes: new and changed files, whiteouts for missing ones, and the directories above them.

    Files count as equal when type, attributes, size and times (to the nanosecond) are: data is not read. When
    one name of a hard-linked file is in, all its names are, so that they stay links.
    """
    root = _bare(after)
    pending = [(before, after, root)]
    unchanged: list[tuple[Inode, bytes, Inode]] = []
    taken: set[Inode] = set()
    unchanged_directories: list[tuple[Inode, Inode, bytes]] = []
    while pending:
        old, new, into = pending.pop()
        old_entries, new_entries, entries = old.children or {}, new.entries(), into.entries()
        for name in old_entries.keys() - new_entries.keys():
            entries[name] = whiteout()
        for name, child in new_entries.items():
            former = old_entries.get(name)
            if child.is_dir:
                below = former if former is not None and former.is_dir else Inode(stat.S_IFDIR)
                entries[name] = bare = _bare(child)
                pending.append((below, child, bare))
                if former is not None and former.is_dir and _same(former, child):
                    unchanged_directories.append((bare, into, name))
            elif former is None or not _same(former, child):
                entries[name] = child
                taken.add(child)
            else:
                unchanged.append((into, name, child))
    for into, name, child in unchanged:
        if child in taken:
            into.entries()[name] = child
    _prune(unchanged_directories)
    return root


def drop_untouched(tree: Inode, below: Below) -> None:
    """Drop the directories of an upper that are just as below and hold no change.

    overlayfs copies a directory up before something is made in it, and leaves the copy when that has gone again.
    """
    at = {path: inode for path, inode in walk(tree) if inode.is_dir}
    for path in reversed(at):
        if path and not at[path].entries() and not at[path].opaque and _as_below(at[path], below.lookup(path)):
            above, _, name = path.rpartition(b"/")
            del at[above].entries()[name]


def _as_below(directory: Inode, before: Inode | None) -> bool:
    if before is None or not before.is_dir:
        return False
    kept = [(one.mode, one.uid, one.gid, one.mtime_ns, sorted(one.xattrs)) for one in (directory, before)]
    return kept[0] == kept[1]


def _bare(inode: Inode) -> Inode:
    """The directory without its entries."""
    bare = Inode(inode.mode, inode.uid, inode.gid, inode.mtime_ns)
    bare.xattrs = inode.xattrs
    return bare


def _prune(unchanged_directories: list[tuple[Inode, Inode, bytes]]) -> None:
    """Drop directories that are unchanged and hold no change, from the leaves up."""
    for directory, parent, name in reversed(unchanged_directories):
        if not directory.entries():
            del parent.entries()[name]


def _same(old: Inode, new: Inode) -> bool:
    return (old.mode, old.uid, old.gid, old.size, old.rdev, old.target, old.xattrs, old.mtime_ns) == (
        new.mode,
        new.uid,
        new.gid,
        new.size,
        new.rdev,
        new.target,
        new.xattrs,
        new.mtime_ns,
    )
