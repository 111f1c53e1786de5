"""Layers as trees: merged at once and asked path by path they show the same; diffs of them are Docker's."""

from __future__ import annotations

import io
import stat
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpmapper.errors import InvalidArgument
from hpmapper.layer.compare import compare
from hpmapper.layer.diff import changes, write_tar
from hpmapper.layer.marks import IMPLIED_ROOT
from hpmapper.layer.merge import merge
from hpmapper.layer.merged import Merged
from hpmapper.tree import Inode, directory, walk, whiteout

Spec = dict[str, "Spec | str"]
"""A tree in short: directories are dicts, "x" is a deletion, any other text a file's data; a key "!" makes opaque."""


def build(spec: Spec, mode: int = 0o755) -> Inode:
    root = directory(mode)
    root.opaque = "!" in spec
    for name, value in spec.items():
        if name != "!":
            root.entries()[name.encode()] = _inode(value)
    return root


def _inode(value: Spec | str) -> Inode:
    if isinstance(value, dict):
        return build(value)
    if value == "x":
        return whiteout()
    # A number that says which file it is stands for its data.
    return Inode(stat.S_IFREG | 0o644, size=len(value), content=len(value), mtime_ns=len(value))


def spell(root: Inode) -> dict[bytes, tuple[int, int]]:
    return {path: (inode.mode, inode.size) for path, inode in walk(root) if path}


class View:
    """A tree as a `merged.LayerView`."""

    def __init__(self, root: Inode) -> None:
        self._root = root

    def lookup(self, path: bytes) -> Inode | None:
        at = self._root
        for part in path.split(b"/") if path else ():
            if at.children is None or part not in at.children:
                return None
            at = at.children[part]
        return at

    def names(self, path: bytes) -> list[bytes]:
        found = self.lookup(path)
        return list(found.entries()) if found else []

    def open(self, path: bytes) -> io.BytesIO:
        return io.BytesIO(path)


def seen(merged: Merged) -> dict[bytes, tuple[int, int]]:
    """All that a merged view shows, by walking it."""
    found = {}
    pending = [b""]
    while pending:
        here = pending.pop()
        for name in merged.names(here):
            path = here + b"/" + name if here else name
            inode = merged.lookup(path)
            assert inode is not None, f"{path!r} is listed, but not there"
            found[path] = (inode.mode, inode.size)
            if inode.is_dir:
                pending.append(path)
    return found


CASES: dict[str, tuple[list[Spec], Spec]] = {
    "added": ([{"a": "1"}, {"b": "22"}], {"a": "1", "b": "22"}),
    "replaced": ([{"a": "1"}, {"a": "22"}], {"a": "22"}),
    "deleted": ([{"a": "1", "b": "1"}, {"a": "x"}], {"b": "1"}),
    "deleted and back": ([{"a": "1"}, {"a": "x"}, {"a": "333"}], {"a": "333"}),
    "tree deleted": ([{"d": {"a": "1", "e": {"b": "1"}}}, {"d": "x"}], {}),
    "tree deleted, empty one back": ([{"d": {"a": "1"}}, {"d": "x"}, {"d": {}}], {"d": {}}),
    "merged": ([{"d": {"a": "1"}}, {"d": {"b": "1"}}], {"d": {"a": "1", "b": "1"}}),
    "opaque": ([{"d": {"a": "1"}}, {"d": {"!": "", "b": "1"}}], {"d": {"b": "1"}}),
    "opaque in the middle": ([{"d": {"a": "1"}}, {"d": {"!": ""}}, {"d": {"c": "1"}}], {"d": {"c": "1"}}),
    "file over directory": ([{"d": {"a": "1"}}, {"d": "22"}], {"d": "22"}),
    "directory over file": ([{"d": "1"}, {"d": {"a": "1"}}], {"d": {"a": "1"}}),
    "directory, file, directory": ([{"d": {"a": "1"}}, {"d": "22"}, {"d": {"b": "1"}}], {"d": {"b": "1"}}),
    "deletion of nothing": ([{"a": "1"}, {"b": "x", "n": {"c": "x"}}], {"a": "1", "n": {}}),
}


@pytest.mark.parametrize(("layers", "expected"), CASES.values(), ids=CASES.keys())
def test_merging(layers: list[Spec], expected: Spec) -> None:
    assert spell(merge(map(build, layers))) == spell(build(expected))
    assert seen(Merged([View(build(layer)) for layer in reversed(layers)])) == spell(build(expected))


def _opaque(spec: Spec) -> Spec:
    return {"!": "", **spec}


