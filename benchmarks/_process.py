"""Processes for the sides of a comparison, which get their memory in one way or the other."""

from __future__ import annotations

import contextlib
import ctypes.util
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import torch

from detrkit.cli._memory import settle_memory

TCMALLOC = ctypes.util.find_library("tcmalloc_minimal")
"""Another library for memory, where this machine has it (Debian's libtcmalloc-minimal4): to be loaded beforehand."""


@contextlib.contextmanager
def process(threads: int, *, settled: bool, preload: str | None = None) -> Iterator[ProcessPoolExecutor]:
    """A new process; it and torch read the environment as they start.

    Args:
        threads: of torch.
        settled: the process gets its memory as those of the command `detrkit` do, instead of as the system has it.
        preload: a library that it loads before all others.
    """
    wanted = {"THP_MEM_ALLOC_ENABLE": "1" if settled else None, "LD_PRELOAD": preload}
    known = {name: os.environ.get(name) for name in wanted}
    os.environ.update({name: value for name, value in wanted.items() if value is not None})
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin, (threads, settled)) as pool:
        pool.submit(abs, 0).result()
        for name, value in known.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        yield pool


def _begin(threads: int, settled: bool) -> None:
    torch.set_num_threads(threads)
    if settled:
        settle_memory()
