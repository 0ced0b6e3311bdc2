"""From logits of masks to masks of the original image, one an object."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from detrkit.masks import RunLengths

AT_ONCE = 2**23
"""Pixels of masks at the original size that are held at once."""


def instance_masks(logits: Float[Tensor, "p m n"], size: tuple[int, int]) -> RunLengths:
    """Masks at the size of the original image: where the logits, resized bilinearly, are above zero.

    Args:
        logits: of masks of an image without padding.
        size: height and width of the original image in pixels.

    Returns:
        The masks, compressed as they are made, so that memory does not depend on how many there are.
    """
    chunk = max(1, AT_ONCE // (size[0] * size[1]))
    return RunLengths.joined(
        [RunLengths.encode(_resized(part, size).cpu().numpy()) for part in torch.split(logits, chunk)]
    )


def _resized(logits: Float[Tensor, "p m n"], size: tuple[int, int]) -> Bool[Tensor, "p h w"]:
    """Made column by column, which is how run lengths run."""
    columns = F.interpolate(logits.mT[:, None].float(), size=size[::-1], mode="bilinear")[:, 0]
    return (columns > 0).mT
