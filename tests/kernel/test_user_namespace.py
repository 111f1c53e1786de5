"""The overlay driver as root of a user namespace, which may set no `trusted.` attributes and map few owners."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hpmapper.check import check
from hpmapper.config import Config
from hpmapper.containers import Containers
from hpmapper.drivers import registry
from hpmapper.errors import InvalidArgument
from hpmapper.image.documents import ImportOptions
from hpmapper.image.opening import SourceOptions
from hpmapper.images import Images
from hpmapper.kernel.idmap import in_user_namespace
from hpmapper.root import open_root
from hpmapper.testing import trees
from hpmapper.testing.tars import folder, member, tar
from tests.scenario import Silent

pytestmark = pytest.mark.kernel

LAYERS = (
    tar(folder(b"./", 0o711), folder(b"etc/"), member(b"etc/old", b"old"), folder(b"opt/"), member(b"opt/a", b"a")),
    tar(folder(b"etc/"), member(b"etc/.wh..wh..opq"), member(b"etc/new", b"new"), member(b"opt/.wh.a")),
)


def test_overlay_in_a_user_namespace(tmp_path: Path) -> None:
    if not shutil.which("unshare"):
        pytest.skip("there is no unshare(1)")
    command = ["unshare", "--user", "--map-root-user", "--mount", "--propagation", "private"]
    code = f"from tests.kernel.test_user_namespace import inside; inside({str(tmp_path)!r})"
    allowed = subprocess.run([*command, "true"], capture_output=True, text=True, check=False)
    if allowed.returncode:
        pytest.skip(f"this host allows no user namespaces: {allowed.stderr.strip()}")
    done = subprocess.run(
        [*command, sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "done\n"


def inside(directory: str) -> None:
    """What happens in the namespace; prints "done"."""
    place = Path(directory)
    assert in_user_namespace()
    config = Config(root=place / "root").with_options(["min_free_space=0"])
    verdicts = {one.name: registry.probe(one, place, config.pool(one)) for one in registry.DRIVERS}
    assert verdicts["overlay"].works, verdicts["overlay"]
    assert not verdicts["hpmapper"].works
    with open_root(Config(root=config.root, driver="overlay", options=config.options)) as opened:
        images, containers = Images(opened.engine), Containers(opened.engine)
        (place / "one.tar").write_bytes(LAYERS[0])
        images.bring(f"tar:{place / 'one.tar'}", SourceOptions(spool=place), ["base"], Silent())
        one = containers.create("base", "one")
        root = containers.mount(one)
        trees.apply([trees.replace_directory("etc"), trees.file("etc/new", b"new"), trees.remove("opt/a")], root)
        upper = opened.engine.driver.root(containers.snapshot(one).id).parent / "u"
        assert os.getxattr(upper / "etc", "user.overlay.opaque") == b"y"
        changed = {(str(change.kind), change.path) for change in containers.changes(one)}
        assert changed == {("C", b"/etc"), ("D", b"/etc/old"), ("A", b"/etc/new"), ("C", b"/opt"), ("D", b"/opt/a")}
        containers.commit(one, ["made"], ImportOptions())
        two = containers.create("made", "two")
        trees.assert_same(containers.mount(two), root)
        spec = opened.engine.handout(containers.snapshot(two))
        assert "userxattr" in spec.options
        for container in (one, two):
            containers.remove(container)
        (place / "foreign.tar").write_bytes(tar(member(b"file", b"x", uid=5)))
        with pytest.raises(InvalidArgument, match=r"file' cannot be made"):
            images.bring(f"tar:{place / 'foreign.tar'}", SourceOptions(spool=place), ["foreign"], Silent())
        assert list(check(opened.engine)) == []
    print("done")
