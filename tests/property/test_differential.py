"""The same random operations in several layers, on every driver and on a plain directory, give the same.

Compared after each layer: each operation's outcome, the trees, the changes as Docker lists them, what the layer's tar
makes of a copy of the plain directory, and what the next container shows. Layers are committed by each of the ways that
there are: as they were written, later read into the driver's own form, or as a tar that is read in.

Always the same sequences, unless HPMAPPER_EXAMPLES asks for more: 3000 hunts for some minutes.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from hpmapper.check import check
from hpmapper.forest import Forest
from hpmapper.layer.stream import Expected
from hpmapper.store.workspace import remove_tree
from hpmapper.testing.contract import Subject
from hpmapper.testing.trees import Facts, assert_same, read_tree
from tests import drivers
from tests.operations import Operation, Step, apply_layer, planned, split_off, steps
from tests.vm.plugin import INSIDE

EXAMPLES = int(os.environ.get("HPMAPPER_EXAMPLES", "60")) // (10 if INSIDE else 3)
"""How many sequences are tried; in an emulated guest fewer."""

WAYS = ("written", "read later", "applied")
"""How a layer is committed."""


class Layer(NamedTuple):
    """What is done in a container, and how that becomes a layer."""

    steps: list[Step]
    way: str


layers = st.lists(
    st.builds(Layer, st.lists(steps, min_size=1, max_size=12), st.sampled_from(WAYS)), min_size=1, max_size=4
)


@pytest.fixture(scope="module", params=drivers.parameters())
def subject(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, private_mounts: None
) -> Iterator[Subject]:
    """Each driver there is, on a root with nothing in it."""
    with drivers.subject_of(request.param, tmp_path_factory.mktemp("driver")) as made:
        yield made


@pytest.mark.kernel
@given(layers)
@settings(
    deadline=None,
    max_examples=EXAMPLES,
    derandomize="HPMAPPER_EXAMPLES" not in os.environ,  # a hunt takes longer than a look at a change
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
def test_drivers_do_as_a_plain_directory_does(subject: Subject, layers: list[Layer]) -> None:
    story = _Story(subject)
    try:
        for layer in layers:
            story.tell(layer)
        subject.engine.rubbish.collect()
        assert list(check(subject.engine)) == []
    finally:
        story.end()


_numbers = count()


class _Story:
    """A chain of layers in a driver, and beside it the plain directory."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._engine = subject.engine
        self._capabilities = subject.driver.capabilities
        self._forest = Forest(subject.engine, "story")
        self._model = subject.model()
        self._model.chmod(0o755)
        self._parent = ""

    def tell(self, layer: Layer) -> None:
        """Do a layer's operations, compare, commit, and compare again."""
        key = f"active-{next(_numbers)}"
        root = self._opened(key)
        before, copy = read_tree(self._model), self._copy()
        image = _Image(self._model)
        for step in layer.steps:
            self._do(step, root, image)
        _take_times(root, self._model)
        assert_same(root, self._model)
        self._compare_changes(key, before, image)
        diff = self._compare_diff(key, copy)
        self._commit(layer.way, key, diff)
        assert_same(self._opened(view := f"view-{next(_numbers)}"), self._model)
        self._forest.remove(view)
        self._engine.rubbish.free_removed()

    def _compare_changes(self, key: str, before: dict[bytes, Facts], image: _Image) -> None:
        """The changes are those between the facts, and perhaps of what was written to for nothing: who looks at what
        was written sees that. The names of one file may be listed together."""
        after = read_tree(self._model)
        expected = _expected_changes(before, after)
        linked = Counter(facts.same_as for facts in after.values())
        more = {path for path, facts in after.items() if linked[facts.same_as] > 1}
        if self._capabilities.changes_from_upper:
            more |= image.touched
        spared = {f"C /{os.fsdecode(path)}" for path in more} - set(expected)
        assert [one for one in self._subject.changes(self._forest.get(key)) if one not in spared] == expected

    def _compare_diff(self, key: str, copy: Path) -> bytes:
        """The layer's tar, the same each time, makes of a copy of the former directory the present one."""
        diff = self._subject.diff(self._forest.get(key))
        assert self._subject.diff(self._forest.get(key)) == diff
        apply_layer(diff, copy)
        assert_same(copy, self._model)
        remove_tree(copy)
        return diff

    def _opened(self, key: str) -> Path:
        self._forest.first_mounts(self._forest.prepare(key, self._parent, {}))
        return self._subject.root(self._forest.get(key))

    def _copy(self) -> Path:
        """Another plain directory like the model."""
        copy = self._subject.model()
        subprocess.run(["cp", "-a", f"{self._model}/.", str(copy)], check=True)
        return copy

    def _do(self, step: Step, root: Path, image: _Image) -> None:
        operation = planned(step, self._model)
        if operation is None:
            return
        image.note(operation)
        outcome = operation.outcome(root)
        note(f"{operation.text}: {errno.errorcode[outcome] if outcome else 'done'}")
        if outcome == errno.EXDEV and not self._capabilities.renames_directories:
            assert image.has_directory(operation), "refused, though no directory of the image is in it"
            return
        if not self._capabilities.keeps_links:
            image.split_links(operation, root if outcome else None)
        assert operation.outcome(self._model) == outcome

    def _commit(self, way: str, key: str, diff: bytes) -> None:
        name = f"committed-{next(_numbers)}"
        if way == "applied":
            self._forest.remove(key)
            key = f"applied-{next(_numbers)}"
            self._forest.first_mounts(self._forest.prepare(key, self._parent, {}))
            self._forest.apply(self._forest.get(key), lambda: io.BytesIO(diff), Expected())
        else:
            self._engine.unmount(self._forest.get(key))
        self._forest.commit(name, key, {})
        self._parent = name
        if way == "read later":
            child = self._forest.prepare(f"child-{next(_numbers)}", name, {}).snapshot
            self._engine.ingest_sealed(child)
            self._forest.remove(self._forest.key_of(child))
            self._engine.rubbish.free_removed()

    def end(self) -> None:
        """Remove all of it; nothing may be left."""
        self._subject.remove_everything()
        remove_tree(self._model)
        self._subject.assert_nothing_left()


