"""The cases of each suite; importing this package registers them all."""

from hpmapper.bench.suites import cow

__all__ = ["cow"]
