"""How far the kernel reads ahead: less for a while, and as before afterwards."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpmapper.kernel import bdi

pytestmark = pytest.mark.kernel


def shown(path: Path) -> int:
    number = os.stat(path).st_dev
    return int(Path(f"/sys/class/bdi/{os.major(number)}:{os.minor(number)}/read_ahead_kb").read_text())


def test_it_is_less_for_a_while(xfs: Path) -> None:
    before = shown(xfs)
    assert before > 16
    with bdi.read_ahead(xfs, 16):
        assert shown(xfs) == 16
    assert shown(xfs) == before
    with bdi.read_ahead(xfs, before + 1):
        assert shown(xfs) == before, "it is never more"


def test_the_first_of_two_puts_it_back(xfs: Path) -> None:
    before = shown(xfs)
    with bdi.read_ahead(xfs, 16):
        with bdi.read_ahead(xfs, 8):
            assert shown(xfs) == 16
        assert shown(xfs) == 16
    assert shown(xfs) == before


def test_without_a_device_of_its_own_nothing_changes() -> None:
    with bdi.read_ahead("/proc", 16):
        pass
