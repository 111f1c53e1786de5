"""Overlays, EROFS and binds through the mount API."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from hpmapper.kernel import fscontext, loop, mount, mountinfo
from hpmapper.kernel.mount import ErofsForm, LayerForm

pytestmark = pytest.mark.kernel

AWKWARD = ["a:b", "a,b", "a\\b", "a b", "a\nb", "a=b,c:d\\", "é:\t"]


@contextmanager
def unmounted(target: Path) -> Iterator[None]:
    """Unmount `target` afterwards; at once, so that a descriptor left open shows as EBUSY."""
    try:
        yield
    finally:
        mount.umount(target)


def directories(parent: Path, *names: str) -> list[Path]:
    paths = [parent / name for name in names]
    for path in paths:
        path.mkdir(parents=True)
    return paths


def layers(parent: Path, count: int) -> list[Path]:
    """Directories with one file each, named by their number."""
    paths = directories(parent, *(f"layer-{number}" for number in range(count)))
    for number, path in enumerate(paths):
        (path / str(number)).touch()
    return paths


@pytest.mark.parametrize(
    ("form", "count"), [(LayerForm.DESCRIPTORS, 499), (LayerForm.STRINGS, 250), (LayerForm.ONE_STRING, 201)]
)
def test_an_overlay_of_many_layers(tmp_path: Path, form: LayerForm, count: int) -> None:
    lowers = layers(tmp_path, count)
    upper, work, merged = directories(tmp_path, "upper", "work", "merged")
    assert mount.overlay(merged, lowers=lowers, upper=upper, work=work, form=form) is form
    with unmounted(merged):
        assert len(os.listdir(merged)) == count


def test_too_many_layers_for_a_page_of_options_say_so(tmp_path: Path) -> None:
    lowers = layers(tmp_path, 260)
    (merged,) = directories(tmp_path, "merged")
    with pytest.raises(OSError, match="too many layers") as caught:
        mount.overlay(merged, lowers=lowers, form=LayerForm.ONE_STRING)
    assert caught.value.errno == errno.E2BIG
    assert caught.value.filename == str(merged)


@pytest.mark.parametrize("form", list(LayerForm))
@pytest.mark.parametrize("name", AWKWARD)
def test_names_that_options_would_split(tmp_path: Path, name: str, form: LayerForm) -> None:
    top, bottom, data, upper, work, merged = directories(
        tmp_path, *(f"{name}/{part}{name}" for part in ("top", "bottom", "data", "upper", "work", "merged"))
    )
    (top / "top").touch()
    (bottom / "bottom").touch()
    mount.overlay(merged, lowers=[top, bottom], data=data, upper=upper, work=work, form=form)
    with unmounted(merged):
        assert sorted(os.listdir(merged)) == ["bottom", "top"]
        (merged / "new").touch()
        assert [one.target for one in mount.mounts_below(tmp_path)] == [str(merged)]
    assert os.listdir(upper) == ["new"]


@pytest.mark.parametrize("form", list(LayerForm))
def test_data_only_layers_are_reached_by_redirects_in_their_order(tmp_path: Path, form: LayerForm) -> None:
    lower, first, second, merged = directories(tmp_path, "lower", "first", "second", "merged")
    for name, place in (("one", first), ("two", second)):
        (place / name).write_text(name)
        (lower / f"file-{name}").touch()
        os.truncate(lower / f"file-{name}", 3)
        os.setxattr(lower / f"file-{name}", "trusted.overlay.metacopy", b"")
        os.setxattr(lower / f"file-{name}", "trusted.overlay.redirect", f"/{name}".encode())
    options = {"metacopy": "on", "redirect_dir": "on"}
    mount.overlay(merged, lowers=[lower], data=[first, second], options=options, form=form)
    with unmounted(merged):
        assert sorted(os.listdir(merged)) == ["file-one", "file-two"]
        assert (merged / "file-one").read_text() == "one"
        assert (merged / "file-two").read_text() == "two"


def test_layers_as_descriptors_stay_the_callers(tmp_path: Path) -> None:
    top, bottom, merged = directories(tmp_path, "top", "bottom", "merged")
    fds = [os.open(path, os.O_PATH | os.O_DIRECTORY) for path in (top, bottom)]
    try:
        mount.overlay(merged, lowers=fds)
        for fd in fds:
            os.fstat(fd)
    finally:
        for fd in fds:
            os.close(fd)
    mount.umount(merged)


def test_a_detached_mount_can_be_a_layer(tmp_path: Path) -> None:
    top, bottom, merged = directories(tmp_path, "top", "bottom", "merged")
    (top / "file").touch()
    tree = fscontext.open_tree(top)
    try:
        mount.overlay(merged, lowers=[tree, bottom])
    finally:
        os.close(tree)
    with unmounted(merged):
        assert (merged / "file").exists()


def test_an_error_has_errno_path_and_the_kernels_words(tmp_path: Path) -> None:
    lower, upper, work, merged = directories(tmp_path, "lower", "upper", "work", "merged")
    with pytest.raises(OSError, match="Invalid argument") as caught:
        mount.overlay(merged, lowers=[lower], upper=upper, work=work, options={"nosuchoption": "1"})
    assert (caught.value.errno, caught.value.filename) == (errno.EINVAL, str(merged))
    notes = caught.value.__notes__
    assert "option nosuchoption" in notes
    assert any("Unknown parameter 'nosuchoption'" in note for note in notes)
    assert not mount.is_mountpoint(merged)


def test_a_missing_layer_is_named(tmp_path: Path) -> None:
    (merged,) = directories(tmp_path, "merged")
    with pytest.raises(FileNotFoundError) as caught:
        mount.overlay(merged, lowers=[tmp_path / "gone"])
    assert caught.value.filename == str(tmp_path / "gone")


def test_an_older_kernel_is_served_by_the_next_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lower, merged = directories(tmp_path, "lower", "merged")
    (second,) = directories(tmp_path, "second,2")  # a name that mount(2) would split
    tried = []

    def refuse(*_: object) -> None:
        tried.append("descriptors")
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(mount, "_form_seen", None)
    monkeypatch.setitem(mount._MAKERS, LayerForm.DESCRIPTORS, refuse)
    for _ in range(2):
        assert mount.overlay(merged, lowers=[lower, second]) is LayerForm.STRINGS
        mount.umount(merged)
    assert tried == ["descriptors"]


def test_umount_says_busy_and_lazy_does_not(tmp_path: Path) -> None:
    source, target = directories(tmp_path, "source", "target")
    (source / "file").touch()
    mount.bind(source, target)
    with open(target / "file", "rb"):
        with pytest.raises(OSError, match="busy") as caught:
            mount.umount(target)
        assert (caught.value.errno, caught.value.filename) == (errno.EBUSY, str(target))
        mount.umount(target, lazy=True)
    assert not mount.is_mountpoint(target)
    with pytest.raises(OSError, match="Invalid argument"):
        mount.umount(target)


def test_binds_can_be_read_only_and_recursive(tmp_path: Path) -> None:
    source, target = directories(tmp_path, "source", "target")
    (inner,) = directories(source, "inner")
    mount.filesystem("tmpfs", "none", inner)
    (inner / "file").touch()
    mount.bind(source, target, read_only=True, recursive=True)
    for path in (target, target / "inner"):
        with pytest.raises(OSError, match="Read-only"):
            (path / "new").touch()
    assert (target / "inner" / "file").exists()
    (source / "still writable").touch()
    for one in mount.mounts_below(target):
        mount.umount(one.target)
    mount.bind(source, target)
    with unmounted(target):
        assert not (target / "inner" / "file").exists()
    mount.umount(inner)


def test_a_file_can_be_bound(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text("bound")
    target.touch()
    mount.bind(source, target)
    with unmounted(target):
        assert target.read_text() == "bound"
        assert mount.is_mountpoint(target)


def test_mount_points_are_told_from_other_paths(tmp_path: Path) -> None:
    (target,) = directories(tmp_path, "target")
    link = tmp_path / "link"
    link.symlink_to("/proc")
    assert mount.is_mountpoint("/proc")
    assert not mount.is_mountpoint(target)
    assert not mount.is_mountpoint(link)
    assert not mount.is_mountpoint(tmp_path / "missing")
    mount.bind(target, target)  # the same file system: st_dev alone would not tell
    with unmounted(target):
        assert mount.is_mountpoint(target)


def test_mounts_below_come_in_the_order_of_unmounting(tmp_path: Path) -> None:
    outer = tmp_path / "out er\\040"
    outer.mkdir()
    mount.filesystem("tmpfs", "none", outer)
    (inner,) = directories(outer, "in\nner")
    mount.filesystem("tmpfs", "none", inner)
    beside = tmp_path / "out er\\040 2"
    beside.mkdir()
    assert [one.target for one in mount.mounts_below(outer)] == [str(inner), str(outer)]
    for one in mount.mounts_below(outer):
        mount.umount(one.target)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An EROFS image with one file."""
    (tree,) = directories(tmp_path, "tree")
    (tree / "file").write_text("content")
    path = tmp_path / "image.erofs"
    subprocess.run(["mkfs.erofs", path, tree], check=True, capture_output=True)
    return path


