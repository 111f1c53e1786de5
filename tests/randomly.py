"""Random changes to a tree, for comparing what finds them."""

from __future__ import annotations

import os
import random
from pathlib import Path

from hpmapper.layer.scan import scan
from hpmapper.testing.trees import (
    append,
    apply,
    chmod,
    directory,
    file,
    hard_link,
    remove,
    rename,
    set_xattr,
    symlink,
    utime,
    write,
)
from hpmapper.tree import walk


def do_something(chance: random.Random, root: Path, step: int) -> None:
    """One random operation on what is there."""
    found = sorted(os.fsdecode(path) for path, inode in walk(scan(os.fsencode(root), overlay=False)) if path)
    files = [path for path in found if (root / path).is_file()]
    folders = ["."] + [path for path in found if (root / path).is_dir() and not (root / path).is_symlink()]
    one, into = chance.choice(files), chance.choice(folders)
    moved = chance.choice(found)
    if f"{into}/".startswith(f"{moved}/"):
        moved = one
    operations = [
        append(one, b"more"),
        write(one, b"x"),
        chmod(one, 0o600 + step % 8),
        set_xattr(one, "user.step", b"%d" % step),
        utime(one, step * 10**9),
        remove(one),
        rename(moved, f"{into}/moved{step}"),
        hard_link(one, f"{into}/link{step}"),
        symlink("../a", f"{into}/sym{step}"),
        file(f"{into}/new{step}", b"new"),
        directory(f"{into}/dir{step}"),
        directory(f"{into}/dir{step}"),
    ]
    apply([chance.choice(operations)], root)
