"""Cases: tars and containers made to hurt. Each is refused with an error that says why, or does no harm."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from blake3 import blake3

from hpmapper.engine import Blob
from hpmapper.errors import Corrupt, InvalidArgument
from hpmapper.layer.stream import Expected
from hpmapper.meta.snapshots import Snapshot
from hpmapper.testing import tars
from hpmapper.testing.contract.subject import Case, Subject, refused
from hpmapper.testing.tars import CHAR, LINK, SYMLINK, folder, header, member, padded, pax, tar

_OVERLAY = b"SCHILY.xattr.trusted.overlay."
_SECRET = b"another image's secret " * 1000


def _refused(subject: Subject, blob: bytes, parent: Snapshot | None = None, expect: Expected | None = None) -> str:
    """Fail unless the layer is refused by one of our errors and leaves nothing; returns what the error says."""
    before = subject.driver.stored(), subject.driver.stored_objects()
    offered = Blob(expect or Expected(), lambda: io.BytesIO(blob))
    error = refused((Corrupt, InvalidArgument), lambda: subject.engine.take_layer(parent, offered))
    assert (subject.driver.stored(), subject.driver.stored_objects()) == before, f"something is left of {error}"
    return str(error)


def names_that_lead_out(subject: Subject) -> None:
    """`..` is refused wherever it stands; the message names the member."""
    for name in (b"../evil", b"a/../../evil", b"..", b"a/..", b"/../evil"):
        assert repr(name)[2:-1] in _refused(subject, tar(member(name, b"x")))
    base = subject.layer(tar(member(b"f", b"f")))
    _refused(subject, tar(member(b"l", kind=LINK, link=b"../../../etc/passwd")), base)
    _refused(subject, tar(member(b"../.wh.f")), base)


def absolute_names(subject: Subject) -> None:
    """A leading slash counts for nothing."""
    outside = subject.directory / "outside"
    blob = tar(pax({b"path": os.fsencode(outside)}), member(b"-", b"x"))
    root = subject.opened(subject.layer(blob))[1]
    assert not outside.exists()
    assert (root / str(outside).lstrip("/")).read_bytes() == b"x"


def symlinks_that_lead_out(subject: Subject) -> None:
    """A member below a symlink of its own tar, or of a layer below, stays in the container."""
    outside = subject.directory / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(_SECRET)
    target = os.fsencode(outside)
    traps = tar(
        pax({b"linkpath": target}),
        member(b"absolute", kind=SYMLINK, link=b"-"),
        pax({b"linkpath": b"../" * 30 + target[1:]}),
        member(b"relative", kind=SYMLINK, link=b"-"),
        member(b"root", kind=SYMLINK, link=b"/"),
    )
    last = [pax({b"path": b"root" + target + b"/c"}), member(b"-", b"x")]
    evil = [member(b"absolute/a", b"x"), member(b"relative/b", b"x"), *last]
    together = subject.layer(traps[: -len(tars.END)] + tar(*evil))
    on_top = subject.layer(tar(*evil, member(b"absolute/.wh.secret")), subject.layer(traps))
    for layer in (together, on_top):
        inside = subject.opened(layer)[1] / str(outside).lstrip("/")
        assert sorted(os.listdir(inside)) == ["a", "b", "c"]
    assert os.listdir(outside) == ["secret"]


def links_that_lead_out(subject: Subject) -> None:
    """A hard link through a symlink does not reach the host's files."""
    secret = subject.directory / "secret"
    secret.write_bytes(_SECRET)
    way = pax({b"linkpath": os.fsencode(subject.directory)})
    base = subject.layer(tar(way, member(b"way", kind=SYMLINK, link=b"-")))
    _refused(subject, tar(member(b"got", kind=LINK, link=b"way/secret")), base)
    _refused(subject, tar(pax({b"linkpath": os.fsencode(secret)}), member(b"got", kind=LINK, link=b"-")), base)


