"""The criterion of set prediction: match once, then weigh the terms of every decoder layer.

What the class part is (softmax with no-object, focal) is a `Classification`; everything else is shared by the family.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from detrkit.errors import UsageError
from detrkit.losses.functional import class_error, focal_loss, giou_loss, l1_loss, weighted_cross_entropy
from detrkit.losses.matching import Matches, PaddedTargets, assign, box_cost
from detrkit.structures import Predictions, Target


@runtime_checkable
class Classification(Protocol):
    """How a variant scores classes, for matching and for the loss."""

    def cost(self, logits: Float[Tensor, "layer b q c"], labels: Int64[Tensor, "b t"]) -> Float[Tensor, "layer b q t"]:
        """Cost of giving each query each object's class."""
        ...

    def loss(
        self,
        logits: Float[Tensor, "layer b q c"],
        matches: Matches,
        labels: Int64[Tensor, "layer p"],
        num_boxes: float,
    ) -> Float[Tensor, " layer"]:
        """The class term of every layer; `labels` are those of the matched objects."""
        ...


@dataclass(frozen=True)
class SoftmaxClassification:
    """DETR's classes: a softmax over the categories and no-object, which comes last.

    Attributes:
        no_object_weight: weight of a no-object query in the cross-entropy; the paper's is 0.1.
    """

    no_object_weight: float = 0.1

    def cost(self, logits: Float[Tensor, "layer b q c"], labels: Int64[Tensor, "b t"]) -> Float[Tensor, "layer b q t"]:
        """Negative probability of the object's class."""
        layers, _, queries, _ = logits.shape
        wanted = labels[None, :, None, :].expand(layers, -1, queries, -1)
        return -logits.softmax(-1).gather(-1, wanted)

    def loss(
        self,
        logits: Float[Tensor, "layer b q c"],
        matches: Matches,
        labels: Int64[Tensor, "layer p"],
        num_boxes: float,
    ) -> Float[Tensor, " layer"]:
        """Cross-entropy with no-object for all that is not matched; `num_boxes` plays no part."""
        del num_boxes
        no_object = logits.shape[-1] - 1
        classes = torch.full(logits.shape[:-1], no_object, dtype=torch.int64, device=logits.device)
        layer = torch.arange(len(logits), device=logits.device)[:, None]
        classes[layer, matches.image[None], matches.query] = labels
        weight = torch.ones(no_object + 1, dtype=logits.dtype, device=logits.device)
        weight[no_object] = self.no_object_weight
        return weighted_cross_entropy(logits, classes, weight)


@dataclass(frozen=True)
class FocalClassification:
    """A yes or no for each category, none for no-object; the many negatives weigh little where they are sure.

    Attributes:
        alpha: weight of positives; negatives have the rest.
        gamma: exponent of the focal factor.
    """

    alpha: float = 0.25
    gamma: float = 2.0

    def cost(self, logits: Float[Tensor, "layer b q c"], labels: Int64[Tensor, "b t"]) -> Float[Tensor, "layer b q t"]:
        """What the object's class would cost as a positive less what it costs as a negative."""
        layers, _, queries, _ = logits.shape
        chance = logits.sigmoid()
        positive = self.alpha * (1 - chance) ** self.gamma * -(chance + 1e-8).log()
        negative = (1 - self.alpha) * chance**self.gamma * -(1 - chance + 1e-8).log()
        wanted = labels[None, :, None, :].expand(layers, -1, queries, -1)
        return (positive - negative).gather(-1, wanted)

    def loss(
        self,
        logits: Float[Tensor, "layer b q c"],
        matches: Matches,
        labels: Int64[Tensor, "layer p"],
        num_boxes: float,
    ) -> Float[Tensor, " layer"]:
        """Focal loss of every query and class: matched queries want their object's class, all others none."""
        wanted = torch.zeros_like(logits)
        layer = torch.arange(len(logits), device=logits.device)[:, None]
        wanted[layer, matches.image[None], matches.query, labels] = 1
        return focal_loss(logits, wanted, num_boxes, self.alpha, self.gamma)


@runtime_checkable
class Answers(Protocol):
    """What is matched and judged: the logits and the boxes of all layers, such as `Predictions` hold."""

    @property
    def logits(self) -> Float[Tensor, "layer b q c"]:
        """Scores of the classes before softmax or sigmoid."""
        ...

    @property
    def boxes(self) -> Float[Tensor, "layer b q 4"]:
        """cxcywh in [0, 1] of the unpadded image."""
        ...


class TermWeights(NamedTuple):
    """Weights of the class, L1 and generalised IoU parts, of a cost or of a loss."""

    classification: float
    l1: float
    giou: float


class Evidence(NamedTuple):
    """What the losses were computed from, without gradients, for whoever watches the training.

    `logits`, without that of no-object, and `boxes` are the answers of the last layer; `matches` join them with
    `targets`.
    """

    logits: Float[Tensor, "b q c"]
    boxes: Float[Tensor, "b q 4"]
    targets: PaddedTargets
    matches: Matches


