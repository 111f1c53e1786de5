"""What the operator wants: files of both kinds, options, and refusals that name the line and the nearest name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpmapper.config import DEFAULT_ROOT, Config, load
from hpmapper.drivers.devicemapper import parse
from hpmapper.drivers.registry import by_name
from hpmapper.errors import InvalidArgument, NotFound
from hpmapper.pool.base import GIB, PoolFs, PoolKind
from hpmapper.pool.floor import DEFAULT_FLOOR, Floor


def written(directory: Path, name: str, text: str) -> Path:
    path = directory / name
    path.write_text(text, encoding="utf-8")
    return path


def test_toml_with_tables(tmp_path: Path) -> None:
    text = 'storage-driver = "hpmapper"\nroot = "/srv/h"\nmin_free_space = "5G"\n[pool]\nsize = "200G"\nfs = "btrfs"\n'
    config = load(written(tmp_path, "config.toml", text))
    assert (config.driver, config.root) == ("hpmapper", Path("/srv/h"))
    pool = config.pool()
    assert (pool.kind, pool.size, pool.fs) == (PoolKind.LOOP, 200 * GIB, PoolFs.BTRFS)
    assert config.floor() == Floor(bytes=5 * GIB)


def test_daemon_json_keeps_dockers_other_keys_to_docker(tmp_path: Path) -> None:
    text = '{"debug": true, "data-root": "/x", "storage-driver": "overlay2", "storage-opts": ["min_free_space=20%"]}'
    config = load(written(tmp_path, "daemon.json", text))
    assert (config.driver, config.root) == ("overlay", DEFAULT_ROOT)
    assert config.floor() == Floor(percent=20)


def test_nothing_said_is_the_defaults() -> None:
    config = Config()
    assert config.driver is None
    assert config.floor() == DEFAULT_FLOOR
    assert config.pool().kind is PoolKind.LOOP


def test_the_last_option_counts() -> None:
    config = Config().with_options(["pool.size=1G", "hpmapper.pool.size=2G"])
    assert config.pool().size == 2 * GIB


@pytest.mark.parametrize(
    ("option", "kind"), [("pool.device=/dev/sdz", PoolKind.DIRECT), ("pool.directory=/srv/pool", PoolKind.DIRECTORY)]
)
def test_a_device_or_directory_says_the_kind(option: str, kind: PoolKind) -> None:
    assert Config().with_options([option]).pool().kind is kind


@pytest.mark.parametrize(
    ("text", "line", "hint"),
    [
        ('root = "/r"\nstorage-drivr = "vfs"\n', 2, "storage-driver"),
        ('\nstorage-driver = "overly"\n', 2, "overlay"),
        ('storage-opts = [\n  "min_free_space=1G",\n  "pool.sise=1G",\n]\n', 3, "pool.size"),
        ('[pool]\nsise = "1G"\n', 2, "pool.size"),
        ("storage-opts = 5\n", 1, "NAME=VALUE"),
    ],
)
def test_what_is_unknown_is_named_with_its_line(tmp_path: Path, text: str, line: int, hint: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        load(written(tmp_path, "config.toml", text))
    assert f"line {line}:" in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize(("name", "text"), [("c.toml", "storage-driver = \n"), ("d.json", '{"storage-driver": \n}')])
def test_malformed_files_are_refused_with_the_line(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"line [12]"):
        load(written(tmp_path, name, text))


@pytest.mark.parametrize("option", ["pool.kind=lop", "pool.fs=ext4", "pool.size=big"])
def test_values_of_no_kind_are_refused(option: str) -> None:
    with pytest.raises(InvalidArgument):
        Config().with_options([option]).pool()


def test_a_missing_file_is_an_error_only_when_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        load(tmp_path / "none.toml")


@pytest.mark.parametrize("text", ["\udcff", "[]", '"text"', "5"])
def test_json_that_is_no_table_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "daemon.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InvalidArgument):
        load(path)


def test_a_driver_gets_the_file_system_it_needs(tmp_path: Path) -> None:
    config = Config(root=tmp_path / "not-there-yet")
    assert config.pool(by_name("btrfs")).fs is PoolFs.BTRFS
    assert config.pool(by_name("hpmapper")).fs is PoolFs.XFS
    assert config.with_options(["pool.size=1G"]).pool(by_name("btrfs")).kind is PoolKind.LOOP
    with pytest.raises(InvalidArgument, match="btrfs driver needs a pool with btrfs, not xfs"):
        config.with_options(["pool.fs=xfs"]).pool(by_name("btrfs"))


def test_dm_options_as_docker_has_them_and_as_a_table(tmp_path: Path) -> None:
    """Names of any case; what may be given several times adds up; a table's values need no quotes."""
    words = ["DM.BaseSize=20G", "dm.mkfsarg=-i size=512", "dm.mkfsarg=-m crc=1", "dm.fs=xfs", "dm.fs=ext4"]
    docker, own = tmp_path / "daemon.json", tmp_path / "config.toml"
    docker.write_text(json.dumps({"storage-driver": "devicemapper", "storage-opts": words}))
    own.write_text(
        'storage-driver = "devicemapper"\n[dm]\nbasesize = "20G"\nfs = "ext4"\nuse_deferred_removal = false\n'
        'mkfsarg = ["-i size=512", "-m crc=1"]\n'
    )
    for file in (docker, own):
        config = load(file)
        options = parse(config.own_options(by_name("devicemapper")).items())
        assert (options.basesize, options.fs) == (20 << 30, "ext4")
        assert options.mkfsarg == ("-i size=512", "-m crc=1")
        assert options.deferred_removal is (file is docker)


def test_a_dm_option_that_does_not_exist(tmp_path: Path) -> None:
    file = tmp_path / "daemon.json"
    file.write_text(json.dumps({"storage-opts": ["dm.basesiz=20G"]}))
    with pytest.raises(InvalidArgument, match=r"no storage option 'dm\.basesiz'.*did you mean 'dm\.basesize'"):
        load(file)


def test_the_dataset_of_zfs_as_in_docker_and_as_a_table(tmp_path: Path) -> None:
    file = written(tmp_path, "daemon.json", '{"storage-driver": "zfs", "storage-opts": ["ZFS.fsname=tank/docker"]}')
    assert load(file).own_options(by_name("zfs")) == {"zfs.fsname": "tank/docker"}
    file = written(tmp_path, "config.toml", 'storage-driver = "zfs"\n[zfs]\nfsname = "tank/hpmapper"\n')
    assert load(file).own_options(by_name("zfs")) == {"zfs.fsname": "tank/hpmapper"}
    with pytest.raises(InvalidArgument, match=r"line 2.*did you mean 'zfs\.fsname'"):
        load(written(tmp_path, "wrong.toml", '[zfs]\nfsnam = "tank"\n'))
