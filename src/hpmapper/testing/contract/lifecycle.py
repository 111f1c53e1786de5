"""Cases: made, used by many at once, removed; refused while in use; and all of it asked for twice or cut short."""

from __future__ import annotations

import errno
import io
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from hpmapper.errors import AlreadyExists, FailedPrecondition, InvalidArgument
from hpmapper.kernel.mountinfo import is_mountpoint
from hpmapper.layer.stream import Expected
from hpmapper.model import Kind, SnapshotId
from hpmapper.store.workspace import workspace
from hpmapper.testing import tars
from hpmapper.testing.contract.subject import Case, Subject, refused
from hpmapper.testing.trees import append, apply, assert_same, directory, file, hard_link, symlink, write

_BASE = [
    directory("etc", 0o755),
    file("etc/passwd", b"root:x:0:0:::\n", 0o644),
    file("etc/shadow", b"root:*:\n", 0o640, 0, 42),
    directory("tmp", 0o1777),
    symlink("etc", "configuration"),
]

_PREPARES = 50


def empty_snapshot(subject: Subject) -> None:
    """A snapshot of nothing is an empty root directory of root's."""
    _, root = subject.opened(None)
    status = root.stat()
    assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o755, 0, 0)
    assert os.listdir(root) == []


def base_and_snapshot_of_it(subject: Subject) -> None:
    """What is committed is what the next container sees, and is out of its reach."""
    model = subject.model()
    apply(_BASE, model)
    base = subject.image(_BASE)
    first, root = subject.opened(base)
    assert_same(root, model)
    apply([append("etc/passwd", b"me\n"), file("new")], root)
    subject.assert_shows(base, model)
    assert subject.changes(first) == ["C /etc", "C /etc/passwd", "A /new"]


def two_containers_are_apart(subject: Subject) -> None:
    """Writes of one container are nobody else's."""
    base = subject.image(_BASE)
    (_, one), (_, other) = subject.opened(base), subject.opened(base)
    apply([write("etc/passwd", b"ROOT")], one)
    assert (other / "etc/passwd").read_bytes().startswith(b"root")


def many_prepares_at_once(subject: Subject) -> None:
    """Fifty containers made, mounted, written to and removed by eight threads."""
    base = subject.image(_BASE)

    def live(number: int) -> None:
        container = subject.engine.prepare(f"parallel-{number}", base)
        root = subject.root(container)
        (root / "mine").write_text(str(number))
        apply([append("etc/passwd", b"%d" % number)], root)
        assert (root / "mine").read_text() == str(number)
        assert (root / "etc/passwd").read_bytes().endswith(b"\n%d" % number)
        if number % 2:
            subject.engine.remove(container)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(live, range(_PREPARES)))
    assert len(subject.driver.stored().snapshots) == _PREPARES // 2


def one_layer_brought_in_by_many(subject: Subject) -> None:
    """Threads that ingest the same layer at once end up with one snapshot."""
    tar = tars.tar(tars.member(b"a", bytes(200_000)), tars.member(b"b", b"small"))
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: subject.layer(tar), range(8)))
    assert len({snapshot.id for snapshot in found}) == 1
    subject.assert_whole(found[0])
    assert len(subject.driver.stored().layers) == 1


def view_is_read_only(subject: Subject) -> None:
    """A view shows its parent and takes no writes; without mounts it takes them, and its parent stays as it is."""
    model = subject.model()
    apply(_BASE, model)
    base = subject.image(_BASE)
    root = subject.root(subject.container(base, view=True))
    assert_same(root, model)
    writes: tuple[Callable[[], object], ...] = (
        lambda: (root / "new").touch(),
        lambda: (root / "etc/passwd").write_bytes(b"changed"),
        lambda: root.chmod(0o711),
    )
    for write_something in writes:
        if subject.driver.capabilities.mounts:
            assert refused(OSError, write_something).errno == errno.EROFS
        else:
            write_something()
    subject.assert_shows(base, model)


def view_of_nothing(subject: Subject) -> None:
    """A view without a parent is empty."""
    assert os.listdir(subject.root(subject.container(None, view=True))) == []


def mounting_twice(subject: Subject) -> None:
    """The same path each time; what was written stays when it is unmounted in between."""
    container, root = subject.opened(subject.image(_BASE))
    apply([file("kept", b"yes")], root)
    assert subject.root(container) == root
    subject.engine.unmount(container)
    subject.engine.unmount(container)
    assert is_mountpoint(root) is False
    assert (subject.root(container) / "kept").read_bytes() == b"yes"


