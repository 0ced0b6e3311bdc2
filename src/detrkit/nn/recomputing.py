"""Layers that can be computed again for their gradients, instead of keeping what they held (activation checkpointing).

Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Recomputable(nn.Module):
    """A layer that keeps its inputs alone in training where `recomputes`; dropout drops the same again.

    Attributes:
        recomputes: whether it does.
    """

    recomputes = False

    def __call__(self, *inputs: Any) -> Any:
        """The layer's output."""
        if self.recomputes and self.training and torch.is_grad_enabled():
            return checkpoint(super().__call__, *inputs, use_reentrant=False)
        return super().__call__(*inputs)


def recompute(model: nn.Module, *, backbone: bool) -> None:
    """Let the layers of a model be computed again for their gradients.

    Args:
        model: whose transformer layers are meant.
        backbone: its backbone's blocks as well.
    """
    for name, module in model.named_modules():
        if isinstance(module, Recomputable) and (backbone or "backbone." not in f"{name}."):
            module.recomputes = any(parameter.requires_grad for parameter in module.parameters())
