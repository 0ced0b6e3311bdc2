"""Images cut into segments, drawn with Pillow alone."""

from __future__ import annotations

import numpy as np
from PIL import Image

from detrkit.data.images import open_image
from detrkit.panoptic import PanopticMap
from detrkit.visualize.colours import PAPER, colours_apart
from detrkit.visualize.pictures import ImageLike, draw_labels, line_width, mosaic, opened_at
from detrkit.visualize.tint import lined, veiled

VEIL = 0.55
"""How much of a segment's pixel is colour."""

SMALLEST_NAMED = 0.002
"""Share of the picture from which on a segment is named in it."""

FINE = 96
"""Places along the longer side of a segment among which that of its name is chosen."""


def draw_panoptic(
    image: ImageLike, found: PanopticMap, *, longest_side: int | None = None, scores: bool = False
) -> Image.Image:
    """Draw segments: a colour each, a line where two meet, and names where there is room.

    Args:
        image: the upright image that was cut into segments; it is not changed.
        found: its segments.
        longest_side: resize the picture to this many pixels first, so that lines and letters suit that size.
        scores: write the scores beside the names.

    Raises:
        DataError: the file is missing or cannot be decoded, or an array is no image.
        UsageError: the segments belong to an image of another size.
    """
    picture, _ = opened_at(image, longest_side, found.image_size, found.source)
    down, across = (
        np.minimum(((np.arange(target) + 0.5) * source / target).astype(np.int64), source - 1)
        for target, source in zip(picture.size[::-1], found.image_size, strict=True)
    )
    ids = found.ids[np.ix_(down, across)]
    areas = np.bincount(ids.ravel(), minlength=len(found) + 1)[1:]
    present = np.flatnonzero(areas > 0)
    order = present[np.argsort(-areas[present], kind="stable")]
    boxes = _boxes(ids, len(found))
    colours = colours_apart(found.labels[order], boxes[order])
    ranks = np.zeros(len(found) + 1, np.int32)
    ranks[order + 1] = np.arange(1, len(order) + 1)
    picture = veiled(picture, ranks[ids], colours, VEIL)
    picture = lined(picture, _borders(ids, max(1, line_width(picture) // 2)).astype(np.int32), [PAPER])
    named = [rank for rank, row in enumerate(order) if areas[row] >= SMALLEST_NAMED * ids.size]
    names = [found.names[order[rank]] for rank in named]
    texts = [
        f"{name} {found.scores[order[rank]]:.2f}" if scores else name for name, rank in zip(names, named, strict=True)
    ]
    places = np.array([_middle(ids, boxes[order[rank]], int(order[rank]) + 1) for rank in named]).reshape(-1, 4)
    draw_labels(picture, texts, names, places, [colours[rank] for rank in named], centred=True)
    return picture


def panoptic_side_by_side(
    image: ImageLike, truth: PanopticMap, found: PanopticMap, *, longest_side: int | None = None
) -> Image.Image:
    """True segments on the left, predicted ones on the right, under a heading each.

    Args:
        image: the upright image.
        truth: its true segments, as from `panoptic_truth_of`.
        found: the predicted ones.
        longest_side: resize each half to this many pixels first.

    Raises:
        DataError, UsageError: as in `draw_panoptic`.
    """
    picture = open_image(image)
    halves = [draw_panoptic(picture, one, longest_side=longest_side) for one in (truth, found)]
    return mosaic(halves, 2, [f"Ground truth ({len(truth)})", f"Predictions ({len(found)})"])


def _boxes(ids: np.ndarray, count: int) -> np.ndarray:
    """xyxy of each segment; zeros where it has no pixel."""
    from scipy.ndimage import find_objects

    boxes = np.zeros((count, 4))
    for row, place in enumerate(find_objects(ids, count)[:count]):
        if place is not None:
            down, across = place
            boxes[row] = across.start, down.start, across.stop, down.stop
    return boxes


def _borders(ids: np.ndarray, line: int) -> np.ndarray:
    """Where one segment ends, for a line of some pixels."""
    borders = np.zeros(ids.shape, bool)
    for shift in range(1, line + 1):
        borders[:, shift:] |= ids[:, shift:] != ids[:, :-shift]
        borders[shift:] |= ids[shift:] != ids[:-shift]
    return borders


def _middle(ids: np.ndarray, box: np.ndarray, number: int) -> tuple[float, float, float, float]:
    """The place of a segment that is farthest from its edge, the middle one of several, as a box without extent."""
    from scipy.ndimage import distance_transform_edt

    x0, y0, x1, y1 = (int(value) for value in box)
    pixels = ids[y0:y1, x0:x1] == number
    step = -(-max(pixels.shape) // FINE)
    coarse = pixels[::step, ::step]
    if not coarse.any():
        step, coarse = 1, pixels
    depth = distance_transform_edt(np.pad(coarse, 1))
    deepest = np.argwhere(depth == depth.max())
    y, x = deepest[np.square(deepest - deepest.mean(0)).sum(1).argmin()]  # in a rectangle they are a line
    return (float(x0 + (x - 1) * step), float(y0 + (y - 1) * step)) * 2