def links_to_nothing(subject: Subject) -> None:
    """A hard link needs a file: not nothing, not a directory, not the root, not what was deleted."""
    base = subject.layer(tar(member(b"f", b"f"), folder(b"d/"), member(b"d/g", b"g")))
    for link in (b"missing", b"d", b"/", b"", b"f/below"):
        _refused(subject, tar(member(b"l", kind=LINK, link=link)), base)
    _refused(subject, tar(member(b".wh.f"), member(b"l", kind=LINK, link=b"f")), base)
    _refused(subject, tar(member(b"d/.wh..wh..opq"), member(b"l", kind=LINK, link=b"d/g")), base)


def circles_of_symlinks(subject: Subject) -> None:
    """A path through symlinks that lead to each other ends."""
    circle = [member(b"a", kind=SYMLINK, link=b"b"), member(b"b", kind=SYMLINK, link=b"a")]
    _refused(subject, tar(*circle, member(b"a/x", b"x")))
    _refused(subject, tar(member(b"s", kind=SYMLINK, link=b"s/s"), member(b"s/x", b"x")))


def paths_through_files(subject: Subject) -> None:
    """A file is no directory."""
    _refused(subject, tar(member(b"f", b"f"), member(b"f/x", b"x")))
    _refused(subject, tar(member(b"f/x", b"x")), subject.layer(tar(member(b"f", b"f"))))
    _refused(subject, tar(member(b"./", b"x")))


def names_too_long(subject: Subject) -> None:
    """Longer than the kernel can open: refused, not cut."""
    _refused(subject, tar(pax({b"path": b"n" * 256}), member(b"x", b"x")))
    _refused(subject, tar(pax({b"path": b"d/" * 2100 + b"x"}), member(b"x", b"x")))
    _refused(subject, tar(pax({b"linkpath": b"t" * 4096}), member(b"x", kind=SYMLINK, link=b"t")))
    _refused(subject, tar(header(b"PaxHeaders/0", b"x", size=1 << 33), member(b"x", b"x")))


def bytes_that_no_name_has(subject: Subject) -> None:
    """A NUL in a name or target, an empty target."""
    _refused(subject, tar(pax({b"path": b"a\0b"}), member(b"x", b"x")))
    _refused(subject, tar(pax({b"linkpath": b"a\0b"}), member(b"x", kind=SYMLINK, link=b"t")))
    _refused(subject, tar(member(b"x", kind=SYMLINK)))


def numbers_out_of_range(subject: Subject) -> None:
    """Owners, device numbers, times and sizes beyond what Linux has."""
    _refused(subject, tar(member(b"x", uid=2**32 - 1)))
    _refused(subject, tar(member(b"x", gid=2**40)))
    _refused(subject, tar(member(b"x", uid=-1)))
    _refused(subject, tar(member(b"x", kind=CHAR, major=1 << 12, minor=1)))
    _refused(subject, tar(member(b"x", mtime=2**80)))
    _refused(subject, tar(pax({b"mtime": b"-" + b"9" * 20}), member(b"x")))
    _refused(subject, tar(header(b"x", size=-512)))
    _refused(subject, tars.sparse_old_gnu(b"x", 1 << 60, ((0, b"x"),)) + tars.END)


def device_that_deletes(subject: Subject) -> None:
    """A character device 0:0 is overlayfs's deletion: no tar may bring one."""
    base = subject.layer(tar(member(b"f", b"f")))
    _refused(subject, tar(member(b"f", kind=CHAR, major=0, minor=0)), base)


