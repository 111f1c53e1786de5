"""Reading a pool's metadata, judged by thin-provisioning-tools on pools that are described here."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from hpmapper.drivers.devicemapper import metadata
from hpmapper.errors import Corrupt

pytestmark = pytest.mark.skipif(
    not shutil.which("thin_restore", path="/usr/sbin:/sbin:/usr/bin"),
    reason="thin-provisioning-tools are not installed: apt install thin-provisioning-tools",
)

Mappings = dict[int, int]


def _xml(devices: dict[int, Mappings], *, transaction: int = 7, blocks: int = 100_000) -> str:
    sizes = f'data_block_size="128" nr_data_blocks="{blocks}"'
    lines = [f'<superblock uuid="" time="1" transaction="{transaction}" {sizes}>']
    made = 'transaction="3" creation_time="0" snap_time="1"'
    for device, mappings in devices.items():
        lines.append(f'<device dev_id="{device}" mapped_blocks="{len(mappings)}" {made}>')
        for block, data in sorted(mappings.items()):
            lines.append(f'<single_mapping origin_block="{block}" data_block="{data}" time="0"/>')
        lines.append("</device>")
    return "\n".join([*lines, "</superblock>"])


def _restored(directory: Path, devices: dict[int, Mappings]) -> Path:
    xml, made = directory / "pool.xml", directory / "metadata"
    xml.write_text(_xml(devices))
    made.touch()
    os.truncate(made, 16 << 20)
    subprocess.run(["thin_restore", "-i", xml, "-o", made], check=True, capture_output=True)
    return made


def _random_devices(seed: int) -> dict[int, Mappings]:
    """A base, copies of it with something written, copies of those; the last one large enough for inner nodes."""
    dice = random.Random(seed)
    free = iter(range(100_000))
    devices: dict[int, Mappings] = {0: {block: next(free) for block in dice.sample(range(4000), 700)}}
    for device in range(1, 8):
        mappings = dict(devices[dice.choice(sorted(devices))])
        for block in dice.sample(range(4000), dice.randrange(300)):
            mappings[block] = next(free)
        devices[device * 1000] = mappings
    devices[999_999] = {}
    return devices


@pytest.mark.parametrize("seed", range(4))
def test_devices_and_mappings(tmp_path: Path, seed: int) -> None:
    devices = _random_devices(seed)
    with metadata.opened(_restored(tmp_path, devices)) as found:
        root = found.superblock()
        assert (root.transaction, root.block, root.held_root, root.needs_check) == (7, 128, 0, False)
        assert {device: details.mapped for device, details in found.devices(root).items()} == {
            device: len(mappings) for device, mappings in devices.items()
        }
        for device, mappings in devices.items():
            assert found.mapped(root, device) == mappings


@pytest.mark.parametrize("seed", range(4))
def test_exclusive_blocks_agree_with_thin_ls(tmp_path: Path, seed: int) -> None:
    devices = _random_devices(seed)
    made = _restored(tmp_path, devices)
    said = subprocess.run(
        ["thin_ls", "--no-headers", "-o", "DEV,EXCLUSIVE_BLOCKS", made], check=True, capture_output=True, text=True
    ).stdout
    expected = {int(line.split()[0]): int(line.split()[1]) for line in said.splitlines()}
    with metadata.opened(made) as found:
        assert found.exclusive(found.superblock()) == expected


@pytest.mark.parametrize("seed", range(4))
def test_changed_blocks_agree_with_thin_delta(tmp_path: Path, seed: int) -> None:
    devices = _random_devices(seed)
    made = _restored(tmp_path, devices)
    for before, after in ((0, 1000), (1000, 0), (0, 7000), (3000, 3000), (0, 999_999)):
        said = subprocess.run(
            ["thin_delta", "--snap1", str(before), "--snap2", str(after), made],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        expected = {
            block
            for begin, length in re.findall(r'<(?:different|right_only) begin="(\d+)" length="(\d+)"', said)
            for block in range(int(begin), int(begin) + int(length))
        }
        with metadata.opened(made) as found:
            assert found.changed(found.superblock(), before, after) == expected


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    with metadata.opened(_restored(tmp_path, {1: {0: 0}})) as found, pytest.raises(Corrupt, match="no thin device 2"):
        found.mapped(found.superblock(), 2)


def test_damage_is_found(tmp_path: Path) -> None:
    """Every flipped byte of a block in use is told; nothing else than `Corrupt` comes of it."""
    made = _restored(tmp_path, _random_devices(1))
    whole = made.read_bytes()
    dice = random.Random(5)
    used = [block for block in range(len(whole) // 4096) if any(whole[block * 4096 : block * 4096 + 4096])]
    told = 0
    for block in [0, *dice.sample(used, 20)]:
        damaged = bytearray(whole)
        damaged[block * 4096 + dice.randrange(4096)] ^= 1 << dice.randrange(8)
        made.write_bytes(damaged)
        try:
            with metadata.opened(made) as found:
                root = found.superblock()
                for device in found.devices(root):
                    found.mapped(root, device)
        except Corrupt:
            told += 1
    assert told >= 10, "the rest are bitmaps and reference counts, which are not read"


def test_hostile_metadata(tmp_path: Path) -> None:
    """Noise, nothing, and a file that ends too soon."""
    made = tmp_path / "metadata"
    for content in (b"", bytes(4096), bytes(1 << 20), random.Random(1).randbytes(1 << 16), b"x" * 4095):
        made.write_bytes(content)
        with pytest.raises(Corrupt, match="metadata"), metadata.opened(made) as found:
            found.superblock()