_names = st.sampled_from("abc")
_specs: st.SearchStrategy[Spec] = st.recursive(
    st.dictionaries(_names, st.sampled_from(["x", "1", "22"]), max_size=3),
    lambda inner: st.dictionaries(_names, st.sampled_from(["x", "1"]) | inner | inner.map(_opaque), max_size=3),
    max_leaves=8,
)


@given(st.lists(_specs, max_size=4))
def test_merging_at_once_and_by_path_agree(layers: list[Spec]) -> None:
    shown = spell(merge(map(build, layers)))
    assert seen(Merged([View(build(layer)) for layer in reversed(layers)])) == shown


@given(_specs, _specs)
def test_a_difference_leads_from_one_to_the_other(before: Spec, after: Spec) -> None:
    old, new = merge([build(before)]), merge([build(after)])
    tree = compare(merge([build(before)]), new)
    assert spell(merge([old, tree])) == spell(merge([build(after)]))


@given(_specs)
def test_no_difference_is_empty(spec: Spec) -> None:
    assert spell(compare(merge([build(spec)]), merge([build(spec)]))) == {}


@given(_specs, _specs)
def test_changes_agree_with_what_is_shown(lower: Spec, upper: Spec) -> None:
    """A and D are what appeared and went; whatever differs is named."""
    before, after = spell(merge([build(lower)])), spell(merge([build(lower), build(upper)]))
    found: dict[str, set[bytes]] = {"A": set(), "C": set(), "D": set()}
    order = []
    for change in changes(build(upper), Merged([View(build(lower))])):
        found[change.kind].add(change.path[1:])
        order.append(change.path.split(b"/"))
    assert order == sorted(order), "not in path order"
    assert found["A"] == after.keys() - before.keys()
    gone = before.keys() - after.keys()
    assert found["D"] <= gone
    # Below a deleted or replaced directory nothing is listed.
    assert all(any(_is_below(path, top) for top in found["D"] | found["C"]) for path in gone - found["D"])
    assert {path for path in before.keys() & after.keys() if before[path] != after[path]} <= found["C"]


def _is_below(path: bytes, top: bytes) -> bool:
    return path.startswith(top + b"/")


def test_attributes_of_the_root() -> None:
    lower, upper = build({}, 0o700), build({"a": "1"})
    upper.xattrs = ((IMPLIED_ROOT, b"y"),)
    assert stat.S_IMODE(merge([lower, upper]).mode) == 0o700
    assert stat.S_IMODE(merge([build({}, 0o700), build({}, 0o711)]).mode) == 0o711


def test_links_are_compared_as_one() -> None:
    """One changed name of a linked file brings the others along, so that they stay links."""

    def linked(size: int) -> Inode:
        root = directory()
        file = Inode(stat.S_IFREG | 0o644, size=size, content=1)
        root.entries().update({b"a": file, b"b": file, b"c": Inode(stat.S_IFREG)})
        return root

    tree = compare(linked(1), linked(2))
    assert set(tree.entries()) == {b"a", b"b"}
    assert tree.entries()[b"a"] is tree.entries()[b"b"]


def tar_of(root: Inode) -> bytes:
    out = io.BytesIO()
    write_tar(root, lambda path: io.BytesIO(b"data of " + path), out)
    return out.getvalue()


def test_a_written_tar_does_not_depend_on_the_order_of_making() -> None:
    spec: Spec = {"a": "1", "b": {"!": "", "c": "22"}, "gone": "x"}
    shuffled: Spec = {"gone": "x", "b": {"c": "22", "!": ""}, "a": "1"}
    assert tar_of(build(spec)) == tar_of(build(shuffled))
    with tarfile.open(fileobj=io.BytesIO(tar_of(build(spec)))) as tar:
        assert tar.getnames() == [".", "a", "b", "b/.wh..wh..opq", "b/c", ".wh.gone"]
        assert not any(member.uname or member.gname for member in tar)


def test_a_file_that_shrank_meanwhile_is_filled_up() -> None:
    root = build({"a": "f" * 1000})
    with tarfile.open(fileobj=io.BytesIO(tar_of(root))) as tar:
        member = tar.extractfile("a")
        assert member is not None
        assert member.read() == b"data of a".ljust(1000, b"\0")


def test_sockets_are_left_out() -> None:
    root = build({"a": "1"})
    root.entries()[b"socket"] = Inode(stat.S_IFSOCK | 0o600)
    with tarfile.open(fileobj=io.BytesIO(tar_of(root))) as tar:
        assert tar.getnames() == [".", "a"]


@pytest.mark.parametrize("name", [b".wh.a", b".wh..wh..opq", b".wh."])
def test_names_that_would_delete(name: bytes) -> None:
    root = build({})
    root.entries()[name] = Inode(stat.S_IFREG)
    with pytest.raises(InvalidArgument, match="wh"):
        tar_of(root)
