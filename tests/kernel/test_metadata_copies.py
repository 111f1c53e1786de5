"""Uppers written with metacopy=on and redirect_dir=on, as kernels before 6.16 need: our own diff reads them rightly."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hpmapper.config import Config
from hpmapper.drivers.hpmapper import HpmapperDriver
from hpmapper.drivers.upper import METADATA_COPIES_MARK
from hpmapper.engine import Engine
from hpmapper.forest import Forest
from hpmapper.layer.stream import Expected
from hpmapper.meta import snapshots
from hpmapper.model import Kind
from hpmapper.root import open_root

pytestmark = pytest.mark.kernel

LARGE = os.urandom(300_000)


@contextmanager
def opened(root: Path) -> Iterator[Engine]:
    """A new engine on the root, as another process would have."""
    config = Config(root=root, driver="hpmapper").with_options(["pool.size=400M", "min_free_space=0"])
    with open_root(config) as one:
        yield one.engine


def base_tar() -> io.BytesIO:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in ("dir/sub/large", "large"):
            member = tarfile.TarInfo(name)
            member.size = len(LARGE)
            tar.addfile(member, io.BytesIO(LARGE))
    out.seek(0)
    return out


def test_a_diff_of_metadata_copies_is_whole(tmp_path: Path) -> None:
    with opened(tmp_path / "root") as engine:
        base = engine.ingest(None, base_tar(), Expected()).snapshot
        active = engine.prepare("active", base)
        assert isinstance(engine.driver, HpmapperDriver)
        top = engine.driver.home / "a" / str(active.id)
        (top / METADATA_COPIES_MARK).touch()
        root = engine.mount(active)
        os.rename(root / "dir", root / "renamed")
        os.chmod(root / "large", 0o600)
        assert "trusted.overlay.redirect" in os.listxattr(top / "u/renamed")
        assert "trusted.overlay.metacopy" in os.listxattr(top / "u/large")
        engine.unmount(active)
    with opened(tmp_path / "root") as engine:
        active = snapshots.get(engine.db, "active")
        seen = sorted(f"{change.kind} {change.path.decode()}" for change in engine.changes(active))
        assert seen == ["A /renamed", "A /renamed/sub", "A /renamed/sub/large", "C /large", "D /dir"]
        view = engine.prepare("view", engine.commit(active).snapshot)
        root = engine.mount(view)
        assert (root / "renamed/sub/large").read_bytes() == LARGE
        assert (root / "large").read_bytes() == LARGE
        assert not (root / "dir").exists()
        engine.detach()


def test_what_cannot_be_sealed_is_read_after_the_sealed_layers_below(tmp_path: Path) -> None:
    """On maps that are not merged yet: an empty layer, which is sealed as it is, and one with metadata copies on it."""
    with opened(tmp_path / "root") as engine:
        forest = Forest(engine, "test")
        parent = ""
        for name in ("lower", "upper", "empty", "top"):
            recorded = forest.prepare(f"{name}-active", parent, {})
            forest.first_mounts(recorded)
            if name != "empty":
                (engine.mount(recorded.snapshot) / name).write_bytes(LARGE)
            engine.unmount(recorded.snapshot)
            forest.commit(name, f"{name}-active", {})
            parent = name
            if name == "upper":
                engine.ingest_sealed(forest.prepare("on-maps", "upper", {}).snapshot)
        forest.first_mounts(forest.prepare("view", "top", {}, Kind.VIEW))
        root = engine.mount(forest.get("view"))
        assert {path.name: path.read_bytes() for path in root.iterdir()} == dict.fromkeys(
            ("lower", "upper", "top"), LARGE
        )
        engine.detach()
