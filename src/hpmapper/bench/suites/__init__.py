"""The cases of each suite; importing this package registers them all."""

from hpmapper.bench.suites import apps, cache, cow, diff, ingest, io, ops, space, start

__all__ = ["apps", "cache", "cow", "diff", "ingest", "io", "ops", "space", "start"]
