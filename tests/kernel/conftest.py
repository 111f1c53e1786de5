"""What tests of the forest share: a root that is served, of each driver."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serving import Served, served


@pytest.fixture(scope="module", params=["hpmapper", "overlay", "vfs"])
def served_root(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, private_mounts: None
) -> Iterator[Served]:
    """A root of each driver, used by all tests of a module in turn."""
    with served(tmp_path_factory.mktemp(request.param), request.param) as made:
        yield made


@pytest.fixture
def here(served_root: Served) -> Iterator[Served]:
    """It, with nothing in it, and with nothing left in it."""
    served_root.content.reads.clear()
    served_root.content.metadata.clear()
    yield served_root
    served_root.clear()
