"""What a map of features says of a place in it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from detrkit.boxes import cxcywh_to_xyxy


def pool_boxes(features: Float[Tensor, "f h w"], boxes: Float[Tensor, "p 4"]) -> Float[Tensor, "p f"]:
    """The mean of a map over boxes; a cell counts by the share of it that lies in the box.

    Args:
        features: one image's map, without padding.
        boxes: cxcywh in [0, 1] of the image, of positive width and height.
    """
    x0, y0, x1, y1 = cxcywh_to_xyxy(boxes).unbind(-1)
    rows, columns = _shares(y0, y1, features.shape[1]), _shares(x0, x1, features.shape[2])
    return torch.einsum("fhw,ph,pw->pf", features, rows, columns)


def _shares(low: Float[Tensor, " p"], high: Float[Tensor, " p"], cells: int) -> Float[Tensor, "p {cells}"]:
    """How much of each interval lies in each of the equal cells of [0, 1]; the shares of an interval add up to 1."""
    edge = torch.arange(cells, device=low.device)
    inside = (torch.minimum(high[:, None] * cells, edge + 1) - torch.maximum(low[:, None] * cells, edge)).clamp(min=0)
    return inside / inside.sum(1, keepdim=True).clamp(min=1e-6)
