"""Device mapper as such, on a kernel that has it."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from hpmapper.kernel import dm, dmudev, fs, loop, mount

pytestmark = [pytest.mark.kernel, pytest.mark.guest("dm", short=True)]

_MIB = 1 << 20
_SECTORS = _MIB // dm.SECTOR
_META, _DATA, _POOL, _THIN = "t-meta", "t-data", "t-pool", "t-thin"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A loop device of 64 MiB."""
    file = tmp_path / "disk"
    file.touch()
    os.truncate(file, 64 * _MIB)
    with loop.attached(file) as device:
        yield device


def _linear(disk: Path, start: int = 0, length: int = _SECTORS) -> dm.Target:
    return dm.Target(0, length, "linear", f"{disk} {start}")


@contextmanager
def _made(name: str, table: list[dm.Target], *, read_only: bool = False) -> Iterator[dm.Device]:
    device = dm.activate(name, table, uuid=f"TEST-{name}", read_only=read_only)
    try:
        yield device
    finally:
        dm.remove(name)


@pytest.fixture
def pool(disk: Path) -> Iterator[str]:
    """A thin pool of 48 MiB in blocks of 64 KiB."""
    with ExitStack() as stack:
        stack.enter_context(_made(_META, [_linear(disk, 0, 4 * _SECTORS)]))
        stack.enter_context(_made(_DATA, [_linear(disk, 8 * _SECTORS, 48 * _SECTORS)]))
        params = f"{dm.path(_META)} {dm.path(_DATA)} 128 0 2 skip_block_zeroing error_if_no_space"
        stack.enter_context(_made(_POOL, [dm.Target(0, 48 * _SECTORS, "thin-pool", params)]))
        yield _POOL


def _thin(number: int, sectors: int = 16 * _SECTORS) -> list[dm.Target]:
    return [dm.Target(0, sectors, "thin", f"{dm.path(_POOL)} {number}")]


def test_version_and_targets() -> None:
    assert dm.version() >= (4, 27, 0)
    assert {"thin", "thin-pool", "linear"} <= dm.targets().keys()


def test_a_device_is_made_found_and_removed(disk: Path) -> None:
    assert dm.find(_DATA) is None
    with _made(_DATA, [_linear(disk)]) as made:
        found = dm.find(_DATA)
        assert found is not None
        assert (found.name, found.uuid, found.number, found.opens) == (_DATA, f"TEST-{_DATA}", made.number, 0)
        assert found.active
        assert not found.suspended
        assert not found.read_only
        assert os.stat(dm.path(_DATA)).st_rdev == made.number
        assert Path("/sys/block", made.kernel_name).is_dir()
        assert dm.devices()[_DATA] == made.number
        assert dm.table(_DATA) == [dm.Target(0, _SECTORS, "linear", f"{_dev(disk)} 0")]
        assert fs.device_size(dm.path(_DATA)) == _MIB
    assert dm.find(_DATA) is None
    assert _DATA not in dm.devices()
    assert not dm.path(_DATA).exists()
    assert dm.remove(_DATA), "removing what is gone succeeds"


def _dev(path: Path) -> str:
    number = os.stat(path).st_rdev
    return f"{os.major(number)}:{os.minor(number)}"


def test_several_targets_and_another_table(disk: Path) -> None:
    table = [_linear(disk), dm.Target(_SECTORS, _SECTORS, "zero", ""), dm.Target(2 * _SECTORS, 8, "error", "")]
    with _made(_DATA, table):
        assert [(one.start, one.length, one.kind) for one in dm.table(_DATA)] == [one[:3] for one in table]
        dm.load(_DATA, [_linear(disk, 0, 2 * _SECTORS)])
        assert len(dm.table(_DATA)) == 3, "what is loaded is not in use yet"
        dm.resume(_DATA)
        assert dm.table(_DATA)[0].length == 2 * _SECTORS
        assert fs.device_size(dm.path(_DATA)) == 2 * _MIB


def test_many_devices_are_listed(disk: Path) -> None:
    """More than fit into the first buffer."""
    names = {f"t-many-{number:03}-{'x' * 100}" for number in range(150)}
    try:
        for name in names:
            dm.activate(name, [_linear(disk, 0, 8)])
        assert names <= dm.devices().keys()
    finally:
        for name in names:
            dm.remove(name)


def test_errors_have_errno_and_name(disk: Path) -> None:
    with _made(_DATA, [_linear(disk)]), pytest.raises(OSError, match=_DATA) as raised:
        dm.activate(_DATA, [_linear(disk)])
    assert raised.value.errno == errno.EBUSY
    for attempt in (lambda: dm.load("t-none", [_linear(disk)]), lambda: dm.status("t-none")):
        with pytest.raises(OSError, match="t-none") as raised:
            attempt()
        assert raised.value.errno == errno.ENXIO
    with pytest.raises(OSError, match="t-bad"):
        dm.activate("t-bad", [dm.Target(0, 8, "nonsense", "")])
    assert dm.find("t-bad") is None, "what failed half-way is taken back"
    for name in ("a/b", "x" * 128):
        with pytest.raises(OSError, match="no name"):
            dm.activate(name, [])


def _wait_until_gone(name: str) -> None:
    """A kernel thread removes what was deferred, soon after its last user has gone."""
    deadline = time.monotonic() + 60
    while dm.find(name) is not None:
        assert time.monotonic() < deadline, f"{name} is still there"
        time.sleep(0.01)


