"""Cases: tars of every format, seen as trees and given back byte for byte."""

from __future__ import annotations

import gzip
import io
import os
import stat
import struct
from collections.abc import Sequence
from pathlib import Path

from hpmapper.engine import Blob
from hpmapper.layer.stream import Expected
from hpmapper.meta.snapshots import Snapshot
from hpmapper.testing import tars
from hpmapper.testing.contract.subject import Case, Subject
from hpmapper.testing.tars import BLOCKDEV, CHAR, FIFO, LINK, SYMLINK, folder, header, member, padded, pax, tar

_BIG = bytes(range(256)) * 300  # more than any driver's limit for small files
_NET_RAW = struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0)  # struct vfs_cap_data: cap_net_raw=ep
_SPARSE_SIZE = 1 << 20
_FEW = ((0, b"begin" * 100), (65536, b"x" * 4096), (_SPARSE_SIZE - 700, b"end" * 100))
_MANY = tuple((number * 8192, b"%04d" % number) for number in range(60))


def _brought(subject: Subject, blob: bytes, parent: Snapshot | None = None) -> Path:
    """Bring in a layer, check its tar, and return the root of a container on it."""
    layer = subject.layer(blob, parent)
    assert b"".join(subject.engine.read_tar(layer)) == blob, "the tar came back changed"
    subject.assert_whole(layer)
    return subject.opened(layer)[1]


def ustar(subject: Subject) -> None:
    """Every type, with all that the header itself can hold."""
    root = _brought(
        subject,
        tar(
            folder(b"./", 0o711),
            folder(b"d/", 0o2750),
            member(b"d/file", b"data", mode=0o4755, uid=1000, gid=2000, mtime=1_234_567_890),
            member(b"big", _BIG),
            member(b"hard", kind=LINK, link=b"big"),
            member(b"soft", kind=SYMLINK, link=b"d/file"),
            member(b"null", kind=CHAR, major=1, minor=3, mode=0o666),
            member(b"disk", kind=BLOCKDEV, major=8, minor=1),
            member(b"pipe", kind=FIFO),
            header(b"n" * 100, size=0, prefix=b"d"),
        ),
    )
    status = (root / "d/file").stat()
    assert (status.st_mode, status.st_uid, status.st_gid) == (stat.S_IFREG | 0o4755, 1000, 2000)
    assert status.st_mtime_ns == 1_234_567_890 * 10**9
    assert (root / "big").read_bytes() == _BIG
    assert os.path.samefile(root / "big", root / "hard")
    assert os.readlink(root / "soft") == "d/file"
    assert (root / "null").stat().st_rdev == os.makedev(1, 3)
    assert stat.S_ISBLK((root / "disk").stat().st_mode)
    assert stat.S_ISFIFO((root / "pipe").stat().st_mode)
    assert (root / "d" / ("n" * 100)).stat().st_size == 0
    assert root.stat().st_mode & 0o7777 == 0o711


def gnu(subject: Subject) -> None:
    """GNU's long names and links, and numbers that octal has no room for."""
    name, target = b"d/" + b"n" * 200, b"t" * 300
    root = _brought(
        subject,
        tar(
            tars.gnu_long(b"L", name),
            member(name[:100], b"long"),
            tars.gnu_long(b"K", target),
            tars.gnu_long(b"L", name + b"l"),
            member(name[:100], kind=SYMLINK, link=target[:100]),
            member(b"far", uid=2**31 + 5, gid=2**32 - 2, mtime=2**34),
            member(b"early", mtime=-5),
        ),
    )
    path = root / os.fsdecode(name)
    assert path.read_bytes() == b"long"
    assert os.readlink(f"{path}l").encode() == target
    assert ((root / "far").stat().st_uid, (root / "far").stat().st_gid) == (2**31 + 5, 2**32 - 2)
    assert (root / "early").stat().st_mtime == -5


def pax_records(subject: Subject) -> None:
    """Names, owners, nanoseconds, attributes; global records, and the member's own that count more."""
    records = {
        b"path": b"d/\xc3\xa9" + b"e" * 200,
        b"mtime": b"1500000000.123456789",
        b"uid": b"4000000000",
        b"gid": b"70000",
        b"SCHILY.xattr.user.mark": b"a=b\n\0c",
        b"LIBARCHIVE.xattr.user.other": b"dmFsdWU",
        b"SCHILY.acl.access": b"user::rw-,user:1000:r--,group::r--,mask::r--,other::---",
        b"comment": b"nobody reads this",
    }
    root = _brought(
        subject,
        tar(
            pax({b"gid": b"55", b"mtime": b"-1.5"}, b"g"),
            pax(records),
            member(b"short", b"pax"),
            member(b"plain", b"global"),
        ),
    )
    path = os.path.join(os.fsencode(root), records[b"path"])
    status = os.stat(path)
    assert (status.st_uid, status.st_gid, status.st_mtime_ns) == (4_000_000_000, 70_000, 1_500_000_000_123_456_789)
    assert os.getxattr(path, "user.mark") == b"a=b\n\0c"
    assert os.getxattr(path, "user.other") == b"value"
    assert len(os.getxattr(path, "system.posix_acl_access")) == 4 + 5 * 8
    plain = (root / "plain").stat()
    assert (plain.st_gid, plain.st_mtime_ns) == (55, -1_500_000_000)


