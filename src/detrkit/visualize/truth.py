"""The ground truth of an image, in the forms in which answers are drawn, and beside an answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from detrkit.data.annotations import Annotations
from detrkit.data.dataset import boxes_in_file, masks_in_file
from detrkit.data.images import open_image
from detrkit.masks import RunLengths
from detrkit.panoptic import PanopticMap
from detrkit.structures import Detections
from detrkit.visualize.pictures import side_by_side
from detrkit.visualize.segments import panoptic_side_by_side


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


def compare(annotations: Annotations, index: int, found: Detections, **how: Any) -> Image.Image:
    """The truth of image `index` beside what was found in it, on its file, of whatever size that is.

    Args:
        annotations: the split.
        index: the image.
        found: its detections in pixels of the size that the annotations state, as they are evaluated.
        **how: of `side_by_side`.

    Raises:
        DataError: the image or a file of masks cannot be read.
    """
    picture = open_image(annotations.path(index))
    size = (picture.height, picture.width)
    truth, found = (_in_file(one, size) for one in (truth_of(annotations, index), found))
    return side_by_side(picture, truth, found, **how)


def compare_panoptic(annotations: Annotations, index: int, found: PanopticMap, **how: Any) -> Image.Image:
    """The same of segments; `how` of `panoptic_side_by_side`."""
    picture = open_image(annotations.path(index))
    size = (picture.height, picture.width)
    truth, found = (panoptic_in_frame(one, size) for one in (panoptic_truth_of(annotations, index), found))
    return panoptic_side_by_side(picture, truth, found, **how)


def panoptic_in_frame(found: PanopticMap, size: tuple[int, int]) -> PanopticMap:
    """Segments in pixels of an image of another height and width, scaled, or cut and filled up, as masks are."""
    if found.image_size == size:
        return found
    numbers = np.arange(1, len(found) + 1)
    masks = masks_in_file(found.ids == numbers[:, None, None], size)
    ids = np.zeros(size, np.int32)
    for number, mask in zip(numbers, masks, strict=True):
        ids[mask] = number
    return replace(found, ids=ids, image_size=size)


def _in_file(found: Detections, size: tuple[int, int]) -> Detections:
    """All of the detections, in pixels of a file of this height and width."""
    if found.image_size == size:
        return found
    boxes, _ = boxes_in_file(found.boxes.astype(np.float64), found.image_size, size)
    segments = found.segments
    if segments is not None and (segments.sizes != size).any():
        segments = RunLengths.encode(masks_in_file(segments.decode(), size))
    return replace(found, boxes=boxes.astype(np.float32), image_size=size, segments=segments)


def _size(annotations: Annotations, index: int) -> tuple[int, int]:
    height, width = annotations.image_sizes[index]
    return int(height), int(width)
