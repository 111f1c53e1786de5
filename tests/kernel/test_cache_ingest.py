"""What comes in twice is neither unpacked nor written twice, and the report says what that saved."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from hpmapper.image.opening import SourceOptions
from hpmapper.image.save import SaveForm, save
from hpmapper.images import Brought
from tests.cacheroot import MIB, CacheRoot, cache_root
from tests.scenario import Silent

pytestmark = pytest.mark.kernel

COMMON, ONE, TWO = (random.Random(seed).randbytes(4 * MIB) for seed in range(3))


def brought(root: CacheRoot, source: str, tmp_path: Path) -> Brought:
    (one,) = root.images.bring(source, SourceOptions(spool=tmp_path), ["again"], Silent())
    return one


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_a_known_layer_is_not_unpacked_whatever_its_compression(tmp_path: Path, compression: str) -> None:
    with cache_root(tmp_path) as root:
        root.image("one", {"common": COMMON, "one": ONE})
        image = root.images.saved(root.images.find("one"))
        save([image], tmp_path / "saved", SaveForm.LAYOUT, compression=compression)
        for blob in (tmp_path / "saved/blobs/sha256").iterdir():
            if blob.stat().st_size > MIB:  # the layer: whoever reads it finds it damaged
                blob.write_bytes(bytes(blob.stat().st_size))
        again = brought(root, f"oci:{tmp_path}/saved", tmp_path)
        assert [taken.ingested for taken in again.layers] == [None]
        assert again.not_unpacked >= 8 * MIB
        assert again.not_read >= 7 * MIB
        assert again.not_written == 0


def test_known_objects_are_not_written_again(tmp_path: Path) -> None:
    with cache_root(tmp_path) as root:
        root.image("one", {"common": COMMON, "one": ONE})
        (tmp_path / "two").mkdir()
        for name, data in (("moved", COMMON), ("two", TWO)):
            (tmp_path / "two" / name).write_bytes(data)
        new = brought(root, f"dir:{tmp_path}/two", tmp_path)
        (taken,) = new.layers
        assert taken.ingested is not None
        assert new.not_written == len(COMMON)
        assert taken.ingested.size < len(TWO) + MIB
        assert (new.not_read, new.not_unpacked) == (0, 0)
        assert dataclasses.replace(new, layers=()).not_written == 0


def test_the_command_reports_it(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "hpmapper.cli.main", "--root", str(tmp_path / "root"), "--storage-opt=pool.size=400M"]

    def said(*words: str | Path) -> str:
        return subprocess.run([*line, *map(str, words)], capture_output=True, text=True, check=True).stdout

    (tmp_path / "files").mkdir()
    (tmp_path / "files/one").write_bytes(ONE)
    said("image", "import", tmp_path / "files", "one")
    said("image", "save", "-o", tmp_path / "saved.tar", "one")
    try:
        text = said("image", "import", tmp_path / "saved.tar", "two")
        assert "0 new, 1 already there" in text
        assert "saved: 4.0 MiB not unpacked (4.0 MiB not read)" in text
        (facts,) = json.loads(said("image", "import", tmp_path / "saved.tar", "two", "--json"))
        assert facts["bytes_not_unpacked"] >= len(ONE)
    finally:
        said("pool", "detach")
