"""From annotations and detections to figures: the one entrance to evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from detrkit.data.annotations import Annotations
from detrkit.errors import UsageError
from detrkit.evaluation.average_precision import (
    RECALL_GRID,
    CocoTables,
    coco_figures,
    coco_tables,
    mask_tables,
    mean_defined,
)
from detrkit.evaluation.columns import Found, flatten, only_things
from detrkit.evaluation.confusion import confusion_matrix
from detrkit.evaluation.matching import Matches, match, overlapping_pairs
from detrkit.evaluation.panoptic_quality import ClassQuality, panoptic_quality
from detrkit.evaluation.thresholds import best_f1
from detrkit.evaluation.voc import voc_figures
from detrkit.panoptic import PanopticMap
from detrkit.structures import Detections

FALLBACK_THRESHOLD = 0.5
"""Score threshold of the confusion matrix where no detection is right and so none is best."""


@dataclass(frozen=True)
class ClassMetrics:
    """How well one class is found. Undefined figures are NaN.

    Attributes:
        name: the category.
        boxes: its ground-truth boxes, crowd left out.
        ap: COCO AP (mean over IoU .50:.05:.95).
        ap50: AP at IoU 0.5.
        threshold: the score threshold of the best F1 at IoU 0.5, on these very images.
        f1: F1 at that threshold.
        precision: share of the detections shown there that are right.
        recall: share of the boxes that are found there.
        mask_ap: COCO AP of masks; undefined where there are none.
        mask_ap50: AP of masks at IoU 0.5.
    """

    name: str
    boxes: int
    ap: float
    ap50: float
    threshold: float
    f1: float
    precision: float
    recall: float
    mask_ap: float = math.nan
    mask_ap50: float = math.nan


@dataclass(frozen=True, eq=False)
class Metrics:
    """The outcome of an evaluation.

    Attributes:
        figures: name to value: AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl, the same of masks
            (mask_AP and so on) where there are any, VOC07 and VOC12 where asked for, and of panoptic maps PQ, SQ, RQ
            and the same of things (PQ_things, …) and of stuff; in [0, 1], NaN where undefined (nothing to be found).
        per_class: one entry a category, in the table's order.
        recall: (101,) the recalls of the precision-recall curves.
        precision: (c, 101) the precision at those recalls at IoU 0.5; NaN for a class without boxes.
        confusion: (c + 1, c + 1) int64 counts at IoU 0.5; rows true, columns found, the last of each is background.
        threshold: the score threshold of the confusion matrix.
        images: how many images were evaluated.
        boxes: how many ground-truth boxes, crowd left out.
        panoptic: panoptic quality by class, where it was asked for.
    """

    figures: dict[str, float]
    per_class: tuple[ClassMetrics, ...]
    recall: np.ndarray
    precision: np.ndarray
    confusion: np.ndarray
    threshold: float
    images: int
    boxes: int
    panoptic: tuple[ClassQuality, ...] = ()

    @property
    def things(self) -> tuple[ClassMetrics, ...]:
        """The entries of `per_class` that are not stuff, of which nothing is detected."""
        return tuple(one for row, one in enumerate(self.per_class) if self.is_thing(row))

    def is_thing(self, label: int) -> bool:
        """Whether a class is a thing, as far as panoptic quality was asked for and so says it."""
        return not self.panoptic or self.panoptic[label].is_thing

    def to_json(self) -> dict[str, Any]:
        """All of it as plain JSON values; undefined figures are None."""
        document: dict[str, Any] = {
            "figures": {name: _number(value) for name, value in self.figures.items()},
            "images": self.images,
            "boxes": self.boxes,
            "per_class": [
                {key: _number(value) if isinstance(value, float) else value for key, value in vars(one).items()}
                for one in self.per_class
            ],
            "curves": {
                "iou": 0.5,
                "recall": [float(value) for value in self.recall],
                "precision": [[_number(float(value)) for value in row] for row in self.precision],
            },
            "confusion": {"iou": 0.5, "threshold": self.threshold, "counts": self.confusion.tolist()},
        }
        return document | ({"panoptic": [one.to_json() for one in self.panoptic]} if self.panoptic else {})


def evaluate(
    annotations: Annotations,
    detections: Sequence[Detections],
    *,
    panoptic: Sequence[PanopticMap] | None = None,
    voc: bool = False,
    threshold: float | None = None,
) -> Metrics:
    """Compare detections with ground truth.

    All figures but those of panoptic quality are of things alone, where some categories are stuff.

    Args:
        annotations: the split, n images.
        detections: n entries; entry i belongs to image i of the annotations.
        panoptic: n entries, the same images cut into segments, of which panoptic quality is computed.
        voc: also compute Pascal VOC's average precision (2007 and 2012).
        threshold: score threshold of the confusion matrix; None takes the one of the best F1 over all classes.

    Returns:
        All figures, tables and curves.

    Raises:
        DataError: detections that do not belong to the annotations or hold impossible values.
        UsageError: a threshold outside [0, 1].
    """
    if threshold is not None and not 0 <= threshold <= 1:
        raise UsageError("The score threshold makes no sense", got=threshold, expected="a number from 0 to 1")
    found = flatten(annotations, detections)
    quality = None if panoptic is None else panoptic_quality(annotations, panoptic)
    annotations, found = only_things(annotations, found)
    tables, masks = coco_tables(annotations, found), mask_tables(annotations, found)
    pairs = overlapping_pairs(annotations, found)
    matches = match(annotations, found, pairs)
    named = dict(_figures(tables, masks))
    if voc:
        named.update(voc_figures(annotations, found, pairs))
    if quality is not None:
        named.update(quality.figures)
    boxes = int((~annotations.crowd).sum())
    if threshold is None:
        best = best_f1(found.scores[~matches.ignored], matches.right[~matches.ignored], boxes).threshold
        threshold = FALLBACK_THRESHOLD if math.isnan(best) else best
    precision = tables.precision[0, :, :, 0, 2].T
    return Metrics(
        figures=named,
        per_class=tuple(_per_class(annotations, found, tables, masks, matches)),
        recall=RECALL_GRID.copy(),
        precision=np.where(precision < 0, np.nan, precision),
        confusion=confusion_matrix(annotations, found, pairs, matches, threshold),
        threshold=threshold,
        images=len(annotations),
        boxes=boxes,
        panoptic=() if quality is None else quality.per_class,
    )


def figures(
    annotations: Annotations, detections: Sequence[Detections], *, voc: bool = False
) -> Iterator[tuple[str, float]]:
    """Yield (name, value) of the overall figures alone; arguments and errors as in `evaluate`."""
    annotations, found = only_things(annotations, flatten(annotations, detections))
    yield from _figures(coco_tables(annotations, found), mask_tables(annotations, found))
    if voc:
        yield from voc_figures(annotations, found, overlapping_pairs(annotations, found))


def _figures(tables: CocoTables, masks: CocoTables | None) -> Iterator[tuple[str, float]]:
    yield from coco_figures(tables)
    if masks is not None:
        yield from ((f"mask_{name}", value) for name, value in coco_figures(masks))


def _per_class(
    annotations: Annotations, found: Found, tables: CocoTables, masks: CocoTables | None, matches: Matches
) -> Iterator[ClassMetrics]:
    boxes = np.bincount(annotations.labels[~annotations.crowd], minlength=len(annotations.categories))
    for label, category in enumerate(annotations.categories):
        rows = (found.labels == label) & ~matches.ignored
        point = best_f1(found.scores[rows], matches.right[rows], int(boxes[label]))
        yield ClassMetrics(
            name=category.name,
            boxes=int(boxes[label]),
            ap=mean_defined(tables.precision[:, :, label, 0, 2]),
            ap50=mean_defined(tables.precision[0, :, label, 0, 2]),
            threshold=point.threshold,
            f1=point.f1,
            precision=point.precision,
            recall=point.recall,
            mask_ap=math.nan if masks is None else mean_defined(masks.precision[:, :, label, 0, 2]),
            mask_ap50=math.nan if masks is None else mean_defined(masks.precision[0, :, label, 0, 2]),
        )


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
