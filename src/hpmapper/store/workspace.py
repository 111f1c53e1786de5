"""Directories for unfinished things, each owned by one living process.

    t/TOKEN      locked (flock) for as long as its owner lives

A lock that can be taken means that the owner is dead, however it died; then the directory is rubbish, and
what the database says TOKEN was at work on is to be undone.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

from hpmapper import faults
from hpmapper.errors import FailedPrecondition
from hpmapper.kernel import btrfs, lock
from hpmapper.kernel.mountinfo import mounts_below

log = logging.getLogger(__name__)


class Workspace:
    """This process's directory in `scratch`, until `close`."""

    def __init__(self, scratch: Path) -> None:
        self._stack = ExitStack()
        self.path = self._acquire(scratch)
        self._numbers = count()

    @property
    def token(self) -> str:
        """The name by which the database knows the owner."""
        return self.path.name

    def _acquire(self, scratch: Path) -> Path:
        while True:
            path = scratch / secrets.token_hex(8)
            path.mkdir(mode=0o700)
            faults.point("workspace.made")
            fd = self._stack.enter_context(lock.exclusive(path))
            # A sweeper may have removed the directory between the two calls.
            if os.path.lexists(path) and os.path.samestat(os.fstat(fd), path.stat()):
                return path
            self._stack.close()

    @contextmanager
    def directory(self) -> Iterator[Path]:
        """A new empty directory for one operation, removed with all that is left in it."""
        path = self.path / str(next(self._numbers))
        path.mkdir(mode=0o700)
        try:
            yield path
        finally:
            remove_tree(path)

    def close(self) -> None:
        """Remove the directory and give up the lock."""
        remove_tree(self.path)
        self._stack.close()


def is_alive(scratch: Path, token: str) -> bool:
    """Whether the owner of a workspace lives."""
    try:
        with _locked_if_dead(scratch / token):
            return False
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True


def sweep(scratch: Path) -> None:
    """Remove what dead owners left."""
    for entry in list(os.scandir(scratch)):
        try:
            with _locked_if_dead(Path(entry.path)):
                remove_tree(Path(entry.path))
        except (BlockingIOError, FileNotFoundError):
            continue  # alive, or being swept by somebody else
        except FailedPrecondition as error:
            log.warning("%s is left for later: %s", entry.path, error)  # something is mounted in it: others go on


@contextmanager
def _locked_if_dead(path: Path) -> Iterator[None]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with lock.exclusive(fd, timeout=0):
            yield
    finally:
        os.close(fd)


@contextmanager
def workspace(scratch: Path) -> Iterator[Path]:
    """A workspace's directory for one operation."""
    own = Workspace(scratch)
    try:
        yield own.path
    finally:
        own.close()


def discard(path: Path, scratch: Path) -> None:
    """Remove the tree at `path`, if there is one.

    It is moved into a workspace first (same file system), so that it is gone at once, and a crash leaves only rubbish.

    Raises:
        FailedPrecondition: something is mounted in it.
    """
    if not os.path.lexists(path):
        return
    with workspace(scratch) as grave:
        try:
            path.rename(grave / "0")
            faults.point("discard.moved")
        except FileNotFoundError:
            pass
        except OSError as error:
            raise FailedPrecondition(f"{path} cannot be removed: {error.strerror}", hint="is it mounted?") from error


def remove_tree(top: Path) -> None:
    """Remove a directory and all below it, subvolumes too. Symlinks are not followed, mount points are an error.

    Each directory met is moved up to `top`'s first level before it is emptied, so neither paths nor recursion grow
    with the depth, which a hostile container can make arbitrary. The names there are new ones: somebody may have been
    killed at the same work.

    Raises:
        FailedPrecondition: something is mounted in it.
    """
    device = os.lstat(top).st_dev
    flat_name = os.path.join(os.fspath(top), f".{secrets.token_hex(8)}-")
    numbers = count()
    pending = [os.fspath(top)]
    while pending:
        here = pending[-1]
        inner = [one for one in _unlink_files(here, device) if not _removed_if_empty(one)]
        if len(pending) > 1:
            flat = [f"{flat_name}{next(numbers)}" for _ in inner]
            for directory, name in zip(inner, flat, strict=True):
                os.rename(directory, name)
            inner = flat
        if not inner or len(pending) > 1:
            os.rmdir(here)
            pending.pop()
        pending.extend(inner)


def _removed_if_empty(directory: str) -> bool:
    """Remove a directory that is empty, as most of a container's are that wrote nothing; False: it is not."""
    try:
        os.rmdir(directory)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY):  # rmdir(2) may say either
            raise
        return False
    return True


def _unlink_files(directory: str, device: int) -> list[str]:
    """Unlink everything but the directories in `directory`, which are returned; a subvolume goes as a whole."""
    inner = []
    for entry in list(os.scandir(directory)):
        if not entry.is_dir(follow_symlinks=False):
            os.unlink(entry.path)
        elif entry.stat(follow_symlinks=False).st_dev == device:
            inner.append(entry.path)
        elif btrfs.is_subvolume(entry.path) and not mounts_below(entry.path):  # deleting it would detach them
            btrfs.delete_subvolume(entry.path)
        else:
            raise FailedPrecondition(f"something is mounted in {entry.path}", hint="unmount it")
    return inner