def preparing_twice(subject: Subject) -> None:
    """A `prepare` that is asked for again, as after a crash, finishes and loses nothing."""
    base = subject.image(_BASE)
    assert base.layer is not None
    container, root = subject.opened(base)
    apply([file("kept", b"yes"), append("etc/passwd", b"me\n")], root)
    subject.driver.prepare(container.id, [base.layer])
    subject.driver.prepare(container.id, [base.layer])
    root = subject.root(container)
    assert (root / "kept").read_bytes() == b"yes"
    assert (root / "etc/passwd").read_bytes().endswith(b"me\n")


def finishing_twice(subject: Subject) -> None:
    """`finish` may be called again, and by several at once."""
    top = subject.image(_BASE, [file("two")], [file("three")])
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: subject.engine.finish(top), range(4)))
    assert (subject.opened(top)[1] / "three").exists()


def removing_twice(subject: Subject) -> None:
    """Removing what is gone, or never was, succeeds."""
    container, root = subject.opened(subject.image(_BASE))
    apply([file("written")], root)
    subject.engine.remove(container)
    assert not subject.driver.stored().snapshots
    for number in (container.id, SnapshotId(4_000_000)):
        subject.driver.remove(number)
        subject.driver.remove_layer(number)
    assert len(subject.driver.stored().layers) == 1


def removing_what_is_half_there(subject: Subject) -> None:
    """A `prepare` without what follows it, and an ingest whose blob broke off, can be taken back."""
    base = subject.image(_BASE)
    assert base.layer is not None
    subject.driver.prepare(SnapshotId(4_000_001), [base.layer])
    subject.driver.remove(SnapshotId(4_000_001))
    chain = [base.layer]
    with workspace(subject.driver.scratch) as work:
        broken = _Breaking(tars.tar(tars.member(b"a", bytes(3 << 20)), tars.member(b"b", bytes(3 << 20))))
        refused(
            ConnectionError,
            lambda: subject.driver.ingest(
                SnapshotId(4_000_002), lambda: chain, broken, work, Expected(), None, lambda digest: False
            ),
        )
    subject.driver.remove_layer(SnapshotId(4_000_002))
    assert subject.driver.stored().layers == {base.layer}


class _Breaking(io.BytesIO):
    """A download that breaks off."""

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() > 2 << 20:
            raise ConnectionError("the line went dead")
        return super().read(size)


def failed_ingest_leaves_nothing(subject: Subject) -> None:
    """The engine takes a failed ingest back whole, and the next attempt succeeds."""
    whole = tars.tar(tars.member(b"a", bytes(3 << 20)), tars.member(b"b", bytes(3 << 20)))
    refused(ConnectionError, lambda: subject.layer(_Breaking(whole)))
    subject.assert_nothing_left()
    subject.assert_whole(subject.layer(whole))


def removal_is_refused_while_in_use(subject: Subject) -> None:
    """An open file, a working directory: refused with nothing changed, and possible afterwards.

    Without mounts nobody can tell: it is removed, and who has a file open can read on.
    """
    container, root = subject.opened(subject.image(_BASE))
    apply([file("kept", b"yes")], root)
    if subject.driver.capabilities.mounts:
        for used in (_open_file, _working_directory):
            with used(root):
                refused(FailedPrecondition, lambda: subject.engine.remove(container))
                refused(FailedPrecondition, lambda: subject.engine.unmount(container))
                assert (root / "kept").read_bytes() == b"yes"
        subject.engine.remove(container)
    else:
        with (root / "kept").open("rb") as kept:
            subject.engine.remove(container)
            assert kept.read() == b"yes"
    assert not subject.driver.stored().snapshots


@contextmanager
def _open_file(root: Path) -> Iterator[None]:
    with (root / "etc/passwd").open("rb"):
        yield


@contextmanager
def _working_directory(root: Path) -> Iterator[None]:
    with subprocess.Popen(["sleep", "60"], cwd=root / "etc") as process:
        try:
            yield
        finally:
            process.kill()


def detaching(subject: Subject) -> None:
    """Detached and attached again, as by a reboot: layers and containers are as they were."""
    model = subject.model()
    apply(_BASE, model)
    base = subject.image(_BASE)
    container, root = subject.opened(base)
    apply([file("kept", b"yes"), hard_link("kept", "also")], root)
    subject.engine.detach()
    subject.driver.detach()
    subject.driver.attach()
    subject.driver.attach()
    subject.assert_shows(base, model)
    subject.assert_whole(base)
    assert (subject.root(container) / "also").read_bytes() == b"yes"


