"""Kubernetes' way to a storage driver: containerd's CRI plugin, driven as kubelet drives it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from hpmapper.bench.images import layer_blobs
from tests.clients import images
from tests.clients.containerd import NAMESPACE, ROOT
from tests.clients.kubernetes import DEMO, KUBERNETES, PAUSE, Node, Pod
from tests.clients.setups import Case, assert_reclaimed, left, running

pytestmark = [pytest.mark.kernel, pytest.mark.clients]

CASES = [Case(release, setup) for release in ("trixie", "sid") for setup in ("hpmapper-fast", "hpmapper")]

RUNNING, EXITED = 1, 2
"""ContainerState's CONTAINER_RUNNING and CONTAINER_EXITED."""

MIB = 1 << 20

MAPPED, COUNT = 1 << 20, 1 << 16
"""A user namespace's first user on the host, and how many there are; kubelet gives each pod 65,536 of them."""

SLACK = 1 << 20
"""Of what a container has written, bytes for directories and what else is not its data."""


@pytest.fixture(scope="session")
def pause(tmp_path_factory: pytest.TempPathFactory, busybox: Path) -> Path:
    return images.pause(tmp_path_factory.mktemp("pause") / "pause", busybox)


@pytest.fixture(scope="module", params=CASES, ids=str)
def shared(request: pytest.FixtureRequest, pool: Path, pause: Path) -> Iterator[Node]:
    with running(request.param, pool, Node) as node:
        assert node.push(pause, "pause", NAMESPACE) == PAUSE
        yield node


@pytest.fixture
def node(shared: Node) -> Iterator[Node]:
    """With nothing in it; and it must come to that again when pods and images are removed."""
    shared.start_again()
    before = left(shared)
    yield shared
    shared.start_again()
    shared.remove_pods()
    shared.remove_all_images()
    # containerd collects in the background.
    shared.machine.wait(shared.daemon, lambda: not shared.snapshots(shared.setup.name, KUBERNETES))
    shared.machine.wait(shared.daemon, lambda: not _content(shared))
    assert_reclaimed(shared, before)


@pytest.fixture
def image(node: Node, demo: Path) -> str:
    """The id of the image that containers are made of, pulled."""
    return node.pull_image(node.push(demo, "demo", NAMESPACE))


def test_a_pod_from_pull_to_removal(node: Node, demo: Path) -> None:
    reference = node.push(demo, "demo", NAMESPACE)
    image = node.pull_image(reference)
    found = node.cri("ImageStatus", image={"image": image}).image
    assert (found.id, list(found.repo_tags), found.pinned) == (image, [reference], False)
    assert found.size > 0

    pod = node.run_pod("life")
    assert node.cri("ImageStatus", image={"image": PAUSE}).image.pinned
    container = pod.run("one", image)
    assert container.status().state == RUNNING
    assert container.execute("cat /data/dir/b; echo mine >/data/mine") == "again\n"
    node.cri("StopContainer", container_id=container.id, timeout=0)
    assert container.status().state == EXITED
    node.cri("RemoveContainer", container_id=container.id)
    with pytest.raises(grpc.RpcError, match="not found"):
        container.status()
    pod.remove()
    node.cri("RemoveImage", image={"image": image})
    assert not node.cri("ImageStatus", image={"image": image}).HasField("image")


def test_a_container_made_again_starts_from_the_image(node: Node, image: str) -> None:
    """As kubelet restarts a container that ended: another one, made before the dead one is removed."""
    with node.pod("again") as pod:
        first = pod.run("one", image)
        first.execute("echo mine >/data/mine; rm /data/dir/b")
        node.cri("StopContainer", container_id=first.id, timeout=0)
        second = pod.run("two", image)
        node.cri("RemoveContainer", container_id=first.id)
        assert second.execute("cat /data/dir/b; ls /data/mine 2>/dev/null || echo none") == "again\nnone\n"


