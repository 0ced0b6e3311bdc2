"""The loss terms as functions of plain tensors. Each returns one figure for every decoder layer."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from detrkit.boxes import cxcywh_to_xyxy, elementwise_giou


def weighted_cross_entropy(
    logits: Float[Tensor, "layer b q c"], classes: Int64[Tensor, "layer b q"], weight: Float[Tensor, " c"]
) -> Float[Tensor, " layer"]:
    """Cross-entropy over classes and no-object, averaged with class weights over all queries of the batch.

    The official average: the sum of weighted terms over the sum of weights, not over the number of boxes. Where all
    weights are zero, it is zero.
    """
    layers = len(logits)
    terms = F.cross_entropy(logits.flatten(0, 2), classes.flatten(), weight, reduction="none")
    total = weight[classes].view(layers, -1).sum(1)
    return terms.view(layers, -1).sum(1) / total.where(total > 0, 1.0)


def focal_loss(
    logits: Float[Tensor, "layer b q c"],
    wanted: Float[Tensor, "layer b q c"],
    num_boxes: float,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Float[Tensor, " layer"]:
    """Sigmoid focal loss over queries and classes, summed and divided by the number of boxes.

    Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, equation 5.

    Args:
        logits: of each class on its own.
        wanted: 1 where the query is to find the class, else 0.
        num_boxes: what the sum is divided by.
        alpha: weight of what is wanted; the rest weighs 1 − alpha.
        gamma: exponent of the factor by which what is nearly right counts less.
    """
    return _focal_terms(logits, wanted, alpha, gamma).sum((1, 2, 3)) / num_boxes


def _focal_terms(
    logits: Float[Tensor, "*any"], wanted: Float[Tensor, "*any"], alpha: float, gamma: float
) -> Float[Tensor, "*any"]:
    terms = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    chance = logits.sigmoid()
    wrong = chance + wanted - 2 * chance * wanted
    # An exponent below 1 is infinitely steep at 0, which a sigmoid reaches: infinity times no loss would be NaN.
    factor = wrong.clamp(min=torch.finfo(wrong.dtype).tiny) ** gamma
    return ((2 * alpha - 1) * wanted + (1 - alpha)) * factor * terms


def l1_loss(
    predicted: Float[Tensor, "layer p 4"], boxes: Float[Tensor, "layer p 4"], num_boxes: float
) -> Float[Tensor, " layer"]:
    """Absolute differences of matched cxcywh boxes, summed and divided by the number of boxes (section 3.1)."""
    return (predicted - boxes).abs().sum((1, 2)) / num_boxes


def giou_loss(
    predicted: Float[Tensor, "layer p 4"], boxes: Float[Tensor, "layer p 4"], num_boxes: float
) -> Float[Tensor, " layer"]:
    """One minus generalised IoU of matched cxcywh boxes, summed and divided by the number of boxes."""
    overlap = elementwise_giou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(boxes))
    return (1 - overlap).sum(1) / num_boxes


def mask_focal_loss(
    logits: Float[Tensor, "p h w"], masks: Float[Tensor, "p h w"], alpha: float = 0.25, gamma: float = 2.0
) -> Float[Tensor, " p"]:
    """Focal loss of every pixel of a mask, averaged over the pixels: one figure for each mask.

    Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, as DETR's mask head uses it (section 5).

    Args:
        logits: whether a pixel belongs to the object.
        masks: 1 where it does.
        alpha: weight of the object's pixels; all others weigh 1 − alpha.
        gamma: exponent of the factor by which what is nearly right counts less.
    """
    return _focal_terms(logits, masks, alpha, gamma).mean((1, 2))


def dice_loss(logits: Float[Tensor, "p h w"], masks: Float[Tensor, "p h w"]) -> Float[Tensor, " p"]:
    """One minus the Dice coefficient of a mask and its probabilities, both sums with one pixel more.

    Milletari et al., "V-Net", 3DV 2016, without the squares, as DETR has it.
    """
    chance = logits.sigmoid()
    both = (chance * masks).sum((1, 2))
    return 1 - (2 * both + 1) / (chance.sum((1, 2)) + masks.sum((1, 2)) + 1)


def class_error(logits: Float[Tensor, "p c"], labels: Int64[Tensor, " p"]) -> Float[Tensor, ""]:
    """Share of matched queries in [0, 1] whose most probable class is wrong; 0 where nothing is matched."""
    if not len(labels):
        return torch.zeros((), device=logits.device)
    return (logits.argmax(-1) != labels).float().mean()
