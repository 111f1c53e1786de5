"""What the cases of `hpmapper.bench.cache` are made of: layers of random files, tables of samples."""

from __future__ import annotations

import random
import statistics
import tarfile
from collections.abc import Mapping
from io import BytesIO

from rich.table import Table

from hpmapper.engine import Engine
from hpmapper.layer.stream import Expected
from hpmapper.meta.snapshots import Snapshot

MIB = 1 << 20
Samples = dict[str, list[float]]
"""Values by side."""


def take_in(engine: Engine, files: Mapping[str, int], name: str = "") -> Snapshot:
    """A layer with files of these sizes (random data, the same in every root for the same `name`)."""
    top = engine.ingest(None, _Tar(files, seed=name), Expected()).snapshot
    engine.finish(top)
    return top


class _Tar(BytesIO):
    """A layer tar of random files; large ones repeat one random MiB with a counter, which no deduplication finds."""

    def __init__(self, files: Mapping[str, int], seed: str) -> None:
        super().__init__()
        block = random.Random(seed).randbytes(MIB)
        with tarfile.open(fileobj=self, mode="w") as tar:
            for name, size in files.items():
                member = tarfile.TarInfo(name)
                member.size = size
                mark = name.encode().ljust(16, b"\0")
                data = b"".join(number.to_bytes(8, "big") + mark + block[24:] for number in range(-(-size // MIB)))
                tar.addfile(member, BytesIO(data[:size]))
        self.seek(0)


def table(title: str, samples: Samples) -> Table:
    """Median, least and most, 99th percentile, and the ratio to the first side."""
    grid = Table("side", "median", "least to most", "p99", "to first", "samples", title=title, title_justify="left")
    first = statistics.median(next(iter(samples.values())))
    for side, values in samples.items():
        middle = statistics.median(values)
        high = sorted(values)[max(0, -(-len(values) * 99 // 100) - 1)]
        spread = f"{min(values):.3g} to {max(values):.3g}"
        ratio = f"{middle / first:.3g}" if first else "-"
        grid.add_row(side, f"{middle:.3g}", spread, f"{high:.3g}", ratio, str(len(values)))
    return grid
