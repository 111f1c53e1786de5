"""The dm.* options: Docker's defaults, parse rules and messages (moby v17.06 to v24, daemon/graphdriver/devmapper)."""

from __future__ import annotations

import pytest

from hpmapper.drivers.devicemapper.options import NAMES, Options, parse
from hpmapper.drivers.devicemapper.units import human_size, parse_size
from hpmapper.errors import InvalidArgument

_GIB = 1 << 30


def parse_words(words: list[str]) -> Options:
    """Of "dm.NAME=VALUE" words."""
    return parse((name, value) for name, _, value in (word.partition("=") for word in words))


def test_defaults() -> None:
    options = parse_words([])
    assert (options.basesize, options.loopdatasize, options.loopmetadatasize) == (10 * _GIB, 100 * _GIB, 2 * _GIB)
    assert options.blocksize == 64 << 10
    assert options.min_free_space == 10
    assert options.fs is None
    assert options.blkdiscard is None
    assert options.deferred_removal
    assert options.deferred_deletion
    assert options.xfs_nospace_max_retries is None
    assert options.libdm_log_level == 2
    lvm = options.directlvm.filled()
    assert (lvm.percent, lvm.metapercent, lvm.autoextend_threshold, lvm.autoextend_percent) == (95, 1, 80, 20)


