"""From tar members to a tree: where names lead, what deletions mean, what hard links join.

Names are resolved inside the tree alone (never on a file system), so no name, link or symlink of a hostile tar
can lead out of it. File data goes to a `FileSink` as it streams by; the recipe keeps what is needed to make
the tar again.
"""

from __future__ import annotations

import os
import stat
from typing import BinaryIO, Protocol

from hpmapper.errors import Corrupt, InvalidArgument
from hpmapper.files import Pieces, Segments
from hpmapper.layer.acl import XFS_NAMES
from hpmapper.layer.marks import IMPLIED_ROOT
from hpmapper.layer.recipe import RecipeWriter
from hpmapper.layer.stream import LayerStream
from hpmapper.layer.tar import BLOCK, Entry, read_entries
from hpmapper.model import ObjectDigest
from hpmapper.tree import Inode, Xattrs, directory, whiteout

WHITEOUT_PREFIX = b".wh."
WHITEOUT_META = b".wh..wh."
OPAQUE_MARKER = b".wh..wh..opq"

MAX_ENTRIES = 4_000_000
"""Members of one layer: each costs some 500 bytes of memory while the layer is read."""

MAX_PATH = 4096  # PATH_MAX: beyond it no program could open the file
MAX_NAME = 255
MAX_ID = 2**32 - 2
MAX_SECONDS = 2**63 - 1  # time_t
MAX_SYMLINKS = 40  # as the kernel's path walk (MAXSYMLINKS)
_FILE_TYPES = {b"3": stat.S_IFCHR, b"4": stat.S_IFBLK, b"6": stat.S_IFIFO}


class FileSink(Protocol):
    """Takes regular files' data."""

    inline_below: int
    """Files smaller than this many bytes come through `inline`."""

    def inline(self, data: bytes) -> int:
        """Keep a small file; returns its offset in the spool."""

    def put(self, pieces: Pieces, size: int, segments: Segments | None) -> tuple[ObjectDigest | int, bytes]:
        """Keep a file of `size` bytes; with `segments` the pieces fill only those ranges, the rest are holes.

        Returns what the inode's `content` is to say, and the name under which a recipe finds the data again.
        """


class Below(Protocol):
    """The merged view of the layers below, asked only when a tar leaves something to them."""

    def lookup(self, path: bytes) -> Inode | None:
        """The file at `path` (no leading slash, last component not followed), its children not filled in."""

    def names(self, path: bytes) -> list[bytes]:
        """The names in the directory at `path`; none if there is no such directory."""

    def open(self, path: bytes) -> BinaryIO:
        """The data of the regular file at `path`."""


class Nothing:
    """What lies below the bottom layer."""

    def lookup(self, path: bytes) -> Inode | None:
        return None

    def names(self, path: bytes) -> list[bytes]:
        return []

    def open(self, path: bytes) -> BinaryIO:
        raise FileNotFoundError(path)


