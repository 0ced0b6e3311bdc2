"""Time on a processor and on a GPU, and how much of the device's rate of products is used."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode


def now(device: torch.device) -> float:
    """Seconds: of processor time on a processor, of the clock on a GPU, whose work is waited for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def operations(work: Callable[[], object]) -> int:
    """Floating-point operations of the products and convolutions of some work, gradients included."""
    counter = FlopCounterMode(display=False)
    with counter:
        work()
    return int(counter.get_total_flops())


def peak_rate(device: torch.device, dtype: torch.dtype, side: int = 0) -> float:
    """Floating-point operations a second of one large product of square matrices, the median of five."""
    side = side or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for number in range(6):
        start = now(device)
        a @ b
        seconds.append(now(device) - start)
        del seconds[: number == 0]  # the first one does not count
    return 2 * side**3 / statistics.median(seconds)