def detaching_is_refused_while_in_use(subject: Subject) -> None:
    """`detach` under a running container is refused; without mounts nothing is attached, and it changes nothing."""
    container, root = subject.opened(subject.image(_BASE))
    with _open_file(root):
        if subject.driver.capabilities.mounts:
            refused(FailedPrecondition, subject.engine.detach)
        else:
            subject.engine.detach()
            assert (root / "etc/passwd").read_bytes() == b"root:x:0:0:::\n"
    subject.driver.attach()
    assert subject.root(container).exists()


def names_are_taken_once(subject: Subject) -> None:
    """A key that exists is refused; so is a parent that is not committed."""
    container = subject.container(None)
    refused(AlreadyExists, lambda: subject.engine.prepare(container.key, None))
    refused(InvalidArgument, lambda: subject.engine.prepare("child", container))
    assert subject.driver.stored().snapshots == {container.id}


def parents_stay(subject: Subject) -> None:
    """A snapshot with children is not removed, nor is its layer collected."""
    base = subject.image(_BASE)
    container = subject.container(base)
    refused(FailedPrecondition, lambda: subject.engine.remove(base))
    subject.engine.rubbish.collect()
    assert (subject.root(container) / "etc/passwd").exists()


def collecting(subject: Subject) -> None:
    """What an image shared with another stays; the rest goes, and comes back when it is brought in again."""
    shared = tars.tar(tars.member(b"shared", b"s" * 70_000))
    single = tars.tar(tars.member(b"single", b"x" * 70_000), tars.member(b"too", b"s" * 70_000))
    base = subject.layer(shared)
    keeper = subject.container(base)
    top = subject.layer(single, base)
    assert top.layer is not None
    subject.engine.rubbish.collect()
    assert subject.driver.stored().layers == {base.layer}
    assert (subject.root(keeper) / "shared").read_bytes() == b"s" * 70_000
    subject.assert_whole(base)
    again = subject.layer(single, base)
    subject.assert_whole(again)
    assert (subject.opened(again)[1] / "too").read_bytes() == b"s" * 70_000


def stored_is_what_was_made(subject: Subject) -> None:
    """`stored` names exactly what exists."""
    base = subject.image(_BASE)
    top = subject.image(_BASE, [file("more")])
    containers = {subject.container(base).id, subject.container(top).id, subject.container(top, view=True).id}
    stored = subject.driver.stored()
    assert stored.snapshots == containers
    assert stored.layers == {base.layer, top.layer}


def usage_is_bounded(subject: Subject) -> None:
    """What a container occupies is about what it wrote, and goes down again."""
    container, root = subject.opened(subject.image(_BASE))
    before = subject.engine.usage(container)
    apply([file("megabyte", os.urandom(1 << 20)), file("small", b"x")], root)
    os.sync()
    used = subject.engine.usage(container)
    assert 1 << 20 <= used.size - before.size <= (1 << 20) + (64 << 10), used
    assert used.inodes == before.inodes + 2
    (root / "megabyte").unlink()
    assert subject.engine.usage(container).size - before.size <= 64 << 10


def facts_for_people(subject: Subject) -> None:
    """`space` and `status` answer sensibly, and a sound layer has nothing wrong with it."""
    base = subject.image(_BASE)
    space = subject.driver.space()
    assert 0 < space.free <= space.total
    assert all(isinstance(value, str) and value for value in subject.driver.status().values())
    assert base.layer is not None
    assert list(subject.driver.check_layer(SnapshotId(4_000_003), None)), "a missing layer is all right"
    assert base.kind is Kind.COMMITTED


CASES: tuple[Case, ...] = (
    empty_snapshot,
    base_and_snapshot_of_it,
    two_containers_are_apart,
    many_prepares_at_once,
    one_layer_brought_in_by_many,
    view_is_read_only,
    view_of_nothing,
    mounting_twice,
    preparing_twice,
    finishing_twice,
    removing_twice,
    removing_what_is_half_there,
    failed_ingest_leaves_nothing,
    removal_is_refused_while_in_use,
    detaching,
    detaching_is_refused_while_in_use,
    names_are_taken_once,
    parents_stay,
    collecting,
    stored_is_what_was_made,
    usage_is_bounded,
    facts_for_people,
)