class LayerBuilder:
    """Builds one layer's tree.

    Attributes:
        root: the tree so far.
        bound: whether the layers below were asked, so that the tree is right above them alone.
        entries: members read.
    """

    def __init__(self, below: Below, sink: FileSink, recipe: RecipeWriter) -> None:
        self.root = directory(0o755)
        self.root.xattrs = ((IMPLIED_ROOT, b"y"),)
        self.bound = False
        self.entries = 0
        self._deleted = False
        self._bookkeeping: list[tuple[Inode, bytes]] = []
        self._below = below
        self._sink = sink
        self._recipe = recipe
        self._directories: dict[bytes, Inode] = {b"": self.root}

    def read(self, stream: LayerStream) -> None:
        """Take in the whole tar.

        Raises:
            Corrupt: the tar is damaged.
            InvalidArgument: a member is hostile or cannot exist on Linux; names the member.
        """
        source = _Recorded(stream, self._recipe)
        for entry in read_entries(source):
            self.entries += 1
            if self.entries > MAX_ENTRIES:
                raise InvalidArgument(f"the layer has more than {MAX_ENTRIES} members", hint="split it into layers")
            self._add(entry, stream)
        for rest in stream.finish():
            self._recipe.literal(bytes(rest))
        if self.root.opaque:
            self._hide_all_below()
        for where, name in self._bookkeeping:
            del where.entries()[name]
        if self._deleted:
            _drop_idle_deletions(self.root)

    def _add(self, entry: Entry, stream: LayerStream) -> None:
        parts = _components(entry.name)
        if not parts:
            self._add_root(entry)
            return
        name = parts[-1]
        if name.startswith(WHITEOUT_PREFIX):
            self._skip_data(entry, stream)
            self._delete(parts)
            return
        parent = self._parent(parts)
        inode = self._link_target(entry) if entry.type == b"1" else self._inode(entry, stream)
        self._enter(parent, parts, inode)

    def _add_root(self, entry: Entry) -> None:
        if entry.type != b"5":
            raise InvalidArgument(f"tar member {entry.name!r} would replace the root directory by a file")
        _set_attributes(self.root, entry)

    def _inode(self, entry: Entry, stream: LayerStream) -> Inode:
        if entry.type == b"0":
            inode = self._file(entry, stream)
        elif entry.type == b"5":
            inode = directory()
        elif entry.type == b"2":
            inode = _symlink(entry)
        else:
            inode = Inode(_FILE_TYPES[entry.type])
            inode.rdev = _device(entry)
        _set_attributes(inode, entry)
        return inode

    def _file(self, entry: Entry, stream: LayerStream) -> Inode:
        inode = Inode(stat.S_IFREG)
        inode.size = entry.size
        padding = -entry.stored % BLOCK
        if entry.segments is None and entry.size < self._sink.inline_below:
            data = stream.read(entry.size + padding)
            self._recipe.literal(data)
            inode.content = self._sink.inline(data[: entry.size]) if entry.size else None
            return inode
        inode.content, name = self._sink.put(stream.pieces(entry.stored), entry.size, entry.segments)
        for offset, length in ((0, entry.size),) if entry.segments is None else entry.segments:
            self._recipe.reference(name, offset, length)
        self._recipe.literal(stream.read(padding))
        return inode

    def _skip_data(self, entry: Entry, stream: LayerStream) -> None:
        for piece in stream.pieces(entry.stored + -entry.stored % BLOCK):
            self._recipe.literal(bytes(piece))

    def _enter(self, parent: Inode, parts: list[bytes], inode: Inode) -> None:
        children = parent.entries()
        name = parts[-1]
        existing = children.get(name)
        if existing is not None:
            if existing.is_dir and inode.is_dir:
                existing.mode, existing.uid, existing.gid = inode.mode, inode.uid, inode.gid
                existing.mtime_ns, existing.xattrs = inode.mtime_ns, inode.xattrs
                return
            # A whiteout and a new file of one name in one layer: the new file stands on an empty place.
            inode.opaque = inode.is_dir and existing.is_whiteout
            self._directories = {b"": self.root}
        children[name] = inode

    def _delete(self, parts: list[bytes]) -> None:
        """A whiteout (OCI image spec, layer.md): deletes in the layers below, never in this one."""
        marker = parts[-1]
        if marker == OPAQUE_MARKER:
            self._parent(parts).opaque = True
            return
        if marker.startswith(WHITEOUT_META):
            return  # AUFS's own bookkeeping
        name = marker.removeprefix(WHITEOUT_PREFIX)
        if name in (b"", b".", b".."):
            raise InvalidArgument(f"tar member {b'/'.join(parts)!r} deletes something without a name")
        children = self._parent(parts).entries()
        existing = children.get(name)
        if existing is not None:
            existing.opaque = existing.is_dir
        elif self._ask(self._place(parts[:-1], name)) is not None:
            # A whiteout of nothing would show up as a device in a directory that no layer below has.
            children[name] = whiteout()
            self._deleted = True

    def _hide_all_below(self) -> None:
        """Write an opaque root as deletions: overlayfs merges its layers' roots whatever their attributes say."""
        self.root.opaque = False
        self.bound = True
        children = self.root.entries()
        for name in self._below.names(b""):
            child = children.setdefault(name, whiteout())
            child.opaque = child.is_dir

    def _ask(self, path: bytes) -> Inode | None:
        """What the layers below have at a resolved path, unless this layer hides it."""
        self.bound = True
        return None if self._hides(path) else self._below.lookup(path)

    def _hides(self, path: bytes) -> bool:
        at: Inode | None = self.root
        for part in path.split(b"/"):
            if at is None or at.children is None:
                return False
            if at.opaque:
                return True
            at = at.children.get(part)
        return False

    def _parent(self, parts: list[bytes]) -> Inode:
        """The directory of the last component, made as the layers below have it if this one does not say."""
        path = b"/".join(parts[:-1])
        found = self._directories.get(path)
        if found is None:
            found = self._below_known(path) or self._resolved(parts[:-1])
            self._directories[path] = found
        return found

    def _below_known(self, path: bytes) -> Inode | None:
        """The directory, if it is in one that was resolved before: the usual case, at a fraction of the cost."""
        above, _, name = path.rpartition(b"/")
        known = self._directories.get(above)
        child = known.entries().get(name) if known is not None else None
        return child if child is not None and child.is_dir else None

    def _resolved(self, parts: list[bytes]) -> Inode:
        trail = self._resolve(parts)
        return trail[-1][1] if trail else self.root

    def _place(self, parts: list[bytes], name: bytes) -> bytes:
        """The path of `name` in the directory that `parts` lead to, without symlinks: what may be asked below."""
        return b"/".join([*(step for step, _ in self._resolve(parts)), name])

    def _resolve(self, parts: list[bytes]) -> list[tuple[bytes, Inode]]:
        """Walk to a directory, following symlinks inside the tree as chroot would; returns the way there."""
        trail: list[tuple[bytes, Inode]] = []  # the way from the root, so that ".." in a symlink can go back
        todo = parts[::-1]
        followed = 0
        while todo:
            part = todo.pop()
            if part == b"..":
                if trail:
                    trail.pop()
                continue
            here = trail[-1][1] if trail else self.root
            child = self._step(here, [name for name, _ in trail], part)
            if child.target:
                followed += 1
                if followed > MAX_SYMLINKS:
                    raise InvalidArgument(f"tar member path {b'/'.join(parts)!r} runs in a circle of symlinks")
                if child.target.startswith(b"/"):
                    trail = []
                todo.extend(step for step in reversed(child.target.split(b"/")) if step not in (b"", b"."))
            else:
                trail.append((part, child))
        return trail

    def _step(self, here: Inode, trail: list[bytes], part: bytes) -> Inode:
        """The directory or symlink `part` of `here`; a directory that only the layers below have is copied."""
        children = here.entries()
        child = children.get(part)
        if child is None and part.startswith(WHITEOUT_PREFIX):
            child = children[part] = self._bookkeeping_directory(here, part)
        elif child is None:
            child = self._implied(b"/".join([*trail, part]))
            if child.is_dir:
                children[part] = child
        elif child.is_whiteout:
            child = directory()
            child.opaque = True
            children[part] = child
        if not child.is_dir and not child.target:
            raise InvalidArgument(f"tar member path {b'/'.join([*trail, part])!r} leads through a file")
        return child

    def _bookkeeping_directory(self, here: Inode, part: bytes) -> Inode:
        """A directory of AUFS's own, until the end: files in .wh..wh.plnk are what other members link to."""
        if not part.startswith(WHITEOUT_META):
            raise InvalidArgument(f"a tar member lies in {part!r}, which as a name is a deletion")
        self._bookkeeping.append((here, part))
        return directory()

    def _implied(self, path: bytes) -> Inode:
        below = self._ask(path)
        if below is None:
            return directory()
        if not below.is_dir:
            return below
        copy = directory(stat.S_IMODE(below.mode), below.uid, below.gid, below.mtime_ns)
        copy.xattrs = below.xattrs
        return copy

    def _link_target(self, entry: Entry) -> Inode:
        """The file that a hard link names: of this layer, or of one below and then joined to this layer."""
        parts = _components(entry.link)
        if not parts:
            raise InvalidArgument(f"tar member {entry.name!r} is a hard link to the root directory")
        parent = self._parent(parts)
        target = parent.entries().get(parts[-1])
        if target is None:
            target = self._from_below(entry, parts)
            parent.entries()[parts[-1]] = target
        if target.is_dir or target.is_whiteout:
            raise InvalidArgument(f"tar member {entry.name!r} is a hard link to {entry.link!r}, which is no file")
        _set_by_link(target, entry)
        return target

    def _from_below(self, entry: Entry, parts: list[bytes]) -> Inode:
        path = self._place(parts[:-1], parts[-1])
        below = self._ask(path)
        if below is None:
            raise Corrupt(f"tar member {entry.name!r} is a hard link to {entry.link!r}, which does not exist")
        if stat.S_ISREG(below.mode) and below.size:
            below.content = self._copy_from_below(path, below.size)
        return below

    def _copy_from_below(self, path: bytes, size: int) -> ObjectDigest | int:
        with self._below.open(path) as data:
            if size < self._sink.inline_below:
                return self._sink.inline(data.read(size))
            return self._sink.put(iter(lambda: data.read(1 << 20), b""), size, None)[0]