def before_posix(subject: Subject) -> None:
    """The V7 form: no magic, NUL as a file's type, a slash for a directory."""
    root = _brought(
        subject,
        tar(
            header(b"d/", b"\0", magic=bytes(8)),
            header(b"d/f", b"\0", size=3, magic=bytes(8)) + padded(b"old"),
            header(b"contiguous", b"7", size=3) + padded(b"ctg"),
        ),
    )
    assert (root / "d/f").read_bytes() == b"old"
    assert (root / "contiguous").read_bytes() == b"ctg"


def sparse(subject: Subject) -> None:
    """The four ways in which tars say where holes are; few ranges and many."""
    forms = (tars.sparse_old_gnu, tars.sparse_pax_00, tars.sparse_pax_01, tars.sparse_pax_10)
    members = [
        form(b"%d-%d" % (number, len(segments)), _SPARSE_SIZE, segments)
        for number, form in enumerate(forms)
        for segments in (_FEW, _MANY, ())
    ]
    root = _brought(subject, tar(*members, member(b"after", b"a")))
    for number in range(len(forms)):
        for segments in (_FEW, _MANY, ()):
            found = (root / f"{number}-{len(segments)}").read_bytes()
            assert found == tars.filled(_SPARSE_SIZE, segments), (number, len(segments))
    assert (root / "after").read_bytes() == b"a"


def duplicates(subject: Subject) -> None:
    """The last of several members of one name counts; all come back in the tar."""
    root = _brought(
        subject,
        tar(
            member(b"f", b"1" * 5000),
            member(b"link", kind=LINK, link=b"f"),
            member(b"f", b"2" * 5000),
            member(b"f", b"3" * 5000),
            member(b"becomes", b"a file"),
            folder(b"becomes/"),
            member(b"becomes/inside", b"i"),
            folder(b"was/"),
            member(b"was/inside", b"i" * 5000),
            member(b"was", b"a file now"),
            folder(b"twice/", 0o700),
            member(b"twice/kept", b"k"),
            folder(b"twice/", 0o755),
        ),
    )
    assert (root / "f").read_bytes() == b"3" * 5000
    assert (root / "link").read_bytes() == b"1" * 5000
    assert (root / "becomes/inside").exists()
    assert (root / "was").read_bytes() == b"a file now"
    assert (root / "twice/kept").exists()
    assert (root / "twice").stat().st_mode & 0o777 == 0o755


def odd_bytes(subject: Subject) -> None:
    """Names that are no UTF-8, with `./`, `/` and `//` around them."""
    names = [b"\xff\xfe", b"./a/./b//c", b"/absolute", b"./\xe9"]
    root = _brought(subject, tar(*(member(name, name) for name in names)))
    for name in (b"\xff\xfe", b"a/b/c", b"absolute", b"\xe9"):
        assert (root / os.fsdecode(name)).read_bytes() in names
    assert len(os.listdir(root)) == len(names)


def endings(subject: Subject) -> None:
    """No end, a short end, rubbish after the end, and nothing at all."""
    whole = member(b"f", b"data")
    for ending in (b"", bytes(512), bytes(20480), bytes(1024) + b"rubbish" * 1000, bytes(512) + member(b"hidden")):
        root = _brought(subject, whole + ending)
        assert os.listdir(root) == ["f"]
    assert os.listdir(_brought(subject, bytes(1024))) == []


