"""A file put in place: backed up, atomic, its attributes kept; and the commands that do it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NoReturn

import pytest
from click.testing import CliRunner, Result

from hpmapper.cli.main import cli
from hpmapper.cli.state import State
from hpmapper.configure import file
from hpmapper.errors import FailedPrecondition, InvalidArgument


def fine(_: Path) -> None:
    """Whatever it says."""


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def test_a_new_file_has_no_backup(tmp_path: Path) -> None:
    path = tmp_path / "etc" / "config.toml"
    assert file.replace(file.read(path), "new", fine) is None
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o644
    assert names(path.parent) == ["config.toml"]


def test_mode_attributes_and_the_old_text_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("old")
    path.chmod(0o640)
    os.setxattr(path, "user.label", b"kept")
    backups = [file.replace(file.read(path), text, fine) for text in ("new", "newer")]
    assert path.read_text() == "newer"
    assert path.stat().st_mode & 0o777 == 0o640
    assert os.getxattr(path, "user.label") == b"kept"
    assert [backup.read_text() for backup in backups if backup] == ["old", "new"]
    assert all(backup and backup.stat().st_mode & 0o777 == 0o640 for backup in backups)
    assert not [name for name in names(tmp_path) if name.endswith(".toml") and name != "config.toml"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: only root can give files away")
def test_the_owner_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("old")
    os.chown(path, 12, 34)
    file.replace(file.read(path), "new", fine)
    assert (path.stat().st_uid, path.stat().st_gid) == (12, 34)


def test_a_symlink_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    link = tmp_path / "config.toml"
    link.symlink_to("real")
    file.replace(file.read(link), "new", fine)
    assert link.is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_what_the_program_refuses_is_not_put_in_place(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("old")

    def refuse(new: Path) -> NoReturn:
        assert new.read_text() == "new"
        raise InvalidArgument("no")

    with pytest.raises(InvalidArgument):
        file.replace(file.read(path), "new", refuse)
    assert names(tmp_path) == ["config.toml"]
    assert path.read_text() == "old"


def test_a_file_that_somebody_changes_meanwhile_is_left(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("old")

    def interfere(_: Path) -> None:
        path.write_text("theirs")

    with pytest.raises(FailedPrecondition, match="meanwhile"):
        file.replace(file.read(path), "new", interfere)
    assert names(tmp_path) == ["config.toml"]
    assert path.read_text() == "theirs"


def test_what_is_no_text_is_told_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes(b"a = 1\nb = '\xff'\n")
    with pytest.raises(InvalidArgument, match="line 2"):
        _ = file.read(tmp_path / "config.toml").text
    with pytest.raises(InvalidArgument, match="directory"):
        file.read(tmp_path)


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(cli, ["config", *map(str, words)], obj=State())


def test_check_then_apply_then_check(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("version = 2 # ours\n")
    words = ("containerd", "--for", "1.7.24", "--no-remap-ids", "--file", path)
    before = run(*words, "--check")
    assert before.exit_code == 5
    assert 'missing: proxy_plugins.hpmapper.type = "snapshot"' in before.output
    applied = json.loads(run(*words, "--apply", "--json").output)
    assert applied["applied"]
    assert Path(applied["backup"]).read_text() == "version = 2 # ours\n"
    assert path.read_text().startswith("version = 2 # ours\n")
    after = run(*words, "--check")
    assert after.exception is None
    assert after.output.startswith("everything is set")
    again = json.loads(run(*words, "--apply", "--json").output)
    assert (again["applied"], again["backup"], again["changes"]) == (False, None, [])
    assert len(names(tmp_path)) == 2


@pytest.mark.parametrize(
    ("words", "place"),
    [
        ([], "pool"),
        (["--storage-driver", "overlay"], "overlay"),
        (["--storage-opt", "pool.directory=/srv/pool"], "/srv/pool"),
    ],
)
def test_kubernetes_measures_the_layers_file_system(words: list[str], place: str, tmp_path: Path) -> None:
    """A pool has one of its own, which is not the root directory's."""
    asked = ["--root", str(tmp_path), *words, "config", "containerd", "--for", "1.7.24", "--no-remap-ids", "--json"]
    printed = json.loads(CliRunner().invoke(cli, asked, obj=State()).stdout)
    settings = {change["setting"]: change["now"] for change in printed["changes"]}
    assert settings["proxy_plugins.hpmapper.exports.root"] == str(tmp_path / place)


def test_conflicts_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    text = 'version = 2\n[proxy_plugins.hpmapper]\ntype = "content"\n'
    path.write_text(text)
    result = run("containerd", "--for", "1.7.24", "--file", path, "--apply")
    assert result.exit_code == 5
    assert "proxy_plugins.hpmapper.type" in result.stderr
    assert path.read_text() == text
    assert names(tmp_path) == ["config.toml"]
    assert json.loads(run("containerd", "--for", "1.7.24", "--file", path, "--check", "--json").stdout)["conflicts"]


def test_printing_needs_no_file(tmp_path: Path) -> None:
    printed = run("docker", "--for", "28.5.2", "--file", tmp_path / "none")
    assert json.loads(printed.stdout)["storage-driver"] == "hpmapper"
    assert "--containerd" in printed.stderr
    assert run("containerd", "--for", "2.1.9", "--name", "fast").stdout.count("[proxy_plugins.fast") >= 3
    assert not names(tmp_path)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("containerd", "--for", "new"), 2),
        (("containerd", "--program", "/nonexistent/containerd"), 3),
        (("containerd", "--program", "/bin/false"), 6),
        (("containerd", "--program", "/bin/true"), 6),
        (("containerd", "--for", "2.1.9", "--apply", "--check"), 2),
        (("containerd", "--for", "2.1.9", "--address", "run/sock"), 2),
        (("containerd", "--for", "2.1.9", "--name", "a b"), 2),
    ],
)
def test_what_makes_no_sense_is_refused(words: tuple[str, ...], code: int) -> None:
    result = run(*words)
    assert result.exit_code == code
    assert result.stderr.startswith("hpmapper: ")


def program(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_the_program_is_asked_and_judges(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    answer = '[ "$1" = --version ] && echo "containerd github.com/containerd/containerd/v2 2.1.9+unknown "'
    good = program(tmp_path / "good", f"{answer} && exit 0; [ $1 = -c ] && [ $3$4 = configdump ]")
    applied = run("containerd", "--program", good, "--file", path, "--apply")
    assert applied.exception is None
    assert "version = 3" in path.read_text()
    path.unlink()
    bad = program(tmp_path / "bad", f"{answer} && exit 0; echo 'it is wrong' >&2; exit 1")
    refused = run("containerd", "--program", bad, "--file", path, "--apply")
    assert refused.exit_code == 2
    assert "it is wrong" in refused.stderr
    assert not path.exists()
