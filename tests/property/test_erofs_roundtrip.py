"""Any tree: what is written is what is read, also by others; and no damage to an image does more than be found."""

from __future__ import annotations

import io
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpmapper.erofs.dump import dump
from hpmapper.erofs.kept import kept_tree
from hpmapper.erofs.plan import NoRoom
from hpmapper.erofs.reader import Map
from hpmapper.erofs.writer import extend_map, write_map
from hpmapper.errors import Corrupt
from hpmapper.layer.merge import merge
from hpmapper.tree import Inode, directory, walk
from tests.strategies import (
    UUID,
    Sample,
    extended,
    facts,
    fsck,
    layers_on,
    map_facts,
    reseal,
    samples,
    strip_marks,
)

_slow_is_fine = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@given(samples())
@_slow_is_fine
def test_reader_gives_the_tree_back(sample: Sample) -> None:
    image = Map.from_bytes(sample.image())
    assert map_facts(image) == sample.facts()


@given(samples())
@_slow_is_fine
def test_each_path_is_found(sample: Sample) -> None:
    image = Map.from_bytes(sample.image())
    for path, inode in walk(sample.root):
        found = image.lookup(path)
        assert found is not None
        assert (found.mode, found.size, found.xattrs) == (inode.mode, inode.size, inode.xattrs)
        assert image.lookup(path + b"/nothing" if path else b"nothing") is None
    assert sorted(image.objects()) == sorted(_references(sample.root))


def _references(root: Inode) -> list[tuple[bytes, int]]:
    unique = {id(inode): inode for _, inode in walk(root)}
    return [(inode.content, inode.size) for inode in unique.values() if isinstance(inode.content, bytes)]


@given(samples())
@_slow_is_fine
def test_a_read_tree_is_written_as_it_was(sample: Sample) -> None:
    first = sample.image()
    spool, out = io.BytesIO(), io.BytesIO()
    write_map(Map.from_bytes(first).tree(spool), spool, out, uuid=UUID)
    assert out.getvalue() == first


@given(samples())
@_slow_is_fine
def test_order_of_insertion_does_not_matter(sample: Sample) -> None:
    first = sample.image()
    for _, inode in walk(sample.root):
        if inode.children:
            inode.children = dict(reversed(inode.children.items()))
    assert sample.image() == first


@given(sample=samples())
@settings(_slow_is_fine, max_examples=40)
def test_fsck_accepts(sample: Sample, tmp_path_factory: pytest.TempPathFactory) -> None:
    image = tmp_path_factory.mktemp("fsck") / "map"
    image.write_bytes(sample.image())
    fsck(image)
    image.unlink()


@given(samples(), st.data())
@_slow_is_fine
def test_an_extended_map_is_what_a_new_one_would_be(sample: Sample, data: st.DataObject) -> None:
    strip_marks(sample.root)
    image = sample.image()
    for _ in range(2):
        layers = [data.draw(layers_on(sample, Map.from_bytes(image))) for _ in range(data.draw(st.integers(1, 2)))]
        merged = merge([Map.from_bytes(image).tree(sample.spool), *layers])
        expected = facts(merged, sample.read)
        try:
            image, wasted = extended(image, layers, sample.spool)
        except NoRoom:
            return
        result = Map.from_bytes(image)
        assert map_facts(result) == expected
        assert 0 <= wasted < len(image)
        for path, inode in walk(merged):
            found = result.lookup(path)
            assert found is not None
            assert (found.mode, found.xattrs) == (inode.mode, inode.xattrs)


@given(sample=samples(), data=st.data())
@settings(_slow_is_fine, max_examples=40)
def test_fsck_accepts_an_extended_map(
    sample: Sample, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    strip_marks(sample.root)
    image = tmp_path_factory.mktemp("fsck") / "map"
    base = sample.image()
    with suppress(NoRoom):
        image.write_bytes(extended(base, [data.draw(layers_on(sample, Map.from_bytes(base)))], sample.spool)[0])
        fsck(image)
        image.unlink()


@given(samples(), st.data())
@settings(_slow_is_fine, max_examples=300)
def test_damage_is_found_or_harmless(sample: Sample, data: st.DataObject) -> None:
    image = bytearray(sample.image())
    used = [at for at, byte in enumerate(image) if byte]
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.sampled_from(used)) + data.draw(st.integers(-2, 6))
        image[at % len(image)] ^= data.draw(st.integers(1, 255))
    _use_all(bytes(image))
    _use_all(reseal(image))


@given(samples(), st.integers(0, 10**6))
@_slow_is_fine
def test_a_cut_image_is_refused(sample: Sample, keep: int) -> None:
    image = sample.image()
    with pytest.raises(Corrupt):
        Map.from_bytes(image[: keep % len(image)])


@given(st.binary(max_size=9000))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(Corrupt):
        Map.from_bytes(noise)


def _use_all(data: bytes) -> None:
    """Every use of a map ends with a result or with Corrupt."""
    try:
        image = Map.from_bytes(data)
    except Corrupt:
        return
    for use in (map_facts, _list_objects, _dump, _find, _extend):
        with suppress(Corrupt):
            use(image)


def _extend(image: Map) -> None:
    root = kept_tree(image)
    here: Inode = root
    for _ in range(5):  # not to the end: a damaged one may go in circles
        below = [child for child in here.entries().values() if child.is_dir]
        if below:
            here = below[0]
    here.entries()[b"new"] = directory()
    if root.entries():
        root.entries().pop(min(root.entries()))
    with suppress(NoRoom):
        extend_map(root, image, io.BytesIO(), io.BytesIO(bytes(image.size)), uuid=UUID)


def _list_objects(image: Map) -> None:
    list(image.objects())


def _dump(image: Map) -> None:
    list(dump(image))


def _find(image: Map) -> None:
    for name in image.children(image.root):
        image.lookup(name + b"/a")