def test_the_images_file_system_is_the_pool(node: Node, image: str) -> None:
    """kubelet collects images by the space of this directory's file system, and reports what they use of it."""
    known = f"{ROOT}/pool"

    def reported() -> bool:
        return bool(_image_filesystem(node).used_bytes.value == sum(_usages(node)))

    assert _image_filesystem(node).fs_id.mountpoint == known
    assert sum(_usages(node)) >= images.LARGE
    node.machine.wait(node.daemon, reported)


def _image_filesystem(node: Node) -> Any:
    (found,) = node.cri("ImageFsInfo").image_filesystems
    return found


def _usages(node: Node) -> list[int]:
    """Bytes of each snapshot, as containerd's own client has them."""
    words = ("snapshots", "--snapshotter", node.setup.name, "usage", "-b")
    return [int(row.split()[1]) for row in node.ctr(*words, namespace=KUBERNETES).splitlines()[1:]]


def test_what_a_container_writes_is_counted(node: Node, image: str) -> None:
    """ephemeral-storage: kubelet evicts pods by these figures."""
    with node.pod("written") as pod:
        container, other = pod.run("one", image), pod.run("two", image)
        container.execute("dd if=/dev/zero of=/data/written bs=65536 count=160")
        container.wait_written(10 * MIB, 10 * MIB + SLACK)
        assert container.written()[1] > 0
        assert other.written()[0] < SLACK
        (_, size), *_ = sorted(((one, container.written()[0]) for one in _listed(node)), reverse=True)
        assert size == container.written()[0]
        container.execute("rm /data/written")
        container.wait_written(0, SLACK)


def _listed(node: Node) -> list[str]:
    return [stats.attributes.id for stats in node.cri("ListContainerStats").stats]


def test_a_container_writes_to_a_file_of_the_image(node: Node, image: str) -> None:
    """A large file of an image that is changed in one place costs what is written, not the whole file."""
    with node.pod("changed") as pod:
        container = pod.run("one", image)
        container.execute("echo x | dd of=/data/large bs=1 seek=1000000 conv=notrunc")
        assert container.execute("stat -c %s /data/large") == f"{images.LARGE}\n"
        container.wait_written(1, SLACK)


def test_restarts_of_both_under_running_pods(node: Node, image: str) -> None:
    with node.pod("stays") as pod:
        container = pod.run("one", image)
        container.execute("echo before >/data/written")
        node.kill_server()
        assert container.execute("cat /data/written") == "before\n"
        node.restart_server()
        node.restart_daemon()
        assert container.status().state == RUNNING
        assert container.execute("cat /data/written /data/dir/b") == "before\nagain\n"
        with node.pod("later") as later:
            assert later.run("one", image).execute("cat /data/dir/b") == "again\n"
        assert container.execute("echo after >>/data/written; cat /data/written") == "before\nafter\n"
        container.wait_written(1, SLACK)
        node.cri("StopContainer", container_id=container.id, timeout=0)
        node.cri("RemoveContainer", container_id=container.id)


def test_containerd_comes_up_before_the_server(node: Node, image: str) -> None:
    """Its CRI plugin then leaves out the images, which it cannot look at, until they are pulled again."""
    with node.pod("stays") as pod:
        container = pod.run("one", image)
        container.execute("echo before >/data/written")
        node.kill_server()
        node.restart_daemon()
        assert not node.cri("ListImages").images
        node.restart_server()
        assert container.execute("cat /data/written") == "before\n"
        assert node.pull_image(DEMO) == image
        node.pull_image(PAUSE)
        assert pod.run("two", image).execute("cat /data/dir/b") == "again\n"
        container.wait_written(1, SLACK)


def test_while_the_server_is_away(node: Node, image: str) -> None:
    """Containers can be removed, and leave no more than others; making one fails, and kubelet tries again."""
    with node.pod("patient") as pod:
        with node.pod("doomed") as doomed:
            doomed.run("one", image).execute("echo mine >/data/mine")
            node.kill_server()
        with pytest.raises(grpc.RpcError, match="UNAVAILABLE"):
            pod.create("one", image)
        node.restart_server()
        assert pod.run("one", image).execute("cat /data/dir/b") == "again\n"


