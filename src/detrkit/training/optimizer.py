"""AdamW in two groups over what trains, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections import Counter

import torch
from torch import nn

from detrkit.errors import UsageError
from detrkit.training.recipe import OptimizationOptions


def make_optimizer(
    model: nn.Module, options: OptimizationOptions, detector: nn.Module | None = None
) -> torch.optim.AdamW:
    """AdamW with one group for the backbone and one for all else; each remembers its `base_lr`.

    The parts that `freeze` names lose their gradient, and so does the backbone where its rate is 0.

    Args:
        model: what trains.
        options: the recipe's.
        detector: the module inside `model` whose parts are meant; by default `model` itself.

    Raises:
        UsageError: `freeze` names a part that the model does not have, or nothing is left to train.
    """
    detector = model if detector is None else detector
    freeze(detector, options.freeze)
    if options.backbone_lr == 0:
        freeze(detector, "backbone")
    of_backbone = {id(one) for name, one in detector.named_parameters() if name.startswith("backbone.")}
    backbone: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (backbone if id(parameter) in of_backbone else rest).append(parameter)
    groups = [
        {"params": group, "lr": rate, "base_lr": rate}
        for group, rate in ((rest, options.lr), (backbone, options.backbone_lr))
        if group
    ]
    if not groups:
        raise UsageError("Nothing is left to train", where="freeze", got=repr(options.freeze))
    return torch.optim.AdamW(groups, weight_decay=options.weight_decay, fused=True)


def freeze(model: nn.Module, parts: str) -> None:
    """Take the gradient from parts of a model. What lies before the first part that trains then keeps no activations.

    Args:
        model: its parameters are changed in place.
        parts: separated by commas. A part is what a parameter's name begins with, up to a point or an underscore:
            `decoder` means `decoder_layers` and `decoder_norm`.

    Raises:
        UsageError: no parameter belongs to the part; lists those that there are.
    """
    parameters = dict(model.named_parameters())
    for part in filter(None, (part.strip() for part in parts.split(","))):
        chosen = [name for name in parameters if name.startswith((f"{part}.", f"{part}_")) or name == part]
        if not chosen:
            raise UsageError(
                "The model has no such part to freeze",
                where="freeze",
                got=repr(part),
                expected=", ".join(_parts(model)),
            )
        for name in chosen:
            parameters[name].requires_grad_(False)


def _parts(model: nn.Module) -> list[str]:
    """What can be frozen: what lies directly in the model, and the words with which several of these begin."""
    names = list(dict.fromkeys(name.partition(".")[0] for name, _ in model.named_parameters()))
    words = Counter(name.partition("_")[0] for name in names)
    return sorted({*names, *(word for word, count in words.items() if count > 1)})


def rate_factor(step: int, total_steps: int, options: OptimizationOptions) -> float:
    """What the learning rates are multiplied with at a step, 0-based: warm-up times schedule."""
    rise = min(1.0, (step + 1) / (options.warmup + 1))
    share = step / total_steps
    if options.schedule == "cosine":
        return rise * (1 + math.cos(math.pi * share)) / 2
    if options.schedule == "step":
        return rise * (0.1 if share >= options.drop_at else 1.0)
    return rise


def note_on_warmup(total_steps: int, options: OptimizationOptions) -> tuple[str, ...]:
    """What to say of a training of which half or more is warm-up."""
    if not options.warmup or 2 * options.warmup < total_steps:
        return ()
    return (
        f"The learning rate rises during {options.warmup:,} steps, and the training has {total_steps:,}: it "
        "will hardly learn anything. Take more --epochs, or a shorter --warmup",
    )


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group's rate to its base rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