class _Recorded:
    """Reads a stream's headers and keeps each byte for the recipe."""

    def __init__(self, stream: LayerStream, recipe: RecipeWriter) -> None:
        self._stream = stream
        self._recipe = recipe

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._recipe.literal(data)
        return data

    def read_or_end(self, size: int) -> bytes:
        data = self._stream.read_or_end(size)
        self._recipe.literal(data)
        return data


def _components(name: bytes) -> list[bytes]:
    """A member name's components. A leading slash counts for nothing, as in every unpacker.

    Raises:
        InvalidArgument: ".." (which no honest tool writes), a NUL, or longer than Linux can open.
    """
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if b".." in parts or b"\0" in name:
        raise InvalidArgument(f"tar member {name[:200]!r} points out of the layer")
    if len(name) > MAX_NAME and (len(name) > MAX_PATH or _has_long_name(parts)):
        raise InvalidArgument(f"tar member {name[:80]!r}... has a name longer than Linux allows")
    return parts


def _has_long_name(parts: list[bytes]) -> bool:
    bare = [*parts[:-1], parts[-1].removeprefix(WHITEOUT_PREFIX)] if parts else []
    return any(len(part) > MAX_NAME for part in bare)


def _set_attributes(inode: Inode, entry: Entry) -> None:
    if not (0 <= entry.uid <= MAX_ID and 0 <= entry.gid <= MAX_ID):
        raise InvalidArgument(f"tar member {entry.name!r} has an owner that cannot exist: {entry.uid}:{entry.gid}")
    if abs(entry.mtime_ns) > MAX_SECONDS * 1_000_000_000:
        raise InvalidArgument(f"tar member {entry.name!r} has a time that Linux cannot count to")
    inode.mode = stat.S_IFMT(inode.mode) | (0o777 if inode.target else entry.mode)
    inode.uid, inode.gid, inode.mtime_ns = entry.uid, entry.gid, entry.mtime_ns
    inode.xattrs = _checked(entry) if entry.xattrs else ()


