"""Cases: what containers do to files, seen in the mount, in the diff, and after a commit.

Each does the same to a container and to a plain directory. They must agree in the mount; a new container of the
commit must agree too, which says that the diff, applied again, gives the same tree.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence

from hpmapper.errors import InvalidArgument
from hpmapper.meta.snapshots import Snapshot
from hpmapper.testing.contract.subject import Case, Subject, refused
from hpmapper.testing.trees import (
    Operation,
    append,
    apply,
    assert_same,
    chmod,
    chown,
    directory,
    file,
    hard_link,
    map_write,
    node,
    remove,
    remove_xattr,
    rename,
    replace_directory,
    set_xattr,
    symlink,
    truncate,
    utime,
    write,
)

_LARGE = bytes(range(256)) * (5 << 12)  # 5 MiB

_BASE = [
    directory("etc"),
    file("etc/passwd", b"root:x:0:0:::\n"),
    file("etc/hosts", b"127.0.0.1 localhost\n"),
    directory("etc/default"),
    file("etc/default/locale", b"LANG=C\n"),
    directory("usr"),
    directory("usr/bin"),
    file("usr/bin/tool", b"#!/bin/sh\n" * 900, 0o755),
    file("usr/bin/su", b"suid\n" * 2000, 0o4755),
    symlink("usr/bin", "bin"),
    directory("var", 0o2775, 0, 50),
    file("var/data", b"0123456789abcdef" * 1000),
]


def _steps(subject: Subject, *steps: Sequence[Operation], changes: Sequence[str] | None = None) -> Snapshot:
    """Apply each step to a container of the step before and to the model; `changes`: of the last, as Docker has it."""
    model = subject.model()
    parent: Snapshot | None = None
    for number, step in enumerate(steps):
        apply(step, model)
        container, root = subject.opened(parent)
        apply(step, root)
        assert_same(root, model)
        if changes is not None and number == len(steps) - 1:
            assert subject.changes(container) == list(changes)
        parent = subject.commit(container)
        subject.assert_shows(parent, model)
        subject.assert_whole(parent)
    assert parent is not None
    return parent


def files_added_changed_removed(subject: Subject) -> None:
    """The three letters of `docker diff`."""
    _steps(
        subject,
        _BASE,
        [file("new", b"n"), append("etc/passwd", b"me\n"), remove("etc/hosts"), directory("etc/new.d")],
        changes=["C /etc", "D /etc/hosts", "A /etc/new.d", "C /etc/passwd", "A /new"],
    )


def nothing_changed(subject: Subject) -> None:
    """A commit of nothing is a layer all the same, and changes nothing."""
    _steps(subject, _BASE, [], changes=[])


def files_truncated_and_overwritten(subject: Subject) -> None:
    """Shorter, longer, in the middle, to nothing."""
    _steps(
        subject,
        [*_BASE, file("usr/large", _LARGE)],
        [
            truncate("etc/passwd", 3),
            truncate("var/data", 1 << 20),
            write("usr/large", b"-" * 4096, 1 << 20),
            truncate("usr/bin/tool", 0),
        ],
        changes=[
            "C /etc", "C /etc/passwd", "C /usr", "C /usr/bin", "C /usr/bin/tool", "C /usr/large", "C /var",
            "C /var/data",
        ],
    )  # fmt: skip


def small_files_written_in_place(subject: Subject) -> None:
    """Files of a few bytes, of 4095, 4096 and 4097: whichever side of a driver's limits they fall."""
    sizes = (1, 100, 4095, 4096, 4097, 8192)
    _steps(
        subject,
        [file(f"f{size}", b"a" * size) for size in sizes],
        [write(f"f{size}", b"b", size - 1) for size in sizes],
        changes=[f"C /f{size}" for size in sorted(sizes, key=str)],
    )


def written_just_now(subject: Subject) -> None:
    """Data that is in memory only, of a file of which nothing else has been touched: `apply` would set its times."""
    container, root = subject.opened(_steps(subject, [file("large", _LARGE)]))
    with (root / "large").open("r+b") as large:
        large.write(b"changed")
    assert subject.changes(container) == ["C /large"]


def directories_removed(subject: Subject) -> None:
    """A tree goes; its siblings of like names stay."""
    alike = [directory("d"), file("d/in", b"1"), file("d.x", b"2"), directory("d!"), file("d!/in", b"3")]
    _steps(subject, alike, [remove("d")], changes=["D /d"])


