"""containerd's file: what each version needs, what stays, what is refused."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpmapper.configure import containerd
from hpmapper.configure.containerd import Wishes
from hpmapper.configure.document import read_toml, write_toml
from hpmapper.configure.draft import Draft
from hpmapper.configure.version import Version, parse
from hpmapper.errors import FailedPrecondition, InvalidArgument, Unsupported

FILE = Path("config.toml")
WISHES = Wishes("hpmapper", "/run/hpmapper/hpmapper.sock", "/var/lib/hpmapper", "linux/amd64")
DIFF = "io.containerd.service.v1.diff-service"
TRANSFER = "io.containerd.transfer.v1.local"
VERSIONS = [
    "1.6.0",
    "1.6.20",
    "1.6.32",
    "1.7.3",
    "1.7.4",
    "1.7.16",
    "1.7.24",
    "2.0.0",
    "2.1.9",
    "2.2.1",
    "2.3.0",
    "3.1.4",
]

OPERATORS = """\
# our node, do not touch
version = 2
oom_score = -999          # important

[grpc]
  address = "/run/containerd/containerd.sock"

[plugins]
  [plugins."io.containerd.grpc.v1.cri"]
    sandbox_image = "registry.example/pause:3.9"
    [plugins."io.containerd.grpc.v1.cri".containerd]
      default_runtime_name = "runc"
      # the default
      snapshotter = "overlayfs"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
        runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.service.v1.diff-service"]
    default = [
      "erofs", # first
      "walking",
    ]

[proxy_plugins.stargz]
  type = "snapshot"
  address = "/run/stargz.sock"
