"""What the operator wants, from the command line, our TOML or Docker's daemon.json.

    storage-driver = "hpmapper"             # as in Docker; else the root's own, else the first that works
    storage-opts   = ["pool.size=200G"]     # as in Docker: NAME=VALUE, see OPTIONS
    root           = "/var/lib/hpmapper"
    metrics        = "127.0.0.1:9469"       # where `serve` tells Prometheus its metrics; nowhere if not said

    [pool]                                  # the same options, written as tables
    size = "200G"
    [dm]
    basesize = "20G"
    [zfs]
    fsname = "tank/hpmapper"

daemon.json may hold any of Docker's other keys, which are Docker's business; our own file may not hold unknown ones.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from hpmapper.drivers.registry import DRIVERS, POOL_OPTIONS, REPEATABLE, Registered, by_name, nearest
from hpmapper.errors import InvalidArgument, NotFound
from hpmapper.kernel.fs import filesystem_name
from hpmapper.pool.base import PoolConfig, PoolFs, PoolKind, parse_size
from hpmapper.pool.floor import DEFAULT_FLOOR, Floor, parse_floor

DEFAULT_ROOT = Path("/var/lib/hpmapper")
DEFAULT_FILE = Path("/etc/hpmapper/config.toml")

_Choice = TypeVar("_Choice", PoolKind, PoolFs)

_DOCKERS_NAMES = {"size": "vfs.size"}
"""Options that Docker's drivers call otherwise."""

_TABLES = ("pool", "dm", "zfs")
_KEYS = ("storage-driver", "storage-opts", "root", "metrics", *_TABLES, "min_free_space")


@dataclass(frozen=True, slots=True)
class Config:
    """What was asked for; None and absent mean that nobody said."""

    root: Path = DEFAULT_ROOT
    driver: str | None = None
    metrics: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)

    def with_options(self, words: tuple[str, ...] | list[str]) -> Config:
        """With "NAME=VALUE" words added; the last of a name counts, of a repeatable one all.

        Raises:
            InvalidArgument: malformed or unknown.
        """
        options = dict(self.options)
        for word in words:
            name, equals, value = word.partition("=")
            if not equals:
                raise InvalidArgument(f"storage option {word!r} has no value", hint="write NAME=VALUE")
            known = _known(name)
            options[known] = f"{options[known]}\n{value}" if known in REPEATABLE and known in options else value
        return replace(self, options=options)

    def pool(self, registered: Registered | None = None) -> PoolConfig:
        """The pool to make for a driver, where there is none yet.

        A driver that needs a certain file system takes the root directory's, if it is that and nothing else was asked.

        Raises:
            InvalidArgument: a value is none of its kind, or not what the driver needs.
        """
        device, directory = self.options.get("pool.device"), self.options.get("pool.directory")
        default = PoolKind.DIRECT if device else PoolKind.DIRECTORY if directory else PoolKind.LOOP
        needed = registered.pool_fs if registered else None
        if needed and "pool.size" not in self.options and _kind_of(self.root) == needed and not device:
            default = PoolKind.DIRECTORY
        fs = _one_of(PoolFs, self.options.get("pool.fs", needed or PoolFs.XFS), "pool.fs")
        if registered and needed and fs is not needed:
            raise InvalidArgument(f"the {registered.name} driver needs a pool with {needed}, not {fs}")
        return PoolConfig(
            kind=_one_of(PoolKind, self.options.get("pool.kind", default), "pool.kind"),
            fs=fs,
            size=parse_size(self.options["pool.size"]) if "pool.size" in self.options else 0,
            device=Path(device) if device else None,
            directory=Path(directory) if directory else None,
        )

    def own_options(self, driver: Registered) -> dict[str, str]:
        """The options that are the driver's own."""
        return {name: value for name, value in self.options.items() if name in driver.options}

    def floor(self) -> Floor:
        """The space to keep free."""
        text = self.options.get("min_free_space")
        return parse_floor(text) if text is not None else DEFAULT_FLOOR


def _kind_of(root: Path) -> str:
    """The file system that a root directory lies on, or will."""
    return filesystem_name(next(path for path in (root, *root.absolute().parents) if path.is_dir()))


def _one_of(kind: type[_Choice], text: str, option: str) -> _Choice:
    try:
        return kind(text)
    except ValueError:
        raise InvalidArgument(f"{option} cannot be {text!r}", hint=nearest(text, list(map(str, kind)))) from None