def compressed(subject: Subject) -> None:
    """gzip and zstd, in one piece and in several, padded, and read byte by byte."""
    plain = tar(member(b"f", _BIG * 10), member(b"g", b"g"))
    half = len(plain) // 2 + 7
    skippable = b"\x50\x2a\x4d\x18" + (9).to_bytes(4, "little") + b"123456789"
    blobs = {
        "gzip": gzip.compress(plain),
        "gzip stored": gzip.compress(plain, 0),
        "gzip members": gzip.compress(plain[:half]) + gzip.compress(b"") + gzip.compress(plain[half:]),
        "gzip padded": gzip.compress(plain) + bytes(1024),
        "zstd": tars.zstd_packed(plain),
        "zstd frames": tars.zstd_packed(plain[:half]) + skippable + tars.zstd_packed(plain[half:]),
    }
    for name, blob in blobs.items():
        layer = subject.layer(blob)
        assert b"".join(subject.engine.read_tar(layer)) == plain, name
        assert subject.layer(_Dribble(blob)) == layer, name
    assert subject.layer(skippable + blobs["zstd"]) == subject.layer(plain)


class _Dribble(io.BytesIO):
    """A stream that gives a byte at first and then little at a time, as sockets may."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(1 if self.tell() < 9 else 700)


def promises_kept(subject: Subject) -> None:
    """A layer that comes as promised is taken, and not read again for the same chain."""
    plain = tar(member(b"f", _BIG))
    first = subject.layer(plain)
    diff_id = subject.diff_id(first)

    def never() -> io.BytesIO:
        raise AssertionError("a known layer was fetched")

    taken = subject.engine.take_layer(None, Blob(Expected(diff_id=diff_id), never))
    assert (taken.snapshot, taken.ingested) == (first, None)


def whiteouts(subject: Subject) -> None:
    """Deletions, of files and trees; of what is not there; before and after what replaces it."""
    base = subject.layer(tar(*_LOWER))
    root = _brought(
        subject,
        tar(
            member(b".wh.top"),
            member(b"d/.wh.a"),
            member(b"d/.wh.sub"),
            member(b"d/.wh.nothing"),
            member(b"new/.wh.nothing"),
            member(b"e/.wh.b"),
            member(b"e/b", b"replaced after its deletion"),
            member(b"e/a", b"replaced before its deletion"),
            member(b"e/.wh.a"),
            member(b"e/.wh..wh.plnk"),
            member(b"n" * 96 + b"/.wh.x"),
        ),
        base,
    )
    assert sorted(os.listdir(root)) == ["d", "e", "new", "n" * 96, "opq"]
    assert os.listdir(root / "d") == ["b"]
    assert (root / "e/b").read_bytes() == b"replaced after its deletion"
    assert (root / "e/a").read_bytes() == b"replaced before its deletion"
    assert os.listdir(root / "new") == []


_LOWER = (
    member(b"top", b"t"),
    folder(b"d/", 0o700),
    member(b"d/a", b"lower"),
    member(b"d/b", b"lower"),
    folder(b"d/sub/"),
    member(b"d/sub/f", b"lower"),
    folder(b"e/"),
    member(b"e/a", b"lower"),
    member(b"e/b", b"lower"),
    folder(b"opq/", 0o750),
    member(b"opq/a", b"lower"),
    folder(b"opq/sub/"),
    member(b"opq/sub/f", b"lower"),
)


def opaque_whiteouts(subject: Subject) -> None:
    """An opaque marker, first, last or among deletions of what it hides anyway; and one of the root."""
    base = subject.layer(tar(*_LOWER))
    marker, own = member(b"opq/.wh..wh..opq"), member(b"opq/own", b"upper")
    idle = (member(b"opq/.wh.a"), member(b"opq/sub/.wh.f"), member(b"opq/sub/g", b"upper"))
    for order in ((marker, own), (own, marker), (*idle, marker, own), (marker, *idle, own)):
        root = _brought(subject, tar(*order), base)
        shown = ["own", "sub"] if idle[0] in order else ["own"]
        assert sorted(os.listdir(root / "opq")) == shown, "an opaque directory shows more"
        assert shown == ["own"] or os.listdir(root / "opq/sub") == ["g"]
        assert sorted(os.listdir(root / "d")) == ["a", "b", "sub"]
    root = _brought(subject, tar(member(b".wh..wh..opq"), member(b"only", b"o"), member(b"d/x", b"x")), base)
    assert sorted(os.listdir(root)) == ["d", "only"]
    assert os.listdir(root / "d") == ["x"]


def directories_that_nobody_mentions(subject: Subject) -> None:
    """A directory on the way to a member is as the layers below have it, or plain."""
    base = subject.layer(tar(folder(b"d/", 0o2711), member(b"d/a", b"a")))
    root = _brought(subject, tar(member(b"d/b", b"b"), member(b"x/y/z", b"z")), base)
    assert (root / "d").stat().st_mode & 0o7777 == 0o2711
    assert sorted(os.listdir(root / "d")) == ["a", "b"]
    assert (root / "x/y").stat().st_mode & 0o7777 == 0o755


def implied_root(subject: Subject) -> None:
    """The root is as the nearest layer that mentions it says."""
    base = subject.layer(tar(folder(b"./", 0o700), member(b"a", b"a")))
    root = _brought(subject, tar(member(b"b", b"b")), base).stat()
    assert (root.st_mode & 0o7777, root.st_mtime) == (0o700, 1_600_000_000)
    assert _brought(subject, tar(folder(b"/", 0o711), member(b"c")), base).stat().st_mode & 0o7777 == 0o711
    assert _brought(subject, tar(member(b"only", b"o"))).stat().st_mode & 0o7777 == 0o755


def links_into_lower_layers(subject: Subject) -> None:
    """A hard link to a file that only a layer below has, small or large; through a symlink of that layer too."""
    base = subject.layer(
        tar(
            member(b"small", b"s", mode=0o600),
            member(b"large", _BIG, mode=0o640),
            member(b"way", kind=SYMLINK, link=b"/real"),
            folder(b"real/"),
            member(b"real/f", _BIG[:7000]),
        )
    )
    links = [member(name + b"2", kind=LINK, link=name, mode=0o640) for name in (b"small", b"large")]
    root = _brought(subject, tar(*links, member(b"f2", kind=LINK, link=b"way/f")), base)
    assert (root / "small2").read_bytes() == b"s"
    assert (root / "large2").read_bytes() == _BIG
    assert os.path.samefile(root / "large", root / "large2")
    assert (root / "large2").stat().st_mode & 0o777 == 0o640
    assert os.path.samefile(root / "real/f", root / "f2")
    assert (root / "f2").read_bytes() == _BIG[:7000]


def links_speak_for_their_file(subject: Subject) -> None:
    """The last header of a file counts, as with containerd and Docker; of xattrs, all do, but for capabilities."""
    attributes = {b"SCHILY.xattr.user.one": b"1", b"SCHILY.xattr.security.capability": _NET_RAW}
    root = _brought(
        subject,
        tar(
            pax(attributes),
            member(b"file", b"data", mode=0o600, uid=1, gid=2),
            pax({b"SCHILY.xattr.user.two": b"2"}),
            member(b"link", kind=LINK, link=b"file", mode=0o4755, uid=7, gid=8, mtime=1_234_567_890),
            member(b"soft", kind=SYMLINK, link=b"file"),
            member(b"soft2", kind=LINK, link=b"soft", mode=0o600, uid=7, gid=8),
        ),
    )
    found = (root / "file").stat()
    assert (found.st_mode & 0o7777, found.st_uid, found.st_gid, found.st_mtime) == (0o4755, 7, 8, 1_234_567_890)
    assert sorted(os.listxattr(root / "file")) == ["user.one", "user.two"]
    assert ((root / "soft").lstat().st_mode & 0o7777, (root / "soft").lstat().st_uid) == (0o777, 7)


def members_behind_symlinks(subject: Subject) -> None:
    """Members and deletions through a symlink to a directory land where it leads, as in a chroot."""
    base = subject.layer(tar(folder(b"usr/"), folder(b"usr/lib/"), member(b"usr/lib/a", b"a"),
                             member(b"lib", kind=SYMLINK, link=b"usr/lib")))  # fmt: skip
    root = _brought(subject, tar(member(b"lib/b", b"b"), member(b"lib/.wh.a")), base)
    assert os.readlink(root / "lib") == "usr/lib"
    assert os.listdir(root / "usr/lib") == ["b"]


def file_capabilities(subject: Subject) -> None:
    """`security.capability` arrives, on small files and on large ones."""
    value = bytes.fromhex("0100000200240000000000000000000000000000")
    record = pax({b"SCHILY.xattr.security.capability": value})
    root = _brought(subject, tar(record, member(b"small", b"s"), record, member(b"large", _BIG)))
    for name in ("small", "large"):
        assert os.getxattr(root / name, "security.capability") == value


def large_directory(subject: Subject) -> None:
    """Five thousand entries in one directory."""
    members: Sequence[bytes] = [member(b"d/%06d" % number) for number in range(5000)]
    root = _brought(subject, tar(*members))
    assert len(os.listdir(root / "d")) == 5000


CASES: tuple[Case, ...] = (
    ustar,
    gnu,
    pax_records,
    before_posix,
    sparse,
    duplicates,
    odd_bytes,
    endings,
    compressed,
    promises_kept,
    whiteouts,
    opaque_whiteouts,
    directories_that_nobody_mentions,
    implied_root,
    links_into_lower_layers,
    links_speak_for_their_file,
    members_behind_symlinks,
    file_capabilities,
    large_directory,
)
