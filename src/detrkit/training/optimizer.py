"""AdamW in two groups, and the learning rate as a function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from detrkit.training.recipe import OptimizationOptions


def make_optimizer(model: nn.Module, options: OptimizationOptions) -> torch.optim.AdamW:
    """AdamW with one group for the backbone and one for all else; each remembers its `base_lr`.

    A backbone rate of 0 freezes the backbone: its parameters lose their gradient.
    """
    backbone: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if name.startswith("backbone.") and options.backbone_lr == 0:
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            (backbone if name.startswith("backbone.") else rest).append(parameter)
    groups = [
        {"params": group, "lr": rate, "base_lr": rate}
        for group, rate in ((rest, options.lr), (backbone, options.backbone_lr))
        if group
    ]
    return torch.optim.AdamW(groups, weight_decay=options.weight_decay, fused=True)


def rate_factor(step: int, total_steps: int, options: OptimizationOptions) -> float:
    """What the learning rates are multiplied with at a step, 0-based: warm-up times schedule."""
    rise = min(1.0, (step + 1) / (options.warmup + 1))
    share = step / total_steps
    if options.schedule == "cosine":
        return rise * (1 + math.cos(math.pi * share)) / 2
    if options.schedule == "step":
        return rise * (0.1 if share >= options.drop_at else 1.0)
    return rise


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group's rate to its base rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
