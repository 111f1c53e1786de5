"""The overlay terms, and that an image cannot forge them."""

from __future__ import annotations

import pytest

from hpmapper.erofs import overlay
from hpmapper.erofs.reader import Map
from hpmapper.errors import Corrupt
from hpmapper.model import ObjectDigest, object_path
from hpmapper.tree import Xattrs
from tests.strategies import Sample, object_file

DIGEST = ObjectDigest(bytes(range(0xA0, 0xC0)))


def test_object_path() -> None:
    assert object_path(DIGEST) == "a0/" + DIGEST.hex()[2:]


@pytest.mark.parametrize(
    "xattrs",
    [
        (),
        ((b"user.a", b"1"),),
        ((b"trusted.overlay.opaque", b"y"), (b"trusted.overlay.overlay.opaque", b"y"), (b"trusted.overlayX", b"")),
        ((b"trusted.overlay.", b"odd"),),
    ],
)
@pytest.mark.parametrize("digest", [None, DIGEST])
@pytest.mark.parametrize("opaque", [False, True])
def test_meaning_is_kept(xattrs: Xattrs, digest: ObjectDigest | None, opaque: bool) -> None:
    stored = overlay.written(xattrs, digest, opaque=opaque)
    assert stored == tuple(sorted(stored))
    assert overlay.meaning(stored) == overlay.Meaning(xattrs, digest, opaque)


def test_an_image_cannot_point_at_an_object() -> None:
    """A tar with these two xattrs would read any other image's data, were they written as they are."""
    forged = ((overlay.METACOPY, b""), (overlay.REDIRECT, overlay.redirect(DIGEST)))
    sample = Sample()
    sample.add(b"forged", sample.file(b"own data", xattrs=forged))
    image = Map.from_bytes(sample.image())
    assert list(image.objects()) == []
    found = image.lookup(b"forged")
    assert found is not None
    assert found.xattrs == forged
    assert image.read(found) == b"own data"


def test_an_object_file_keeps_the_images_own() -> None:
    forged = ((overlay.REDIRECT, b"/etc/shadow"),)
    sample = Sample()
    sample.add(b"a", object_file(5, 4096, forged))
    image = Map.from_bytes(sample.image())
    assert list(image.objects()) == [(ObjectDigest((5).to_bytes(32, "big")), 4096)]
    assert image.children(image.root)[b"a"].xattrs == forged


@pytest.mark.parametrize(
    "stored",
    [
        {overlay.METACOPY: b""},
        {overlay.REDIRECT: overlay.redirect(DIGEST)},
        {overlay.METACOPY: b"x", overlay.REDIRECT: overlay.redirect(DIGEST)},
        {overlay.METACOPY: b"", overlay.REDIRECT: b"/../" + b"0" * 62},
        {overlay.METACOPY: b"", overlay.REDIRECT: overlay.redirect(DIGEST).upper()},
        {overlay.METACOPY: b"", overlay.REDIRECT: overlay.redirect(DIGEST) + b"\n"},
        {overlay.METACOPY: b"", overlay.REDIRECT: overlay.redirect(DIGEST)[1:]},
        {overlay.OPAQUE: b"x"},
        {b"trusted.overlay.whiteout": b""},
    ],
)
def test_other_overlay_xattrs_are_corrupt(stored: dict[bytes, bytes]) -> None:
    with pytest.raises(Corrupt):
        overlay.meaning(stored.items())
