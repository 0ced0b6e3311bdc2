"""How much memory something takes at its peak: to be called in a new process for each side of a comparison."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from collections.abc import Callable
from pathlib import Path


def peak_added(work: Callable[[], object]) -> float:
    """How far the peak of this process rises above what it holds now, in MB."""
    gc.collect()
    give_back()  # or what is free in the heap now would take in some of the work unseen
    forget = Path("/proc/self/clear_refs")
    if forget.exists():
        forget.write_text("5")  # the peak starts anew from what is held now
    before = peak()
    work()
    return peak() - before


def give_back() -> None:
    """Return the free memory of this process to the system, as the GNU C library does it, or tcmalloc in its place."""
    if sys.platform == "linux":
        known = ctypes.CDLL(None)
        for name, arguments in (("malloc_trim", (0,)), ("MallocExtension_ReleaseFreeMemory", ())):
            if hasattr(known, name):
                getattr(known, name)(*arguments)


def peak() -> float:
    """The most memory that this process has held, in MB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would tell the parent's peak where that is higher
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