def test_there_is_every_option_of_dockers_documentation() -> None:
    documented = """basesize loopdatasize loopmetadatasize fs mkfsarg mountopt datadev metadatadev thinpooldev blocksize
        blkdiscard override_udev_sync_check use_deferred_removal use_deferred_deletion min_free_space
        xfs_nospace_max_retries libdm_log_level directlvm_device directlvm_device_force thinp_percent thinp_metapercent
        thinp_autoextend_threshold thinp_autoextend_percent"""
    assert set(NAMES) == {f"dm.{name}" for name in documented.split()}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("32", 32), ("32b", 32), ("32k", 32 << 10), ("32K", 32 << 10), ("32kb", 32 << 10), ("32Kb", 32 << 10),
        ("32KiB", 32 << 10), ("32Mb", 32 << 20), ("32 MiB", 32 << 20), ("32Gb", 32 << 30), ("32Tb", 32 << 40),
        ("32Pb", 32 << 50), ("32.5kB", int(32.5 * 1024)), ("0.5g", 1 << 29), ("0", 0),
    ],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    """As go-units' TestRAMInBytes."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "hello", "-32", "32x", " 32 ", "32  kb", "32m b", "1.2.3", ".5g", "٣٢k", "32\n"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(InvalidArgument, match="invalid size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0B"), (999, "999B"), (1000, "1kB"), (1024, "1.024kB"), (65536, "65.54kB"), (10737418240, "10.74GB"),
        (107374182400, "107.4GB"), (2147483648, "2.147GB"), (999_999, "1000kB"), (1 << 50, "1.126PB"),
    ],
)  # fmt: skip
def test_sizes_as_docker_prints_them(size: int, text: str) -> None:
    assert human_size(size) == text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dm.nonsense=1"], "devmapper: Unknown option dm.nonsense"),
        (["overlay2.size=1"], "devmapper: Unknown option overlay2.size"),
        (["dm.basesize=much"], "invalid size: 'much'"),
        (["dm.fs=btrfs"], "devmapper: Unsupported filesystem btrfs"),
        (["dm.blkdiscard=yes"], 'strconv.ParseBool: parsing "yes": invalid syntax'),
        (["dm.blocksize=100K"], "dm.blocksize cannot be 100K"),
        (["dm.blocksize=32K"], "dm.blocksize cannot be 32K"),
        (["dm.blocksize=2G"], "dm.blocksize cannot be 2G"),
        (["dm.min_free_space=10"], "devmapper: Option dm.min_free_space requires % suffix"),
        (["dm.min_free_space=100%"], "devmapper: Invalid value 100% for option dm.min_free_space"),
        (["dm.min_free_space=-1%"], "devmapper: Invalid value -1% for option dm.min_free_space"),
        (["dm.min_free_space=%"], "devmapper: Invalid value % for option dm.min_free_space"),
        (["dm.xfs_nospace_max_retries=-1"], "strconv.ParseUint"),
        (["dm.libdm_log_level=1"], r"dm.libdm_log_level must be in range \[2,7\]"),
        (["dm.libdm_log_level=8"], r"dm.libdm_log_level must be in range \[2,7\]"),
        (["dm.libdm_log_level=debug"], "could not parse `dm.libdm_log_level=debug`"),
        (
            ["dm.use_deferred_removal=false", "dm.use_deferred_deletion=true"],
            "devmapper: Deferred deletion can not be enabled as deferred removal is not enabled",
        ),
        (["dm.thinp_percent=95"], "must provide device path in `dm.directlvm_device` in order to configure direct-lvm"),
        (["dm.thinp_autoextend_threshold=70"], "must provide device path"),
        (["dm.directlvm_device=/dev/x", "dm.thinp_percent=95"], "must set both `dm.thinp_percent` and"),
        (["dm.directlvm_device=/dev/x", "dm.thinp_metapercent=1"], "must set both `dm.thinp_percent` and"),
        (
            ["dm.directlvm_device=/dev/x", "dm.thinp_percent=99", "dm.thinp_metapercent=2"],
            "combined `dm.thinp_percent` and `dm.thinp_metapercent` must not be greater than 100",
        ),
        (["dm.thinp_percent=100"], "dm.thinp_percent must be greater than 0 and less than 100"),
        (["dm.thinp_metapercent=half"], "could not parse `dm.thinp_metapercent=half`"),
        (["dm.thinp_autoextend_percent=101"], "dm.thinp_autoextend_percent must be greater than 0 and less than 100"),
        (["dm.directlvm_device_force=maybe"], "strconv.ParseBool"),
        (
            ["dm.directlvm_device=/dev/x", "dm.thinpooldev=pool"],
            "cannot setup direct-lvm when `dm.thinpooldev` is also specified",
        ),
        (["dm.datadev=/dev/x"], "name both"),
    ],
)
def test_messages(words: list[str], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        parse_words(words)


def test_names_are_trimmed_and_of_any_case_and_the_last_counts() -> None:
    options = parse_words([" DM.BaseSize = 20G ", "dm.basesize=30G", "dm.fs=ext4", "dm.fs=xfs"])
    assert options.basesize == 30 * _GIB
    assert options.basesize_given
    assert options.fs == "xfs"


def test_some_options_add_up() -> None:
    options = parse_words(
        ["dm.mkfsarg=-i size=1024", "dm.mkfsarg=-m", "dm.mountopt=discard", "dm.mountopt=logbsize=256k,noatime"]
    )
    assert options.mkfsarg == ("-i size=1024", "-m")
    assert options.mountopt == "discard,logbsize=256k,noatime"
    assert options.mount_options() == {"discard": None, "logbsize": "256k", "noatime": None}


def test_what_depends_on_something_else() -> None:
    assert parse_words(["dm.thinpooldev=/dev/mapper/vg-pool"]).thinpooldev == "vg-pool"
    assert parse_words(["dm.blkdiscard=t"]).blkdiscard is True
    assert parse_words(["dm.blkdiscard=false"]).blkdiscard is False
    assert not parse_words(["dm.use_deferred_removal=false"]).deferred_deletion
    assert parse_words(["dm.min_free_space=0%"]).min_free_space == 0
    options = parse_words(["dm.directlvm_device=/dev/x", "dm.thinp_percent=90%", "dm.thinp_metapercent=2"])
    assert (options.directlvm.percent, options.directlvm.metapercent) == (90, 2)
    assert options.directlvm.autoextend_percent == 0, "what was left open is 0, as in setup-config.json"