def test_erofs_through_a_loop_device_which_goes_with_the_mount(tmp_path: Path, image: Path) -> None:
    (target,) = directories(tmp_path, "target")
    assert mount.erofs(image, target, form=ErofsForm.LOOP) is ErofsForm.LOOP
    (device,) = loop.find(image)
    assert device.read_only
    assert device.autoclear
    with unmounted(target):
        assert (target / "file").read_text() == "content"
    assert loop.find(image) == []


def test_erofs_from_a_file(xfs: Path, image: Path) -> None:
    inside = xfs / "image"
    inside.write_bytes(image.read_bytes())
    (target,) = directories(xfs.parent, "target")
    assert mount.erofs(inside, target) is ErofsForm.FILE
    with unmounted(target):
        assert (target / "file").read_text() == "content"


def test_erofs_falls_back_to_a_loop_device_where_files_cannot_be_mounted(tmp_path: Path, image: Path) -> None:
    memory, target = directories(tmp_path, "memory", "target")
    mount.filesystem("tmpfs", "none", memory)
    (memory / "image").write_bytes(image.read_bytes())
    with unmounted(memory):
        with pytest.raises(OSError, match="Block device required"):
            mount.erofs(memory / "image", target, form=ErofsForm.FILE)
        assert mount.erofs(memory / "image", target) is ErofsForm.LOOP
        with unmounted(target):
            assert (target / "file").read_text() == "content"


@pytest.mark.parametrize("form", list(ErofsForm))
def test_what_is_not_erofs_leaves_nothing(xfs: Path, form: ErofsForm) -> None:
    (target,) = directories(xfs, "target")
    (xfs / "image").write_bytes(bytes(8192))
    with pytest.raises(OSError, match=r"Invalid argument|Structure needs cleaning"):
        mount.erofs(xfs / "image", target, form=form)
    assert not mount.is_mountpoint(target)
    assert loop.find(xfs / "image") == []


@pytest.mark.parametrize("watched", [False, True])
def test_a_lower_layer_is_one_while_it_is_mounted(tmp_path: Path, watched: bool) -> None:
    below, upper, work, merged = directories(tmp_path, "lower", "upper", "work", "merged")
    lower = str(below)
    with mountinfo.watched() if watched else nullcontext():
        seen = [mountinfo.is_lower(lower)]
        for _ in range(2):
            mount.overlay(merged, lowers=[lower], upper=upper, work=work)
            seen += [mountinfo.is_lower(lower), mountinfo.is_lower(lower)]
            mount.umount(merged)
            seen += [mountinfo.is_lower(lower)]
    assert seen == [False, True, True, False, True, True, False]
