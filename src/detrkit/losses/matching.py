"""Bipartite matching between predictions and objects, for all decoder layers and images in one call.

DETR (Carion et al., ECCV 2020), section 3.1, equations 1 and 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from detrkit.boxes import cxcywh_to_xyxy, pairwise_giou
from detrkit.errors import Error


class NonFiniteError(Error):
    """A model whose predictions are NaN or infinite.

    Args:
        images: the names of those that it happened on.
        boxes: what can be told of annotated boxes that are the cause.
        got: how far it came, for people.
    """

    def __init__(self, images: Sequence[str], boxes: Sequence[str] = (), got: str = ""):
        self.images, self.boxes = tuple(images), tuple(boxes)
        if boxes:
            what = "An annotated box makes the loss NaN or infinite"
            got = "; ".join([*boxes, *([got] if got else [])])
            remedy = "Correct or remove the box."
        else:
            what = "The predictions or their gradient are NaN or infinite"
            remedy = "Lower the learning rate, keep gradient clipping on, or train with --precision fp32 or bf16."
        super().__init__(what, where=", ".join(images), got=got, remedy=remedy)


class PaddedTargets(NamedTuple):
    """The targets of a batch as rectangular tensors; rows beyond an image's count are zeros. There is at least one."""

    labels: Int64[Tensor, "b t"]
    boxes: Float[Tensor, "b t 4"]
    counts: tuple[int, ...]
    names: tuple[str, ...]


class Matches(NamedTuple):
    """The matched pairs: pair p joins query `query[l, p]` with object `target[l, p]`, both of image `image[p]`.

    How many pairs an image has does not depend on the layer: min(queries, objects).
    """

    image: Int64[Tensor, " p"]
    query: Int64[Tensor, "layer p"]
    target: Int64[Tensor, "layer p"]


def box_cost(
    predicted: Float[Tensor, "layer b q 4"], boxes: Float[Tensor, "b t 4"], l1: float, giou: float
) -> Float[Tensor, "layer b q t"]:
    """L1 distance of cxcywh boxes and negative generalised IoU, weighted (equation 2, the box part)."""
    distance = (predicted[..., :, None, :] - boxes[:, None, :, :]).abs().sum(-1)
    overlap = pairwise_giou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(boxes))
    return l1 * distance - giou * overlap


def assign(cost: Float[Tensor, "layer b q t"], targets: PaddedTargets) -> Matches:
    """Minimise the total cost for each layer and image on its own.

    The costs travel to the CPU once for the whole step.

    Args:
        cost: cost of joining each query with each (padded) object of its own image.
        targets: says how many objects of each image are real.

    Raises:
        NonFiniteError: a cost is NaN or infinite; names the images. Costs of padded objects count too, because they
            are the only ones of an image without objects.
    """
    from scipy.optimize import linear_sum_assignment  # loading it takes 0.3 s, and only training needs it

    table = cost.detach().float().cpu().numpy()
    finite = np.isfinite(table)
    if not finite.all():
        raise _blame(finite, targets)
    real = [table[:, image, :, :count] for image, count in enumerate(targets.counts)]
    layers = len(table)
    image: list[int] = []
    pairs: list[np.ndarray] = []  # for each image: (layer, 2, pair)
    for index, part in enumerate(real):
        image.extend([index] * min(part.shape[1:]))
        pairs.append(np.array([linear_sum_assignment(part[layer]) for layer in range(layers)]))
    joined = np.concatenate(pairs, -1).astype(np.int64) if pairs else np.zeros((layers, 2, 0), np.int64)
    image_of, moved = (
        torch.from_numpy(one).to(cost.device, non_blocking=True) for one in (np.array(image, np.int64), joined)
    )
    return Matches(image_of, moved[:, 0], moved[:, 1])


def _blame(finite: np.ndarray, targets: PaddedTargets) -> NonFiniteError:
    """The images with costs that are not finite, and their boxes that no query can be joined with."""
    images, boxes = [], []
    for image, (name, count) in enumerate(zip(targets.names, targets.counts, strict=True)):
        if finite[:, image].all():
            continue
        images.append(name)
        can = np.any(finite[:, image], (0, 1)).reshape(
            -1
        )  # a prediction that is not finite spoils every column, also padded ones
        for index, values in enumerate(targets.boxes[image, :count].tolist()):
            if not can[index] and (can.any() or not np.isfinite(values).all()):
                numbers = ", ".join(f"{value:.4g}" for value in values)
                boxes.append(f"box {index + 1} of {count} in {name}: cx, cy, w, h = {numbers}")
    return NonFiniteError(images, boxes)