def files_renamed(subject: Subject) -> None:
    """A file of the image under a new name, over another one, and into a new directory."""
    _steps(
        subject,
        _BASE,
        [
            rename("etc/hosts", "etc/hosts.old"),
            rename("var/data", "etc/passwd"),
            directory("new"),
            rename("usr/bin/tool", "new/tool"),
        ],
        changes=[
            "C /etc", "D /etc/hosts", "A /etc/hosts.old", "C /etc/passwd", "A /new", "A /new/tool", "C /usr",
            "C /usr/bin", "D /usr/bin/tool", "C /var", "D /var/data",
        ],
    )  # fmt: skip


def directories_renamed(subject: Subject) -> None:
    """A directory of the image and one of the container under new names, changed before and after."""
    _steps(
        subject,
        _BASE,
        [
            append("etc/passwd", b"before\n"),
            rename("etc", "moved"),
            append("moved/hosts", b"after\n"),
            directory("own"),
            file("own/f", b"f"),
            rename("own", "usr/own"),
        ],
        changes=[
            "D /etc", "A /moved", "A /moved/default", "A /moved/default/locale", "A /moved/hosts", "A /moved/passwd",
            "C /usr", "A /usr/own", "A /usr/own/f",
        ],
    )  # fmt: skip


def directory_renamed_over_its_old_name(subject: Subject) -> None:
    """A new directory in the place of a renamed one shows nothing of the old."""
    _steps(subject, _BASE, [rename("etc", "etc.old"), directory("etc"), file("etc/only", b"1")])


def hard_links_kept(subject: Subject) -> None:
    """Names of one file made in one container stay one file."""
    linked = [file("a", _LARGE[:9000]), hard_link("a", "b"), directory("d"), hard_link("a", "d/c")]
    _steps(subject, linked, [file("x", b"x"), hard_link("x", "y")], changes=["A /x", "A /y"])


def hard_links_of_other_types(subject: Subject) -> None:
    """Symlinks, fifos and devices may have several names too."""
    _steps(
        subject,
        [
            symlink("nowhere", "link"),
            hard_link("link", "link2"),
            node("pipe", stat.S_IFIFO | 0o600),
            hard_link("pipe", "pipe2"),
            node("null", stat.S_IFCHR | 0o666, 1, 3),
            hard_link("null", "null2"),
        ],
    )


def hard_link_to_a_file_of_the_image(subject: Subject) -> None:
    """A new name for a file of a lower layer: one file under both names, after the commit too."""
    model = subject.model()
    apply(_BASE, model)
    container, root = subject.opened(subject.image(_BASE))
    for top in (root, model):
        apply([hard_link("var/data", "etc/data")], top)
        assert os.path.samefile(top / "var/data", top / "etc/data")
    committed = subject.commit(container)
    _, again = subject.opened(committed)
    assert os.path.samefile(again / "var/data", again / "etc/data")
    assert_same(again, root)


def hard_link_broken(subject: Subject) -> None:
    """A write through one name of a linked file of the image: the other has the old or the new data, never a mixture.

    (POSIX wants the new one; overlayfs copies up one name alone.) The commit is as the mount was.
    """
    base = subject.image([file("a", b"old" * 3000), hard_link("a", "b"), file("c", b"c")])
    container, root = subject.opened(base)
    apply([write("a", b"new")], root)
    assert (root / "a").read_bytes() == b"new" + b"old" * 2999
    assert (root / "b").read_bytes()[:3] in (b"old", b"new")
    _, again = subject.opened(subject.commit(container))
    assert (again / "a").read_bytes() == (root / "a").read_bytes()
    assert (again / "b").read_bytes() == (root / "b").read_bytes()


def hard_link_with_one_name_removed(subject: Subject) -> None:
    """The other name keeps the data."""
    base = subject.image([file("a", _LARGE[:9000]), hard_link("a", "b")])
    container, root = subject.opened(base)
    apply([remove("a")], root)
    committed = subject.commit(container)
    assert subject.changes(container) == ["D /a"]
    _, again = subject.opened(committed)
    assert os.listdir(again) == ["b"]
    assert (again / "b").read_bytes() == _LARGE[:9000]


def devices_and_fifos(subject: Subject) -> None:
    """Every type but sockets goes through a commit, with the largest device numbers that XFS can hold."""
    _steps(
        subject,
        _BASE,
        [
            node("null", stat.S_IFCHR | 0o666, 1, 3),
            node("disk", stat.S_IFBLK | 0o660, 511, 262143),
            node("pipe", stat.S_IFIFO | 0o644),
        ],
        changes=["A /disk", "A /null", "A /pipe"],
    )


