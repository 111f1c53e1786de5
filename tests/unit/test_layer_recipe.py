"""A layer's recipe gives back its tar, byte for byte, or says that it cannot."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpmapper.errors import Corrupt
from hpmapper.layer.recipe import MAGIC, RecipeWriter, replay
from hpmapper.testing.tars import zstd_packed

STORED = bytes(range(256)) * 40

literals = st.binary(max_size=3000).map(lambda data: (data, None))
ranges = st.tuples(st.integers(0, len(STORED)), st.integers(0, len(STORED))).map(lambda pair: (None, sorted(pair)))


def write(records: list[tuple[bytes | None, list[int] | None]]) -> tuple[bytes, bytes]:
    """A recipe, and what it stands for."""
    out, whole = io.BytesIO(), b""
    recipe = RecipeWriter(out)
    for literal, span in records:
        if literal is not None:
            recipe.literal(literal)
            whole += literal
        elif span is not None:
            recipe.reference(b"name", span[0], span[1] - span[0])
            whole += STORED[span[0] : span[1]]
    recipe.close()
    return out.getvalue(), whole


def read(recipe: bytes, stored: bytes = STORED) -> bytes:
    def open_stored(name: bytes) -> io.BytesIO:
        assert name == b"name"
        return io.BytesIO(stored)

    return b"".join(replay(io.BytesIO(recipe), open_stored))


@given(st.lists(literals | ranges, max_size=30))
def test_round_trip(records: list[tuple[bytes | None, list[int] | None]]) -> None:
    recipe, whole = write(records)
    assert read(recipe) == whole


def test_many_records_and_large_ones() -> None:
    records: list[tuple[bytes | None, list[int] | None]] = [(None, [number, number + 3]) for number in range(5000)]
    recipe, whole = write([*records, (bytes(5 << 20), None), *records])
    assert read(recipe) == whole
    assert len(recipe) < 200_000


def test_a_stored_file_that_shrank() -> None:
    recipe, _ = write([(None, [10, 2000])])
    with pytest.raises(Corrupt, match="too short"):
        read(recipe, STORED[:1999])


def test_every_cut_is_found() -> None:
    recipe, _ = write([(b"head" * 50, None), (None, [0, 100]), (b"tail", None)])
    for length in range(len(recipe)):
        with pytest.raises(Corrupt):
            read(recipe[:length])


def test_unknown_records() -> None:
    for records in (b"X", b"", b"L\xff\xff\xff\xff", b"R\x04na"):
        with pytest.raises(Corrupt):
            read(MAGIC + zstd_packed(records))
    with pytest.raises(Corrupt):
        read(b"another magic" + zstd_packed(b"E"))


@given(st.data())
def test_damage_is_found_or_harmless(data: st.DataObject) -> None:
    recipe, _ = write([(b"head" * 50, None), (None, [0, 100]), (b"tail", None)])
    bad = bytearray(recipe)
    bad[data.draw(st.integers(0, len(bad) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        read(bytes(bad))
    except (Corrupt, AssertionError):
        pass  # AssertionError: a reference to another name, which the store would not have
