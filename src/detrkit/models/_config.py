"""What the configs of several variants have to keep, checked in one place. It belongs to no variant."""

from __future__ import annotations

from typing import Any

from detrkit.data.images import MAX_PIXELS
from detrkit.errors import UsageError

_AT_LEAST = {
    "num_classes": 1, "num_queries": 1, "query_groups": 1, "dim": 1, "heads": 1, "encoder_layers": 0,
    "decoder_layers": 1, "feedforward": 1, "temperature": 1, "no_object_weight": 0, "class_weight": 0, "l1_weight": 0,
    "giou_weight": 0, "focal_alpha": 0, "focal_gamma": 0,
}  # fmt: skip


def check_size(image_size: int, longest: int) -> None:
    """Refuse a size at which no image can be seen.

    Args:
        image_size: the shorter side, in pixels.
        longest: limit of the longer side, in pixels.

    Raises:
        UsageError: a side below 1, or more pixels than any image may have that is opened.
    """
    for name, side in (("image_size", image_size), ("longest", longest)):
        if side < 1:
            raise UsageError(f"Bad value for {name}", got=side, expected="at least 1")
    if image_size**2 > MAX_PIXELS:
        raise UsageError(
            "No image has so many pixels",
            where="image_size",
            got=f"{image_size} × {image_size}",
            expected=f"at most {MAX_PIXELS:,}",
        )


def check(config: Any, **choices: tuple[str, ...]) -> None:
    """Refuse numbers that make no sense, together or alone.

    Args:
        config: a variant's config; of the known fields those are checked that it has.
        **choices: fields of text, and the values that each may take.

    Raises:
        UsageError: names the field, what it holds and what it may hold.
    """
    for name, least in _AT_LEAST.items():
        if not getattr(config, name, least) >= least:
            raise UsageError(f"Bad value for {name}", got=getattr(config, name), expected=f"at least {least}")
    check_size(config.image_size, config.longest)
    if not 0 <= config.dropout < 1:
        raise UsageError("Bad value for dropout", got=config.dropout, expected="at least 0 and below 1")
    if config.dim % 4 or config.dim % config.heads:
        raise UsageError(
            "The width does not suit the attention heads and the position encoding",
            got=f"dim {config.dim}, heads {config.heads}",
            expected="dim a multiple of 4 and of heads",
        )
    if config.dilated and config.stride != 32:
        raise UsageError(
            "Only the last stage can be dilated, and this model does not read it",
            got=f"dilated with stride {config.stride}",
            expected="stride 32, which dilation halves",
        )
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise UsageError(
                f"Bad value for {name}", got=repr(getattr(config, name)), expected=f"one of {', '.join(known)}"
            )
