"""From raw predictions to scored boxes in pixels, as plain tensors.

A variant picks the function that fits its classes. Boxes leave in xyxy pixels of the original image.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from detrkit.boxes import cxcywh_to_xyxy, nms
from detrkit.structures import Predictions

LEAST = 100
"""So many detections of an image there may be at least where queries answer for each class, however few they are."""


class Scored(NamedTuple):
    """Detections of one image: boxes xyxy in pixels, scores in [0, 1], labels, and which query of the last layer each
    comes from; None where several layers answer together.
    """

    boxes: Float[Tensor, "n 4"]
    scores: Float[Tensor, " n"]
    labels: Int64[Tensor, " n"]
    queries: Int64[Tensor, " n"] | None = None


def to_pixels(boxes: Float[Tensor, "*n q 4"], sizes: Int64[Tensor, "b 2"]) -> Float[Tensor, "*n q 4"]:
    """cxcywh in [0, 1] to xyxy in pixels of images of `sizes` (height, width)."""
    height, width = sizes.to(boxes.dtype).unbind(-1)
    return cxcywh_to_xyxy(boxes) * torch.stack([width, height, width, height], -1)[:, None, :]


def softmax_detections(predictions: Predictions, sizes: Int64[Tensor, "b 2"]) -> list[Scored]:
    """DETR's answer: for every query of the last layer its best class other than no-object.

    No threshold and no suppression of overlaps (section 3 of the paper): as many detections as queries.

    Args:
        predictions: logits end in the no-object class.
        sizes: height and width of each original image in pixels.
    """
    scores, labels = predictions.logits[-1].float().softmax(-1)[..., :-1].max(-1)
    boxes = to_pixels(predictions.boxes[-1].float(), sizes)
    queries = torch.arange(boxes.shape[1], device=boxes.device)
    return [Scored(*image, queries) for image in zip(boxes, scores, labels, strict=True)]


def softmax_ensemble(
    predictions: Predictions, sizes: Int64[Tensor, "b 2"], iou: float = 0.7, top: int | None = None
) -> list[Scored]:
    """The answers of all decoder layers together, overlaps of one class suppressed.

    Args:
        predictions: logits end in the no-object class.
        sizes: height and width of each original image in pixels.
        iou: a box is dropped where it overlaps a better one of its class by more than this.
        top: at most this many detections an image; by default the number of queries.
    """
    top = predictions.logits.shape[2] if top is None else top
    scores, labels = predictions.logits.float().softmax(-1)[..., :-1].max(-1)
    boxes = to_pixels(predictions.boxes.float(), sizes)
    layers = [
        Scored(boxes[:, image].flatten(0, 1), scores[:, image].flatten(), labels[:, image].flatten())
        for image in range(boxes.shape[1])
    ]
    return [_without_overlaps(candidates, iou, top) for candidates in layers]


def sigmoid_detections(predictions: Predictions, sizes: Int64[Tensor, "b 2"], top: int | None = None) -> list[Scored]:
    """Conditional DETR's answer: the best pairs of query and class of the last layer; a query may answer repeatedly.

    The official code keeps 100 pairs of its 300 queries. Here they are as many as the queries, which may be raised for
    images of many objects; the first 100 are the official ones.

    Args:
        predictions: every class is a yes or no of its own.
        sizes: height and width of each original image in pixels.
        top: at most this many detections an image; by default the number of queries, and at least 100.
    """
    top = _most(predictions) if top is None else top
    return [_best(*image, top) for image in _chances(predictions.logits[-1], predictions.boxes[-1], sizes)]


def sigmoid_ensemble(
    predictions: Predictions, sizes: Int64[Tensor, "b 2"], iou: float = 0.7, top: int | None = None
) -> list[Scored]:
    """The answers of all decoder layers together, overlaps of one class suppressed.

    Args:
        predictions: every class is a yes or no of its own.
        sizes: height and width of each original image in pixels.
        iou: a box is dropped where it overlaps a better one of its class by more than this.
        top: at most this many detections an image, as of `sigmoid_detections`.
    """
    top = _most(predictions) if top is None else top
    layers = [
        [_best(*image, top) for image in _chances(*layer, sizes)]
        for layer in zip(predictions.logits, predictions.boxes, strict=True)
    ]
    together = [
        Scored(*(torch.cat(column) for column in zip(*(layer[:3] for layer in image), strict=True)))
        for image in zip(*layers, strict=True)
    ]
    return [_without_overlaps(candidates, iou, top) for candidates in together]


def _most(predictions: Predictions) -> int:
    return max(LEAST, predictions.logits.shape[2])


def _chances(
    logits: Float[Tensor, "b q c"], boxes: Float[Tensor, "b q 4"], sizes: Int64[Tensor, "b 2"]
) -> Iterator[tuple[Float[Tensor, "q c"], Float[Tensor, "q 4"]]]:
    """Probability of each class and box in pixels of each query, image by image."""
    return zip(logits.float().sigmoid(), to_pixels(boxes.float(), sizes), strict=True)


def _best(chances: Float[Tensor, "q c"], boxes: Float[Tensor, "q 4"], top: int) -> Scored:
    scores, pairs = chances.flatten().topk(min(top, chances.numel()))
    query, label = pairs // chances.shape[1], pairs % chances.shape[1]
    return Scored(boxes[query], scores, label, query)


def _without_overlaps(candidates: Scored, iou: float, top: int) -> Scored:
    kept = nms(candidates.boxes, candidates.scores, candidates.labels, iou)[:top]
    return Scored(candidates.boxes[kept], candidates.scores[kept], candidates.labels[kept])
