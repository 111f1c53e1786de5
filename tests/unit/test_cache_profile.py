"""Start profiles as bytes: there and back, and hostile ones refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpmapper.cache.profile import MAX_BYTES, Profile, decode, joined
from hpmapper.errors import Corrupt
from hpmapper.kernel.mincore import Run
from hpmapper.model import ObjectDigest

offsets = st.integers(0, 2**40)
runs = st.lists(st.builds(lambda start, length: Run(start, start + length), offsets, offsets), max_size=5).map(tuple)
digests = st.binary(min_size=32, max_size=32).map(ObjectDigest)
profiles = st.builds(
    Profile,
    offsets,
    runs,
    st.lists(st.tuples(digests, runs), max_size=5).map(tuple),
    st.booleans(),
    st.floats(0, 100),
)


@given(profiles)
def test_a_profile_survives_being_stored(profile: Profile) -> None:
    assert decode(profile.encode(), "it") == profile


def document(**changes: Any) -> bytes:
    whole = {"version": 1, "map": {"size": 1, "ranges": []}, "objects": []} | changes
    return json.dumps(whole).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"\xff",
        document(version=2),
        document(map={"size": -1, "ranges": []}),
        document(map={"size": 1, "ranges": [[0, -1]]}),
        document(map={"size": 1, "ranges": [[0]]}),
        document(objects=[{"digest": "../" * 21 + "a", "ranges": []}]),
        document(objects=[{"digest": "A" * 64, "ranges": []}]),
        document(objects=[{"digest": "a" * 64, "ranges": [[2**70, 1]]}]),
        b"[" * 100_000,
        b" " * (MAX_BYTES + 1),
    ],
)
def test_what_is_no_profile_is_refused(data: bytes) -> None:
    with pytest.raises(Corrupt, match="the profile"):
        decode(data, "the profile")


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        decode(data, "it")
    except Corrupt:
        pass


def test_neighbours_are_joined() -> None:
    assert joined([Run(0, 10), Run(15, 20), Run(40, 50)], 10) == (Run(0, 20), Run(40, 50))
    assert joined([], 10) == ()


def test_it_is_restricted_to_what_an_image_has() -> None:
    mine, other = ObjectDigest(b"m" * 32), ObjectDigest(b"o" * 32)
    profile = Profile(0, (), ((mine, (Run(0, 1),)), (other, (Run(0, 5),))))
    assert profile.restricted({mine}).size == 1
