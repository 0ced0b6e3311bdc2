"""The ground truth of an image, in the forms in which answers are drawn."""

from __future__ import annotations

import numpy as np

from detrkit.data.annotations import Annotations
from detrkit.masks import RunLengths
from detrkit.panoptic import PanopticMap
from detrkit.structures import Detections


def truth_of(annotations: Annotations, index: int) -> Detections:
    """The things of image `index` as detections of score 1, with their masks where there are any; crowds are left out.

    Raises:
        DataError: a file of masks cannot be read.
    """
    rows = annotations.rows(index)
    is_thing = np.array([category.is_thing for category in annotations.categories], bool)
    kept = ~annotations.crowd[rows] & is_thing[annotations.labels[rows]]
    return Detections(
        annotations.boxes[rows][kept].astype(np.float32),
        np.ones(int(kept.sum()), np.float32),
        annotations.labels[rows][kept],
        annotations.categories,
        _size(annotations, index),
        str(annotations.path(index)),
        None if annotations.masks is None else annotations.masks.encoded(rows)[kept],
    )


def panoptic_truth_of(annotations: Annotations, index: int) -> PanopticMap:
    """The true segments of image `index`, crowds included; without those whose mask is not known.

    Raises:
        DataError: a file of masks cannot be read.
    """
    rows = annotations.rows(index)
    masks = RunLengths.joined([]) if annotations.masks is None else annotations.masks.encoded(rows)
    size = (int(masks.sizes[0, 0]), int(masks.sizes[0, 1])) if len(masks) else _size(annotations, index)
    known = np.flatnonzero(masks.known)
    ids = np.zeros(size, np.int32)
    for number, row in enumerate(known.tolist(), start=1):
        ids[masks[[row]].decode()[0]] = number
    return PanopticMap(
        ids,
        annotations.labels[rows][known],
        np.ones(len(known), np.float32),
        annotations.categories,
        size,
        str(annotations.path(index)),
    )


def _size(annotations: Annotations, index: int) -> tuple[int, int]:
    height, width = annotations.image_sizes[index]
    return int(height), int(width)
