"""Removing trees, however often somebody is stopped at it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from hpmapper.store.workspace import remove_tree


class Stopped(Exception):
    """As if killed."""


def _made(top: Path) -> Path:
    for branch in ("a/b/c/d", "a/x/y/z", "e/f/g"):
        (top / branch).mkdir(parents=True)
        (top / branch / "file").touch()
    return top


def _stopping_before(step: int, call: Callable[..., None], steps: Iterator[int]) -> Callable[..., None]:
    def counted(*arguments: str) -> None:
        if next(steps) == step:
            raise Stopped
        call(*arguments)

    return counted


def test_a_removal_that_was_cut_short_can_be_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in count():
        top = _made(tmp_path / str(step))
        with monkeypatch.context() as patched:
            steps = count()
            for name in ("rename", "rmdir", "unlink"):
                patched.setattr(os, name, _stopping_before(step, getattr(os, name), steps))
            try:
                remove_tree(top)
            except Stopped:
                pass
            else:
                break
        remove_tree(top)
        assert not top.exists()
    assert step > 15
