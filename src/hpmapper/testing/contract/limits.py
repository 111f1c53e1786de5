"""Cases: how much one snapshot may keep (`CASES`), where the file system has limits; and what else is refused.

`REFUSALS` are for every driver, `CASES` for one that has `Capabilities.size_limits`.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path

from hpmapper.errors import InvalidArgument, Unsupported
from hpmapper.model import SnapshotId
from hpmapper.testing.contract.capabilities import listings
from hpmapper.testing.contract.subject import Case, Subject, refused
from hpmapper.testing.tars import folder, tar

_MIB = 1 << 20
_LIMIT = 24 * _MIB
_SLACK = 4 * _MIB
"""What may be lost of a limit to metadata, and to what the driver itself keeps beside a snapshot."""

_numbers = count(5_000_000)


@contextmanager
def limited(subject: Subject, chain: list[SnapshotId], size: int = _LIMIT) -> Iterator[tuple[SnapshotId, Path]]:
    """A snapshot of an `open_chain` with a limit, and the directory in it that anybody may write to."""
    snapshot = SnapshotId(next(_numbers))
    subject.driver.prepare(snapshot, chain, size=size)
    try:
        yield snapshot, subject.driver.mount(snapshot, chain) / "open"
    finally:
        subject.driver.remove(snapshot)


def write_until_refused(directory: Path, name: str = "new", most: int = 2 * _LIMIT) -> int:
    """Write a file until it is refused; returns the bytes that were taken.

    Written by nobody: ext4 lets whoever may pass limits (CAP_SYS_RESOURCE) do so where no overlay is in between.
    """
    command = ["dd", "if=/dev/urandom", f"of={name}", "bs=64K", f"count={most >> 16}", "conv=fsync"]
    done = subprocess.run(command, cwd=directory, user=65534, group=65534, check=False, capture_output=True)
    refusals = (os.strerror(number).encode() for number in (errno.EDQUOT, errno.ENOSPC))
    assert done.returncode == 0 or any(refusal in done.stderr for refusal in refusals), done.stderr
    return (directory / name).stat().st_size


def writers_are_held_to_the_limit(subject: Subject) -> None:
    """`size_limits`: a writer inside is refused at the limit, and can go on once something is deleted."""
    chain = subject.open_chain()
    with limited(subject, chain) as (_, inside):
        for name in ("new", "again"):
            assert _LIMIT - _SLACK < write_until_refused(inside, name) <= _LIMIT
            (inside / name).unlink()
            os.sync()


def others_are_not_held_to_it(subject: Subject) -> None:
    """A limit is one snapshot's: its neighbours, with a limit of their own or none, write on."""
    chain = subject.open_chain()
    with limited(subject, chain) as (_, full), limited(subject, chain, 2 * _LIMIT) as (_, larger):
        assert write_until_refused(full) <= _LIMIT
        assert write_until_refused(larger) > 2 * _LIMIT - 2 * _SLACK
        free = SnapshotId(next(_numbers))
        subject.driver.prepare(free, chain)
        assert write_until_refused(subject.driver.mount(free, chain) / "open") == 2 * _LIMIT
        subject.driver.remove(free)