def attributes_that_redirect(subject: Subject) -> None:
    """`trusted.overlay.*` of a tar neither opens another image's data nor hides or shows anything."""
    secret = subject.layer(tar(member(b"secret", _SECRET)))
    base = subject.layer(tar(folder(b"d/"), member(b"d/lower", b"l"), member(b"f", b"lower file")))
    redirect = b"/" + _object_paths(_SECRET)
    root = subject.opened(
        subject.layer(
            tar(
                pax(
                    {b"SCHILY.xattr.trusted.overlay.metacopy": b"", b"SCHILY.xattr.trusted.overlay.redirect": redirect}
                ),
                member(b"stolen"),
                pax({_OVERLAY + b"opaque": b"y"}),
                folder(b"d/"),
                pax({_OVERLAY + b"redirect": b"/d"}),
                folder(b"e/"),
                pax({_OVERLAY + b"whiteout": b"y", b"SCHILY.xattr.user.overlay.whiteout": b"y"}),
                member(b"f"),
            ),
            base,
        )
    )[1]
    subject.assert_whole(secret)
    assert (root / "stolen").read_bytes() == b""
    assert os.listdir(root / "d") == ["lower"]
    assert os.listdir(root / "e") == []
    assert (root / "f").read_bytes() == b""


def _object_paths(data: bytes) -> bytes:
    """Where hpmapper keeps these data, as its own maps name it."""
    name = blake3(data).hexdigest()
    return f"{name[:2]}/{name[2:]}".encode("ascii")


def attributes_that_cannot_be(subject: Subject) -> None:
    """Unknown namespaces, overlong names and values."""
    for name in (b"nonsense", b"system.nfs4_acl", b"user." + b"n" * 255, b"user.\0", b"other.x"):
        _refused(subject, tar(pax({b"SCHILY.xattr." + name: b"v"}), member(b"x")))
    _refused(subject, tar(pax({b"SCHILY.xattr.user.x": bytes(65537)}), member(b"x")))
    _refused(subject, tar(pax({b"SCHILY.acl.access": b"user:somebody:rw-"}), member(b"x")))
    _refused(subject, tar(pax({b"LIBARCHIVE.xattr.user.x": b"a"}), member(b"x")))


def deletions_without_a_name(subject: Subject) -> None:
    """`.wh.` of nothing, of `.` and of `..`."""
    base = subject.layer(tar(folder(b"d/"), member(b"d/f", b"f")))
    for name in (b".wh.", b"d/.wh.", b"d/.wh..", b"d/.wh..."):
        _refused(subject, tar(member(name)), base)


def damaged_headers(subject: Subject) -> None:
    """A wrong checksum, letters for digits, types that are none, records that lie about their length."""
    good = bytearray(member(b"f", b"data"))
    for at, byte in ((0, 255), (150, 0x41), (126, 0x5A)):
        bad = bytearray(good)
        bad[at] = byte
        _refused(subject, bytes(bad) + tars.END)
    _refused(subject, tar(member(b"x", kind=b"V")))
    for data in (b"99 path=x\n", b"8 path=x", b"0 a=b\n", b"path=x\n", b"7 =\n\n\n\n", b"-1 a=b\n"):
        _refused(subject, header(b"PaxHeaders/0", b"x", size=len(data)) + padded(data) + tar(member(b"x")))
    _refused(subject, tar(pax({b"size": b"1e3"}), member(b"x")))


def damaged_sparse_maps(subject: Subject) -> None:
    """Ranges that overlap, run out of the file, or do not add up to the data."""
    overlapping, outside = ((0, b"x" * 1024), (512, b"y" * 512)), ((8192, b"z" * 512),)
    for form in (tars.sparse_old_gnu, tars.sparse_pax_00, tars.sparse_pax_01, tars.sparse_pax_10):
        _refused(subject, form(b"x", 4096, overlapping) + tars.END)
        _refused(subject, form(b"x", 4096, outside) + tars.END)
    _refused(subject, tar(pax({b"GNU.sparse.map": b"0,512", b"GNU.sparse.size": b"512"}), member(b"x", b"short")))
    major = {b"GNU.sparse.major": b"1", b"GNU.sparse.realsize": b"10"}
    _refused(subject, tar(pax(major), member(b"x", b"5\n" + bytes(510))))
    _refused(subject, tar(pax(major), member(b"x")))


