"""What it takes to tell few changes in a large tree, and to make a layer of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hpmapper.bench.harness import Bench, Run, Side, Turn, case, container, image
from hpmapper.bench.results import Axis, Quantity
from hpmapper.bench.synthetic import small_files
from hpmapper.errors import Corrupt

_CHANGED = 10


@case(
    "diff",
    quantities=[
        Quantity("changes", "ms", "lower", "a walk of what was written: 11 files"),
        Quantity("commit", "ms", "lower", "the same, 11 files written and synced"),
    ],
    axis=Axis("files", growth=True),
    points=[1_000, 10_000, 100_000],
    short_points=[100, 500, 1_000],
    cold=True,
    kinds=("driver", "peer"),
)
@contextmanager
def few_changes(side: Side, bench: Bench) -> Iterator[Run]:
    """Ten files of so many are written anew, and one is added: telling what changed, and committing it."""
    bench.require_free(6_000 * bench.number, f"{bench.number} files")
    tree = f"tree-{bench.number}"
    files = small_files(bench.number)
    names = list(files)[:: len(files) // _CHANGED][:_CHANGED]

    def run(turn: Turn) -> None:
        changed = f"changed-{turn.number}"
        with container(side, changed, tree) as root:
            for name in names:
                (root / name).write_bytes(b"changed" * 20)
            (root / "added").write_bytes(b"new")
            with turn.timed("changes"):
                told = side.changed(changed)
            if told < _CHANGED + 1:
                raise Corrupt(f"{side.name} told {told} changes of {_CHANGED + 1}")
            if side.kind == "driver":
                with turn.timed("commit"):
                    side.commit(changed, f"{changed}-image")
        if side.kind == "driver":
            side.forget(f"{changed}-image")

    with image(side, bench.synthetic(tree, [files]), tree):
        yield run