def everything_counts(subject: Subject) -> None:
    """Files in new directories, moved ones, and links count as well; what was there in the image may be changed."""
    chain = subject.open_chain()
    with limited(subject, chain) as (_, inside):
        with (inside / "old").open("r+b") as file:
            file.write(b"new")
        (inside / "a/b").mkdir(parents=True)
        (inside / "a/b").chmod(0o777)
        first = write_until_refused(inside / "a/b", most=_LIMIT // 2)
        (inside / "a/b/new").rename(inside / "moved")
        (inside / "link").hardlink_to(inside / "moved")
        assert first == _LIMIT // 2
        assert first + write_until_refused(inside / "a/b") <= _LIMIT
        assert (inside / "old").read_bytes()[:4] == b"newo"


def usage_is_what_counts(subject: Subject) -> None:
    """The usage of a limited snapshot is what counts against its limit, found without listing what it keeps."""
    chain = subject.open_chain()
    with limited(subject, chain) as (snapshot, inside):
        before = subject.driver.usage(snapshot)
        written = write_until_refused(inside, most=_LIMIT // 2)
        for number in range(100):
            (inside / f"d{number}").mkdir()
        os.sync()
        with listings() as listed:
            used = subject.driver.usage(snapshot)
        assert not listed, f"{listed} were listed"
        assert written <= used.size - before.size <= written + _SLACK
        # Not exactly 101: XFS frees what overlayfs has removed some time later, so that `before` may have counted more.
        assert 91 <= used.inodes - before.inodes <= 111
        assert used.size <= _LIMIT


def limits_last(subject: Subject) -> None:
    """A limit is there after detaching; asking for it twice is asking once."""
    chain = subject.open_chain()
    with limited(subject, chain) as (snapshot, inside):
        subject.driver.prepare(snapshot, chain, size=_LIMIT)
        first = write_until_refused(inside, most=_LIMIT // 2)
        subject.engine.detach()
        subject.driver.attach()
        inside = subject.driver.mount(snapshot, chain) / "open"
        assert first + write_until_refused(inside, "more") <= _LIMIT


def limits_at_once(subject: Subject) -> None:
    """Made by many at once, each snapshot has its own limit; removed, none is left to those that come after."""
    chain = subject.open_chain()
    made = [SnapshotId(next(_numbers)) for _ in range(8)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda one: subject.driver.prepare(one, chain, size=4 * _MIB), made))
        taken = list(
            threads.map(lambda one: write_until_refused(subject.driver.mount(one, chain) / "open", most=8 * _MIB), made)
        )
        list(threads.map(subject.driver.remove, made))
    assert all(0 < one <= 4 * _MIB for one in taken), taken


def limited_removal_can_be_repeated(subject: Subject) -> None:
    """A full snapshot can be removed, also again; one that was cut short while it was made, too."""
    chain = subject.open_chain()
    with limited(subject, chain) as (snapshot, inside):
        write_until_refused(inside)
        subject.driver.remove(snapshot)
        subject.driver.remove(snapshot)
        assert snapshot not in subject.driver.stored().snapshots


def storage_made_again_has_its_limit(subject: Subject) -> None:
    """What the engine makes anew, because a crash took the storage, has the limit that was asked for at first."""
    base = subject.layer(tar(folder(b"open/", 0o777)))
    container = subject.engine.prepare("limited", base, size=_LIMIT)
    subject.driver.remove(container.id)
    assert write_until_refused(subject.root(container) / "open") <= _LIMIT
    refused(InvalidArgument, lambda: subject.engine.prepare("too-small", base, size=1))
    assert subject.driver.stored().snapshots == {container.id}


def limits_that_cannot_be_are_refused(subject: Subject) -> None:
    """Too small a limit; any limit where there is none: refused with the way to get it, and nothing is left."""
    chain = subject.open_chain()
    snapshot = SnapshotId(next(_numbers))
    for size in (-1, 0, 4096):
        refused(InvalidArgument, partial(subject.driver.prepare, snapshot, chain, size=size))
    if not subject.driver.capabilities.size_limits:
        error = refused(Unsupported, lambda: subject.driver.prepare(snapshot, chain, size=_LIMIT))
        assert error.hint
    assert snapshot not in subject.driver.stored().snapshots


CASES: tuple[Case, ...] = (
    writers_are_held_to_the_limit,
    others_are_not_held_to_it,
    everything_counts,
    usage_is_what_counts,
    limits_last,
    limits_at_once,
    limited_removal_can_be_repeated,
    storage_made_again_has_its_limit,
)

REFUSALS: tuple[Case, ...] = (limits_that_cannot_be_are_refused,)
