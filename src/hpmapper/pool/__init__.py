"""The reflink file system that the flagship driver stands on: made, found, grown and watched.

`base` is the contract; `loop`, `direct` and `directory` are the three ways to get one; `floor` stops before it is full.
"""

from __future__ import annotations

from pathlib import Path

from hpmapper.pool.base import Pool, PoolConfig, PoolKind
from hpmapper.pool.direct import DirectPool
from hpmapper.pool.directory import DirectoryPool
from hpmapper.pool.loop import LoopPool

__all__ = ["open_pool"]


def open_pool(root: Path, config: PoolConfig) -> Pool:
    """The pool of these settings below `root`; touches nothing yet."""
    match config.kind:
        case PoolKind.LOOP:
            return LoopPool(root, config)
        case PoolKind.DIRECT:
            return DirectPool(root, config)
        case PoolKind.DIRECTORY:
            return DirectoryPool(root, config)
