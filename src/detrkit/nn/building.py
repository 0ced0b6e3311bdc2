"""A bound for models that are built as a file says, which may say anything."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.overrides import TorchFunctionMode

OF_EACH = 4096
"""What a tensor counts beside its numbers, so that small layers without end come to an end."""

ALWAYS = 1 << 22
"""Numbers that any model may have."""


_MAKERS = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn}


class _Refusal(TorchFunctionMode):
    """Refuses to make tensors of more numbers than `most`, in this thread."""

    def __init__(self, most: int):
        super().__init__()
        self.most = most

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _MAKERS:
            sides = kwargs["size"] if kwargs and "size" in kwargs else args[:1] if func is torch.full else args
            flat = [side for part in sides for side in (part if isinstance(part, tuple | list) else (part,))]
            if (numbers := math.prod(side for side in flat if isinstance(side, int))) > self.most:
                raise ValueError(f"{numbers:,} numbers of one tensor make the model larger than its weights")
        return func(*args, **(kwargs or {}))


@contextmanager
def built_within(size: int) -> Iterator[None]:
    """Within it, this thread builds no module of more numbers than `size`, which is that of its weights in bytes.

    The caller's random state stays as it is, whatever the module starts with before it has its weights. Tensors are
    counted when a module takes them; one that alone is too large is not even made.

    Raises:
        ValueError: where a module would be larger.
    """
    thread, left = threading.get_ident(), size + ALWAYS

    def count(owner: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal left
        if tensor is not None and threading.get_ident() == thread:
            left -= tensor.numel() + OF_EACH
            if left < 0:
                raise ValueError(f"its tensors make the model larger than its weights, which have {size:,} bytes")

    hooks = [
        torch_modules.register_module_parameter_registration_hook(count),
        torch_modules.register_module_buffer_registration_hook(count),
    ]
    try:
        with torch.random.fork_rng(devices=[]), _Refusal(left):
            yield
    finally:
        for hook in hooks:
            hook.remove()
