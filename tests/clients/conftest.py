"""What the tests with real clients share: a file system for their data, and images."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients import images, pools


@pytest.fixture(scope="module")
def pool(private_mounts: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An XFS with reflink for all roots of a module."""
    with pools.xfs(tmp_path_factory.mktemp("pool")) as mounted:
        yield mounted


@pytest.fixture(scope="session")
def busybox() -> Path:
    found = shutil.which("busybox")
    if found is None:
        pytest.fail("busybox is not installed: apt install busybox-static")
    return Path(found).resolve()


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory, busybox: Path) -> Path:
    """The OCI layout of an image with all that layers do."""
    return images.make(tmp_path_factory.mktemp("demo") / "demo", busybox)


@pytest.fixture(scope="session")
def tall(tmp_path_factory: pytest.TempPathFactory, busybox: Path) -> Path:
    """The OCI layout of an image of 121 layers."""
    return images.tall(tmp_path_factory.mktemp("tall") / "tall", busybox, 120)
