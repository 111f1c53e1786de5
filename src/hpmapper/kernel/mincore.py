"""Which pages of a file are in the page cache: mincore(2) over a mapping that is never touched.

cachestat(2) tells how many, this tells which. Kernels before 6.5 have only this.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from hpmapper.kernel.syscall import NR_MINCORE, NR_MMAP, NR_MUNMAP, syscall

PAGE = os.sysconf("SC_PAGE_SIZE")

_PROT_NONE = 0
_MAP_SHARED = 1
_STEP = 1 << 30
"""Bytes looked at in one go: a quarter of a million pages, one byte each."""

_RESIDENT = re.compile(rb"\x01+")


class Run(NamedTuple):
    """Consecutive cached bytes of a file: from `start` up to `end`, both multiples of the page size."""

    start: int
    end: int


def resident(fd: int, offset: int = 0, length: int | None = None) -> list[Run]:
    """The cached parts of an open file that touch [offset, offset + length) (None: to its end), in order.

    EPERM is not raised: to a caller who neither owns the file nor may write it, the kernel calls everything resident
    (Linux 5.2, commit 134fca9063ad).
    """
    size = os.fstat(fd).st_size
    end = size if length is None else min(size, offset + length)
    runs: list[Run] = []
    for start in range(offset // PAGE * PAGE, end, _STEP):
        for run in _look(fd, start, min(_STEP, end - start)):
            if runs and runs[-1].end == run.start:
                run = Run(runs.pop().start, run.end)
            runs.append(run)
    return runs


def _look(fd: int, offset: int, length: int) -> Iterator[Run]:
    pages = -(-length // PAGE)
    answer = ctypes.create_string_buffer(pages)
    with _mapped(fd, offset, length) as address:
        syscall(NR_MINCORE, address, length, answer, path=fd)
    for match in _RESIDENT.finditer(answer.raw[:pages]):
        yield Run(offset + match.start() * PAGE, offset + match.end() * PAGE)


@contextmanager
def _mapped(fd: int, offset: int, length: int) -> Iterator[int]:
    """The address of a mapping that nobody may read: looking must not cache anything."""
    address = syscall(NR_MMAP, 0, length, _PROT_NONE, _MAP_SHARED, fd, offset, path=fd)
    try:
        yield address
    finally:
        syscall(NR_MUNMAP, address, length)
