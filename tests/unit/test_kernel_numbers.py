"""Computed ioctl numbers against those that strace prints, and the parsing of mountinfo."""

from __future__ import annotations

import errno
import os

import pytest

from hpmapper.kernel import btrfs, clone, fiemap, fs, qgroup, quota, syscall
from hpmapper.kernel.mountinfo import parse_mount, unescape


@pytest.mark.parametrize(
    ("computed", "known"),
    [
        (clone._FICLONE, 0x40049409),
        (clone._FIDEDUPERANGE, 0xC0189436),
        (fiemap._FIEMAP, 0xC020660B),
        (fs._FS_IOC_GETFLAGS, 0x80086601),
        (fs._FS_IOC_SETFLAGS, 0x40086602),
        (fs._FS_IOC_FSGETXATTR, 0x801C581F),
        (fs._FS_IOC_FSSETXATTR, 0x401C5820),
        (fs._FITRIM, 0xC0185879),
        (fs._XFS_IOC_FSGEOMETRY_V4, 0x8070587C),
        (fs._XFS_IOC_FSGROWFSDATA, 0x4010586E),
        (fs._BTRFS_IOC_RESIZE, 0x50009403),
        (btrfs._SNAP_DESTROY, 0x5000940F),
        (btrfs._TREE_SEARCH_V2, 0xC0709411),
        (btrfs._SNAP_CREATE_V2, 0x50009417),
        (btrfs._SUBVOL_CREATE_V2, 0x50009418),
        (btrfs._SUBVOL_GETFLAGS, 0x80089419),
        (btrfs._SUBVOL_SETFLAGS, 0x4008941A),
        (btrfs._GET_SUBVOL_INFO, 0x81F8943C),
        (btrfs._SNAP_DESTROY_V2, 0x5000943F),
        (qgroup._FS_INFO, 0x8400941F),
        (qgroup._QUOTA_CTL, 0xC0109428),
        (qgroup._QGROUP_ASSIGN, 0x40189429),
        (qgroup._QGROUP_CREATE, 0x4010942A),
        (qgroup._QGROUP_LIMIT, 0x8030942B),
        (fs._EXT4_IOC_RESIZE_FS, 0x40086610),
        (fs._BLKDISCARD, 0x1277),
    ],
)
def test_ioctl_numbers(computed: int, known: int) -> None:
    assert computed == known


def test_records_have_the_kernels_sizes() -> None:
    assert fs._XFS_GEOMETRY.size == 112
    assert fs._FSXATTR.size == 28
    assert fiemap._EXTENT.size == 56
    assert clone._DEDUPE_TARGET.size == 32
    assert quota._FS_DISK_QUOTA.size == 112
    assert {record.size for record in (btrfs._VOL_ARGS, btrfs._VOL_ARGS_V2, btrfs._VOL_ARGS_V2_BY_ID)} == {4096}
    assert btrfs._SEARCH_ARGS.size == 112
    assert btrfs._SUBVOL_INFO.size == 504


def test_a_failure_has_errno_path_and_reason() -> None:
    with pytest.raises(OSError, match="why") as caught:
        syscall.fail(errno.EINVAL, b"/some/p\xffth", "why")
    assert caught.value.errno == errno.EINVAL
    assert caught.value.filename == os.fsdecode(b"/some/p\xffth")


def test_an_unknown_system_call_is_enosys() -> None:
    with pytest.raises(OSError, match="not implemented") as caught:
        syscall.syscall(0xFFFF, path="/x")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSYS, "/x")


def test_a_descriptor_is_named_by_its_path() -> None:
    fd = os.open("/", os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="ioctl") as caught:
            syscall.ioctl(fd, 0x1234)
    finally:
        os.close(fd)
    assert caught.value.filename == "/"
    assert syscall.fd_name(fd) == f"fd {fd}"


@pytest.mark.parametrize(
    ("escaped", "plain"), [(r"a\040b", "a b"), (r"\011\012\134", "\t\n\\"), ("plain", "plain"), (r"\134040", r"\040")]
)
def test_octal_escapes(escaped: str, plain: str) -> None:
    assert unescape(escaped) == plain


def test_a_line_of_mountinfo() -> None:
    line = r"36 35 98:0 /mnt1 /mnt\0402 rw,noatime master:1 propagate_from:2 - ext3 /dev/root rw,errors=continue"
    found = parse_mount(line + "\n")
    assert (found.id, found.parent, found.device) == (36, 35, os.makedev(98, 0))
    assert (found.root, found.target, found.options) == ("/mnt1", "/mnt 2", "rw,noatime")
    assert (found.fstype, found.source, found.super_options) == ("ext3", "/dev/root", "rw,errors=continue")


def test_a_line_without_optional_fields_and_with_a_dash_in_a_name() -> None:
    found = parse_mount("1 0 0:5 / /a\\040-\\040b rw - tmpfs - rw")
    assert (found.target, found.fstype, found.source) == ("/a - b", "tmpfs", "-")
