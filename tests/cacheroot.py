"""What the tests of the cache stand on: a small root with images and containers, and bytes that are known."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from hpmapper.config import Config
from hpmapper.containers import Containers
from hpmapper.engine import Engine
from hpmapper.image.opening import SourceOptions
from hpmapper.images import Images
from hpmapper.kernel.sync import syncfs
from hpmapper.meta.images import ContainerRow
from hpmapper.root import open_root
from tests.scenario import Silent

MIB = 1 << 20


class CacheRoot:
    """An open root, with short words for what tests do."""

    def __init__(self, engine: Engine, directory: Path) -> None:
        self.engine = engine
        self.images = Images(engine)
        self.containers = Containers(engine)
        self._directory = directory

    @property
    def home(self) -> Path:
        return self.engine.driver.scratch.parent

    def image(self, name: str, files: Mapping[str, bytes]) -> str:
        """Bring in an image with these files; returns its id."""
        tar = self._directory / "image.tar"
        tar.write_bytes(tar_of(files))
        (brought,) = self.images.bring(f"tar:{tar}", SourceOptions(spool=self._directory), [name], Silent())
        return brought.image.id

    def container(self, image: str, name: str) -> tuple[ContainerRow, Path]:
        """A new container, mounted."""
        row = self.containers.create(image, name)
        return row, self.containers.mount(row)

    def forget(self) -> None:
        """Drop what is cached of this root's file systems, and of no others: tests run beside other work."""
        syncfs(self.home)
        for top in (self.home, *(path for place in ("i", "l") for path in (self.home / place).glob("*/m"))):
            for path in top.rglob("*"):
                if path.is_file() and not path.is_symlink():
                    forget(path)


def forget(path: Path) -> None:
    """Drop a file's clean pages."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def tar_of(files: Mapping[str, bytes]) -> bytes:
    """A tar of files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o755
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


@contextmanager
def cache_root(directory: Path, driver: str = "hpmapper", size: str = "500M", fs: str = "xfs") -> Iterator[CacheRoot]:
    """A root in `directory`, detached at the end."""
    config = Config(root=directory / "root", driver=driver)
    config = config.with_options([f"pool.size={size}", f"pool.fs={fs}", "min_free_space=0"])
    with open_root(config) as opened:
        try:
            yield CacheRoot(opened.engine, directory)
        finally:
            opened.engine.detach()
