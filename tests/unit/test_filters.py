"""containerd's filter grammar (pkg/filters), for what a List of snapshots may be asked."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpmapper.containerd import filters
from hpmapper.errors import InvalidArgument
from hpmapper.forest import Info
from hpmapper.model import Kind

REF = "containerd.io/snapshot.ref"
CHAIN = "sha256:" + "ab" * 32

BASE = Info("k8s.io/1/base", "", Kind.COMMITTED, 1, 1, {REF: CHAIN, "a.b": "dotted", "empty": "", "n": "a,b"})
CHILD = Info('k8s.io/2/child of "x"', "k8s.io/1/base", Kind.ACTIVE, 1, 1, {"foo": "bar"})
VIEW = Info("k8s.io/3/view", "k8s.io/1/base", Kind.VIEW, 1, 1, {})
ALL = {"base": BASE, "child": CHILD, "view": VIEW}

TABLE = [
    ([], "base child view"),
    ([""], "base child view"),
    (["", "name==nothing"], "base child view"),
    (["name==k8s.io/1/base"], "base"),
    (['name=="k8s.io/1/base"'], "base"),
    ([r'name=="k8s.io/2/child of \"x\""'], "child"),
    ([r'name=="\x6b8s.io/1/\142ase"'], "base"),
    ([r'name=="\u006b8s.io/1/base"'], "base"),
    (["parent==k8s.io/1/base"], "child view"),
    (['parent==""'], "base"),
    (['parent!=""'], "child view"),
    (["kind==committed"], "base"),
    (["kind!=committed"], "child view"),
    (["kind==active", "kind==view"], "child view"),
    (["kind==active,kind==view"], ""),
    (["kind==active,parent==k8s.io/1/base"], "child"),
    (["name"], "base child view"),  # always there
    (["parent"], "base child view"),
    (["labels.foo"], "child"),
    (["labels.empty"], "base"),
    (["labels.foo==bar"], "child"),
    (["labels.foo!=bar"], "base view"),
    (["labels.a.b==dotted"], "base"),
    (['labels."a.b"==dotted'], "base"),
    (['labels."a"."b"==dotted'], "base"),
    ([f'labels."{REF}"=={CHAIN}'], "base"),
    ([f'labels."{REF}"=={CHAIN},parent==""'], "base"),
    ([f'labels."{REF}"=={CHAIN},parent=="k8s.io/1/base"'], ""),
    (['labels.n=="a,b"'], "base"),
    (["labels.foo~=^ba"], "child"),
    (["labels.foo~=a"], "child"),
    (["labels.foo~=^$"], "base view"),  # nothing matches nothing
    (["name~=/k8s.io\\/[12]\\//"], "base child"),
    (["name~=|k8s.io/[13]|"], "base view"),
    (['name~="of"'], "child"),
    (["name~=/[/"], ""),  # no regular expression matches nothing
    (["name~=a{99999999999}"], ""),
    (["name~=/(?=b)/"], ""),  # Go has no lookaround either
    (["labels.foo~=/^(?i)BA.$/"], "child"),  # nor does it mind flags in the middle
    (["labels"], ""),
    (["nothing"], ""),
    (["nothing!=x"], "base child view"),
    (["size==3"], ""),
    (['"name"==k8s.io/1/base'], "base"),
]

MALFORMED = [
    ",",
    "name==",
    "name!=,",
    "name=base",
    "name==a b",
    "name==a,",
    ",name==a",
    "name==a,,name==b",
    "name..x",
    "name.",
    ".name",
    "==a",
    "na me==a",
    'name=="a',
    'name=="a"b',
    '"name',
    "name~=",
    "name~=/a/b",
    "name<3",
    " ",
    "name==a\nb",
    "ä==b",
]


@pytest.mark.parametrize(("asked", "found"), TABLE)
def test_what_passes(asked: list[str], found: str) -> None:
    wanted = filters.parse(asked)
    assert [name for name, info in ALL.items() if wanted(info)] == found.split()


@pytest.mark.parametrize("asked", MALFORMED)
def test_what_is_malformed_is_refused(asked: str) -> None:
    with pytest.raises(InvalidArgument, match="at character"):
        filters.parse(["name==good", asked])


_PIECES = st.sampled_from(
    ["name", "parent", "kind", "labels", ".", ",", "==", "!=", "~=", "=", '"', "/", "|", "\\", "x", "(", "[", " ", "\n"]
)
_TEXTS = st.one_of(st.text(), st.lists(_PIECES).map("".join))


@given(st.lists(_TEXTS, max_size=3))
def test_anything_is_either_understood_or_refused(asked: list[str]) -> None:
    try:
        wanted = filters.parse(asked)
    except InvalidArgument:
        return
    for info in ALL.values():
        assert wanted(info) in (True, False)


@given(st.text(), st.text(min_size=1))
def test_quoted_text_is_found_again(value: str, name: str) -> None:
    info = Info(value, "", Kind.ACTIVE, 1, 1, {name: value})
    wanted = filters.parse([f"name=={_quoted(value)},labels.{_quoted(name)}=={_quoted(value)}"])
    assert wanted(info)
    assert not wanted(Info(value + "x", "", Kind.ACTIVE, 1, 1, {name: value}))


def _quoted(text: str) -> str:
    """As Go's strconv.Quote."""
    return '"' + "".join(_escaped(character) for character in text) + '"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    return character if character.isprintable() else f"\\U{ord(character):08x}"
