"""daemon.json: the two ways to Docker, what stays, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpmapper.configure.docker import Way, draft, require_name
from hpmapper.configure.document import read_json, write_json
from hpmapper.configure.version import parse
from hpmapper.errors import InvalidArgument, Unsupported

FILE = Path("daemon.json")
OPERATORS = '{\n  "log-driver": "journald",\n  "storage-driver": "overlay2",\n  "features": {"buildkit": true}\n}\n'


def merged(text: str, version: str, way: Way | None = None) -> str:
    found = draft(read_json(FILE, text), parse(version), "hpmapper", way)
    assert not found.conflicts
    return write_json(text, found)


def test_newer_dockers_leave_images_to_containerd() -> None:
    assert json.loads(merged("", "28.5.2")) == {
        "storage-driver": "hpmapper",
        "features": {"containerd-snapshotter": True},
    }


def test_older_dockers_have_a_plugin() -> None:
    plugin = {"storage-driver": "hpmapper", "experimental": True}
    assert json.loads(merged("", "20.10.24")) == plugin
    assert json.loads(merged("{}", "26.1.5", Way.PLUGIN)) == plugin


@pytest.mark.parametrize("version", ["20.10.24", "26.1.5", "29.0.1"])
def test_merging_twice_changes_nothing_more(version: str) -> None:
    text = merged(OPERATORS, version)
    assert not draft(read_json(FILE, text), parse(version), "hpmapper", None).changes


def test_everything_else_stays() -> None:
    text = merged(OPERATORS, "26.1.5")
    assert list(json.loads(text)) == ["log-driver", "storage-driver", "features"]
    assert json.loads(text)["features"] == {"buildkit": True, "containerd-snapshotter": True}
    assert text.startswith('{\n  "log-driver": "journald",\n  "storage')


def test_what_was_there_is_said() -> None:
    found = draft(read_json(FILE, OPERATORS), parse("26.1.5"), "hpmapper", None)
    assert any("overlay2" in note for note in found.notes)
    assert [str(change) for change in found.changes if change.was] == ['storage-driver = "hpmapper" (was "overlay2")']


@pytest.mark.parametrize(
    ("version", "way"), [("23.0.6", Way.IMAGE_STORE), ("27.0.1", Way.PLUGIN), ("28.5.2", Way.PLUGIN)]
)
def test_what_a_version_cannot_do_is_refused(version: str, way: Way) -> None:
    with pytest.raises(Unsupported):
        draft({}, parse(version), "hpmapper", way)


@pytest.mark.parametrize(
    ("content", "way", "conflict"),
    [
        ({"userns-remap": "default"}, Way.IMAGE_STORE, "userns-remap"),
        ({"features": {"containerd-snapshotter": True}}, Way.PLUGIN, "no graph driver"),
        ({"features": "all"}, Way.IMAGE_STORE, "not a table"),
    ],
)
def test_conflicts(content: dict[str, object], way: Way, conflict: str) -> None:
    assert conflict in draft(content, parse("26.1.5"), "hpmapper", way).conflicts[0]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('{\n"a": 1,\n"b" 2}', "line 3"),
        ('{\n"a": 1,\n"b": {"a": 2},\n"a": 3}', "line 4: 'a' is there twice"),
        ("[]", "no object in it but a list"),
        ("\nnull", "no object"),
    ],
)
def test_what_is_malformed_is_told_with_its_line(text: str, error: str) -> None:
    with pytest.raises(InvalidArgument, match=error):
        read_json(FILE, text)


@pytest.mark.parametrize("name", ["", "a b", "../x", "a.b", "ä", 'x"'])
def test_names_that_no_plugin_can_have(name: str) -> None:
    with pytest.raises(InvalidArgument):
        require_name(name)
