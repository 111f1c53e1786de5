"""containerd of three Debian releases with our snapshotter, a registry, and real images: what an operator does.

containerd's own overlayfs, in the same containerd, says what a root has to look like. Its overlayfs behind a proxy
socket ("peer") goes through the same tests: what it cannot do is not asked of us.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from hpmapper.testing.trees import Facts
from tests.clients import images
from tests.clients.containerd import ELSEWHERE, NAMESPACE, Container, Containerd
from tests.clients.differs import differences
from tests.clients.machine import Failed
from tests.clients.setups import SETUPS, Case, assert_reclaimed, left, running

pytestmark = [pytest.mark.kernel, pytest.mark.clients]

# Debian 12's containerd has no proxies for differs.
CASES = [
    *(Case("bookworm", name) for name, setup in SETUPS.items() if setup.command and not setup.fast),
    *(Case(release, name) for release in ("trixie", "sid") for name, setup in SETUPS.items() if setup.command),
]


@pytest.fixture(scope="module", params=CASES, ids=str)
def shared(request: pytest.FixtureRequest, pool: Path) -> Iterator[Containerd]:
    with running(request.param, pool, Containerd) as containerd:
        yield containerd


@pytest.fixture
def containerd(shared: Containerd) -> Iterator[Containerd]:
    """With nothing in it; and it must come to that again when everything is removed."""
    before = left(shared)
    yield shared
    for namespace in (NAMESPACE, ELSEWHERE):
        shared.remove_images(namespace)
        for snapshotter in ("overlayfs", shared.setup.name):
            assert shared.snapshots(snapshotter, namespace) == []
    assert_reclaimed(shared, before)


def _root(containerd: Containerd, reference: str, snapshotter: str, namespace: str = NAMESPACE) -> dict[bytes, Facts]:
    with containerd.container(reference, snapshotter, f"look-{snapshotter}", namespace) as container:
        return container.root()


def test_a_root_is_as_overlayfs_gives_it(containerd: Containerd, demo: Path) -> None:
    reference = containerd.push(demo, "demo", NAMESPACE)
    for snapshotter in ("overlayfs", containerd.setup.name):
        containerd.pull(reference, snapshotter)
    expected = _root(containerd, reference, "overlayfs")
    assert differences(_root(containerd, reference, containerd.setup.name), expected) == []
    assert {b"data/after/38", b"data/covered/new", b"data/dir/b"} < expected.keys()
    assert not {b"data/before", b"data/covered/old", b"data/dir/sub", b"data/after/39"} & expected.keys()


def test_two_containers_of_an_image_do_not_see_each_other(containerd: Containerd, demo: Path) -> None:
    reference, name = containerd.push(demo, "demo", NAMESPACE), containerd.setup.name
    containerd.pull(reference, name)
    with containerd.container(reference, name, "one") as one, containerd.container(reference, name, "two") as two:
        one.execute("/bin/sh", "-c", "echo mine >/data/mine; rm /data/linked; echo x >>/data/large")
        assert two.execute("/bin/sh", "-c", "ls /data/linked; ls /data/mine 2>/dev/null || echo none").split() == [
            "/data/linked",
            "none",
        ]


CHANGES = """
set -e
ln /data/linked /data/linked-in-upper
chmod 4711 /data/large
chown 12:34 /data/linked
mv /data/after /data/later
rm -r /data/covered
mkdir /data/covered
echo again >/data/covered/again
rm /data/dir/a
rm /data/directory-then-file
mkdir /data/directory-then-file
mknod /data/null c 1 3
echo changed >>/data/dir/c
"""
"""What has gone wrong in storage drivers: a link to a file of a lower layer, the mode of a large file, a renamed
directory, a directory made anew where one was removed."""


def test_a_commit_is_the_same_image_elsewhere(containerd: Containerd, demo: Path, tmp_path: Path) -> None:
    reference, name = containerd.push(demo, "demo", NAMESPACE), containerd.setup.name
    containerd.pull(reference, name)
    with containerd.container(reference, name, "changed") as container:
        container.execute("/bin/sh", "-c", CHANGES)
        blob = _committed(container)
        committed = images.extended(tmp_path / "committed", demo, "committed", blob)
        expected = container.root()
    pushed = containerd.push(committed, "committed", NAMESPACE)
    containerd.pull(pushed, "overlayfs", ELSEWHERE)
    assert differences(_root(containerd, pushed, "overlayfs", ELSEWHERE), expected, whole_seconds=True) == []
    containerd.pull(pushed, name)
    assert differences(_root(containerd, pushed, name), expected, whole_seconds=True) == []


def test_a_commit_keeps_extended_attributes(containerd: Containerd, demo: Path, tmp_path: Path) -> None:
    if not (containerd.setup.fast and containerd.tells_namespaces):
        pytest.skip("containerd's own differ makes the layer, and writes no extended attributes but capabilities")
    reference, name = containerd.push(demo, "demo", NAMESPACE), containerd.setup.name
    containerd.pull(reference, name)
    with containerd.container(reference, name, "changed") as container:
        container.execute("/bin/chown", "12:34", "/data/attributed")
        committed = images.extended(tmp_path / "committed", demo, "committed", _committed(container))
        expected = container.root()
    pushed = containerd.push(committed, "committed", NAMESPACE)
    containerd.pull(pushed, "overlayfs", ELSEWHERE)
    assert differences(_root(containerd, pushed, "overlayfs", ELSEWHERE), expected, whole_seconds=True) == []


def _committed(container: Container) -> bytes:
    """The layer of what a container changed, as containerd's diff service makes it: a gzip blob."""
    words = ["snapshots", "--snapshotter", container.containerd.setup.name, "diff", container.name]
    return container.containerd.ctr_bytes(*words, namespace=container.namespace)


