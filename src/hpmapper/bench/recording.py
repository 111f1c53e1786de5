"""Ways to record a start: what looking costs, and what it finds."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from hpmapper.bench.figures import MIB, Samples
from hpmapper.bench.layout import silent_bring
from hpmapper.bench.measure import drop_caches
from hpmapper.bench.roots import on_xfs
from hpmapper.bench.starts import images_of, run_inside
from hpmapper.cache.count import count
from hpmapper.cache.start import ImageFiles
from hpmapper.containers import Containers
from hpmapper.images import Images
from hpmapper.kernel import fanotify
from hpmapper.kernel.mincore import resident


def record(options: argparse.Namespace) -> Samples:
    """Recording a cold start by three methods: ms that looking takes before and after it, ms that the start takes, and
    MiB found to have been read."""
    samples: Samples = {}
    methods: dict[str, Callable[..., None]] = {
        "nothing": _unrecorded,
        "residency before and after": _by_residency,
        "fanotify's reads alone": partial(_by_fanotify, mask=fanotify.FAN_ACCESS, whole=True),
        "fanotify's opens, residency after": partial(_by_fanotify, mask=fanotify.FAN_OPEN, whole=False),
    }
    with on_xfs(options.work, "hpmapper") as (one,):
        for image, (layout, command) in images_of(options).items():
            silent_bring(one.engine, layout, image, options.work)
            files = ImageFiles(one.engine.db, one.engine.driver, Images(one.engine).find(image).top)
            for _ in range(options.runs):
                for name, method in methods.items():
                    container = Containers(one.engine).create(image)
                    root = Containers(one.engine).mount(container)
                    drop_caches()
                    method(partial(samples_of, samples, f"{image}, {name}"), files, root, command)
                    Containers(one.engine).remove(container)
    return samples


def samples_of(samples: Samples, name: str, what: str, value: float) -> None:
    """Note a value of one method."""
    samples.setdefault(f"{name}: {what}", []).append(value)


Note = Callable[[str, float], None]


def _timed_start(note: Note, root: Path, command: Sequence[str]) -> None:
    begin = time.perf_counter()
    run_inside(root, command)
    note("start, ms", (time.perf_counter() - begin) * 1e3)


def _unrecorded(note: Note, files: ImageFiles, root: Path, command: Sequence[str]) -> None:
    _timed_start(note, root, command)


def _by_residency(note: Note, files: ImageFiles, root: Path, command: Sequence[str]) -> None:
    paths = [files.places.object_file(digest) or "" for digest in files.objects]
    begin = time.perf_counter()
    before = {path: count(path).cached for path in paths}
    looked = time.perf_counter() - begin
    _timed_start(note, root, command)
    begin = time.perf_counter()
    read = sum(max(0, count(path).cached - before[path]) for path in paths)
    note("looking, ms", (looked + time.perf_counter() - begin) * 1e3)
    note("found, MiB", read / MIB)


def _by_fanotify(note: Note, files: ImageFiles, root: Path, command: Sequence[str], *, mask: int, whole: bool) -> None:
    seen: set[str] = set()
    with fanotify.watching(files.places.scratch.parent, mask, ignored=files.database) as fd:
        _timed_start(note, root, command)
        begin = time.perf_counter()
        for event in _events(fd):
            if event.fd >= 0:
                seen.add("/".join(os.readlink(f"/proc/self/fd/{event.fd}").split("/")[-2:]))
                os.close(event.fd)
    found = 0
    for digest in files.objects:
        path = Path(files.places.object_file(digest) or "")
        if "/".join(path.parts[-2:]) in seen:
            found += path.stat().st_size if whole else _resident_bytes(path)
    note("looking, ms", (time.perf_counter() - begin) * 1e3)
    note("found, MiB", found / MIB)


def _events(fd: int) -> Iterator[fanotify.Event]:
    while events := fanotify.read_events(fd):
        yield from events


def _resident_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return sum(run.end - run.start for run in resident(file.fileno()))
