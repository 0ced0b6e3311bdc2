"""In what arithmetic, memory layout and form a model computes: chosen once, the same for training and use."""

from __future__ import annotations

import os
import shutil
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import nn

from detrkit.errors import UsageError

Precision = Literal["fp32", "bf16", "fp16", "auto"]
"""`auto`: bf16 where the machine has instructions for it, else fp32."""


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


def compile_backbone(backbone: nn.Module, device: torch.device) -> None:
    """Let a backbone in evaluation mode run as compiled code, its weights constants in it; names stay as they are.

    Convolutions, what is added to them and their ReLUs become one pass each. The first image of each size takes a
    minute longer, so it is for thousands of images of few sizes.

    Args:
        backbone: changed in place. It must not be trained afterwards.
        device: where it computes.

    Raises:
        UsageError: on a processor, and no C++ compiler is there.
    """
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        raise UsageError(
            "Compiling a model for the processor needs a C++ compiler, and there is none",
            where="compile",
            expected="g++ or clang++ on the PATH",
            remedy="Install one (apt install g++), or go without compiling.",
        )
    backbone.requires_grad_(False)
    backbone.compile(options={"freezing": True})


def _computes_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16: without them it is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        known = torch.cpu.get_capabilities()
        return bool(known.get("avx512_bf16") or known.get("amx_bf16"))
    return False
