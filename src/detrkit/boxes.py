"""Box geometry. Functions say whether a box is cxcywh or xyxy; `pairwise` is all with all, `elementwise` row by row."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

AT_ONCE = 512
"""Boxes that are compared with all others in one go; bounds the memory, changes no result."""


def cxcywh_to_xyxy(boxes: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    """Centre, width and height to the two corners, in the unit of the input."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def xyxy_to_cxcywh(boxes: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    """The two corners to centre, width and height, in the unit of the input."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], -1)


def area(boxes: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n"]:
    """Area of xyxy boxes."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def elementwise_iou(
    a: Float[Tensor, "*#n 4"], b: Float[Tensor, "*#n 4"]
) -> tuple[Float[Tensor, "*_"], Float[Tensor, "*_"]]:
    """Intersection over union and the union itself of xyxy boxes, broadcast against each other.

    Two boxes of no area have a union of 0; their IoU is 0, never NaN, and its gradient stays small.
    """
    low = torch.maximum(a[..., :2], b[..., :2])
    high = torch.minimum(a[..., 2:], b[..., 2:])
    side = (high - low).clamp(min=0)
    intersection = side[..., 0] * side[..., 1]
    union = area(a) + area(b) - intersection
    return intersection / union.where(union > 0, 1.0), union


def elementwise_giou(a: Float[Tensor, "*#n 4"], b: Float[Tensor, "*#n 4"]) -> Float[Tensor, "*_"]:
    """Generalised IoU (Rezatofighi et al., CVPR 2019, algorithm 1) of xyxy boxes, broadcast against each other."""
    iou, union = elementwise_iou(a, b)
    low = torch.minimum(a[..., :2], b[..., :2])
    high = torch.maximum(a[..., 2:], b[..., 2:])
    side = (high - low).clamp(min=0)
    hull = side[..., 0] * side[..., 1]
    return iou - (hull - union) / hull.where(hull > 0, 1.0)


def pairwise_iou(a: Float[Tensor, "*#n r 4"], b: Float[Tensor, "*#n s 4"]) -> Float[Tensor, "*_ r s"]:
    """IoU of every xyxy box of `a` with every one of `b`."""
    return elementwise_iou(a[..., :, None, :], b[..., None, :, :])[0]


def pairwise_giou(a: Float[Tensor, "*#n r 4"], b: Float[Tensor, "*#n s 4"]) -> Float[Tensor, "*_ r s"]:
    """Generalised IoU of every xyxy box of `a` with every one of `b`."""
    return elementwise_giou(a[..., :, None, :], b[..., None, :, :])


def clip(boxes: Float[Tensor, "*n 4"], height: float, width: float) -> Float[Tensor, "*n 4"]:
    """xyxy boxes cut at the border of an image of `height` × `width`."""
    limit = boxes.new_tensor([width, height, width, height])
    return torch.minimum(boxes.clamp(min=0), limit)


def nms(
    boxes: Float[Tensor, "n 4"], scores: Float[Tensor, " n"], labels: Float[Tensor, " n"] | Tensor, iou: float
) -> Tensor:
    """Greedy non-maximum suppression within each label.

    Args:
        boxes: xyxy.
        scores: higher is kept first.
        labels: boxes of different labels never suppress each other.
        iou: a box is dropped where it overlaps a kept one of its label by more than this.

    Returns:
        Indices of the kept boxes, by falling score, int64.
    """
    order = scores.argsort(descending=True, stable=True)
    boxes, labels = boxes[order], labels[order]
    overlaps = torch.cat([pairwise_iou(part, boxes) > iou for part in torch.split(boxes, AT_ONCE)])
    suppressing = (overlaps & (labels[:, None] == labels[None, :])).triu(1).cpu().numpy()
    kept = torch.ones(len(order), dtype=torch.bool).numpy()
    for row in range(len(order)):
        if kept[row]:
            kept[suppressing[row]] = False
    return order[torch.from_numpy(kept).to(order.device)]
