"""Layers that are applied to a copy of what is below: they say whether they took one of several names of a file."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from hpmapper.drivers.directory import LOST_LINKS, Dialect, drop_recipe, fill
from hpmapper.layer.merged import Merged
from hpmapper.layer.scan import DirectoryView
from hpmapper.layer.stream import Expected
from hpmapper.model import SnapshotId
from hpmapper.testing.tars import LINK, folder, member, tar

pytestmark = pytest.mark.kernel

BASE = tar(
    folder(b"d/"),
    member(b"d/one", b"1"),
    member(b"other", kind=LINK, link=b"d/one"),
    member(b"alone", b"2"),
    folder(b"empty/"),
    member(b"superseded", b"3"),
    member(b"superseded", b"4"),
)


def _fill(work: Path, layer: bytes) -> bool:
    (work / "layer/diff").mkdir(parents=True, exist_ok=True)
    drop_recipe(work / "layer")
    below = Merged([DirectoryView(str(work / "layer/diff").encode(), overlay=False)])
    fill(io.BytesIO(layer), below, work, SnapshotId(1), Dialect.APPLIED, Expected(), None)
    return (work / "layer" / LOST_LINKS).exists()


@pytest.mark.parametrize(
    ("more", "lost"),
    [
        (member(b"d/.wh.one"), True),
        (member(b"other", b"replaced"), True),
        (member(b".wh.d"), True),
        (folder(b"d/") + member(b"d/.wh..wh..opq"), True),
        (member(b"d/third", kind=LINK, link=b"other"), True),  # brought anew under all its names
        (member(b".wh.alone") + member(b".wh.empty"), False),
        (member(b"new", b"new") + folder(b"d/", 0o700), False),
    ],
    ids=["deleted", "replaced", "with its directory", "hidden", "linked", "had no other name", "nothing to do with it"],
)
def test_layers_that_take_one_of_several_names_say_so(tmp_path: Path, more: bytes, lost: bool) -> None:
    assert not _fill(tmp_path, BASE)
    assert (tmp_path / "layer/superseded").is_dir()
    assert _fill(tmp_path, tar(more)) is lost
    assert _fill(tmp_path, tar(member(b"later"))) is lost, "those above inherit it"
