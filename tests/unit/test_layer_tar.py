"""The tar parser, judged by GNU tar and by Python's tarfile: the same members and data from the same bytes."""

from __future__ import annotations

import io
import os
import shutil
import stat
import struct
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from hpmapper.errors import Corrupt, InvalidArgument
from hpmapper.layer.acl import acl_from_text
from hpmapper.layer.tar import BLOCK, Entry, read_entries
from hpmapper.testing import tars

NEEDS_TAR = pytest.mark.skipif(shutil.which("tar") is None, reason="apt install tar")
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: devices, owners, trusted xattrs")


class Source:
    """Bytes as the parser takes them."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def read(self, size: int) -> bytes:
        data = self._data.read(size)
        if len(data) < size:
            raise Corrupt("the bytes end")
        return data

    def read_or_end(self, size: int) -> bytes:
        data = self._data.read(size)
        if data and len(data) < size:
            raise Corrupt("the bytes end")
        return data


def parse(data: bytes) -> dict[bytes, tuple[Entry, bytes]]:
    """Members by name, with what their files read as."""
    source = Source(data)
    found = {}
    for entry in read_entries(source):
        stored = source.read(entry.stored + -entry.stored % BLOCK)[: entry.stored]
        found[entry.name.rstrip(b"/")] = entry, _expanded(entry, stored)
    return found


def _expanded(entry: Entry, stored: bytes) -> bytes:
    if entry.segments is None:
        return stored
    whole = bytearray(entry.size)
    at = 0
    for offset, length in entry.segments:
        whole[offset : offset + length] = stored[at : at + length]
        at += length
    return bytes(whole)


# GNU tar as the writer, the file system as the judge.


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Files of all types that need no root."""
    top = tmp_path / "tree"
    (top / "d").mkdir(parents=True)
    (top / "d/small").write_bytes(b"small")
    (top / "d/empty").touch()
    (top / "d/big").write_bytes(bytes(range(256)) * 300)
    os.link(top / "d/small", top / "d/zz-linked")
    os.symlink("d/small", top / "soft")
    os.mkfifo(top / "pipe", 0o640)
    (top / "d/small").chmod(0o4751)
    for name, segments in {
        "sparse-few": (0, 1 << 20),
        "sparse-many": range(65536, 4 << 20, 131072),
        "sparse-end": (),
    }.items():
        with (top / name).open("wb") as out:
            for offset in segments:
                out.seek(offset)
                out.write(b"%08d" % offset * 100)
            out.truncate(5 << 20)
    os.utime(top / "d/big", ns=(0, 1_234_567_890_123_456_789))
    os.utime(top / "d/empty", ns=(0, -1_500_000_000))
    return top


def _long_names(top: Path) -> None:
    deep = top / ("n" * 120) / ("m" * 120)
    deep.mkdir(parents=True)
    (deep / ("f" * 200)).write_bytes(b"long")
    os.symlink("t" * 300, top / "long-link")
    os.link(deep / ("f" * 200), top / "zz-long-hard-link")
    (top / os.fsdecode(b"\xff\xfe")).write_bytes(b"raw")


def gnu_tar(top: Path, *options: str) -> bytes:
    done = subprocess.run(
        ["tar", "--create", "--sort=name", "--directory", top, *options, "."],
        stdout=subprocess.PIPE,
        check=True,
        env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
    )
    return done.stdout


def assert_as_on_disk(data: bytes, top: Path, *, nanoseconds: bool) -> None:
    """Fail unless the members are what the tree's files are."""
    members = parse(data)
    on_disk = {os.path.relpath(path, top).encode("utf-8", "surrogateescape"): path for path in _walk(top)}
    assert {b"/".join(name.split(b"/")[1:]) or b"." for name in members} == set(on_disk)
    for name, path in on_disk.items():
        entry, data_found = members[b"./" + name if name != b"." else b"."]
        status = os.lstat(path)
        if entry.type == tars.LINK:
            assert status.st_nlink > 1
            continue
        assert entry.mode == (0o777 if stat.S_ISLNK(status.st_mode) else stat.S_IMODE(status.st_mode))
        assert (entry.uid, entry.gid) == (status.st_uid, status.st_gid)
        exact = 1 if nanoseconds else 1_000_000_000
        assert entry.mtime_ns // exact == status.st_mtime_ns // exact
        if stat.S_ISREG(status.st_mode):
            assert data_found == Path(path).read_bytes()
            assert entry.size == status.st_size
        elif stat.S_ISLNK(status.st_mode):
            assert entry.link == os.fsencode(os.readlink(path))


def _walk(top: Path) -> list[str]:
    found = [str(top)]
    for here, directories, files in os.walk(top):
        found += [os.path.join(here, name) for name in directories + files]
    return found