def sockets(subject: Subject) -> None:
    """A socket lives in its container; no tar can hold one, so the commit goes without."""
    container, root = subject.opened(subject.image(_BASE))
    apply([node("run", stat.S_IFSOCK | 0o700), file("beside", b"1")], root)
    assert stat.S_ISSOCK((root / "run").stat().st_mode)
    _, again = subject.opened(subject.commit(container))
    assert (again / "beside").exists()
    assert not os.path.lexists(again / "run")


def opaque_directories(subject: Subject) -> None:
    """A directory replaced by an empty one of its name, then filled; what was in it does not come back."""
    _steps(
        subject,
        _BASE,
        [replace_directory("etc", 0o700), file("etc/hosts", b"new")],
        [file("etc/passwd", b"again")],
        [replace_directory("etc")],
        changes=["C /etc", "D /etc/hosts", "D /etc/passwd"],
    )


def opaque_directory_changes(subject: Subject) -> None:
    """The entries that an opaque directory hides count as deleted, at any depth."""
    _steps(
        subject,
        _BASE,
        [replace_directory("etc"), file("etc/hosts", b"new"), directory("etc/default"), directory("etc/a")],
        changes=["C /etc", "A /etc/a", "C /etc/default", "D /etc/default/locale", "C /etc/hosts", "D /etc/passwd"],
    )


def removed_and_made_again(subject: Subject) -> None:
    """Deletions and new things of the same name, in one container and over three layers."""
    _steps(
        subject,
        _BASE,
        [remove("etc"), remove("var/data")],
        [directory("etc", 0o711), directory("etc/default"), file("var/data", b"new")],
        [remove("etc/default"), file("etc/default", b"now a file")],
        changes=["C /etc", "C /etc/default"],
    )


def types_changed(subject: Subject) -> None:
    """Each type replaced by each other one."""
    makers: dict[str, Callable[[str], list[Operation]]] = {
        "file": lambda name: [file(name, b"f" * 5000)],
        "dir": lambda name: [directory(name), file(f"{name}/in", b"1")],
        "link": lambda name: [symlink("target", name)],
        "pipe": lambda name: [node(name, stat.S_IFIFO | 0o600)],
    }
    before: list[Operation] = []
    after: list[Operation] = []
    for old, make_old in makers.items():
        for new, make_new in makers.items():
            name = f"{old}-{new}"
            before += make_old(name)
            after += [remove(name), *make_new(name)]
    _steps(subject, before, after)


def permissions_of_a_large_file(subject: Subject) -> None:
    """A chmod alone must not publish an empty or holey file (design trap 2)."""
    _steps(
        subject,
        [file("large", _LARGE), file("small", b"s"), file("owned", _LARGE), file("marked", _LARGE)],
        [
            chmod("large", 0o4711),
            chmod("small", 0o600),
            chown("owned", 1000, 1000),
            set_xattr("marked", "user.mark", b"1"),
        ],
        changes=["C /large", "C /marked", "C /owned", "C /small"],
    )


def times_alone(subject: Subject) -> None:
    """A touch is a change; nanoseconds and years before 1970 survive."""
    _steps(
        subject,
        _BASE,
        [utime("etc/passwd", -1), utime("var", -1_000_000_007), utime("usr/bin/tool", 4_000_000_000_000_000_001)],
        changes=["C /etc", "C /etc/passwd", "C /usr", "C /usr/bin", "C /usr/bin/tool", "C /var"],
    )


def mapped_writes(subject: Subject) -> None:
    """What was written through a mapping is in the mount, in reads, and in the commit."""
    _steps(
        subject,
        [file("large", _LARGE), file("small", b"0123456789")],
        [map_write("large", b"mapped", 1 << 20), map_write("large", b"end", len(_LARGE) - 3), map_write("small", b"x")],
        changes=["C /large", "C /small"],
    )


def written_while_mapped(subject: Subject) -> None:
    """A file opened before its copy-up shows the old data, one opened after it the new (overlayfs's known limit)."""
    _, root = subject.opened(subject.image([file("f", b"old" * 5000)]))
    with (root / "f").open("rb") as early:
        apply([write("f", b"new")], root)
        assert early.read(3) in (b"old", b"new")
    assert (root / "f").read_bytes()[:6] == b"newold"


def root_directory(subject: Subject) -> None:
    """Mode, owner and attributes of / belong to the image, change in the container, and are committed."""
    _steps(
        subject,
        [chmod("", 0o711), chown("", 5, 6), set_xattr("", "user.root", b"1"), file("a")],
        [file("b")],
        [chmod("", 0o1777), chown("", 0, 0), remove_xattr("", "user.root"), set_xattr("", "user.later", b"2")],
    )