def test_an_image_of_many_layers(containerd: Containerd, tall: Path) -> None:
    reference, name = containerd.push(tall, "tall", NAMESPACE), containerd.setup.name
    containerd.pull(reference, name)
    with containerd.container(reference, name, "tall") as container:
        numbers = container.execute("/bin/sh", "-c", "cat /data/*").split()
    assert sorted(map(int, numbers)) == list(range(120))


def test_snapshots_can_be_mounted_by_hand(containerd: Containerd, demo: Path) -> None:
    reference, name = containerd.push(demo, "demo", NAMESPACE), containerd.setup.name
    containerd.pull(reference, name)
    containerd.machine.run("mkdir", "-p", "/mnt/view")
    containerd.ctr("images", "mount", "--snapshotter", name, reference, "/mnt/view")
    try:
        assert (containerd.machine.path("/mnt/view/data/directory-then-file")).read_bytes() == b"file\n"
        with pytest.raises(OSError, match="Read-only"):
            containerd.machine.path("/mnt/view/new").touch()
    finally:
        containerd.ctr("images", "unmount", "--snapshotter", name, "--rm", "/mnt/view")


def test_a_restarted_server_finds_running_containers_as_they_were(containerd: Containerd, demo: Path) -> None:
    """Killed, not asked to stop: the containers run on, and what was there is there."""
    reference, name = containerd.push(demo, "demo", NAMESPACE), containerd.setup.name
    containerd.pull(reference, name)
    with containerd.container(reference, name, "before") as container:
        container.execute("/bin/sh", "-c", "echo before >/data/written")
        expected = container.root()
        containerd.kill_server()
        assert container.execute("/bin/cat", "/data/written").split() == ["before"]
        containerd.restart_server()
        assert differences(container.root(), expected) == []
        with containerd.container(reference, name, "after") as other:
            assert other.execute("/bin/cat", "/data/dir/b").split() == ["again"]
        container.execute("/bin/sh", "-c", "echo after >/data/written")


AT_ONCE = 50

PATIENCE = 180.0
"""Seconds for a start that the server's death has disturbed, while all the others start on the same processors."""


def test_containers_start_at_once_while_the_server_is_killed(containerd: Containerd, demo: Path) -> None:
    """A start may fail when the server goes away in its middle; tried again it works, and nothing is left of it."""
    reference, name = containerd.push(demo, "demo", NAMESPACE), containerd.setup.name
    containerd.pull(reference, name)
    words = ("run", "--rm", "--net-host", "--snapshotter", name, reference)
    look = ("/bin/sh", "-c", "[ $(cat /data/dir/b) = again ]")

    def run(number: int) -> None:
        deadline = time.monotonic() + PATIENCE
        for attempt in itertools.count():
            try:
                containerd.ctr(*words, f"at-once-{number}-{attempt}", *look)
                return
            except Failed:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    with ThreadPoolExecutor(AT_ONCE) as threads:
        runs = [threads.submit(run, number) for number in range(AT_ONCE)]
        wait(runs, return_when=FIRST_COMPLETED)
        containerd.kill_server()
        containerd.restart_server()
        for one in runs:
            one.result()
    containerd.remove_containers()
