"""What the OCI runtime is told: Docker's rules for commands, variables, users, volumes and mounts."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from hpmapper.errors import InvalidArgument, NotFound
from hpmapper.runtime import inside, spec, users
from hpmapper.runtime.spec import Defaults, Options
from hpmapper.runtime.users import Account
from hpmapper.runtime.volumes import Volume, parse_volume

PASSWD = """root:x:0:0:root:/root:/bin/sh
app:x:1000:1001:App:/home/app:/bin/sh
# a comment
broken:x:no:number:::
77:x:5:5:named like a number:/five:
"""
GROUP = """root:x:0:
staff:x:50:app,other
app:x:1001:
wheel:x:10:other
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text(PASSWD)
    (tmp_path / "etc/group").write_text(GROUP)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "account"),
    [
        ("", Account(0, 0, (0,), "/root")),
        ("app", Account(1000, 1001, (50, 1001), "/home/app")),
        ("1000", Account(1000, 1001, (50, 1001), "/home/app")),
        ("app:staff", Account(1000, 50, (), "/home/app")),
        ("app:7", Account(1000, 7, (), "/home/app")),
        ("4294967294:4294967294", Account(4294967294, 4294967294, (), "/")),
        ("77", Account(77, 0, (), "/")),
    ],
)
def test_users_as_docker_finds_them(root: Path, text: str, account: Account) -> None:
    assert users.resolve(root, text) == account


@pytest.mark.parametrize("text", ["nobody-here", "app:no-such-group", "broken"])
def test_unknown_users_are_named(root: Path, text: str) -> None:
    with pytest.raises(NotFound, match="the container has no"):
        users.resolve(root, text)


def test_ids_end_somewhere(root: Path) -> None:
    with pytest.raises(InvalidArgument):
        users.resolve(root, "4294967295")


def test_the_hosts_users_are_never_asked(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").symlink_to("/../../../../../../../../etc/passwd")
    with pytest.raises((NotFound, OSError)):
        users.resolve(tmp_path, "root")


def test_fifos_and_sockets_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        assert inside.read_text(tmp_path, "/fifo") == inside.read_text(tmp_path, "/socket") == ""


@pytest.mark.parametrize(
    ("defaults", "options", "words"),
    [
        (Defaults(cmd=("sh",)), Options(), ["sh"]),
        (Defaults(entrypoint=("e", "-x"), cmd=("c",)), Options(), ["e", "-x", "c"]),
        (Defaults(entrypoint=("e",), cmd=("c",)), Options(command=("d", "1")), ["e", "d", "1"]),
        (Defaults(entrypoint=("e",), cmd=("c",)), Options(entrypoint="f"), ["f"]),
        (Defaults(entrypoint=("e",), cmd=("c",)), Options(entrypoint="", command=("d",)), ["d"]),
    ],
)
def test_commands(defaults: Defaults, options: Options, words: list[str]) -> None:
    assert spec.arguments(defaults, options) == words


def test_an_image_without_a_command_needs_one() -> None:
    with pytest.raises(InvalidArgument, match="no command"):
        spec.arguments(Defaults(), Options())


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROM_HOST", "host")
    monkeypatch.delenv("NOT_THERE", raising=False)
    defaults = Defaults(env=("PATH=/image", "A=image", "B=image"))
    options = Options(env=("A=user=1", "FROM_HOST", "NOT_THERE", "B="), terminal=True)
    made = spec.environment(defaults, options, "box", "/home/app")
    assert made == [
        "PATH=/image",
        "HOSTNAME=box",
        "TERM=xterm",
        "A=user=1",
        "B=",
        "FROM_HOST=host",
        "HOME=/home/app",
    ]


def test_a_variable_needs_a_name() -> None:
    with pytest.raises(InvalidArgument, match="environment variable"):
        spec.environment(Defaults(), Options(env=("=x",)), "box", "/")


def test_volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_volume(f"{tmp_path}:/a/../b/") == Volume(tmp_path, "/b")
    assert parse_volume(".:/x:ro") == Volume(tmp_path, "/x", read_only=True)
    for bad in ("", "/x", ":/x", f"{tmp_path}:x", f"{tmp_path}:/", f"{tmp_path}:/x:rx", f"{tmp_path}:/x:ro:"):
        with pytest.raises(InvalidArgument):
            parse_volume(bad)
    with pytest.raises(NotFound):
        parse_volume("/no/such/place:/x")


def test_volumes_replace_default_mounts_and_inner_ones_come_last(tmp_path: Path) -> None:
    volumes = (Volume(tmp_path, "/data/in"), Volume(tmp_path, "/data"), Volume(tmp_path, "/dev/shm"))
    targets = [one["destination"] for one in spec.mounts(volumes)]
    assert len(targets) == len(set(targets))
    assert targets.index("/dev") < targets.index("/dev/shm")
    assert targets.index("/data") < targets.index("/data/in")


def test_the_document(tmp_path: Path) -> None:
    account = Account(1000, 1001, (50, 1001), "/home/app")
    options = Options(command=("true",), workdir="srv/../app/", volumes=(Volume(tmp_path, "/x", read_only=True),))
    made = spec.make_spec(tmp_path, ("name", "/group"), Defaults(), options, account)
    assert json.loads(spec.encode(made)) == made
    process, linux = made["process"], made["linux"]
    assert process["user"] == {"uid": 1000, "gid": 1001, "additionalGids": [50, 1001]}
    assert process["cwd"] == "/app"
    assert process["capabilities"]["effective"] == []
    assert "CAP_SYS_ADMIN" not in process["capabilities"]["bounding"]
    assert linux["resources"]["devices"] == [{"allow": False, "access": "rwm"}]
    assert {"type": "network"} not in linux["namespaces"]
    assert made["mounts"][-1]["options"] == ["rbind", "rprivate", "ro"]


def test_what_json_cannot_carry_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="UTF-8"):
        spec.encode({"args": ["\udcff"]})


def test_directories_are_made_inside_only(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (root / "link").symlink_to(outside)
    (root / "up").symlink_to("../../outside")
    with pytest.raises(InvalidArgument):
        inside.make_directories(root, "/link/new")
    with pytest.raises(InvalidArgument):
        inside.make_directories(root, "/up/new")
    inside.make_directories(root, "/../../a/b")
    assert (root / "a/b").is_dir()
    assert not list(outside.iterdir())


def test_mount_points_leave_no_trace(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    os.utime(tmp_path / "etc", ns=(5, 5))
    made = inside.make_file(tmp_path, "/etc/resolv.conf") + inside.make_directories(tmp_path, "/mnt/deep")
    assert (tmp_path / "etc/resolv.conf").is_file()
    assert inside.make_file(tmp_path, "/etc/resolv.conf") == []
    inside.unmake(tmp_path, made)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["etc"]
    assert (tmp_path / "etc").stat().st_mtime_ns == 5


def test_what_a_container_did_to_a_mount_point_stays(tmp_path: Path) -> None:
    made = inside.make_file(tmp_path, "/etc/resolv.conf") + inside.make_directories(tmp_path, "/mnt")
    (tmp_path / "etc/resolv.conf").write_text("mine")
    (tmp_path / "mnt/file").touch()
    inside.unmake(tmp_path, made)
    assert (tmp_path / "etc/resolv.conf").read_text() == "mine"
    assert (tmp_path / "mnt/file").exists()


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidArgument, match="/file"):
        inside.make_directories(tmp_path, "/file/below")
