"""The dm.* storage options: Docker's names, defaults, checks and messages.

An option that Docker left unchecked and the kernel or a tool then refused (dm.blocksize) is checked here. What
Docker's daemon took and its documentation forbade (dm.min_free_space without "%", percentages of 0) follows the daemon.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from hpmapper.drivers.devicemapper.units import parse_bool, parse_percent, parse_size
from hpmapper.errors import InvalidArgument

GIB = 1 << 30
KIB = 1 << 10

FILESYSTEMS = ("xfs", "ext4")
_BLOCK_SIZES = (64 * KIB, GIB)


@dataclass(frozen=True, slots=True)
class DirectLvm:
    """How `dm.directlvm_device` is to be made a pool; 0 stands for the default, as in Docker's setup-config.json."""

    device: str = ""
    force: bool = False
    percent: int = 0
    metapercent: int = 0
    autoextend_threshold: int = 0
    autoextend_percent: int = 0

    def filled(self) -> DirectLvm:
        """With the defaults for what was left open."""
        return replace(
            self,
            percent=self.percent or 95,
            metapercent=self.metapercent or 1,
            autoextend_threshold=self.autoextend_threshold or 80,
            autoextend_percent=self.autoextend_percent or 20,
        )

    def check(self) -> None:
        """Refuse what contradicts itself."""
        asked = (self.percent, self.metapercent, self.autoextend_threshold, self.autoextend_percent)
        if not self.device:
            if any(asked):
                raise InvalidArgument(
                    "must provide device path in `dm.directlvm_device` in order to configure direct-lvm"
                )
            return
        if bool(self.percent) != bool(self.metapercent):
            raise InvalidArgument("must set both `dm.thinp_percent` and `dm.thinp_metapercent` if either is specified")
        if self.percent + self.metapercent > 100:
            raise InvalidArgument("combined `dm.thinp_percent` and `dm.thinp_metapercent` must not be greater than 100")


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for; None: nobody said, and the default depends on what is found.

    Attributes:
        basesize, loopdatasize, loopmetadatasize, blocksize: bytes.
        fs: of the base device; None: xfs where kernel and mkfs.xfs are there, else ext4.
        min_free_space: percent of the pool's data and metadata blocks that no new snapshot may eat into.
    """

    basesize: int = 10 * GIB
    basesize_given: bool = False
    loopdatasize: int = 100 * GIB
    loopmetadatasize: int = 2 * GIB
    fs: str | None = None
    mkfsarg: tuple[str, ...] = ()
    mountopt: str = ""
    datadev: str = ""
    metadatadev: str = ""
    thinpooldev: str = ""
    blocksize: int = 64 * KIB
    blkdiscard: bool | None = None
    override_udev_sync_check: bool = False
    use_deferred_removal: bool | None = None
    use_deferred_deletion: bool | None = None
    min_free_space: int = 10
    xfs_nospace_max_retries: int | None = None
    libdm_log_level: int = 2
    directlvm: DirectLvm = DirectLvm()

    @property
    def deferred_removal(self) -> bool:
        """On unless it was forbidden: every kernel that this runs on has it (4.27 of the interface, Linux 3.13)."""
        return self.use_deferred_removal is not False

    @property
    def deferred_deletion(self) -> bool:
        """As `deferred_removal`, without which it makes no sense."""
        return self.use_deferred_deletion is not False and self.deferred_removal

    @property
    def names_a_pool(self) -> bool:
        """Whether something was said about where the pool is to lie."""
        return bool(self.thinpooldev or self.datadev or self.directlvm.device)

    def mount_options(self) -> dict[str, str | None]:
        """`dm.mountopt` as the kernel's mount API takes it."""
        words = [word for word in self.mountopt.split(",") if word]
        return {name: value if equals else None for name, equals, value in (word.partition("=") for word in words)}


def parse(words: Iterable[tuple[str, str]]) -> Options:
    """Options of (name, value) pairs in the order given: the last counts, but mkfsarg and mountopt add up (also as
    lines of one value).

    Raises:
        InvalidArgument: unknown, malformed, or at odds with another; in Docker's words where it had some.
    """
    options = Options()
    for name, value in words:
        key = name.strip().lower()
        setter = _SETTERS.get(key)
        if setter is None:
            raise InvalidArgument(f"devmapper: Unknown option {key}", hint=f"known are {', '.join(NAMES)}")
        for one in value.split("\n") if key in REPEATABLE else [value]:
            options = setter(options, one.strip())
    return _checked(options)


def _checked(options: Options) -> Options:
    if options.use_deferred_deletion and not options.deferred_removal:
        raise InvalidArgument(
            "devmapper: Deferred deletion can not be enabled as deferred removal is not enabled. Enable deferred "
            "removal using --storage-opt dm.use_deferred_removal=true parameter"
        )
    options.directlvm.check()
    if options.directlvm.device and options.thinpooldev:
        raise InvalidArgument("cannot setup direct-lvm when `dm.thinpooldev` is also specified")
    if bool(options.datadev) != bool(options.metadatadev):
        raise InvalidArgument("dm.datadev and dm.metadatadev make a pool together: name both")
    return options