class _Image:
    """What of the plain directory comes from lower layers, and `touched`: the paths that may have been copied up."""

    def __init__(self, model: Path) -> None:
        self._model = model
        self.touched: set[bytes] = set()
        self._directories: set[int] = set()
        self._linked: set[int] = set()
        for path in model.rglob("*"):
            status = path.lstat()
            if stat.S_ISDIR(status.st_mode):
                self._directories.add(status.st_ino)
            elif status.st_nlink > 1:
                self._linked.add(status.st_ino)

    def note(self, operation: Operation) -> None:
        """An operation is about to be done."""
        for path in operation.changes + operation.puts:
            while path:
                self.touched.add(path)
                path = os.path.dirname(path)

    def has_directory(self, operation: Operation) -> bool:
        """Whether an operation is about one of its directories."""
        return any(self._number(path) in self._directories for path in operation.changes)

    def split_links(self, operation: Operation, failed_in: Path | None) -> None:
        """Where a file keeps its names together only until it is changed: do what that does to it.

        An operation that failed in a container's root may have come as far as that.
        """
        for path in operation.changes:
            if self._number(path) in self._linked and (failed_in is None or self._is_split(path, failed_in)):
                split_off(self._model, path)

    def _is_split(self, path: bytes, root: Path) -> bool:
        """Whether a file has lost its other names in a container's root."""
        facts = read_tree(self._model)
        others = [one for one in facts if facts[one].same_as == facts[path].same_as and one != path]
        top = os.fsencode(root)
        number = os.lstat(os.path.join(top, path)).st_ino
        return bool(others) and all(os.lstat(os.path.join(top, one)).st_ino != number for one in others)

    def _number(self, path: bytes) -> int:
        return os.lstat(os.path.join(os.fsencode(self._model), path)).st_ino


def _take_times(root: Path, model: Path) -> None:
    """Give the plain directory the container's times, which only the kernel knows; from here on they count."""
    for path, facts in sorted(read_tree(root).items(), reverse=True):
        with suppress(FileNotFoundError):
            place = os.path.join(os.fsencode(model), path)
            os.utime(place, ns=(facts.mtime_ns, facts.mtime_ns), follow_symlinks=False)


def _expected_changes(before: dict[bytes, Facts], after: dict[bytes, Facts]) -> list[str]:
    """What Docker would list, by the facts of two trees."""
    kinds: dict[bytes, str] = {}
    for path in (before.keys() | after.keys()) - {b"."}:
        above = os.path.dirname(path) or b"."
        if path not in before:
            kinds[path] = "A"
        elif path in after:
            if before[path]._replace(same_as=b"") != after[path]._replace(same_as=b""):
                kinds[path] = "C"
        elif above in after and stat.S_ISDIR(after[above].mode):
            kinds[path] = "D"
    for path in list(kinds):
        while path := os.path.dirname(path):
            kinds.setdefault(path, "C")
    return [f"{kinds[path]} /{os.fsdecode(path)}" for path in sorted(kinds, key=lambda one: one.split(b"/"))]
