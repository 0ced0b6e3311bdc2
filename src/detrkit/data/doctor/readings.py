"""Whether boxes look as if they were written in another order, or in other units, than their format has.

Each way of writing four numbers is a *reading*. Under the right one nearly all boxes lie inside their images; under a
wrong one many do not. So where the format's own reading sends many boxes outside, and another one none, the other is
likely to be meant. That can be seen of a whole split, or of single images that a hurried export left behind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from detrkit.data.annotations import Annotations, Stated

SLACK = 1.5
"""Pixels by which a box may leave its image and still fit: rounding, and counting from 1."""

FAR = 0.02
"""A box that leaves its image by this share of its side is not merely drawn carelessly."""

LEAST_SIDE = 0.5
"""Pixels; a box with a shorter side is none."""

MOST_RIGHT, FEWEST_WRONG, FEWEST_BOXES = 0.02, 0.05, 5
"""Another reading is believed of a split if it leaves at most the first share of its boxes outside, where the format's
own leaves the second, and that many."""

SHARE_SWAPPED, SHARE_OTHER = 0.2, 0.5
"""Of a single image it is believed that y stands before x where at least the first share of its boxes does not fit as
it stands, and that the order is another where the second share does not."""


def _corners(numbers: np.ndarray) -> np.ndarray:
    return numbers


def _from_sides(numbers: np.ndarray) -> np.ndarray:
    return np.concatenate([numbers[:, :2], numbers[:, :2] + numbers[:, 2:]], 1)


def _from_centre(numbers: np.ndarray) -> np.ndarray:
    half = numbers[:, 2:] / 2
    return np.concatenate([numbers[:, :2] - half, numbers[:, :2] + half], 1)


def _to_sides(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)


def _to_centre(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1)


class _Order(NamedTuple):
    names: str
    names_swapped: str
    to_corners: Callable[[np.ndarray], np.ndarray]
    from_corners: Callable[[np.ndarray], np.ndarray]


_ORDERS = {
    "xywh": _Order("x y width height", "y x height width", _from_sides, _to_sides),
    "xyxy": _Order("x y x y (two corners)", "y x y x (two corners)", _corners, _corners),
    "cxcywh": _Order(
        "x y width height, with x y in the middle", "y x height width, with y x in the middle", _from_centre, _to_centre
    ),
}
_OWN_ORDER = {"coco": "xywh", "voc": "xyxy", "yolo": "cxcywh"}


class Reading(NamedTuple):
    """A way to read four numbers: their order, whether y stands before x, and whether they are still to be multiplied
    by the size of the image.
    """

    order: str
    swapped: bool
    multiplied: bool

    def __str__(self) -> str:
        order = _ORDERS[self.order]
        names = order.names_swapped if self.swapped else order.names
        return f"{names}, divided by the image's size" if self.multiplied else names

    def boxes(self, boxes: np.ndarray, sizes: np.ndarray, format: str) -> np.ndarray:
        """What the numbers mean so: (m, 4) xyxy in pixels.

        Args:
            boxes: (m, 4) xyxy in pixels, as `format` reads the same numbers.
            sizes: (m, 2) height and width of each box's image.
            format: how the files are written.
        """
        scale = np.concatenate([sizes[:, ::-1], sizes[:, ::-1]], 1).astype(np.float64)
        unit = scale if format == "yolo" else np.ones(4)
        with np.errstate(over="ignore", invalid="ignore"):
            numbers = _ORDERS[own_order(format)].from_corners(boxes / unit)
            numbers = numbers[:, [1, 0, 3, 2]] if self.swapped else numbers
            corners = _ORDERS[self.order].to_corners(numbers) * unit
            return corners * scale if self.multiplied else corners


def own_order(format: str) -> str:
    """The order of the numbers in a format."""
    return _OWN_ORDER.get(format, "xyxy")


def _others(format: str) -> list[Reading]:
    """All readings but the format's own; where several fit, the first is meant."""
    own = own_order(format)
    orders = [own, *(order for order in _ORDERS if order != own)]
    found = [Reading(order, swapped, big) for big in (False, True) for swapped in (False, True) for order in orders]
    return [reading for reading in found if reading != Reading(own, False, False)]