def _set_by_link(target: Inode, entry: Entry) -> None:
    """Give a file what the header of a link to it says, as containerd and Docker do. (GNU tar leaves it as it was.)

    They chown it, which takes its capabilities away unless the header has them, and set extended attributes.
    """
    kept = {name: value for name, value in target.xattrs if name != _CAPABILITIES}
    _set_attributes(target, entry)
    if kept:
        target.xattrs = tuple(sorted({**kept, **dict(target.xattrs)}.items()))


_CAPABILITIES = b"security.capability"
_XATTR_SPACES = (b"user.", b"trusted.", b"security.", b"system.posix_acl_")


def _checked(entry: Entry) -> Xattrs:
    for name, value in entry.xattrs:
        if not name.startswith(_XATTR_SPACES) or len(name) > 255 or b"\0" in name or len(value) > 65535:
            raise InvalidArgument(f"tar member {entry.name!r} has an extended attribute Linux refuses: {name[:80]!r}")
    # overlayfs reads user.overlay.* where it runs without privileges; nothing of a tar may speak to it.
    kept = ((name, value) for name, value in entry.xattrs if not name.startswith((b"user.overlay.", IMPLIED_ROOT)))
    return tuple((name, value) for name, value in kept if name not in XFS_NAMES)


def _symlink(entry: Entry) -> Inode:
    if not entry.link or len(entry.link) >= MAX_PATH or b"\0" in entry.link:
        raise InvalidArgument(f"tar member {entry.name!r} is a symlink with an empty or impossible target")
    inode = Inode(stat.S_IFLNK | 0o777)
    inode.target, inode.size = entry.link, len(entry.link)
    return inode


def _device(entry: Entry) -> int:
    if not (0 <= entry.major < 1 << 12 and 0 <= entry.minor < 1 << 20):
        raise InvalidArgument(f"tar member {entry.name!r} has a device number Linux lacks: {entry.major}:{entry.minor}")
    if entry.type == b"3" and entry.major == entry.minor == 0:
        raise InvalidArgument(
            f"tar member {entry.name!r} is the device 0:0, by which overlayfs means a deletion",
            hint="in a layer a deletion is a member whose name begins with .wh.",
        )
    return os.makedev(entry.major, entry.minor)


def _drop_idle_deletions(root: Inode) -> None:
    """Remove whiteouts inside opaque directories: they delete nothing there, and overlayfs lists them."""
    pending = [(root, False)]
    while pending:
        here, hidden = pending.pop()
        children = here.entries()
        hidden = hidden or here.opaque
        if hidden:
            for name in [name for name, child in children.items() if child.is_whiteout]:
                del children[name]
        pending.extend((child, hidden) for child in children.values() if child.is_dir)
