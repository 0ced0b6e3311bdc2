"""How a command's own process gets its memory: for maps of many megabytes that come and go with every step.

By default the C library of Linux keeps such blocks among the small ones once it has seen a few, where they leave holes;
and it gets the largest from the system each time anew, page by page.
"""

from __future__ import annotations

import ctypes
import os
import sys

LARGE = 16 * 2**20
"""Bytes from which on a block is got by itself, and given back when it is free."""
SPARE = 2**30
"""Bytes of what smaller ones left free that are kept, for the next step needs them again."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def settle_memory() -> None:
    """Give large blocks back when they are free, and get them in pages of 2 MB.

    For processes of our own alone, before torch is imported. What the environment says already is left as it is;
    systems without the GNU C library are left alone.
    """
    if not sys.platform.startswith("linux"):
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch asks for huge pages, where the system has them
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None or any(name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")):
        return
    set_option(_M_MMAP_THRESHOLD, LARGE)
    set_option(_M_TRIM_THRESHOLD, SPARE)
