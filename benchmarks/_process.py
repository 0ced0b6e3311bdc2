"""Processes for the sides of a comparison, which get their memory in one way or the other."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import torch

from detrkit.cli._memory import settle_memory


@contextlib.contextmanager
def process(threads: int, *, settled: bool) -> Iterator[ProcessPoolExecutor]:
    """A new process; torch reads the environment as it starts.

    Args:
        threads: of torch.
        settled: the process gets its memory as those of the command `detrkit` do, instead of as the system has it.
    """
    known = os.environ.get("THP_MEM_ALLOC_ENABLE")
    if settled:
        os.environ["THP_MEM_ALLOC_ENABLE"] = "1"
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin, (threads, settled)) as pool:
        pool.submit(abs, 0).result()
        if known is None:
            os.environ.pop("THP_MEM_ALLOC_ENABLE", None)
        yield pool


def _begin(threads: int, settled: bool) -> None:
    torch.set_num_threads(threads)
    if settled:
        settle_memory()