def streams_cut_short(subject: Subject) -> None:
    """The tar ends inside a header, inside data, inside padding; each compression inside its frame."""
    plain = tar(member(b"f", b"d" * 5000), member(b"g", b"g"))
    for length in (100, 511, 600, 5000, 512 + 5000):
        _refused(subject, plain[:length])
    for packed in (gzip.compress(plain), tars.zstd_packed(plain)):
        for length in (5, 12, len(packed) // 2, len(packed) - 1):
            _refused(subject, packed[:length])


def damaged_compression(subject: Subject) -> None:
    """A flipped bit in gzip or zstd, and rubbish behind it."""
    plain = tar(member(b"f", bytes(range(256)) * 40))
    for packed in (gzip.compress(plain), tars.zstd_packed(plain)):
        for at in (len(packed) // 2, len(packed) - 6):
            bad = bytearray(packed)
            bad[at] ^= 0x10
            _refused(subject, bytes(bad))
        _refused(subject, packed + b"rubbish")


def promises_broken(subject: Subject) -> None:
    """Another digest, size or DiffID than was promised: each is named in the message."""
    plain = tar(member(b"f", b"data" * 5000))
    packed = gzip.compress(plain)
    wrong = "sha256:" + "0" * 64
    digest = f"sha256:{hashlib.sha256(packed).hexdigest()}"
    assert "DiffID" in _refused(subject, packed, expect=Expected(diff_id=wrong, digest=digest))
    assert "digest" in _refused(subject, packed, expect=Expected(digest=wrong))
    assert "size" in _refused(subject, packed, expect=Expected(size=len(packed) + 1))


def deep_trees(subject: Subject) -> None:
    """A tree deeper than any path can be: it may be refused, but it can be removed."""
    container, root = subject.opened(None)
    _dig(root, depth=60)
    _raises_ours(lambda: subject.engine.commit(container))
    _raises_ours(lambda: list(subject.engine.changes(container)))
    _raises_ours(lambda: subject.engine.usage(container))
    subject.engine.remove(container)


def _dig(root: Path, depth: int) -> None:
    """Make `depth` directories of 200 letters inside each other, step by step."""
    fd = os.open(root, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d" * 200, dir_fd=fd)
        below = os.open("d" * 200, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)


def _raises_ours(attempt: Callable[[], object]) -> None:
    """Success or one of our errors; nothing else."""
    with suppress(Corrupt, InvalidArgument):
        attempt()


def deep_trees_in_tars(subject: Subject) -> None:
    """Symlinks let a tar build deeper than its names are long: taken or refused, but nothing else."""
    step = b"d/" * 900
    members = []
    for number in range(5):
        way = (b"l%d/" % (number - 1) if number else b"") + step
        members += [pax({b"path": way}), folder(b"d/"), pax({b"linkpath": way}), member(b"l%d" % number, kind=SYMLINK)]
    _raises_ours(lambda: subject.layer(tar(*members)))


def hostile_links_in_containers(subject: Subject) -> None:
    """What a container leaves behind is removed without following it."""
    outside = subject.directory / "outside"
    outside.mkdir()
    (outside / "kept").write_bytes(b"k")
    container, root = subject.opened(None)
    os.symlink(outside, root / "link")
    (root / "d").mkdir()
    os.symlink("/", root / "d/root")
    subject.engine.remove(container)
    assert os.listdir(outside) == ["kept"]


CASES: tuple[Case, ...] = (
    names_that_lead_out,
    absolute_names,
    symlinks_that_lead_out,
    links_that_lead_out,
    links_to_nothing,
    circles_of_symlinks,
    paths_through_files,
    names_too_long,
    bytes_that_no_name_has,
    numbers_out_of_range,
    device_that_deletes,
    attributes_that_redirect,
    attributes_that_cannot_be,
    deletions_without_a_name,
    damaged_headers,
    damaged_sparse_maps,
    streams_cut_short,
    damaged_compression,
    promises_broken,
    deep_trees,
    deep_trees_in_tars,
    hostile_links_in_containers,
)
