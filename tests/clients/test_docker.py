"""Docker with the containerd image store and our snapshotter: run, build, commit, diff, save, load, rm, prune.

containerd's own overlayfs says what a container has to see; its overlayfs behind a proxy socket ("peer") goes through
the same tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hpmapper.testing.trees import Facts
from tests.clients.containerd import NAMESPACE, Containerd
from tests.clients.differs import differences
from tests.clients.docker import MOBY, Docker
from tests.clients.setups import SETUPS, Case, assert_reclaimed, left, running

pytestmark = [pytest.mark.kernel, pytest.mark.clients]

CASES = [Case(release, name) for release in ("trixie", "sid") for name, setup in SETUPS.items() if setup.command]

OF_DOCKER = (b".dockerenv", b"dev", b"etc", b"proc", b"sys")
"""Where dockerd makes files and mount points of its own in a container's first layer."""


@pytest.fixture(scope="module", params=CASES, ids=str)
def shared(request: pytest.FixtureRequest, pool: Path) -> Iterator[Docker]:
    with running(request.param, pool, Containerd) as containerd:
        docker = Docker(containerd)
        docker.start()
        yield docker
        docker.stop()


@pytest.fixture
def docker(shared: Docker) -> Iterator[Docker]:
    """With nothing in it; and it must come to that again when everything is removed."""
    before = left(shared.containerd)
    yield shared
    if containers := shared("ps", "--all", "--quiet").split():
        shared("rm", "--force", "--volumes", *containers)
    shared("system", "prune", "--all", "--force", "--volumes")
    assert shared("images", "--quiet") == ""
    containerd = shared.containerd
    containerd.remove_images()
    for snapshotter in ("overlayfs", containerd.setup.name):
        for namespace in (NAMESPACE, MOBY):
            assert containerd.snapshots(snapshotter, namespace) == []
    assert_reclaimed(containerd, before)


def _pulled(docker: Docker, layout: Path) -> str:
    reference = docker.containerd.push(layout, "demo", NAMESPACE)
    docker("pull", "--quiet", reference)
    return reference


def _started(docker: Docker, image: str, name: str) -> None:
    docker("run", "--detach", "--network=host", f"--name={name}", image, "sleep", "100000")


def _run(docker: Docker, image: str, script: str) -> list[str]:
    return docker("run", "--rm", "--network=none", image, "sh", "-c", script).split("\n")[:-1]


def _of_image(root: dict[bytes, Facts]) -> dict[bytes, Facts]:
    return {path: facts for path, facts in root.items() if path.split(b"/")[0] not in OF_DOCKER}


def _on_overlayfs(containerd: Containerd, reference: str) -> dict[bytes, Facts]:
    containerd.pull(reference, "overlayfs")
    with containerd.container(reference, "overlayfs", "expected") as container:
        return container.root()


def test_a_root_is_as_overlayfs_gives_it(docker: Docker, demo: Path) -> None:
    reference = _pulled(docker, demo)
    _started(docker, reference, "look")
    expected = _of_image(_on_overlayfs(docker.containerd, reference))
    assert differences(_of_image(docker.root("look")), expected) == []


def test_diff_and_commit_tell_what_was_changed(docker: Docker, demo: Path) -> None:
    _started(docker, _pulled(docker, demo), "changed")
    changes = (
        "echo new >/data/new; rm /data/dir/a; chmod 4711 /data/large; ln /data/linked /data/also; mkdir /data/some"
    )
    docker("exec", "changed", "sh", "-c", changes)
    found = set(docker("diff", "changed").splitlines())
    assert found - COPIED_UP == {
        "C /data", "C /data/dir", "A /data/new", "D /data/dir/a", "C /data/large", "A /data/also", "A /data/some"
    }  # fmt: skip
    docker("commit", "changed", "committed:1")
    expected = _of_image(docker.root("changed"))
    _started(docker, "committed:1", "again")
    assert differences(_of_image(docker.root("again")), expected, whole_seconds=True) == []


COPIED_UP = {"C /data/linked"}
"""A link to a file of a lower layer copies the file up. Docker need not call that a change: it has the same content."""

DOCKERFILE = """\
FROM {base}
RUN sh -c 'mv /data/after /data/later && rm -r /data/covered && mkdir /data/covered && echo 1 >/data/covered/1'
COPY added /data/added
RUN sh -c 'chmod 600 /data/added && rm /data/dir/c && ln /data/linked /data/also'
CMD ["cat", "/data/added"]
"""


@pytest.mark.parametrize("buildkit", [False, True], ids=["classic", "buildkit"])
def test_build(docker: Docker, demo: Path, buildkit: bool) -> None:
    context = docker.machine.path("/data/context")
    context.mkdir(exist_ok=True)
    (context / "Dockerfile").write_text(DOCKERFILE.format(base=_pulled(docker, demo)))
    (context / "added").write_bytes(b"added\n")
    docker("build", "--network=none", "--tag=built:1", "/data/context", buildkit=buildkit)
    assert docker("run", "--rm", "--network=none", "built:1") == "added\n"
    script = "ls /data/later | wc -l; cat /data/covered/*; stat -c %a /data/added; ls /data/dir"
    assert _run(docker, "built:1", script) == ["39", "1", "600", "a", "b", "d", "e", "f"]
    assert _run(docker, "built:1", "busybox cmp /data/also /data/linked && echo same") == ["same"]


def test_save_and_load(docker: Docker, demo: Path) -> None:
    reference = _pulled(docker, demo)
    _started(docker, reference, "first")
    expected = _of_image(docker.root("first"))
    docker("save", "--output=/data/saved.tar", reference)
    docker("rm", "--force", "first")
    docker("rmi", "--force", reference)
    docker("load", "--quiet", "--input=/data/saved.tar")
    _started(docker, reference, "second")
    assert differences(_of_image(docker.root("second")), expected) == []


def test_copying_into_and_out_of_a_container_that_does_not_run(docker: Docker, demo: Path) -> None:
    docker("create", "--network=none", "--name=still", _pulled(docker, demo), "cat", "/data/put")
    docker.machine.path("/data/put").write_bytes(b"put\n")
    docker("cp", "/data/put", "still:/data/put")
    docker("cp", "still:/data/dir/b", "/data/got")
    assert docker.machine.path("/data/got").read_bytes() == b"again\n"
    assert docker("start", "--attach", "still") == "put\n"


def test_what_runs_goes_on_when_the_server_is_killed(docker: Docker, demo: Path) -> None:
    reference = _pulled(docker, demo)
    _started(docker, reference, "running")
    docker.containerd.kill_server()
    docker("exec", "running", "sh", "-c", "echo still >/data/still")
    docker.containerd.restart_server()
    assert docker("exec", "running", "cat", "/data/still") == "still\n"
    docker("restart", "--time=0", "running")
    assert docker("exec", "running", "cat", "/data/still") == "still\n"
    assert _run(docker, reference, "cat /data/dir/b") == ["again"]