class Losses(NamedTuple):
    """All terms of a step: `values[i, l]` is term `names[i]` at decoder layer l, not yet weighted.

    `share` is the part of a term's weight that each layer has; below 1 where groups of queries made layers more.
    `evidence` is what they were computed from, where boxes were matched.
    """

    names: tuple[str, ...]
    values: Float[Tensor, "term layer"]
    weights: Float[Tensor, " term"]
    class_error: Float[Tensor, ""]
    share: float = 1.0
    evidence: Evidence | None = None

    @property
    def total(self) -> Float[Tensor, ""]:
        """The weighted sum over terms and layers: what is minimised."""
        return (self.values.sum(1) * self.weights).sum()

    def joined(self, name: str, values: Float[Tensor, " layer"], weight: float) -> Losses:
        """The same with one term more, whose weight is shared among groups of queries as those of the others are."""
        share = self.share * constants(values, weight)
        return Losses(
            (*self.names, name),
            torch.cat([self.values, values[None]]),
            torch.cat([self.weights, share]),
            self.class_error,
            self.share,
            self.evidence,
        )

    def of_last_layer(self, name: str, value: Float[Tensor, ""], weight: float) -> Losses:
        """The same with a term more that only the last layer has, at its full weight."""
        values = torch.zeros_like(self.values[:1])
        values[0, -1] = value
        weights = torch.cat([self.weights, constants(self.weights, weight)])
        return self._replace(names=(*self.names, name), values=torch.cat([self.values, values]), weights=weights)

    def beside(self, other: Losses, prefix: str, weight: float) -> Losses:
        """These terms, and those of another answer of the same layers under `prefix`, times `weight`."""
        return Losses(
            (*self.names, *(f"{prefix}{name}" for name in other.names)),
            torch.cat([self.values, other.values]),
            torch.cat([self.weights, weight * other.weights]),
            self.class_error,
            self.share,
            self.evidence,
        )


@dataclass(frozen=True)
class SetCriterion:
    """Hungarian loss (equation 2 of the DETR paper) at every decoder layer.

    Attributes:
        classification: the class part.
        cost: weights in the matching.
        loss: weights in the loss.
        layers: the decoder's layers. Where predictions have a multiple of them, of several groups of queries, the
            weights are shared among the groups. 0: every layer has the full weight.
    """

    classification: Classification
    cost: TermWeights
    loss: TermWeights
    layers: int = 0

    @torch.no_grad()
    def costs(self, predictions: Answers, targets: PaddedTargets) -> Float[Tensor, "layer b q t"]:
        """What it costs to join each query with each object of its image, padded ones included, at every layer."""
        logits, boxes = predictions.logits.float(), predictions.boxes.float()
        of_class = self.cost.classification * self.classification.cost(logits, targets.labels)
        return of_class + box_cost(boxes, targets.boxes, self.cost.l1, self.cost.giou)

    def match(self, predictions: Answers, targets: PaddedTargets) -> Matches:
        """Join queries with objects at every layer.

        Raises:
            NonFiniteError: predictions are NaN or infinite; names the images.
        """
        return assign(self.costs(predictions, targets), targets)

    def __call__(self, predictions: Predictions, targets: Sequence[Target], num_boxes: float | None = None) -> Losses:
        """All terms of a batch.

        Args:
            predictions: of all layers.
            targets: one for each image.
            num_boxes: what box terms are divided by; by default the batch's number of boxes, at least 1. Processes
                that train together pass their mean.

        Raises:
            NonFiniteError: predictions are NaN or infinite; names the images.
            UsageError: the number of targets is not the number of images.
        """
        images = predictions.logits.shape[1]
        if len(targets) != images:
            raise UsageError("Targets and images differ in number", got=f"{len(targets)} targets, {images} images")
        padded = pad_targets(targets)
        return self.terms(predictions, padded, self.match(predictions, padded), num_boxes)

    def terms(
        self, predictions: Answers, targets: PaddedTargets, matches: Matches, num_boxes: float | None = None
    ) -> Losses:
        """All terms of a batch whose matches are known.

        Args:
            predictions: of all layers.
            targets: of every image.
            matches: who answers for which object, at every layer.
            num_boxes: as for the whole criterion.
        """
        num_boxes = max(float(sum(targets.counts)), 1.0) if num_boxes is None else num_boxes
        logits, predicted = predictions.logits.float(), predictions.boxes.float()
        layer = torch.arange(len(logits), device=logits.device)[:, None]
        answers = predicted[layer, matches.image[None], matches.query]
        boxes = targets.boxes[matches.image[None], matches.target]
        labels = targets.labels[matches.image[None], matches.target]
        values = torch.stack(
            [
                self.classification.loss(logits, matches, labels, num_boxes),
                l1_loss(answers, boxes, num_boxes),
                giou_loss(answers, boxes, num_boxes),
            ]
        )
        with torch.no_grad():
            error = class_error(logits[-1][matches.image, matches.query[-1]], labels[-1])
        share = self.layers / values.shape[1] if self.layers else 1.0
        classes = logits.shape[-1] - isinstance(self.classification, SoftmaxClassification)
        evidence = Evidence(logits[-1, :, :, :classes].detach(), predicted[-1].detach(), targets, matches)
        return Losses(("class", "l1", "giou"), values, constants(values, *self.loss) * share, error, share, evidence)


def constants(like: Tensor, *numbers: float) -> Float[Tensor, " n"]:
    """Numbers where a tensor is and in its type, without waiting for its device as a copy of them would."""
    return torch.stack([like.new_full((), number) for number in numbers])


def pad_targets(targets: Sequence[Target]) -> PaddedTargets:
    """Stack the targets of a batch, filled up with zeros to the largest count, or to 1 where that is 0."""
    counts = tuple(len(target.labels) for target in targets)
    first, rows = targets[0], max(1, *counts)
    labels = first.labels.new_zeros(len(targets), rows)
    boxes = first.boxes.new_zeros(len(targets), rows, 4)
    for row, (target, count) in enumerate(zip(targets, counts, strict=True)):
        labels[row, :count] = target.labels
        boxes[row, :count] = target.boxes
    names = tuple(target.name or f"image {row} of the batch" for row, target in enumerate(targets))
    return PaddedTargets(labels, boxes, counts, names)
