"""On which device and in what arithmetic a model computes: chosen in one place, the same for training and use."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal

import torch

from detrkit.errors import UsageError

Precision = Literal["fp32", "bf16", "fp16", "auto"]
"""`auto`: bf16 where the machine has instructions for it, else fp32."""


def choose_device(name: str) -> torch.device:
    """The device of a name; `auto` is the first of cuda, mps and cpu that is there.

    Raises:
        UsageError: no such device on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError("There is no such device here", got=name, remedy="Use --device cpu.") from error
    return device


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The arithmetic that a `Precision` means on a device.

    Raises:
        UsageError: there is no such precision.
    """
    if precision == "auto":
        return torch.bfloat16 if _computes_bf16(device) else torch.float32
    known = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision not in known:
        raise UsageError("Bad value for precision", got=repr(precision), expected=f"{', '.join(known)} or auto")
    return known[precision]


def arithmetic(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Within it, forward passes compute in `dtype`; weights stay as they are."""
    is_reduced = dtype != torch.float32
    return torch.autocast(device.type, dtype=dtype if is_reduced else None, enabled=is_reduced)


def _computes_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16: without them it is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        known = torch.cpu.get_capabilities()
        return bool(known.get("avx512_bf16") or known.get("amx_bf16"))
    return False
