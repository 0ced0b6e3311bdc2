"""Panoptic quality, computed by hotcoco behind one adapter.

Kirillov et al., "Panoptic Segmentation" (CVPR 2019), by the rules of the reference implementation: a predicted segment
finds a true one of its class where their IoU is above 0.5, pixels that belong to no true segment left out of the union;
crowd segments are neither found nor missed; a predicted segment more than half of which lies in such pixels or in
crowds of its class is not counted as false. PQ is SQ (mean IoU of what was found) times RQ (F1 of finding), each a mean
over the classes that occur on either side. Undefined figures are NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from detrkit.data.annotations import Annotations
from detrkit.errors import DataError
from detrkit.evaluation.columns import check_categories, check_number, image_name, true_masks
from detrkit.masks import RunLengths
from detrkit.panoptic import PanopticMap

GROUPS = {"All": "", "Things": "_things", "Stuff": "_stuff"}
"""What the figures are means over, as hotcoco calls it, and the ending of their names."""


@dataclass(frozen=True)
class ClassQuality:
    """How well one class is segmented. Undefined figures are NaN.

    Attributes:
        name: the category.
        is_thing: whether it is a thing.
        segments: its true segments, crowds left out.
        pq: panoptic quality, `sq` × `rq`.
        sq: segmentation quality, mean IoU of the segments found.
        rq: recognition quality, F1 of finding.
        found: true segments that were found.
        false: predicted segments that found none.
    """

    name: str
    is_thing: bool
    segments: int
    pq: float
    sq: float
    rq: float
    found: int
    false: int

    @property
    def missed(self) -> int:
        """True segments that were not found."""
        return self.segments - self.found

    def to_json(self) -> dict[str, Any]:
        """All of it as plain JSON values; undefined figures are None."""
        undefined = {name: None for name in ("pq", "sq", "rq") if math.isnan(getattr(self, name))}
        return {**vars(self), **undefined}


@dataclass(frozen=True)
class PanopticQuality:
    """How well a split is segmented.

    Attributes:
        figures: name to value: PQ, SQ, RQ of all classes, then of things (PQ_things, …) and of stuff (PQ_stuff, …); in
            [0, 1], NaN where no such class occurs.
        per_class: one entry a category, in the table's order.
    """

    figures: dict[str, float]
    per_class: tuple[ClassQuality, ...]


def panoptic_quality(annotations: Annotations, maps: Sequence[PanopticMap]) -> PanopticQuality:
    """Compare segments with the true ones.

    A true segment whose mask is not known is left out, and so its pixels belong to none. Several crowds of one class in
    an image count as one.

    Args:
        annotations: the split, n images; each row is a segment, of things and of stuff, with its mask.
        maps: n entries; entry i belongs to image i.

    Raises:
        DataError: there are no masks, the numbers differ, a map has another size or category table, or true segments
            overlap.
    """
    if annotations.masks is None:
        raise DataError(
            "Panoptic quality needs the true segments",
            where=annotations.source,
            got="annotations without masks",
            remedy="Evaluate on a panoptic data set.",
        )
    check_number(annotations, maps, "panoptic maps")
    for index, one in enumerate(maps):
        check_categories(annotations, index, one.categories)
    if not annotations.categories:
        return PanopticQuality(dict(_figures({})), ())
    import hotcoco
    from hotcoco.panoptic import PanopticEval

    images = [{"id": index, "height": 0, "width": 0} for index in range(1, len(annotations) + 1)]
    categories = [
        {"id": label + 1, "name": category.name, "isthing": int(category.is_thing)}
        for label, category in enumerate(annotations.categories)
    ]
    truth, found = _Segments(), _Segments()
    masks = true_masks(annotations)
    for index, one in enumerate(maps):
        rows = annotations.rows(index)
        _add_truth(truth, annotations, index, masks[rows], one.image_size)
        present = one.areas > 0
        images[index].update(height=one.image_size[0], width=one.image_size[1])
        found.add(index + 1, one.labels[present], one.segments[present], np.zeros(int(present.sum()), bool))
    evaluator = PanopticEval(
        *(hotcoco.COCO.from_arrays(images, categories, **side.columns()) for side in (truth, found))
    )
    evaluator.evaluate()
    results = evaluator.results()
    return PanopticQuality(dict(_figures(results)), tuple(_per_class(annotations, results["per_class"])))


class _Segments:
    """The segments of one side, image after image, as the evaluator takes them."""

    def __init__(self) -> None:
        self.images: list[np.ndarray] = []
        self.labels: list[np.ndarray] = []
        self.crowd: list[np.ndarray] = []
        self.masks: list[RunLengths] = []

    def add(self, image: int, labels: np.ndarray, masks: RunLengths, crowd: np.ndarray) -> None:
        self.images.append(np.full(len(labels), image, np.int64))
        self.labels.append(labels)
        self.crowd.append(crowd)
        self.masks.append(masks)

    def columns(self) -> dict[str, Any]:
        masks = RunLengths.joined(self.masks)
        return {
            "image_ids": np.concatenate(self.images),
            "category_ids": np.concatenate(self.labels).astype(np.int64) + 1,
            "boxes": np.zeros((len(masks), 4)),
            "area": masks.areas().astype(np.float64),
            "iscrowd": np.concatenate(self.crowd),
            "segmentation": masks.to_coco(),
        }


def _add_truth(
    truth: _Segments, annotations: Annotations, index: int, masks: RunLengths, size: tuple[int, int]
) -> None:
    """The true segments of one image, checked, the crowds of each class made one."""
    from hotcoco import mask

    rows = annotations.rows(index)
    labels, crowd, masks = (
        annotations.labels[rows][masks.known],
        annotations.crowd[rows][masks.known],
        masks[masks.known],
    )
    if (masks.sizes != size).any():
        raise DataError(
            "The panoptic map has another size than the true segments of its image",
            where=image_name(annotations, index),
            got=f"{size[0]} × {size[1]}",
            expected=" × ".join(str(side) for side in masks.sizes[0]),
        )
    if len(masks) and int(mask.area(mask.merge(masks.to_coco()))) != masks.areas().sum():
        raise DataError(
            "True segments overlap, and panoptic quality is only defined where each pixel belongs to one at most",
            where=image_name(annotations, index),
            remedy="Evaluate on a panoptic data set, not on masks of instances.",
        )
    truth.add(index + 1, labels[~crowd], masks[~crowd], np.zeros(int((~crowd).sum()), bool))
    for label in np.unique(labels[crowd]):
        merged: Any = mask.merge(masks[crowd & (labels == label)].to_coco())
        truth.add(index + 1, np.array([label]), RunLengths.from_coco([merged]), np.ones(1, bool))


def _figures(results: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for group, ending in GROUPS.items():
        means = results.get(group, {"n": 0})
        for name in ("pq", "sq", "rq"):
            yield name.upper() + ending, float(means[name]) if means["n"] else math.nan


def _per_class(annotations: Annotations, results: dict[int, dict[str, float]]) -> Iterator[ClassQuality]:
    for label, category in enumerate(annotations.categories):
        one = results[label + 1]
        found, false, missed = (int(one[name]) for name in ("tp", "fp", "fn"))
        occurs = found + false + missed > 0
        pq, sq, rq = (float(one[name]) if occurs else math.nan for name in ("pq", "sq", "rq"))
        yield ClassQuality(category.name, category.is_thing, found + missed, pq, sq, rq, found, false)