@NEEDS_TAR
@pytest.mark.parametrize(
    "options",
    [
        "--format=ustar",
        "--format=gnu",
        "--format=oldgnu",
        "--format=pax",
        "--format=gnu --sparse",
        "--format=pax --sparse --sparse-version=0.0",
        "--format=pax --sparse --sparse-version=0.1",
        "--format=pax --sparse --sparse-version=1.0",
    ],
)
def test_what_gnu_tar_writes(tree: Path, options: str) -> None:
    if "ustar" in options:
        os.utime(tree / "d/empty", ns=(0, 0))  # it has no times before 1970
    else:
        _long_names(tree)
    data = gnu_tar(tree, *options.split())
    if "--sparse" in options:
        assert len(data) < 4 << 20, "GNU tar found no holes"
    assert_as_on_disk(data, tree, nanoseconds="pax" in options)


@NEEDS_TAR
@AS_ROOT
def test_what_root_can_put_into_a_gnu_tar(tmp_path: Path) -> None:
    capability = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)
    top = tmp_path / "tree"
    top.mkdir()
    os.mknod(top / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(top / "disk", stat.S_IFBLK | 0o660, os.makedev(259, 70_000))
    (top / "owned").write_bytes(b"o")
    os.chown(top / "owned", 2**31 + 7, 2**32 - 2)
    (top / "able").write_bytes(b"a")
    os.setxattr(top / "able", "security.capability", capability)
    os.setxattr(top / "able", "user.text", b"a=b\nc\0d")
    os.setxattr(top / "able", "trusted.empty", b"")
    os.mknod(top / "socket", stat.S_IFSOCK | 0o600)  # which tar leaves out
    for form in ("gnu", "pax"):
        options = [f"--format={form}", "--xattrs", "--xattrs-include=*"] if form == "pax" else [f"--format={form}"]
        members = parse(gnu_tar(top, *options, "--warning=no-file-ignored"))
        assert (members[b"./disk"][0].major, members[b"./disk"][0].minor) == (259, 70_000)
        assert members[b"./null"][0].type == tars.CHAR
        assert (members[b"./owned"][0].uid, members[b"./owned"][0].gid) == (2**31 + 7, 2**32 - 2)
        assert b"./socket" not in members
        if form == "pax":
            assert dict(members[b"./able"][0].xattrs) == {
                b"security.capability": capability,
                b"user.text": b"a=b\nc\0d",
                b"trusted.empty": b"",
            }


@NEEDS_TAR
@AS_ROOT
@pytest.mark.skipif(shutil.which("setfacl") is None, reason="apt install acl")
def test_access_control_lists_of_gnu_tar(tmp_path: Path) -> None:
    top = tmp_path / "tree"
    (top / "d").mkdir(parents=True)
    (top / "f").touch()
    # Ids that no user has: GNU tar 1.34 writes names where it can, with --numeric-owner too.
    subprocess.run(["setfacl", "-m", "u:54321:rw,u:70000:r,g:54321:rx,m::rwx", top / "f"], check=True)
    subprocess.run(["setfacl", "-m", "u:54321:rwx", "-d", "-m", "u:54322:rw,o::-", top / "d"], check=True)
    members = parse(gnu_tar(top, "--format=pax", "--acls", "--numeric-owner"))
    for name in ("f", "d"):
        entry, _ = members[f"./{name}".encode()]
        on_disk = {key: os.getxattr(top / name, key) for key in os.listxattr(top / name) if "acl" in key}
        assert {key.decode(): value for key, value in entry.xattrs} == on_disk


@NEEDS_TAR
@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_a_sparse_file_of_many_gibibytes(tmp_path: Path, form: str) -> None:
    top = tmp_path / "tree"
    top.mkdir()
    with (top / "huge").open("wb") as out:
        out.seek(9 << 30)
        out.write(b"end")
    source = Source(gnu_tar(top, f"--format={form}", "--sparse"))
    entry = next(entry for entry in read_entries(source) if entry.name.endswith(b"huge"))
    assert entry.size == (9 << 30) + 3
    assert entry.segments is not None
    assert [offset for offset, _ in entry.segments] == [9 << 30]


# Python's tarfile as the writer and as the judge.


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_what_tarfile_writes(form: int) -> None:
    wanted: list[tuple[str, dict[str, Any]]] = [
        ("f", {"size": 3, "mode": 0o4755, "uid": 1, "gid": 2, "mtime": 1_700_000_000}),
        ("d/" + "x" * 90, {"type": tarfile.DIRTYPE, "mode": 0o1777}),
        ("link", {"type": tarfile.SYMTYPE, "linkname": "target"}),
        ("hard", {"type": tarfile.LNKTYPE, "linkname": "f"}),
        ("char", {"type": tarfile.CHRTYPE, "devmajor": 5, "devminor": 1}),
        ("pipe", {"type": tarfile.FIFOTYPE}),
    ]
    if form != tarfile.USTAR_FORMAT:
        wanted += [
            ("n" * 300, {"size": 1}),
            ("é\udcff" + "m" * 120, {"type": tarfile.SYMTYPE, "linkname": "ł" * 120}),
            ("owner", {"uid": 2**32 - 2, "gid": 2**21}),
            ("old", {"mtime": -12345}),
            ("new", {"mtime": 2**35}),
        ]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form, encoding="utf-8", errors="surrogateescape") as tar:
        for name, fields in wanted:
            info = tarfile.TarInfo(name)
            for key, value in fields.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(b"abc"[: info.size]))
    members = parse(out.getvalue())
    assert len(members) == len(wanted)
    with tarfile.open(fileobj=io.BytesIO(out.getvalue()), encoding="utf-8", errors="surrogateescape") as tar:
        for info in tar:
            entry, data = members[info.name.encode("utf-8", "surrogateescape")]
            found = entry.mode, entry.uid, entry.gid, entry.mtime_ns, entry.type, entry.major, entry.minor, len(data)
            mtime_ns = int(info.mtime) * 10**9
            assert found == (
                info.mode,
                info.uid,
                info.gid,
                mtime_ns,
                info.type,
                info.devmajor,
                info.devminor,
                info.size,
            )
            assert entry.link == info.linkname.encode("utf-8", "surrogateescape")


