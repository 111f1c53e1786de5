"""From what a user typed to an image source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

from hpmapper.errors import InvalidArgument, NotFound
from hpmapper.image.documents import ImportOptions
from hpmapper.image.platforms import Platform
from hpmapper.image.source import Form, ImageSource

FORMS = "docker://NAME, oci:DIR, oci-archive:FILE, docker-archive:FILE, tar:FILE, dir:DIR, a path, or -"


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """What opening a source may need.

    Attributes:
        spool: an existing directory for temporary files (downloads, unpacked archives).
        platform: instead of this machine's.
        imported: the config of an image made from a root file system.
        tar_directory: needed for directories that are root file systems only.
        stdin: what `-` reads.
        insecure: allow plain HTTP and unverified TLS to any registry, not only to this machine.
        progress: is given a registry download's lines of text.
    """

    spool: Path
    platform: Platform | None = None
    imported: ImportOptions = field(default_factory=ImportOptions)
    tar_directory: Callable[[Path, BinaryIO], None] | None = None
    stdin: BinaryIO | None = None
    insecure: bool = False
    progress: Callable[[str], None] | None = None


def open_source(text: str, options: SourceOptions) -> ImageSource:
    """Return the source that `text` names, not yet entered; a bare path is told apart by looking.

    Raises:
        InvalidArgument: no source is called that.
        NotFound: there is no such file.
    """
    if text.startswith("docker://"):
        return _registry(text.removeprefix("docker://"), options)
    scheme, colon, rest = text.partition(":")
    opener = _SCHEMES.get(scheme) if colon else None
    if opener is None:
        return _bare(text, options)
    if not rest:
        raise InvalidArgument(f"{text!r} names no file", hint=FORMS)
    return opener(rest, options)


def _registry(name: str, options: SourceOptions) -> ImageSource:
    from hpmapper.image.registry import RegistrySource

    return RegistrySource(
        name,
        spool=options.spool,
        platform=options.platform,
        insecure=options.insecure,
        progress=options.progress,
    )


def _layout(rest: str, options: SourceOptions) -> ImageSource:
    from hpmapper.image.layout import LayoutSource

    path, ref = _path_and_ref(rest)
    return LayoutSource(path, ref, options.platform)


def _directory(rest: str, options: SourceOptions) -> ImageSource:
    from hpmapper.image.rootfs import DirectorySource

    if options.tar_directory is None:
        raise InvalidArgument(f"a directory cannot be imported here: {rest}", hint="make a tar of it first")
    return DirectorySource(Path(rest), options.tar_directory, _imported(options))


def _tar(path: Path | None, form: Form | None, ref: str | None, options: SourceOptions) -> ImageSource:
    from hpmapper.image.archive import TarSource

    return TarSource(
        path,
        spool=options.spool,
        stdin=options.stdin,
        form=form,
        ref=ref,
        platform=options.platform,
        options=_imported(options),
    )


def _archive(form: Form, rest: str, options: SourceOptions) -> ImageSource:
    path, ref = _path_and_ref(rest)
    return _tar(None if path == Path("-") else path, form, ref, options)


_SCHEMES: dict[str, Callable[[str, SourceOptions], ImageSource]] = {
    "oci": _layout,
    "dir": _directory,
    "tar": lambda rest, options: _tar(None if rest == "-" else Path(rest), Form.ROOTFS, None, options),
    "oci-archive": partial(_archive, Form.OCI),
    "docker-archive": partial(_archive, Form.DOCKER),
}


def _bare(text: str, options: SourceOptions) -> ImageSource:
    if text == "-":
        return _tar(None, None, None, options)
    path = Path(text)
    if path.is_file() or path.is_fifo():
        return _tar(path, None, None, options)
    if not path.is_dir():
        raise NotFound(f"there is no file or directory {text!r}", hint=f"an image in a registry is docker://{text}")
    if (path / "oci-layout").is_file():
        return _layout(text, options)
    return _directory(text, options)


def _path_and_ref(rest: str) -> tuple[Path, str | None]:
    """Split `PATH[:REF]`; a path that exists may contain colons."""
    whole = Path(rest)
    path, colon, ref = rest.partition(":")
    if not colon or whole.exists():
        return whole, None
    return Path(path), ref


def _imported(options: SourceOptions) -> ImportOptions:
    return replace(options.imported, platform=options.imported.platform or options.platform)
