"""Sizes, floors, settings and the running of tools."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpmapper.errors import HpmapperError, InvalidArgument, NoSpace, Unsupported
from hpmapper.model import Space
from hpmapper.pool.base import GIB, KIB, MIB, PIB, TIB, PoolConfig, PoolFs, PoolKind, format_size, parse_size
from hpmapper.pool.floor import DEFAULT_FLOOR, Floor, check_floor, parse_floor
from hpmapper.pool.tools import run_tool


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("0", 0),
        ("100G", 100 * GIB),
        ("1.5TiB", 3 * TIB // 2),
        (" 512 MB ", 512 * MIB),
        ("10k", 10 * KIB),
        ("2p", 2 * PIB),
        ("7b", 7),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1G", "1.G", "1,5G", "10%", "1 2", "1e3", "100GG", "inf", "٣"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="is not a size"):
        parse_size(text)


def test_sizes_for_people() -> None:
    assert [format_size(size) for size in (0, 1023, 1536, GIB, 5 * PIB)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "1.0 GiB",
        "5.0 PiB",
    ]


def test_floors() -> None:
    space = Space(total=100 * GIB, free=50 * GIB)
    assert parse_floor("10%").of(space) == 10 * GIB
    assert parse_floor("2.5 %") == Floor(percent=2.5)
    assert parse_floor("5G").of(space) == 5 * GIB
    assert parse_floor("0").of(space) == 0
    assert [str(parse_floor(text)) for text in ("10%", "5G")] == ["10%", "5.0 GiB"]
    assert DEFAULT_FLOOR.of(space) == 10 * GIB


@pytest.mark.parametrize("text", ["", "%", "100%", "-1%", "nan%", "x%", "5X"])
def test_what_is_no_floor_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_floor(text)


def test_the_floor_stops_with_figures_and_a_cure() -> None:
    check_floor(Space(100 * GIB, 10 * GIB))
    check_floor(Space(100 * GIB, 11 * GIB), needed=GIB)
    with pytest.raises(NoSpace, match=r"9\.0 GiB of 100\.0 GiB free, and 10\.0 GiB \(10%\) must stay free") as caught:
        check_floor(Space(100 * GIB, 9 * GIB))
    assert "pool grow" in caught.value.hint
    with pytest.raises(NoSpace, match=r"2\.0 GiB are needed"):
        check_floor(Space(100 * GIB, 11 * GIB), needed=2 * GIB)


@pytest.mark.parametrize(
    "config",
    [
        PoolConfig(PoolKind.LOOP, size=GIB).with_uuid(),
        PoolConfig(PoolKind.DIRECT, fs=PoolFs.BTRFS, device=Path("/dev/vg/pool")),
        PoolConfig(PoolKind.DIRECTORY, directory=Path("/srv/pool")),
        PoolConfig(PoolKind.DIRECTORY),
    ],
)
def test_settings_survive_json(config: PoolConfig) -> None:
    assert PoolConfig.from_dict(config.to_dict()) == config


def test_a_uuid_is_given_once() -> None:
    config = PoolConfig(PoolKind.LOOP).with_uuid()
    assert config.uuid
    assert config.with_uuid() is config


@pytest.mark.parametrize(
    "stored",
    [
        {},
        {"kind": "tape"},
        {"kind": "loop", "size": "many"},
        {"kind": "loop", "fs": "vfat"},
        {"kind": "loop", "colour": "red"},
        {"kind": "loop", "device": "/dev/sdz"},
        {"kind": "loop", "directory": "/x"},
        {"kind": "direct"},
        {"kind": "directory", "size": 5},
    ],
)
def test_settings_that_make_no_sense_are_refused(stored: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument):
        PoolConfig.from_dict(stored)


def test_a_missing_program_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpmapper.pool.tools._SBIN", "/nonexistent")
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(Unsupported, match=r"mkfs\.xfs is not installed") as caught:
        run_tool(["mkfs.xfs", "-V"])
    assert caught.value.hint == "apt install xfsprogs"


def test_a_failure_says_what_was_said() -> None:
    with pytest.raises(HpmapperError, match="failed with status 3: second; third"):
        run_tool(["sh", "-c", "echo second >&2; echo ' third' >&2; exit 3"])
    with pytest.raises(HpmapperError, match="it said nothing"):
        run_tool(["false"])
    assert run_tool(["sh", "-c", "echo out; exit 2"], accept=(0, 2)) == (2, "out\n", "")