# Numbers and records by themselves.


@pytest.mark.parametrize(
    ("mtime", "nanoseconds"),
    [
        (b"1.5", 1_500_000_000),
        (b"-1.5", -1_500_000_000),
        (b"-0.000000001", -1),
        (b"0.1234567899", 123_456_789),
        (b"17", 17_000_000_000),
        (b"17.", 17_000_000_000),
        (b".5", 500_000_000),
        (b"99999999999.000000001", 99_999_999_999_000_000_001),
    ],
)
def test_times_of_pax(mtime: bytes, nanoseconds: int) -> None:
    members = parse(tars.tar(tars.pax({b"mtime": mtime}), tars.member(b"f")))
    assert members[b"f"][0].mtime_ns == nanoseconds


@pytest.mark.parametrize("mtime", [b"1e5", b"+1", b"1.2.3", b"--1", b" 1", b"1 ", b"1,5", b"nan", b"0x1"])
def test_times_that_are_none(mtime: bytes) -> None:
    with pytest.raises(Corrupt):
        parse(tars.tar(tars.pax({b"mtime": mtime}), tars.member(b"f")))


@pytest.mark.parametrize("value", [0, 1, 8**7 - 1, 8**7, 2**31, 2**32 - 2, 2**50])
def test_owners_in_octal_and_base_256(value: int) -> None:
    entry, _ = parse(tars.tar(tars.member(b"f", uid=value, gid=value)))[b"f"]
    assert (entry.uid, entry.gid) == (value, value)


@pytest.mark.parametrize("value", [-1, -(2**33), 8**11, 2**62])
def test_times_in_base_256(value: int) -> None:
    assert parse(tars.tar(tars.member(b"f", mtime=value)))[b"f"][0].mtime_ns == value * 10**9


def test_octal_fields_that_end_in_spaces_or_nothing() -> None:
    head = tars.header(b"f", size=5, fields={124: b" 5 \0" + bytes(8), 108: bytes(8), 116: b"0000017 "})
    entry, data = parse(head + tars.padded(b"12345") + tars.END)[b"f"]
    assert (entry.size, entry.uid, entry.gid, data) == (5, 0, 15, b"12345")


def test_checksum_of_signed_bytes() -> None:
    head = bytearray(tars.header(b"\xff\xfe", size=0))
    total = sum(byte if byte < 128 else byte - 256 for byte in head[:148] + b" " * 8 + head[156:])
    head[148:156] = b"%06o\0 " % total
    assert b"\xff\xfe" in parse(bytes(head) + tars.END)


def test_an_empty_pax_value_leaves_the_header_s_own() -> None:
    """POSIX, pax Extended Header: a value of zero length deletes the field's override."""
    defaults = tars.pax({b"uid": b"7", b"mtime": b"1.5"}, b"g")
    blob = tars.tar(defaults, tars.pax({b"uid": b"", b"mtime": b"", b"path": b""}), tars.member(b"f", uid=3, mtime=9))
    entry, _ = parse(blob)[b"f"]
    assert (entry.uid, entry.mtime_ns) == (3, 9 * 10**9)


def test_records_are_for_one_member() -> None:
    members = parse(tars.tar(tars.pax({b"uid": b"7", b"path": b"renamed"}), tars.member(b"a"), tars.member(b"b")))
    assert {name: entry.uid for name, (entry, _) in members.items()} == {b"renamed": 7, b"b": 0}


def test_acl_text() -> None:
    value = acl_from_text(b"user::rwx,user:joe:r--:1000\ngroup::r-x #effective:r--,mask::r-x,other::---")
    entries = list(struct.iter_unpack("<HHI", value[4:]))
    nobody = 0xFFFFFFFF
    assert entries == [(1, 7, nobody), (2, 4, 1000), (4, 5, nobody), (16, 5, nobody), (32, 0, nobody)]


@pytest.mark.parametrize(
    "text", [b"user", b"user:", b"nobody::rwx", b"user:joe:rwx", b"user:-1:rwx", b"user:4294967295:r"]
)
def test_acl_text_that_is_none(text: bytes) -> None:
    with pytest.raises(InvalidArgument):
        acl_from_text(text)
