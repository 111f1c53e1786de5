"""hpmapper image: bringing in, listing, saving and removing images."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click

from hpmapper.cli import output, progress
from hpmapper.cli.groups import NearestGroup
from hpmapper.cli.session import Session, session
from hpmapper.cli.state import State, json_option, pass_state
from hpmapper.errors import InvalidArgument
from hpmapper.image import codec, oci, platforms, reference
from hpmapper.image.documents import ImportOptions
from hpmapper.image.opening import SourceOptions
from hpmapper.image.save import SavedImage, SaveForm, save, save_to_stream
from hpmapper.images import Brought
from hpmapper.meta import snapshots
from hpmapper.meta.images import ImageRow
from hpmapper.meta.snapshots import Layer, Snapshot
from hpmapper.store.workspace import workspace

UNNAMED = "<none>"
_REGISTRY = "docker://"
_FORMS = [str(form) for form in SaveForm]  # as texts: click 8.2 and later would ask for an enum's names


@click.group(cls=NearestGroup)
def image() -> None:
    """Bring in, list, save and remove images."""


_platform = click.option("--platform", metavar="OS/ARCH", help="Instead of this machine's, where there is a choice.")
_quiet = click.option("-q", "--quiet", is_flag=True, help="Print nothing but the images' ids.")


@image.command()
@click.argument("sources", nargs=-1, required=True, metavar="IMAGE...")
@_platform
@click.option("--insecure", is_flag=True, help="Allow plain HTTP and unverified certificates, to any registry.")
@_quiet
@json_option
@pass_state
def pull(state: State, sources: Sequence[str], platform: str | None, insecure: bool, quiet: bool) -> None:
    """Bring in images from registries.

    IMAGE is debian:12, registry.example.com/team/app, or the same behind docker://.
    """
    with session(state, create=True) as opened:
        for source in sources:
            reference.parse(source.removeprefix(_REGISTRY))  # all are checked before the first is fetched
        began = time.monotonic()
        brought: list[Brought] = []
        for source in sources:
            full = _REGISTRY + source.removeprefix(_REGISTRY)
            brought += _bring(opened, full, (), _Wanted(state, platform=platform, insecure=insecure, quiet=quiet))
        _report(state, brought, time.monotonic() - began, quiet)


@image.command("import")
@click.argument("source", metavar="FILE|DIR|-")
@click.argument("name", required=False)
@click.option("-c", "--change", multiple=True, metavar="INSTRUCTION", help="As in a Dockerfile: -c 'CMD [\"sh\"]'.")
@click.option("-m", "--message", help="A comment for the image's history.")
@_platform
@_quiet
@json_option
@pass_state
def import_(
    state: State,
    source: str,
    name: str | None,
    change: Sequence[str],
    message: str | None,
    platform: str | None,
    quiet: bool,
) -> None:
    """Bring in an image from files.

    FILE is a tar of a root file system, or an archive of `docker save` or of an OCI layout; DIR an OCI layout or a
    root file system. What it is is found out, or said: oci:DIR, oci-archive:FILE, docker-archive:FILE, tar:FILE,
    dir:DIR. - is standard input. --change and --message are for root file systems, which say nothing themselves.
    """
    imported = ImportOptions(message=message).changed(change)
    with session(state, create=True) as opened:
        began = time.monotonic()
        wanted = _Wanted(state, platform=platform, quiet=quiet, imported=imported)
        brought = _bring(opened, source, (name,) if name else (), wanted)
        _report(state, brought, time.monotonic() - began, quiet)


class _Wanted:
    """How images are to be brought in."""

    def __init__(
        self,
        state: State,
        *,
        platform: str | None,
        quiet: bool,
        insecure: bool = False,
        imported: ImportOptions | None = None,
    ) -> None:
        self.platform = platforms.parse(platform) if platform else None
        self.quiet = quiet or state.json
        self.insecure = insecure
        self.imported = imported or ImportOptions()

    def options(self, spool: Path) -> SourceOptions:
        """With a directory for downloads."""
        return SourceOptions(
            spool=spool,
            platform=self.platform,
            imported=self.imported,
            # Not buffered: while a buffer is filled from a slow pipe, Ctrl-C is noticed with the next bytes only.
            stdin=getattr(sys.stdin.buffer, "raw", sys.stdin.buffer),
            insecure=self.insecure,
            progress=None if self.quiet else lambda line: click.echo(line, err=True),
        )


def _bring(opened: Session, source: str, names: Sequence[str], wanted: _Wanted) -> list[Brought]:
    # The spool is a workspace: what a killed download leaves is swept when the root is next opened.
    with (
        workspace(opened.engine.driver.scratch) as spool,
        progress.watching(quiet=wanted.quiet) as watcher,
    ):
        return opened.images.bring(source, wanted.options(spool), names, watcher)


def _report(state: State, brought: Sequence[Brought], seconds: float, quiet: bool) -> None:
    facts = [_cost(one) | {"seconds": round(seconds, 3)} for one in brought]
    output.show(state, facts, lambda: "\n".join(one.image.id if quiet else _summary(one, seconds) for one in brought))


def _cost(brought: Brought) -> dict[str, object]:
    new = [taken.ingested for taken in brought.layers if taken.ingested]
    return {
        "id": brought.image.id,
        "names": brought.image.names,
        "layers_new": len(new),
        "layers_known": len(brought.layers) - len(new),
        "bytes_stored": sum(one.size for one in new),
        "bytes_deduplicated": brought.not_written,
        "bytes_not_read": brought.not_read,
        "bytes_not_unpacked": brought.not_unpacked,
    }


def _summary(brought: Brought, seconds: float) -> str:
    new = [taken.ingested for taken in brought.layers if taken.ingested]
    known = len(brought.layers) - len(new)
    stored = sum(one.size for one in new)
    lines = [
        f"{_title(brought.image)}  {_short(brought.image)}",
        f"  layers: {len(new)} new, {known} already there; stored {output.size(stored)}; {seconds:.1f} s",
    ]
    saved = [f"{output.size(brought.not_unpacked)} not unpacked ({output.size(brought.not_read)} not read)"] * bool(
        known
    )
    saved += [f"{output.size(brought.not_written)} of files not written again"] * bool(brought.not_written)
    return "\n".join([*lines, *(["  saved: " + ", ".join(saved)] if saved else [])])


@image.command()
@json_option
@pass_state
def ls(state: State) -> None:
    """List the images."""
    with session(state) as opened:
        rows = opened.images.all()
    facts = [
        {"id": row.id, "names": row.names, "size": row.size, "created": output.timestamp(row.created)} for row in rows
    ]
    output.show(state, facts, lambda: output.table(("NAME", "ID", "SIZE", "CREATED"), _lines(rows)))


def _lines(rows: Sequence[ImageRow]) -> list[tuple[str, str, str, str]]:
    return [
        (name, _short(row), output.size(row.size), output.moment(row.created))
        for row in rows
        for name in map(_familiar, row.names or (UNNAMED,))
    ]


@image.command()
@click.argument("names", nargs=-1, required=True, metavar="IMAGE...")
@json_option
@pass_state
def inspect(state: State, names: Sequence[str]) -> None:
    """Print all that is known of images, as JSON."""
    with session(state) as opened:
        facts = [_inspected(opened, opened.images.find(name)) for name in names]
    click.echo(json.dumps(facts, indent=2))


def _inspected(opened: Session, row: ImageRow) -> dict[str, object]:
    return {
        "id": row.id,
        "names": row.names,
        "size": row.size,
        "created": output.timestamp(row.created),
        "config": json.loads(row.config),
        "layers": [_layer_facts(opened, snapshot) for snapshot in opened.images.layers(row)],
    }


def _layer_facts(opened: Session, snapshot: Snapshot) -> dict[str, object]:
    layer = _layer(opened, snapshot)
    return {
        "diff_id": layer.diff_id,
        "chain_id": snapshot.key,
        "size": layer.tar_size,
        "bytes_stored": layer.size,
        "entries": layer.inodes,
        "damaged": layer.damaged,
        "storage": layer.id,
    }


def _layer(opened: Session, snapshot: Snapshot) -> Layer:
    assert snapshot.layer is not None
    return snapshots.layer(opened.engine.db, snapshot.layer)


@image.command()
@click.argument("name", metavar="IMAGE")
@click.option("--no-trunc", is_flag=True, help="Print commands in full.")
@json_option
@pass_state
def history(state: State, name: str, no_trunc: bool) -> None:
    """Show how an image came to be, the last step first."""
    with session(state) as opened:
        row = opened.images.find(name)
        layers = [_layer(opened, snapshot) for snapshot in opened.images.layers(row)]
    facts = _steps(row, layers)
    output.show(state, facts, lambda: _history_table(facts, no_trunc))


def _steps(row: ImageRow, layers: Sequence[Layer]) -> list[dict[str, object]]:
    steps = oci.decode_config(row.config, f"config of {row.id}").history or []
    lowest_first = iter(layers)
    facts: list[dict[str, object]] = []
    for step in steps:
        layer = None if step.empty_layer else next(lowest_first, None)
        facts.append(
            {
                "created": step.created,
                "created_by": step.created_by or "",
                "size": layer.tar_size if layer else 0,
                "bytes_stored": layer.size if layer else 0,
                "comment": step.comment or "",
            }
        )
    return facts[::-1]


def _history_table(facts: Sequence[dict[str, object]], no_trunc: bool) -> str:
    rows = [
        (
            str(step["created"] or "")[:19],
            output.size(int(str(step["size"]))),
            _cut(str(step["created_by"]), no_trunc),
            str(step["comment"]),
        )
        for step in facts
    ]
    return output.table(("CREATED", "SIZE", "CREATED BY", "COMMENT"), rows)


def _cut(text: str, no_trunc: bool) -> str:
    text = " ".join(text.split())
    return text if no_trunc or len(text) <= 60 else text[:59] + "…"


@image.command("save")
@click.argument("names", nargs=-1, required=True, metavar="IMAGE...")
@click.option("-o", "--output", "target", required=True, metavar="FILE", help="Where to; - is standard output.")
@click.option("--format", "form", type=click.Choice(_FORMS), default=_FORMS[-1], show_default=True)
@click.option("--compression", type=click.Choice(codec.COMPRESSIONS), default="none", show_default=True)
@pass_state
def save_(state: State, names: Sequence[str], target: str, form: str, compression: str) -> None:
    """Write images out, with the very layers that came in.

    A docker-archive is an OCI archive too, with what `docker load` needs beside; oci is a directory.
    """
    with session(state) as opened:
        images = [_saved(opened, name) for name in names]
        if target != "-":
            save(images, Path(target), SaveForm(form), compression=compression)
            return
        if sys.stdout.isatty():
            raise InvalidArgument("an archive is nothing for a terminal", hint="redirect it, or name a file with -o")
        with workspace(opened.engine.driver.scratch) as spool:
            save_to_stream(images, sys.stdout.buffer, SaveForm(form), spool=spool, compression=compression)


def _saved(opened: Session, name: str) -> SavedImage:
    """An image under the name by which it was asked for, or under all when that was its id."""
    row = opened.images.find(name)
    saved = opened.images.saved(row)
    asked = [known for known in row.names if known == _full(name)]
    return saved._replace(names=tuple(asked or row.names))


@image.command()
@click.argument("names", nargs=-1, required=True, metavar="IMAGE...")
@click.option("--no-gc", is_flag=True, help="Leave the space to a later `hpmapper gc`.")
@json_option
@pass_state
def rm(state: State, names: Sequence[str], no_gc: bool) -> None:
    """Remove images by name or id.

    An image goes with its last name.
    """
    with session(state) as opened:
        for name in names:
            opened.images.find(name)
        gone = {name: opened.images.remove(name) for name in names}
        collected = opened.engine.rubbish.collect() if any(gone.values()) and not no_gc else None
    freed = collected.bytes if collected else 0
    facts = {"images": [{"name": name, "removed": removed} for name, removed in gone.items()], "bytes_freed": freed}
    lines = [f"{'removed' if removed else 'untagged'} {name}" for name, removed in gone.items()]
    output.show(state, facts, lambda: "\n".join(lines + ([f"freed {output.size(freed)}"] if collected else [])))


@image.command()
@click.argument("name", metavar="IMAGE")
@click.argument("new", metavar="NAME")
@pass_state
def tag(state: State, name: str, new: str) -> None:
    """Give an image one more name."""
    with session(state) as opened:
        opened.images.tag(name, new)


def _full(name: str) -> str:
    try:
        return reference.normalised(name)
    except InvalidArgument:
        return ""  # an id


def _familiar(name: str) -> str:
    return name if name == UNNAMED else reference.parse(name).familiar


def _title(row: ImageRow) -> str:
    return ", ".join(map(_familiar, row.names)) or UNNAMED


def _short(row: ImageRow) -> str:
    return row.id.removeprefix("sha256:")[:12]