def owners_and_attributes(subject: Subject) -> None:
    """Ids beyond 16 and 31 bits, set-user-ID after chown, capabilities, ACLs, and the overlay's own names."""
    capability = bytes.fromhex("0100000200240000000000000000000000000000")[:20]
    acl = bytes.fromhex("02000000" "01000700ffffffff" "02000400e8030000" "04000500ffffffff" "10000500ffffffff"
                        "20000000ffffffff")  # fmt: skip
    marks = {"security.capability": capability, "user.empty": b"", "user.long": b"v" * 2000}
    _steps(
        subject,
        [
            file("ids", b"1", 0o6755, 2**31, 2**32 - 2),
            directory("d", 0o3777, 70_000, 65_536),
            file("marked", b"2" * 5000, 0o755, 0, 0, marks),
            file("linked", b"2" * 5000, 0o755, 0, 0, marks),
            hard_link("linked", "linked2"),
            file("acl", b"3", 0o640, 0, 0, {"system.posix_acl_access": acl}),
            directory("acl.d", 0o750, 0, 0, {"system.posix_acl_default": acl}),
            symlink("ids", "link"),
            chown("link", 70_000, 70_000),
        ],
        [set_xattr("marked", "user.more", b"m"), remove_xattr("marked", "user.empty"), chown("ids", 1, 2)],
        changes=["C /ids", "C /marked"],
    )


def strange_names(subject: Subject) -> None:
    """Any bytes but a slash and a NUL may be a name."""
    names = [
        b"\xff\xfe",
        b"new\nline",
        b"-rf",
        b" ",
        b"...",
        b"a:b,c\\d\"'",
        b"n" * 255,
        "zażółć".encode(),
        b"\x7f\x01",
    ]
    made = [file(name, name) for name in names]
    deep = b"/".join([b"d" * 200] * 3)
    below = [directory(deep[:200]), directory(deep[:401]), directory(deep), file(deep + b"/\xff", b"1")]
    _steps(
        subject,
        [*made, *below, symlink(b"\xfe" * 300, b"l")],
        [append(names[0], b"!"), remove(names[1]), remove(names[6]), file(deep + b"/\xfe", b"2")],
    )


def sparse_files(subject: Subject) -> None:
    """A file with holes reads the same everywhere."""
    _steps(subject, [file("sparse", b"head"), truncate("sparse", 8 << 20), write("sparse", b"middle", 3 << 20)])


def many_files(subject: Subject) -> None:
    """A thousand entries of a directory, half of them gone."""
    names = [f"d/{number:04}" for number in range(1000)]
    _steps(
        subject,
        [directory("d"), *(file(name, name.encode()) for name in names)],
        [remove(name) for name in names[::2]],
        changes=["C /d", *(f"D /{name}" for name in names[::2])],
    )


def changes_of_a_deep_place(subject: Subject) -> None:
    """Directories on the way to a change count as changed, as Docker lists them."""
    path = "/".join("abcdefgh")
    above = [directory(path[: 2 * depth + 1]) for depth in range(8)]
    _steps(
        subject,
        [*above, file(f"{path}/f", b"1")],
        [append(f"{path}/f", b"2")],
        changes=[*(f"C /{path[: 2 * depth + 1]}" for depth in range(8)), f"C /{path}/f"],
    )


def rules_of_a_diff(subject: Subject) -> None:
    """A name that only a layer's deletions may have is refused, and nothing of the commit is left."""
    container, root = subject.opened(subject.image(_BASE))
    (root / ".wh.etc").touch()
    layers = subject.driver.stored().layers
    refused(InvalidArgument, lambda: subject.engine.commit(container))
    assert subject.driver.stored().layers == layers
    (root / ".wh.etc").unlink()
    subject.commit(container)


CASES: tuple[Case, ...] = (
    files_added_changed_removed,
    nothing_changed,
    files_truncated_and_overwritten,
    small_files_written_in_place,
    written_just_now,
    directories_removed,
    files_renamed,
    directories_renamed,
    directory_renamed_over_its_old_name,
    hard_links_kept,
    hard_links_of_other_types,
    hard_link_to_a_file_of_the_image,
    hard_link_broken,
    hard_link_with_one_name_removed,
    devices_and_fifos,
    sockets,
    opaque_directories,
    opaque_directory_changes,
    removed_and_made_again,
    types_changed,
    permissions_of_a_large_file,
    times_alone,
    mapped_writes,
    written_while_mapped,
    root_directory,
    owners_and_attributes,
    strange_names,
    sparse_files,
    many_files,
    changes_of_a_deep_place,
    rules_of_a_diff,
)