def _known(name: str) -> str:
    known = {*POOL_OPTIONS, *(option for driver in DRIVERS for option in driver.options)}
    bare = name.strip().removeprefix("hpmapper.")
    bare = _DOCKERS_NAMES.get(bare, bare)
    bare = bare.lower() if bare.lower().startswith(("dm.", "zfs.")) else bare  # as Docker's drivers took them
    if bare not in known:
        raise InvalidArgument(f"there is no storage option {name!r}", hint=nearest(bare, known))
    return bare


def load(path: Path | None) -> Config:
    """Read a file (JSON by its name, else TOML); None: the default one, if it exists.

    Raises:
        NotFound: the named file does not exist. InvalidArgument: it is malformed; the message has the line.
    """
    file = path or DEFAULT_FILE
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        if path is None:
            return Config()
        raise NotFound(f"config file {file} does not exist") from None
    except (UnicodeDecodeError, OSError) as error:
        raise InvalidArgument(f"config file {file} cannot be read: {error}") from None
    is_json = file.suffix == ".json"
    try:
        content = json.loads(text) if is_json else tomllib.loads(text)
    except (json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidArgument(f"config file {file}: {error}") from None
    return _Reader(file, text, foreign_keys=is_json).read(content)


class _Reader:
    """Turns a file's content into a `Config`; knows the file's lines, for messages."""

    def __init__(self, file: Path, text: str, *, foreign_keys: bool) -> None:
        self._file = file
        self._lines = text.splitlines()
        self._foreign_keys = foreign_keys

    def read(self, content: object) -> Config:
        table = self._table(content, "")
        for key in table:
            if key not in _KEYS and not self._foreign_keys:
                raise self._refused(key, f"unknown key {key!r}", nearest(key, _KEYS))
        words = self._words(table.get("storage-opts", []))
        config = Config(
            root=Path(self._string(table, "root", str(DEFAULT_ROOT))) if not self._foreign_keys else DEFAULT_ROOT,
            driver=self._driver(table),
            metrics=(self._string(table, "metrics", "") or None) if not self._foreign_keys else None,
        )
        if not self._foreign_keys:
            words += self._nested(table)
        for word in words:
            try:
                config = config.with_options([word])
            except InvalidArgument as error:
                name = word.partition("=")[0]
                raise self._refused(name, error.message, error.hint, name.rpartition(".")[2]) from None
        return config

    def _nested(self, table: Mapping[str, object]) -> list[str]:
        words = []
        for name in _TABLES:
            for key, value in self._table(table.get(name, {}), name).items():
                values = value if isinstance(value, list) and f"{name}.{key}" in REPEATABLE else [value]
                words += [f"{name}.{key}={one}" for one in values]
        if "min_free_space" in table:
            words.append(f"min_free_space={table['min_free_space']}")
        return words

    def _driver(self, table: Mapping[str, object]) -> str | None:
        if "storage-driver" not in table:
            return None
        name = self._string(table, "storage-driver", "")
        try:
            return by_name(name).name
        except InvalidArgument as error:
            raise self._refused("storage-driver", error.message, error.hint) from None

    def _words(self, value: object) -> list[str]:
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise self._refused("storage-opts", "storage-opts is not a list of strings", '["NAME=VALUE", …]')
        return list(value)

    def _string(self, table: Mapping[str, object], key: str, default: str) -> str:
        value = table.get(key, default)
        if not isinstance(value, str):
            raise self._refused(key, f"{key} is not a string", "")
        return value

    def _table(self, value: object, key: str) -> dict[str, object]:
        if not isinstance(value, dict):
            raise self._refused(key, f"{key or 'the file'} is not a table of settings", "")
        return value

    def _refused(self, word: str, message: str, hint: str, otherwise: str = "") -> InvalidArgument:
        """The error, with the line that has the word (or, where a table says it in parts, its last part)."""
        line = self._line_of(word) or self._line_of(otherwise)
        where = f"config file {self._file}, line {line}" if line else f"config file {self._file}"
        return InvalidArgument(f"{where}: {message}", hint=hint)

    def _line_of(self, word: str) -> int:
        pattern = re.compile(rf"(?<![\w.-]){re.escape(word)}(?![\w-])")
        return next((number for number, text in enumerate(self._lines, 1) if word and pattern.search(text)), 0)