_Setter = Callable[[Options, str], Options]


def _field(name: str, convert: Callable[[str], object]) -> _Setter:
    return lambda options, value: replace(options, **{name: convert(value)})  # type: ignore[arg-type]


def _lvm(name: str, convert: Callable[[str], object]) -> _Setter:
    def set_it(options: Options, value: str) -> Options:
        return replace(options, directlvm=replace(options.directlvm, **{name: convert(value)}))  # type: ignore[arg-type]

    return set_it


def _basesize(options: Options, value: str) -> Options:
    return replace(options, basesize=parse_size(value), basesize_given=True)


def _filesystem(value: str) -> str:
    if value not in FILESYSTEMS:
        raise InvalidArgument(f"devmapper: Unsupported filesystem {value}", hint="xfs or ext4")
    return value


def _mkfsarg(options: Options, value: str) -> Options:
    return replace(options, mkfsarg=(*options.mkfsarg, value))


def _mountopt(options: Options, value: str) -> Options:
    return replace(options, mountopt=",".join(filter(None, (options.mountopt, value))))


def _blocksize(value: str) -> int:
    size = parse_size(value)
    if not _BLOCK_SIZES[0] <= size <= _BLOCK_SIZES[1] or size % _BLOCK_SIZES[0]:
        raise InvalidArgument(f"dm.blocksize cannot be {value}", hint="a multiple of 64K, at most 1G")
    return size


def _free_space(value: str) -> int:
    if not value.endswith("%"):
        raise InvalidArgument("devmapper: Option dm.min_free_space requires % suffix", hint="write 10%")
    number = value.removesuffix("%")
    if not number.isascii() or not number.isdigit() or int(number) >= 100:
        raise InvalidArgument(f"devmapper: Invalid value {value} for option dm.min_free_space", hint="0% to 99%")
    return int(number)


def _retries(value: str) -> int:
    if not value.isascii() or not value.isdigit() or int(value) >= 1 << 64:
        raise InvalidArgument(f'strconv.ParseUint: parsing "{value}": invalid syntax', hint="a whole number, 0 or more")
    return int(value)


def _log_level(value: str) -> int:
    if not value.isascii() or not value.isdigit():
        raise InvalidArgument(f"could not parse `dm.libdm_log_level={value}`: it is not a whole number")
    if not 2 <= int(value) <= 7:
        raise InvalidArgument("dm.libdm_log_level must be in range [2,7]")
    return int(value)


def _percent(option: str, limit: int) -> Callable[[str], int]:
    return lambda value: parse_percent(option, value, limit=limit)


def _pool_name(value: str) -> str:
    return value.removeprefix("/dev/mapper/")


_SETTERS: Mapping[str, _Setter] = {
    "dm.basesize": _basesize,
    "dm.loopdatasize": _field("loopdatasize", parse_size),
    "dm.loopmetadatasize": _field("loopmetadatasize", parse_size),
    "dm.fs": _field("fs", _filesystem),
    "dm.mkfsarg": _mkfsarg,
    "dm.mountopt": _mountopt,
    "dm.datadev": _field("datadev", str),
    "dm.metadatadev": _field("metadatadev", str),
    "dm.thinpooldev": _field("thinpooldev", _pool_name),
    "dm.blocksize": _field("blocksize", _blocksize),
    "dm.blkdiscard": _field("blkdiscard", parse_bool),
    "dm.override_udev_sync_check": _field("override_udev_sync_check", parse_bool),
    "dm.use_deferred_removal": _field("use_deferred_removal", parse_bool),
    "dm.use_deferred_deletion": _field("use_deferred_deletion", parse_bool),
    "dm.min_free_space": _field("min_free_space", _free_space),
    "dm.xfs_nospace_max_retries": _field("xfs_nospace_max_retries", _retries),
    "dm.libdm_log_level": _field("libdm_log_level", _log_level),
    "dm.directlvm_device": _lvm("device", str),
    "dm.directlvm_device_force": _lvm("force", parse_bool),
    "dm.thinp_percent": _lvm("percent", _percent("dm.thinp_percent", 99)),
    "dm.thinp_metapercent": _lvm("metapercent", _percent("dm.thinp_metapercent", 99)),
    "dm.thinp_autoextend_threshold": _lvm("autoextend_threshold", _percent("dm.thinp_autoextend_threshold", 100)),
    "dm.thinp_autoextend_percent": _lvm("autoextend_percent", _percent("dm.thinp_autoextend_percent", 100)),
}

NAMES = tuple(_SETTERS)
"""All options, by their names in storage-opts."""

REPEATABLE = ("dm.mkfsarg", "dm.mountopt")
"""Those that may be given several times and add up."""
