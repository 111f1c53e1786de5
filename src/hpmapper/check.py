"""fsck: the stated invariants, one check each, and what repairs it.

    database    SQLite finds its file whole                      — cannot be repaired here
    snapshot    every ready snapshot has its storage             — forgotten: there is nothing left of it
    unnamed     no storage without a row                         — removed
    object      every object has the data its name says          — removed; its layers wait for the next pull
    layer       every layer's own form is as it was recorded     — made again from its own tar
    tar         every layer gives back the tar it came from      — as above; else it waits for the next pull
    derived     what was derived from layers matches them        — made again when needed

A layer that cannot be repaired from what is here is marked; pulling its image again heals it in place, for
its containers too, since objects and layers come back under the names by which everything refers to them.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass

from hpmapper.engine import Engine
from hpmapper.errors import HpmapperError
from hpmapper.meta import snapshots
from hpmapper.meta.snapshots import Layer
from hpmapper.model import ObjectDigest

log = logging.getLogger(__name__)

_REBUILT = "made again from its own tar"


@dataclass(frozen=True, slots=True)
class Finding:
    """A broken invariant: which, on what object, how, what was done about it ("" where nothing was), and whether
    all is well again now."""

    invariant: str
    subject: str
    problem: str
    repair: str = ""
    mended: bool = False


def check(engine: Engine, *, repair: bool = False) -> Iterator[Finding]:
    """Check everything, reading every byte; with `repair`, mend what can be mended. Yields what was wrong.

    Runs beside other operations; objects are not swept meanwhile.
    """
    return _Check(engine, repair).run()


class _Check:
    def __init__(self, engine: Engine, repair: bool) -> None:
        self._engine = engine
        self._db = engine.db
        self._driver = engine.driver
        self._repair = repair

    def run(self) -> Iterator[Finding]:
        yield from (Finding("database", str(self._db.path), problem) for problem in self._db.integrity_errors())
        yield from self._snapshots()
        yield from self._unnamed()
        with self._driver.pin():
            bad_objects = dict(self._bad_objects())
            bad_layers = dict(self._bad_layers())
        yield from self._mend_objects(bad_objects)
        yield from self._mend_layers(bad_layers)
        yield from self._recovered(bad_layers)
        done = "dropped: it is made again when needed" if self._repair else ""
        for problem in self._driver.check_derived(repair=self._repair):
            yield Finding("derived", problem.subject, problem.text, done, self._repair)

    def _snapshots(self) -> Iterator[Finding]:
        stored = self._driver.stored().snapshots
        for snapshot in sorted(snapshots.storage_ids(self._db).ready - stored):
            if snapshot in self._driver.stored().snapshots or snapshot not in snapshots.storage_ids(self._db).ready:
                continue  # made or removed between the two looks
            if self._repair:
                self._engine.prepared(snapshots.by_id(self._db, snapshot))
            done = "made anew: it holds no changes" if self._repair else ""
            yield Finding("snapshot", f"snapshot {snapshot}", "its storage is gone", done, self._repair)

    def _unnamed(self) -> Iterator[Finding]:
        stored = self._driver.stored()
        named = snapshots.storage_ids(self._db)
        done = "removed" if self._repair else ""
        for snapshot in sorted(stored.snapshots - named.snapshots):
            if self._repair:
                self._driver.remove(snapshot)
            yield Finding("unnamed", f"storage of snapshot {snapshot}", "nothing names it", done, self._repair)
        for layer in sorted(stored.layers - named.layers):
            if self._repair:
                self._driver.remove_layer(layer)
            yield Finding("unnamed", f"storage of layer {layer}", "nothing names it", done, self._repair)
        strays = self._driver.stored_objects() - {digest for digest, _ in snapshots.objects(self._db)}
        if strays and self._engine.rubbish.is_at_work():
            return  # they may be on their way in
        if strays and self._repair:
            self._driver.sweep_objects(lambda: {digest for digest, _ in snapshots.objects(self._db)}, timeout=60)
        for digest in sorted(strays):
            yield Finding("unnamed", f"object {digest.hex()}", "nothing names it", done, self._repair)

    def _bad_objects(self) -> Iterator[tuple[ObjectDigest, str]]:
        for digest, size in snapshots.objects(self._db):
            problem = self._driver.check_object(digest, size)
            if problem and snapshots.is_object(self._db, digest):
                yield digest, problem

    def _bad_layers(self) -> Iterator[tuple[Layer, Finding]]:
        for layer in snapshots.layers(self._db):
            subject = f"layer {layer.id}"
            if layer.sealed:
                if not self._driver.has(layer.id):
                    yield layer, Finding("layer", subject, "its directory is missing")
                continue
            problems = list(self._driver.check_layer(layer.id, layer.digest))
            if problems:
                yield layer, Finding("layer", subject, "; ".join(problems))
                continue
            problem = self._wrong_tar(layer)
            if problem:
                yield layer, Finding("tar", subject, problem)

    def _wrong_tar(self, layer: Layer) -> str | None:
        """Why the layer does not give back its tar, None if it does."""
        hasher = hashlib.sha256()
        try:
            for piece in self._driver.read_tar(layer.id):
                hasher.update(piece)
        except (HpmapperError, OSError) as error:
            return f"its tar cannot be made again: {error}"
        found = f"sha256:{hasher.hexdigest()}"
        return None if found == layer.diff_id else f"its tar has the DiffID {found}, not {layer.diff_id}"

    def _mend_objects(self, bad: dict[ObjectDigest, str]) -> Iterator[Finding]:
        done = "removed: pull the images that need it again" if self._repair else ""
        if bad and self._repair:
            with self._db.transaction() as transaction:
                for digest in bad:
                    snapshots.mark_users_damaged(transaction, digest)
            self._driver.sweep_objects(
                lambda: {digest for digest, _ in snapshots.objects(self._db)} - bad.keys(), timeout=60
            )
        for digest, problem in bad.items():
            yield Finding("object", f"object {digest.hex()}", problem, done)

    def _mend_layers(self, bad: dict[Layer, Finding]) -> Iterator[Finding]:
        for layer, finding in bad.items():
            done = self._mend_layer(layer) if self._repair else ""
            yield Finding(finding.invariant, finding.subject, finding.problem, done, done == _REBUILT)

    def _mend_layer(self, layer: Layer) -> str:
        try:
            self._engine.rebuild(layer)
        except HpmapperError as error:
            log.debug("layer %s cannot be rebuilt: %s", layer.id, error)
            with self._db.transaction() as transaction:
                snapshots.mark_damaged(transaction, layer.id)
            return "marked: pull the images that need it again"
        return _REBUILT

    def _recovered(self, bad: dict[Layer, Finding]) -> Iterator[Finding]:
        """Layers that were marked and are whole again, since another image brought back what they lacked."""
        for layer in snapshots.layers(self._db):
            if layer.damaged and layer not in bad and not self._wrong_tar(layer):
                if self._repair:
                    with self._db.transaction() as transaction:
                        snapshots.mark_damaged(transaction, layer.id, damaged=False)
                done = "mark removed" if self._repair else ""
                yield Finding("layer", f"layer {layer.id}", "it is marked as damaged, but whole", done, self._repair)
