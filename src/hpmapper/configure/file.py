"""A configuration file replaced as a whole: backed up, atomically, with its owner, mode and attributes."""

from __future__ import annotations

import errno
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hpmapper.errors import FailedPrecondition, InvalidArgument

Validate = Callable[[Path], None]
"""Judges a file before it is put in place; raises if it is bad."""


@dataclass(frozen=True, slots=True)
class Text:
    """What a file said when it was read: `raw` is None when there was none."""

    file: Path
    raw: bytes | None

    @property
    def text(self) -> str:
        """Its text.

        Raises:
            InvalidArgument: it is not UTF-8.
        """
        raw = self.raw or b""
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            line = raw[: error.start].count(b"\n") + 1
            raise InvalidArgument(f"{self.file}, line {line}: this is not UTF-8: {error.reason}") from None


def read(file: Path) -> Text:
    """Read a file, which may be missing; what a symlink points to is what will be replaced."""
    target = Path(os.path.realpath(file))
    try:
        return Text(target, target.read_bytes())
    except FileNotFoundError:
        return Text(target, None)
    except OSError as error:
        if error.errno != errno.EISDIR:
            raise
        raise InvalidArgument(f"{file} is a directory", hint="name the file in it") from None


def replace(old: Text, text: str, validate: Validate) -> Path | None:
    """Put a new text in place of an old one; returns the backup, None where there was nothing to keep.

    Raises:
        FailedPrecondition: somebody has changed the file since it was read. What `validate` raises.
    """
    old.file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    with _beside(old.file) as new:
        new.write_bytes(text.encode("utf-8"))
        _copy_attributes(old, new)
        validate(new)
        if read(old.file).raw != old.raw:
            raise FailedPrecondition(f"{old.file} was changed by somebody else meanwhile", hint="try again")
        backup = _back_up(old) if old.raw is not None else None
        _sync(new)
        new.rename(old.file)
        _sync(old.file.parent)
    return backup


@contextmanager
def _beside(file: Path) -> Iterator[Path]:
    """A new file on the same file system, gone at the end if it was not renamed.

    Its name does not end in .toml: containerd reads those of some directories.
    """
    fd, name = tempfile.mkstemp(prefix=f".{file.name}.", suffix=".new", dir=file.parent)
    os.close(fd)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _copy_attributes(old: Text, new: Path) -> None:
    if old.raw is None:
        new.chmod(0o644)
        return
    facts = old.file.stat()
    os.chown(new, facts.st_uid, facts.st_gid)
    new.chmod(facts.st_mode & 0o7777)
    for name in os.listxattr(old.file):  # an SELinux label: without it the daemon may not read the file
        os.setxattr(new, name, os.getxattr(old.file, name))


def _back_up(old: Text) -> Path:
    """A copy under a name that nobody has; its end keeps programs from reading it."""
    stem = f"{old.file.name}.{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    for number in range(1000):
        backup = old.file.with_name(f"{stem}{f'-{number}' if number else ''}.bak")
        try:
            fd = os.open(backup, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            continue
        with open(fd, "wb") as file:
            file.write(old.raw or b"")
        _copy_attributes(old, backup)
        _sync(backup)
        return backup
    raise FailedPrecondition(f"{old.file} has a thousand backups of this second", hint="try again")


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
