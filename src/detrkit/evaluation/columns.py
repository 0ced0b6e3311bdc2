"""The detections of a whole split in columns, checked against the annotations that they are evaluated with; and the
true masks of a whole split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from detrkit.data.annotations import Annotations
from detrkit.errors import DataError
from detrkit.masks import RunLengths
from detrkit.structures import Category, Detections


class Found(NamedTuple):
    """All detections of a split, image after image.

    Attributes:
        images: (k,) int64, the position of each detection's image in the annotations.
        labels: (k,) int64, rows of the category table.
        scores: (k,) float64.
        boxes: (k, 4) float64, xyxy in pixels of the upright image.
        segments: k masks of their images' sizes; None where the detector makes none.
    """

    images: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray
    segments: RunLengths | None = None


def flatten(annotations: Annotations, detections: Sequence[Detections]) -> Found:
    """Put the detections of every image into columns.

    Args:
        annotations: the split, n images.
        detections: n entries; entry i belongs to image i.

    Raises:
        DataError: there is no image, the numbers differ, a detection has an unknown label, a coordinate or a score
            that is not finite, columns of unequal length, another category table than the annotations, or no mask
            where others have one.
    """
    check_number(annotations, detections, "detections")
    seen = None
    for index, one in enumerate(detections):
        if one.categories is not seen:
            check_categories(annotations, index, one.categories)
            seen = one.categories
        count = len(one)
        if one.boxes.shape != (count, 4) or one.scores.shape != (count,) or one.labels.shape != (count,):
            raise DataError(
                "The columns of the detections do not fit together",
                where=image_name(annotations, index),
                got=f"boxes {one.boxes.shape}, scores {one.scores.shape}, labels {one.labels.shape}",
                expected="(n, 4), (n,), (n,)",
            )
    counts = [len(one) for one in detections]
    found = Found(
        np.repeat(np.arange(len(detections), dtype=np.int64), counts),
        np.concatenate([one.labels for one in detections]).astype(np.int64),
        np.concatenate([one.scores for one in detections]).astype(np.float64),
        np.concatenate([one.boxes for one in detections]).astype(np.float64),
        _segments(annotations, detections),
    )
    _check_values(annotations, found, len(annotations.categories))
    return found


def only_things(annotations: Annotations, found: Found) -> tuple[Annotations, Found]:
    """What of a split and of its detections are things: stuff is not counted, and no figure of detection is of it."""
    is_thing = np.array([category.is_thing for category in annotations.categories], bool)
    if is_thing.all():
        return annotations, found
    rows, kept = np.flatnonzero(is_thing[annotations.labels]), is_thing[found.labels]
    things = replace(
        annotations,
        offsets=np.searchsorted(rows, annotations.offsets),
        boxes=annotations.boxes[rows],
        labels=annotations.labels[rows],
        areas=annotations.areas[rows],
        crowd=annotations.crowd[rows],
        difficult=annotations.difficult[rows],
        masks=None if annotations.masks is None else annotations.masks[rows],
    )
    chosen = Found(
        found.images[kept],
        found.labels[kept],
        found.scores[kept],
        found.boxes[kept],
        None if found.segments is None else found.segments[kept],
    )
    return things, chosen


def true_masks(annotations: Annotations) -> RunLengths:
    """The masks of all objects of a split that has masks, one a row.

    Raises:
        DataError: a file that holds them cannot be read.
    """
    assert annotations.masks is not None, "only annotations with masks are asked for them"
    if isinstance(annotations.masks, RunLengths):
        return annotations.masks
    return RunLengths.joined([annotations.masks.encoded(annotations.rows(index)) for index in range(len(annotations))])


def _segments(annotations: Annotations, detections: Sequence[Detections]) -> RunLengths | None:
    if all(one.segments is None for one in detections):
        return None
    parts = []
    for index, one in enumerate(detections):
        part = RunLengths.joined([]) if one.segments is None else one.segments
        if len(part) != len(one) or not part.known.all():
            raise DataError(
                "Some detections have a mask and others have none",
                where=image_name(annotations, index),
                got=f"{int(part.known.sum())} masks of {len(one)} detections",
                expected="a mask, be it empty, for each of them",
            )
        parts.append(part)
    return RunLengths.joined(parts)


def image_name(annotations: Annotations, index: int) -> str:
    """An image, for messages."""
    return f"image {index} ({annotations.file_names[index]})"


def check_number(annotations: Annotations, answers: Sequence[object], what: str) -> None:
    """Refuse a split without images, or as many entries of "detections" or others as it has no images."""
    if len(annotations) == 0:
        raise DataError(
            "There is no image to evaluate on",
            where=annotations.source,
            remedy="Choose a split that holds at least one image.",
        )
    if len(answers) != len(annotations):
        raise DataError(
            f"{what.capitalize()} and images differ in number",
            where=annotations.source,
            got=f"{len(answers)} entries of {what}",
            expected=f"{len(annotations)}, one for each image",
            remedy="Give an empty entry for an image in which nothing was found.",
        )


def check_categories(annotations: Annotations, index: int, categories: tuple[Category, ...]) -> None:
    """Refuse an answer for image `index` whose category table is not that of the annotations."""
    found, names = ([category.name for category in table] for table in (categories, annotations.categories))
    if found != names:
        raise DataError(
            "The answers have another category table than the annotations",
            where=image_name(annotations, index),
            got=_short(found),
            expected=_short(names),
            remedy="Evaluate a model on data with the categories that it was trained on, in the same order.",
        )


def _short(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f", … ({len(names)} in all)" if len(names) > 8 else "") if names else "no category"


def _check_values(annotations: Annotations, found: Found, classes: int) -> None:
    finite = np.isfinite(found.scores) & np.isfinite(found.boxes).all(1)
    known = (found.labels >= 0) & (found.labels < classes)
    upright = (found.boxes[:, 2:] >= found.boxes[:, :2]).all(1)
    for good, what, expected in (
        (finite, "A detection has a score or a coordinate that is not a finite number", "finite numbers"),
        (known, "A detection has a label that the category table lacks", f"a label from 0 to {classes - 1}"),
        (~finite | upright, "A detection has its corners swapped", "x0 ≤ x1 and y0 ≤ y1"),
    ):
        if not good.all():
            row = int(np.flatnonzero(~good)[0])
            box = ", ".join(f"{value:g}" for value in found.boxes[row])
            raise DataError(
                what,
                where=image_name(annotations, int(found.images[row])),
                got=f"label {found.labels[row]}, score {found.scores[row]:g}, box ({box})",
                expected=expected,
            )