def test_a_root_that_must_not_be_written(node: Node, image: str) -> None:
    security = {"namespace_options": {"network": "NODE"}, "readonly_rootfs": True}
    with node.pod("readonly", security) as pod:
        container = pod.run("one", image)
        assert container.execute("echo x 2>&1 >/data/new || cat /data/dir/b").endswith("Read-only file system\nagain\n")


def test_a_pod_with_users_of_its_own(node: Node, image: str) -> None:
    """hostUsers: false. Root in the pod is nobody on the host, and sees the image's owners as they are."""
    extensions = json.loads(node.machine.run("runc", "features")).get("linux", {}).get("mountExtensions", {})
    if not extensions.get("idmap", {}).get("enabled"):
        pytest.skip(f"this release's runc has no idmapped mounts, which pods need: {node.machine.run('runc', '-v')}")
    with node.pod("users", _users()) as pod:
        container = pod.run("one", image)
        assert container.execute("cat /proc/self/uid_map").split() == ["0", str(MAPPED), str(COUNT)]
        assert container.execute("stat -c '%u:%g' /data/dir/b /data/large /data/linked").split() == [
            "0:0",
            "1000:1001",
            "7:8",
        ]
        container.execute("echo mine >/data/mine; chown 5:6 /data/mine; echo more >>/data/large")
        assert container.execute("stat -c '%u:%g' /data/mine /data/large").split() == ["5:6", "1000:1001"]
        container.wait_written(1, SLACK)
        with node.pod("host-users") as plain:
            assert plain.run("one", image).execute("stat -c '%u:%g' /data/large").split() == ["1000:1001"]


def _users() -> dict[str, object]:
    mapping = [{"host_id": MAPPED, "container_id": 0, "length": COUNT}]
    return {"namespace_options": {"userns_options": {"mode": "POD", "uids": mapping, "gids": mapping}}}


CONTAINERS, PODS = 5, 30


def test_containers_of_one_image_in_a_pod(node: Node, image: str) -> None:
    with node.pod("many") as pod:
        containers = [pod.run(f"c{number}", image) for number in range(CONTAINERS)]
        for number, container in enumerate(containers):
            container.execute(f"echo {number} >/data/mine; rm /data/dir/{'acdef'[number]}")
        for number, container in enumerate(containers):
            assert container.execute("cat /data/mine") == f"{number}\n"
            seen = container.execute("ls /data/dir").split()
            assert seen == [name for name in "abcdef" if name != "acdef"[number]]


def test_pods_at_once(node: Node, image: str) -> None:
    def start(number: int) -> Pod:
        pod = node.run_pod(f"at-once-{number}")
        assert pod.run("one", image).execute("cat /data/dir/b") == "again\n"
        return pod

    with ThreadPoolExecutor(PODS) as threads:
        pods = list(threads.map(start, range(PODS)))
        assert len(node.cri("ListPodSandbox").items) == len(_listed(node)) == PODS
        list(threads.map(Pod.remove, pods))
    assert not node.cri("ListPodSandbox").items


def test_an_image_that_is_collected_while_a_container_has_it(node: Node, image: str) -> None:
    """kubelet does not do this, an operator may: the container goes on, and the image comes back by a pull."""
    with node.pod("orphan") as pod:
        container = pod.run("one", image)
        node.cri("RemoveImage", image={"image": image})
        assert container.execute("cat /data/dir/b") == "again\n"
        container.execute("echo more >>/data/large")


def test_layers_that_are_not_kept_once_they_are_unpacked(node: Node, demo: Path) -> None:
    """With discard_unpacked_layers; containerd 2.1 then pulls without its transfer service, by another way to us."""
    reference = node.push(demo, "demo", NAMESPACE)
    layers = {f"sha256:{blob.name}" for blob in layer_blobs(demo)}
    node.configure(discards=True)
    node.restart_daemon()
    image = node.pull_image(reference)
    node.machine.wait(node.daemon, lambda: not layers & _content(node))
    with node.pod("discarded") as pod:
        assert pod.run("one", image).execute("cat /data/dir/b") == "again\n"
    node.configure()
    node.restart_daemon()


def _content(node: Node) -> set[str]:
    return set(node.ctr("content", "ls", "--quiet", namespace=KUBERNETES).split())