def fits(boxes: np.ndarray, sizes: np.ndarray, slack: float | np.ndarray = SLACK) -> np.ndarray:
    """Which boxes (m, 4) have sides of half a pixel at least and lie inside their images of `sizes` (m, 2), give or
    take `slack` pixels.
    """
    limit = sizes[:, ::-1]
    with np.errstate(invalid="ignore"):
        sides = (boxes[:, 2:] - boxes[:, :2] >= LEAST_SIDE).all(1)
        inside = (boxes[:, :2] >= -np.asarray(slack)).all(1) & (boxes[:, 2:] <= limit + slack).all(1)
    return sides & inside


class Misread(NamedTuple):
    """Images whose boxes seem to be meant otherwise: `images` are their rows, `boxes` how many they have, `outside` how
    many of these do not fit as the format reads them, and `left` how many do not fit either way.
    """

    reading: Reading
    images: np.ndarray
    boxes: int
    outside: int
    left: int


def misread(annotations: Annotations, found: Stated, format: str) -> list[Misread]:
    """The readings that seem to be meant, each with the images that it holds for.

    Args:
        annotations: a split.
        found: its boxes as stated.
        format: how it is written.
    """
    sizes = annotations.image_sizes[found.images]
    known = (sizes > 0).all(1) & np.isfinite(found.boxes).all(1)
    wrong = known & ~fits(found.boxes, sizes)
    if not wrong.any():
        return []
    everywhere = _of_split(found, sizes, known, wrong, format)
    return [everywhere] if everywhere else _of_images(found, sizes, known, format, len(annotations))


def _of_split(found: Stated, sizes: np.ndarray, known: np.ndarray, wrong: np.ndarray, format: str) -> Misread | None:
    boxes, count = int(known.sum()), int(wrong.sum())
    if count < FEWEST_BOXES or count < FEWEST_WRONG * boxes:
        return None
    best, fewest = None, min(MOST_RIGHT * boxes, count / 10) + 1e-9
    for reading in _others(format):
        left = int((known & ~fits(reading.boxes(found.boxes, sizes, format), sizes)).sum())
        if left < fewest:
            best, fewest = reading, float(left)
    return best and Misread(best, np.unique(found.images[known]), boxes, count, int(fewest))


def _of_images(found: Stated, sizes: np.ndarray, known: np.ndarray, format: str, images: int) -> list[Misread]:
    """Single images: much of what they hold fits under another reading alone.

    A few boxes that cross the border on the right or below fit by chance if the middle is taken for the corner, so that
    reading is believed of whole splits only.
    """
    far = np.maximum(SLACK, FAR * sizes[:, ::-1])
    wrong = known & ~fits(found.boxes, sizes, far)
    tiny = known & (found.boxes <= 1).all(1) & (found.boxes >= 0).all(1)  # all of a box within the image's first pixel
    boxes, outside, specks = (_count(flags, found.images, images) for flags in (known, wrong, tiny))
    all_specks = (specks > 0) & (specks == boxes)
    suspect = ((outside >= 2) & (outside >= SHARE_SWAPPED * boxes)) | all_specks
    chosen = np.full(images, -1)
    readings = [one for one in _others(format) if one.order in (own_order(format), "xyxy")]
    rows = np.flatnonzero(suspect[found.images] & known)
    if len(rows):
        for number, reading in enumerate(readings):
            fitting = fits(reading.boxes(found.boxes[rows], sizes[rows], format), sizes[rows])
            left = np.bincount(found.images[rows][~fitting], minlength=images)
            swapped_alone = reading.swapped and reading.order == own_order(format)
            enough = (boxes >= FEWEST_BOXES) if swapped_alone else outside >= SHARE_OTHER * boxes
            believed = all_specks if reading.multiplied else suspect & ~all_specks & enough
            chosen[believed & (left == 0) & (chosen < 0)] = number
    return [
        Misread(readings[number], members, int(boxes[members].sum()), int(outside[members].sum()), 0)
        for number in np.unique(chosen[chosen >= 0])
        for members in [np.flatnonzero(chosen == number)]
    ]


def _count(flags: np.ndarray, images: np.ndarray, count: int) -> np.ndarray:
    return np.bincount(images[flags], minlength=count)
