"""Status lines and tables of thin pools, in every state that drivers/md/dm-thin.c can print."""

from __future__ import annotations

import pytest

from hpmapper.drivers.devicemapper.thin import (
    Mode,
    PoolTable,
    parse_pool_status,
    parse_pool_table,
)
from hpmapper.errors import Corrupt, FailedPrecondition
from hpmapper.kernel.dm import Target


def test_a_pool_at_work() -> None:
    status = parse_pool_status("14 270/524288 18000/1638400 - rw discard_passdown error_if_no_space - 1024 ")
    assert status.mode is Mode.WRITE
    assert (status.transaction, status.metadata_used, status.metadata_total) == (14, 270, 524288)
    assert (status.data_used, status.data_total, status.data_free) == (18000, 1638400, 1620400)
    assert status.held_root is None
    assert status.errors_when_full
    assert status.takes_messages
    assert not status.needs_check


@pytest.mark.parametrize(
    ("line", "mode", "takes", "check"),
    [
        ("1 10/64 9/9 - out_of_data_space discard_passdown queue_if_no_space - 16", "out_of_data_space", True, False),
        ("1 64/64 10/100 - ro no_discard_passdown queue_if_no_space needs_check 16", "ro", False, True),
        ("1 10/64 10/100 - ro ignore_discard error_if_no_space - 16", "ro", False, False),
        ("Fail", "Fail", False, True),
        ("Error", "Fail", False, True),
        ("1 10/64 10/100 - rw discard_passdown queue_if_no_space", "rw", True, False),
        ("1 10/64 10/100 - rw discard_passdown", "rw", True, False),
    ],
)  # fmt: skip
def test_states(line: str, mode: str, takes: bool, check: bool) -> None:
    status = parse_pool_status(line)
    assert (str(status.mode), status.takes_messages, status.needs_check) == (mode, takes, check)


def test_a_held_metadata_snapshot() -> None:
    assert parse_pool_status("1 10/64 10/100 42 rw discard_passdown queue_if_no_space - 16").held_root == 42


@pytest.mark.parametrize("line", ["", "-", "1", "1 10/64", "1 a/b c/d - rw", "1 10/64 10/100 - what", "1 10 10 - rw x"])
def test_what_is_no_status(line: str) -> None:
    with pytest.raises(Corrupt, match="not understood"):
        parse_pool_status(line)


def test_tables() -> None:
    table = PoolTable(2097152, "/dev/loop1", "/dev/loop0", 128, 32768)
    target = table.target()
    assert target.params == "/dev/loop1 /dev/loop0 128 32768 2 skip_block_zeroing error_if_no_space"
    assert parse_pool_table(target) == table
    plain = parse_pool_table(Target(0, 2097152, "thin-pool", "7:1 7:0 1024 0"))
    assert (plain.block, plain.features) == (1024, ())
    for other in (Target(0, 8, "linear", "7:0 0"), Target(0, 8, "thin-pool", "")):
        with pytest.raises(FailedPrecondition, match="thin pool"):
            parse_pool_table(other)
