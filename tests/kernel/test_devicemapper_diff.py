"""What a container on a thin device changed, found by the blocks that were written, against reading both trees."""

from __future__ import annotations

import io
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpmapper.drivers.devicemapper import DeviceMapperDriver, written
from hpmapper.kernel import dm
from hpmapper.layer.stream import Expected
from hpmapper.model import SnapshotId
from hpmapper.store.workspace import workspace
from hpmapper.testing.tars import folder, member, tar
from tests.kernel.test_devicemapper import attached

pytestmark = [pytest.mark.kernel]

_ONE, _TWO, _THREE = (SnapshotId(number) for number in (1, 2, 3))
_DIRECTORIES, _FILES = 30, 60
_DATA = b"0123456789" * 200


@pytest.fixture(params=[pytest.param("xfs", marks=pytest.mark.guest("dm", short=True)),
                        pytest.param("ext4", marks=pytest.mark.guest("dm"))])  # fmt: skip
def driver(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[DeviceMapperDriver]:
    """A pool with one layer of many small files, and nothing else."""
    members = [folder(b"./")]
    for directory in range(_DIRECTORIES):
        members.append(folder(b"d%d/" % directory))
        members += [member(b"d%d/f%d" % (directory, number), _DATA) for number in range(_FILES)]
    with attached(tmp_path / "d", fs=request.param) as made:
        with workspace(made.scratch) as work:
            made.ingest(_ONE, list, io.BytesIO(tar(*members)), work, Expected(), None, lambda _: False)
        yield made
        for number in (_TWO, _THREE):
            made.remove(number)


def _change(root: Path) -> None:
    """One of each kind."""
    (root / "d1/f1").write_bytes(b"shorter")
    _set_back(root / "d2/f2")
    (root / "d3/f3").chmod(0o600)
    os.setxattr(root / "d4/f4", "user.x", b"y")
    (root / "d5/f5").rename(root / "d5/renamed")
    (root / "d6").rename(root / "moved")
    os.link(root / "d7/f7", root / "d8/linked")
    (root / "d9/f9").unlink()
    (root / "d10/f10").unlink()
    (root / "d10/f10").write_bytes(_DATA)
    _write_through_a_mapping(root / "d11/f11")
    (root / "d12/new").mkdir()
    os.symlink("f1", root / "d12/new/link")


def _set_back(path: Path) -> None:
    """Other data, as many, and the times of before."""
    times = path.stat()
    path.write_bytes(_DATA[::-1])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def _write_through_a_mapping(path: Path) -> None:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[5:6] = b"!"


_EXPECTED = {
    "C /d1", "C /d1/f1", "C /d2", "C /d2/f2", "C /d3", "C /d3/f3", "C /d4", "C /d4/f4", "C /d5", "D /d5/f5",
    "A /d5/renamed", "D /d6", "C /d7", "C /d7/f7", "C /d8", "A /d8/linked", "C /d9", "D /d9/f9", "C /d10",
    "C /d10/f10", "C /d11", "C /d11/f11", "C /d12", "A /d12/new", "A /d12/new/link", "A /moved",
    *(f"A /moved/f{number}" for number in range(_FILES)),
}  # fmt: skip


def _seen(driver: DeviceMapperDriver, snapshot: SnapshotId) -> set[str]:
    return {f"{change.kind.value} {os.fsdecode(change.path)}" for change in driver.changes(snapshot, [_ONE])}


def test_every_kind_of_change_is_found(driver: DeviceMapperDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, while it is mounted and nothing has been written out; and after it was unmounted."""
    driver.prepare(_TWO, [_ONE])
    assert driver.is_untouched(_TWO)
    root = driver.mount(_TWO, [_ONE])
    assert not driver.is_untouched(_TWO), "mounting writes"
    assert _seen(driver, _TWO) == set()
    _change(root)
    assert _seen(driver, _TWO) == _EXPECTED
    assert not dm.find(driver.devices.name(_TWO)).suspended  # type: ignore[union-attr]
    diff = io.BytesIO()
    driver.write_diff(_TWO, [_ONE], diff)
    size = driver.usage(_TWO).size
    assert size < 4 << 20
    driver.unmount(_TWO)
    assert _seen(driver, _TWO) == _EXPECTED
    monkeypatch.setattr(written, "in_blocks", lambda *_: written.anywhere)
    assert _seen(driver, _TWO) == _EXPECTED
    again = io.BytesIO()
    driver.write_diff(_TWO, [_ONE], again)
    assert again.getvalue() == diff.getvalue()


def test_few_inodes_are_looked_at(driver: DeviceMapperDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """One change in 1,800 files: XFS has 128 inodes in a block of 64 KiB."""
    if driver.status()["Backing Filesystem"] != "xfs":
        pytest.skip("ext4 does not say where its inodes are: the times of all are looked at")
    looked: list[int] = []
    in_blocks = written.in_blocks

    def counting(*arguments: object) -> written.IsWritten:
        known = in_blocks(*arguments)  # type: ignore[arg-type]
        return lambda inode: bool(known(inode) and not looked.append(inode))  # type: ignore[func-returns-value]

    driver.prepare(_THREE, [_ONE])
    (driver.mount(_THREE, [_ONE]) / "d20/f20").write_bytes(b"changed")
    monkeypatch.setattr(written, "in_blocks", counting)
    assert _seen(driver, _THREE) == {"C /d20", "C /d20/f20"}
    assert 0 < len(looked) < _DIRECTORIES * _FILES / 4
