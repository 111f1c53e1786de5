"""hpmapper cache: what of a root is in the page cache, and getting rid of what is there twice."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import click

from hpmapper.cache import duplicates as twice
from hpmapper.cache import inventory as inventories
from hpmapper.cache.activity import Activity
from hpmapper.cache.count import Counts, count, regular_files
from hpmapper.cache.dedupe import MIN_AGE, Deduped, Deduper, Throttle
from hpmapper.cache.inventory import Inventory
from hpmapper.cache.names import names_of
from hpmapper.cache.stat import CacheStat, cache_stat
from hpmapper.cache.trim import Trimmed, trim
from hpmapper.cli import output
from hpmapper.cli.groups import NearestGroup
from hpmapper.cli.session import Session, session
from hpmapper.cli.state import State, json_option, pass_state
from hpmapper.errors import Unsupported
from hpmapper.image import reference
from hpmapper.meta import snapshots
from hpmapper.model import ObjectDigest
from hpmapper.pool.base import parse_size

_FIELDS = ("CACHED", "DIRTY", "EVICTED LATELY")


@click.group(cls=NearestGroup)
def cache() -> None:
    """See and tidy the page cache."""


class _File(NamedTuple):
    """A cached file, for lists."""

    kind: str
    name: str
    shown_by: int
    counts: Counts


@cache.command("stat")
@click.option("--image", metavar="IMAGE", help="Only what this image shows, file by file.")
@click.option("--container", metavar="CONTAINER", help="Only what this container has for itself, file by file.")
@click.option("--top", type=click.IntRange(min=1), metavar="N", help="Only the N files with most bytes cached.")
@json_option
@pass_state
def stat_(state: State, image: str | None, container: str | None, top: int | None) -> None:
    """Show what is cached, and for whom.

    And what plain copies would have cost. Bytes of objects, maps, layers, containers' own files, and devices. A
    container is live while its root is mounted.
    """
    if image and container:
        raise click.UsageError("--image and --container exclude each other")
    with session(state) as opened:
        inventory = inventories.take(opened.engine.db, opened.engine.driver)
        if image or container or top:
            files = sorted(_files(opened, inventory, image, container), key=lambda one: -one.counts.cached)[:top]
            files = _named(inventory, [one for one in files if one.counts.cached or one.counts.recently_evicted])
            facts: Any = [_file_facts(one) for one in files]
            output.show(state, facts, lambda: _files_text(files))
            return
        facts = _facts(cache_stat(inventory, opened.engine.driver))
        facts["duplicates"] = _cached_twice(inventory)
    output.show(state, facts, lambda: _text(facts))


def _cached_twice(inventory: Inventory) -> int | None:
    """Bytes; None where the kernel cannot tell."""
    try:
        return sum(one.size for one in twice.find(inventory))
    except Unsupported:
        return None


def _counts(counts: Counts) -> dict[str, int]:
    return counts._asdict()


def _facts(found: CacheStat) -> dict[str, Any]:
    inventory = found.inventory
    total = found.total
    return {
        "total": _counts(total),
        "objects": {
            "count": len(found.objects),
            "cached_objects": sum(1 for one in found.objects.values() if one.cached),
        }
        | _sum(found.objects.values()),
        "layers": _sum(found.layers.values()),
        "containers_own": _sum(found.own.values()),
        "maps": _sum(found.maps.values()),
        "devices": {name: _counts(one) for name, one in found.devices.items()},
        "sharing": [{"containers": readers, "bytes": size} for readers, size in found.sharing().items()],
        "plain_copies": found.plain_copies,
        "images": [
            {"id": one.id, "name": one.name, "containers": inventory.live_chains()[one.chain]}
            | {"map": found.of_map(one.chain).cached}
            | _counts(found.of_chain(one.chain))
            for one in inventory.images
        ],
        "containers": [
            {"name": one.name, "live": one.snapshot in inventory.live, "shown": found.of_chain(one.chain).cached}
            | _counts(found.own[one.snapshot])
            for one in inventory.containers
        ],
    }


def _sum(counts: Any) -> dict[str, int]:
    result = Counts()
    for one in counts:
        result = result.plus(one)
    return _counts(result)


def _text(facts: dict[str, Any]) -> str:
    kinds = [("objects", facts["objects"]), ("layers", facts["layers"]), ("maps", facts["maps"])]
    kinds += [("containers' own files", facts["containers_own"])]
    kinds += [(f"device {name}", counts) for name, counts in facts["devices"].items()]
    rows = [(name, *_cells(counts)) for name, counts in [*kinds, ("total", facts["total"])] if any(_values(counts))]
    parts = [output.table(("", *_FIELDS), rows) if rows else "nothing is cached"]
    saved = facts["plain_copies"] - facts["total"]["cached"]
    if saved > 0:
        plain = output.size(facts["plain_copies"])
        parts.append(f"copies of their own would take up to {plain}: {output.size(saved)} more")
    if facts["duplicates"]:
        parts.append(f"{output.size(facts['duplicates'])} are cached twice: hpmapper cache trim drops them")
    shares = [(str(one["containers"]), output.size(one["bytes"])) for one in facts["sharing"]]
    if shares:
        parts.append(output.table(("SHOWN BY CONTAINERS", "CACHED"), shares))
    images = [(_short(one["name"]), str(one["containers"]), *_cells(one)) for one in facts["images"]]
    if images:
        parts.append(output.table(("IMAGE", "LIVE", *_FIELDS), images))
    own = [
        (one["name"], output.yes(one["live"]), *_cells(one), output.size(one["shown"])) for one in facts["containers"]
    ]
    if own:
        parts.append(output.table(("CONTAINER", "LIVE", *(f"OWN {name}" for name in _FIELDS), "OF ITS IMAGE"), own))
    return "\n\n".join(parts)


def _values(counts: dict[str, Any]) -> tuple[int, int, int]:
    return counts["cached"], counts["dirty"], counts["recently_evicted"]


def _cells(counts: dict[str, Any]) -> tuple[str, ...]:
    return tuple(map(output.size, _values(counts)))


def _short(name: str) -> str:
    return name[7:19] if name.startswith("sha256:") else reference.parse(name).familiar


def _files(opened: Session, inventory: Inventory, image: str | None, container: str | None) -> Iterator[_File]:
    """The files of an image, of a container, or all that are counted one by one."""
    if container is not None:
        row = opened.containers.get(container)
        yield from _own_files(inventory, {row.snapshot: row.name})
        return
    chains = [one.chain for one in inventory.images]
    if image is not None:
        wanted = opened.images.find(image).id
        chains = [one.chain for one in inventory.images if one.id == wanted]
    found = cache_stat(inventory, opened.engine.driver)
    for digest in {digest for chain in chains for digest in inventory.objects_of(chain)}:
        yield _File("object", digest.hex(), found.readers.get(digest, 0), found.objects[digest])
    for layer in {layer for chain in chains for layer in chain}:
        directory = inventory.places.layer_files(layer)
        for path, _ in regular_files(directory) if directory else ():
            yield _File("layer", path, found.layer_readers.get(layer, 0), count(path))
    for chain in dict.fromkeys(chains):
        for name in map(str, inventory.places.map_files(chain)):
            yield _File("map", name, inventory.live_chains()[chain], found.maps[name])
    if image is None:
        yield from _own_files(inventory, {one.snapshot: one.name for one in inventory.containers})


def _own_files(inventory: Inventory, names: dict[Any, str]) -> Iterator[_File]:
    for snapshot, name in names.items():
        top = str(inventory.places.own_files(snapshot))
        for path, _ in regular_files(top):
            yield _File("own", f"{name}:{path[len(top) :]}", 1, count(path))


def _named(inventory: Inventory, files: Sequence[_File]) -> list[_File]:
    digests = {ObjectDigest(bytes.fromhex(one.name)) for one in files if one.kind == "object"}
    names = {digest.hex(): name for digest, name in names_of(inventory, digests).items()}
    return [one._replace(name=names.get(one.name, one.name)) if one.kind == "object" else one for one in files]


def _file_facts(one: _File) -> dict[str, Any]:
    return {"kind": one.kind, "name": one.name, "containers": one.shown_by} | _counts(one.counts)


def _files_text(files: Sequence[_File]) -> str:
    if not files:
        return "nothing is cached"
    rows = [(one.kind, str(one.shown_by), *_cells(_counts(one.counts)), one.name) for one in files]
    return output.table(("KIND", "LIVE", *_FIELDS, "NAME"), rows)


@cache.command("duplicates")
@click.option("--contents", is_flag=True, help="Compare whole files by what is in them; slower, reads them all.")
@json_option
@pass_state
def duplicates_(state: State, contents: bool) -> None:
    """List what is cached twice.

    Pages of blocks that two files share, by container and file. With --contents instead files outside the object
    store that are the same and wholly cached: what the overlay and vfs drivers waste.
    """
    with session(state) as opened:
        inventory = inventories.take(opened.engine.db, opened.engine.driver)
        if contents:
            same = twice.same_files(twice.directories(inventory))
            facts: Any = [{"size": one.size, "bytes": one.wasted, "paths": one.paths} for one in same]
            output.show(state, facts, lambda: _same_text(same))
            return
        found = _by_file(inventory, twice.find(inventory, Activity.over(inventory)))
    output.show(state, found, lambda: _duplicates_text(found))


def _by_file(inventory: Inventory, found: Sequence[twice.Duplicate]) -> list[dict[str, Any]]:
    names = {one.snapshot: one.name for one in inventory.containers}
    sizes: dict[tuple[str, str], int] = {}
    for one in found:
        owner = names.get(one.owner, "") if one.owner is not None else ""
        path = one.path
        if one.owner is not None:
            path = path.removeprefix(str(inventory.places.own_files(one.owner)))
        sizes[owner, path] = sizes.get((owner, path), 0) + one.size
    return [{"container": owner, "path": path, "bytes": size} for (owner, path), size in sizes.items()]


def _duplicates_text(found: Sequence[dict[str, Any]]) -> str:
    if not found:
        return "nothing is cached twice"
    rows = [(one["container"] or "-", output.size(one["bytes"]), one["path"]) for one in found]
    return output.table(("CONTAINER", "CACHED TWICE", "FILE"), rows)


def _same_text(same: Sequence[twice.SameFiles]) -> str:
    if not same:
        return "no two files are the same"
    rows = [(output.size(one.wasted), str(len(one.paths)), one.paths[0]) for one in same]
    return output.table(("WASTED", "COPIES", "ONE OF THEM"), rows)


@cache.command("trim")
@click.option("--idle", "idle_only", is_flag=True, help="Only of containers that do nothing.")
@click.option("--max", "limit", metavar="SIZE", help="At most this much.")
@json_option
@pass_state
def trim_(state: State, idle_only: bool, limit: str | None) -> None:
    """Drop what is cached twice.

    One copy stays, the one that is read most. Idle containers' copies go first. Nothing that is dirty is touched.
    """
    most = parse_size(limit) if limit is not None else None
    with session(state) as opened:
        inventory = inventories.take(opened.engine.db, opened.engine.driver)
        work = Activity.over(inventory)
        done = trim(twice.find(inventory, work), work, limit=most, busy=not idle_only)
    output.show(state, dataclasses.asdict(done), lambda: _trimmed_text(done))


def _trimmed_text(done: Trimmed) -> str:
    text = f"dropped {output.size(done.dropped)} of {output.size(done.found)} that were cached twice"
    rest = [f"{output.size(done.kept)} are in use"] * bool(done.kept)
    rest += [f"{output.size(done.passed)} were left"] * bool(done.passed)
    return "; ".join([text, *rest])


@cache.command("dedupe")
@click.option("--min-age", type=click.FloatRange(min=0), default=MIN_AGE, help="Seconds since the last change.")
@click.option(
    "--io-pressure", type=click.FloatRange(0, 100), default=Throttle().limit, help="Percent from which to wait."
)
@json_option
@pass_state
def dedupe_(state: State, min_age: float, io_pressure: float) -> None:
    """Let identical files share their blocks.

    Files that containers wrote, with the image's, or with each other's. Containers may run meanwhile. Waits while the
    disk is busy.
    """
    with session(state) as opened:
        inventory = inventories.take(opened.engine.db, opened.engine.driver)
        deduper = Deduper(Throttle(io_pressure), min_age=min_age)
        done = deduper.run(inventory, dict(snapshots.objects(opened.engine.db)), time.time())
    facts = dataclasses.asdict(done) | {"waited": deduper.throttle.waited}
    output.show(state, facts, lambda: _deduped_text(done))


def _deduped_text(done: Deduped) -> str:
    return (
        f"{done.files} files now share {output.size(done.bytes)}; looked at {done.looked}, "
        f"read {done.read} ({output.size(done.read_bytes)})"
    )