"""


def drafted(text: str, version: str, wishes: Wishes = WISHES) -> Draft:
    return containerd.draft(read_toml(FILE, text), parse(version), wishes)


def merged(text: str, version: str, wishes: Wishes = WISHES) -> str:
    draft = drafted(text, version, wishes)
    assert not draft.conflicts
    return write_toml(FILE, text, draft)


def settings(text: str, version: str, wishes: Wishes = WISHES) -> dict[str, Any]:
    return tomllib.loads(merged(text, version, wishes))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "text", ["", OPERATORS, 'disabled_plugins = ["cri"]\n'], ids=["new", "operator's", "packager's"]
)
def test_merging_twice_changes_nothing_more(text: str, version: str) -> None:
    assert not drafted(merged(text, version), version).changes


@pytest.mark.parametrize("version", VERSIONS)
def test_everything_else_stays(version: str) -> None:
    before, after = tomllib.loads(OPERATORS), settings(OPERATORS, version)
    assert after["grpc"] == before["grpc"]
    assert after["oom_score"] == -999
    assert after["proxy_plugins"]["stargz"] == before["proxy_plugins"]["stargz"]
    cri, cri_before = (one["plugins"]["io.containerd.grpc.v1.cri"] for one in (after, before))
    assert cri.pop("containerd") == cri_before.pop("containerd") | {"snapshotter": "hpmapper"}
    assert cri == cri_before
    # The lines that are not about us are all there, in their order.
    lines = iter(merged(OPERATORS, version).splitlines())
    kept = [line for line in OPERATORS.splitlines() if "snapshotter =" not in line and "default = [" not in line]
    assert all(any(after.startswith(before) for after in lines) for before in kept)


def test_a_snapshotter_alone_where_there_is_nothing_else() -> None:
    found = settings("", "1.6.20")
    assert found == {
        "version": 2,
        "proxy_plugins": {"hpmapper": {"type": "snapshot", "address": WISHES.address}},
        "plugins": {"io.containerd.grpc.v1.cri": {"containerd": {"snapshotter": "hpmapper"}}},
    }


def test_the_differ_comes_first_and_the_default_entry_names_its_own() -> None:
    found = settings("", "1.7.24")
    assert found["proxy_plugins"]["hpmapper"]["exports"] == {"root": "/var/lib/hpmapper"}
    assert found["proxy_plugins"]["hpmapper"]["capabilities"] == ["remap-ids"]
    assert found["proxy_plugins"]["hpmapper-diff"] == {"type": "diff", "address": WISHES.address}
    assert found["plugins"][DIFF] == {"default": ["hpmapper-diff", "walking"]}
    entries = found["plugins"][TRANSFER]["unpack_config"]
    assert entries == [{"platform": "linux/amd64", "snapshotter": "overlayfs", "differ": "walking"}]


def test_the_transfer_service_keeps_its_own_entries() -> None:
    ours = {"platform": "linux/amd64", "snapshotter": "hpmapper", "differ": "hpmapper-diff"}
    walking = {"platform": "linux/amd64", "snapshotter": "overlayfs", "differ": "walking"}
    erofs = {"platform": "linux(+erofs)/amd64", "snapshotter": "erofs", "differ": "erofs", "optional": True}
    assert settings("", "2.1.9")["plugins"][TRANSFER] == {"unpack_config": [walking, ours]}
    newest = settings("", "2.3.0")
    assert newest["version"] == 3
    assert newest["plugins"][TRANSFER] == {"unpack_config": [walking, erofs, ours]}
    assert newest["plugins"]["io.containerd.cri.v1.images"] == {"snapshotter": "hpmapper"}


@pytest.mark.parametrize(
    ("version", "differ", "expected"),
    [
        ("1.7.22", True, None),
        ("1.7.23", True, ["remap-ids"]),
        ("2.1.9", True, ["remap-ids"]),
        ("2.2.0", True, ["remap-ids"]),
        ("2.2.0", False, ["remap-ids"]),
    ],
)
def test_capabilities_are_those_that_are_true(version: str, differ: bool, expected: list[str] | None) -> None:
    wishes = replace(WISHES, differ=differ)
    assert settings("", version, wishes)["proxy_plugins"]["hpmapper"].get("capabilities") == expected


def test_a_capability_that_would_lose_data_is_taken_away_and_said() -> None:
    text = '[proxy_plugins.hpmapper]\ntype = "snapshot"\naddress = "/run/hpmapper/hpmapper.sock"\n'
    text = f'version = 3\n{text}capabilities = ["rebase", "theirs"]\n'
    draft = drafted(text, "2.2.3")
    change = next(change for change in draft.changes if change.path[-1] == "capabilities")
    assert change.now == ["theirs", "remap-ids"]
    assert "deletions" in change.why


def test_an_order_of_differs_gets_ours_in_front() -> None:
    assert settings(OPERATORS, "1.7.24")["plugins"][DIFF]["default"] == ["hpmapper-diff", "erofs", "walking"]
    assert '"erofs", # first' in merged(OPERATORS, "1.7.24")
    good = f'version = 3\n[plugins."{DIFF}"]\ndefault = ["erofs", "hpmapper-diff", "walking"]\n'
    assert settings(good, "2.1.9")["plugins"][DIFF]["default"] == ["erofs", "hpmapper-diff", "walking"]
    useless = good.replace('"erofs", "hpmapper-diff", "walking"', '"walking", "hpmapper-diff"')
    assert settings(useless, "2.1.9")["plugins"][DIFF]["default"] == ["hpmapper-diff", "walking"]


@pytest.mark.parametrize(
    "entries",
    [
        '[[plugins."io.containerd.transfer.v1.local".unpack_config]]\nplatform = "linux/amd64"\nsnapshotter = "zfs"\n',
        '[plugins."io.containerd.transfer.v1.local"]\n'
        'unpack_config = [{platform = "linux/amd64", snapshotter = "zfs"}]\n',
    ],
    ids=["tables", "inline"],
)
def test_entries_of_the_operator_stay(entries: str) -> None:
    zfs = {"platform": "linux/amd64", "snapshotter": "zfs"}
    ours = {"platform": "linux/amd64", "snapshotter": "hpmapper", "differ": "hpmapper-diff"}
    found = settings(f"version = 3\n{entries}", "2.1.9")["plugins"][TRANSFER]["unpack_config"]
    assert found == [zfs, ours]
    # 2.0 would give the entry without a differ any of the two.
    found = settings(f"version = 3\n{entries}", "2.0.1")["plugins"][TRANSFER]["unpack_config"]
    assert found == [zfs | {"differ": "walking"}, ours]


def test_the_packagers_old_file_becomes_version_2() -> None:
    found = settings('# by the package\ndisabled_plugins = ["cri"]\n', "1.7.24")
    assert found["version"] == 2
    assert found["disabled_plugins"] == ["io.containerd.grpc.v1.cri"]
    assert "io.containerd.grpc.v1.cri" not in found["plugins"]


def test_a_file_of_version_2_stays_one_with_containerd_2() -> None:
    found = settings("version = 2\n", "2.1.9")
    assert found["version"] == 2
    assert found["plugins"]["io.containerd.grpc.v1.cri"]["containerd"]["snapshotter"] == "hpmapper"


@pytest.mark.parametrize(
    ("text", "version", "error"),
    [
        ("version = 3\n", "1.7.24", "reads those up to 2"),
        ("version = 4\n", "2.2.0", "reads those up to 3"),
        ('version = "2"\n', "2.2.0", "format version '2'"),
        ('[plugins.cri]\nsandbox_image = "x"\n', "1.7.24", "format version 1"),
        ('disabled_plugins = ["btrfs"]\n', "1.7.24", "'btrfs'"),
    ],
)
def test_a_file_of_another_format_is_refused(text: str, version: str, error: str) -> None:
    with pytest.raises(FailedPrecondition, match=error):
        drafted(text, version)


@pytest.mark.parametrize(
    ("text", "conflict"),
    [
        ('[proxy_plugins.hpmapper]\ntype = "content"\n', "proxy_plugins.hpmapper.type is"),
        ('[proxy_plugins.hpmapper]\naddress = "/run/other.sock"\n', "proxy_plugins.hpmapper.address is"),
        ('[proxy_plugins.hpmapper-diff]\ntype = "snapshot"\n', "proxy_plugins.hpmapper-diff.type is"),
        ('[proxy_plugins.hpmapper.exports]\nroot = "/data"\n', "exports.root is"),
        ('[plugins."io.containerd.cri.v1.images"]\nsnapshotter = "nydus"\n', 'is "nydus", not "hpmapper"'),
        (f'[plugins."{DIFF}"]\ndefault = "walking"\n', "not a list of strings"),
        (f'[plugins."{TRANSFER}"]\nunpack_config = "no"\n', "not a list of tables"),
        (f'[plugins]\n"{DIFF}" = 7\n', "not a table"),
        ('proxy_plugins = "none"\n', "proxy_plugins is"),
    ],
)
def test_decisions_of_others_are_not_overruled(text: str, conflict: str) -> None:
    assert any(conflict in found for found in drafted(f"version = 3\n{text}", "2.1.9").conflicts)


def test_imports_that_win_are_conflicts(tmp_path: Path) -> None:
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "a.toml").write_text(f'[plugins."{DIFF}"]\ndefault = ["walking"]\n')
    (tmp_path / "conf.d" / "b.toml").write_text("oom_score = 1\n")
    draft = drafted('version = 3\nimports = ["conf.d/*.toml"]\n', "2.1.9")
    containerd.imported(tmp_path / "config.toml", draft)
    assert len(draft.conflicts) == 1
    assert "a.toml" in draft.conflicts[0]


def test_what_is_malformed_is_told_with_its_line() -> None:
    with pytest.raises(InvalidArgument, match="line 2"):
        read_toml(FILE, "version = 2\n[plugins\n")
    with pytest.raises(InvalidArgument, match="line 3"):
        read_toml(FILE, "version = 2\n[a]\nb =\n")


def test_old_containerd_is_refused() -> None:
    with pytest.raises(Unsupported, match=r"1\.5\.9 is too old"):
        drafted("", "1.5.9")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1.7.24", (1, 7, 24)), ("v2.1.9", (2, 1, 9)), ("1.6.20~ds1", (1, 6, 20)), ("2.3.0-rc.1", (2, 3, 0))],
)
def test_versions_are_read(text: str, expected: tuple[int, int, int]) -> None:
    assert parse(text) == Version(*expected)


@pytest.mark.parametrize("text", ["", "1.7", "newest", "1.7.x", "99999.1.1"])
def test_what_is_no_version_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse(text)