def test_in_use_and_deferred(disk: Path) -> None:
    dm.activate(_DATA, [_linear(disk)])
    with dm.path(_DATA).open("rb"):
        with pytest.raises(OSError, match=_DATA) as raised:
            dm.remove(_DATA)
        assert raised.value.errno == errno.EBUSY
        assert dm.remove(_DATA, deferred=True) is False
        found = dm.find(_DATA)
        assert found is not None
        assert found.removing
        assert found.opens == 1
        dm.cancel_removal(_DATA)
        found = dm.find(_DATA)
        assert found is not None
        assert not found.removing
        dm.remove(_DATA, deferred=True)
    _wait_until_gone(_DATA)
    dm.path(_DATA).unlink(missing_ok=True)
    assert dm.remove(_DATA, deferred=True) is True


def test_read_only(disk: Path) -> None:
    with _made(_DATA, [_linear(disk)], read_only=True) as made:
        assert made.read_only
        with pytest.raises(PermissionError), dm.path(_DATA).open("r+b") as data:
            data.write(b"x")


def test_suspending_holds_writes_back(disk: Path) -> None:
    with _made(_DATA, [_linear(disk)]):
        done = threading.Event()

        def write() -> None:
            with dm.path(_DATA).open("r+b") as data:
                data.write(b"x" * 4096)
                data.flush()
                os.fsync(data.fileno())
            done.set()

        with dm.suspended(_DATA):
            found = dm.find(_DATA)
            assert found is not None
            assert found.suspended
            writer = threading.Thread(target=write)
            writer.start()
            assert not done.wait(0.5)
        writer.join()
        assert done.is_set()


def test_thin_devices_and_snapshots(pool: str) -> None:
    dm.message(pool, "create_thin 1")
    with _made(_THIN, _thin(1)):
        with dm.path(_THIN).open("r+b") as data:
            data.write(b"1" * 100_000)
        with dm.suspended(_THIN):
            dm.message(pool, "create_snap 2 1")
        with _made("t-snap", _thin(2)):
            with dm.path("t-snap").open("r+b") as data:
                assert data.read(100_000) == b"1" * 100_000
                data.seek(0)
                data.write(b"2" * 10)
            with dm.path(_THIN).open("rb") as data:
                assert data.read(10) == b"1" * 10
        assert dm.status("t-snap" if dm.find("t-snap") else _THIN)[0].params.split()[0] == "256"
    dm.message(pool, "delete 2")
    for text, expected in (
        ("delete 2", errno.ENODATA),
        ("create_thin 1", errno.EEXIST),
        ("create_snap 3 9", errno.ENODATA),
        ("set_transaction_id 5 6", errno.EINVAL),
        (f"create_thin {1 << 24}", errno.EINVAL),
    ):
        with pytest.raises(OSError, match=pool) as raised:
            dm.message(pool, text)
        assert raised.value.errno == expected, text
    dm.message(pool, "set_transaction_id 0 1")
    assert dm.status(pool)[0].params.startswith("1 ")


def test_low_water_is_an_event(pool: str) -> None:
    before = dm.find(pool)
    assert before is not None
    dm.load(pool, [dm.table(pool)[0]._replace(params=f"{dm.path(_META)} {dm.path(_DATA)} 128 760 0")])
    dm.suspend(pool)
    dm.resume(pool)
    dm.message(pool, "create_thin 1")
    now = dm.find(pool)
    assert now is not None
    with _made(_THIN, _thin(1)):
        with dm.path(_THIN).open("r+b") as data:
            data.write(b"1" * _MIB)
        assert dm.wait(pool, now.event).event > now.event


def test_udev_makes_the_nodes_where_it_runs(disk: Path) -> None:
    """The cookie is answered: the node is there at once, as a link of udev's, and no semaphore is left."""
    with _udev():
        assert dmudev.is_running()
        semaphores = Path("/proc/sysvipc/sem").read_text()
        with _made(_DATA, [_linear(disk)]):
            assert dm.path(_DATA).is_symlink()
        assert not dm.path(_DATA).exists()
        assert Path("/proc/sysvipc/sem").read_text() == semaphores


@contextmanager
def _udev() -> Iterator[None]:
    with subprocess.Popen(["/usr/lib/systemd/systemd-udevd"], stderr=subprocess.DEVNULL) as udevd:
        try:
            while not dmudev.is_running():
                pass
            subprocess.run(["udevadm", "settle"], check=True)
            yield
        finally:
            udevd.terminate()
    Path("/run/udev/control").unlink(missing_ok=True)


def test_a_dead_udev_is_not_waited_for_for_ever(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its socket is there, but nobody answers: the node is made here."""
    control = Path("/run/udev/control")
    control.parent.mkdir(exist_ok=True)
    control.touch()
    monkeypatch.setattr(dmudev, "_SECONDS", 1)
    try:
        with _made(_DATA, [_linear(disk)]):
            assert dm.path(_DATA).is_block_device()
    finally:
        control.unlink()


def test_file_system_on_a_thin_device(pool: str, tmp_path: Path) -> None:
    """A snapshot of a mounted file system is clean: suspending froze it."""
    dm.message(pool, "create_thin 1")
    target = tmp_path / "m"
    target.mkdir()
    with _made(_THIN, _thin(1)):
        subprocess.run(["mkfs.ext4", "-q", "-F", dm.path(_THIN)], check=True)
        mount.filesystem("ext4", dm.path(_THIN), target)
        (target / "f").write_text("not synced")
        with dm.suspended(_THIN):
            dm.message(pool, "create_snap 2 1")
        (target / "f").write_text("later")
        mount.umount(target)
    with _made("t-snap", _thin(2)):
        mount.filesystem("ext4", dm.path("t-snap"), target)
        assert (target / "f").read_text() == "not synced"
        mount.umount(target)
