"""Regions that stand out of an image by their colour: guesses of where objects are, without any label.

Detectors that are pre-trained on such guesses (DETReg, Bar et al., CVPR 2022, takes those of selective search) learn to
say where things end and to share them out among queries. Here a guess is a connected patch of one of the image's few
main colours: rough, quick, and the same on every run.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float
from PIL import Image
from scipy import ndimage

SHORTEST, LONGEST = 128, 1024  # pixels, of the image in which is looked; finer detail is no region
COLOURS = (2, 3, 6)  # into so many main colours the image is divided, each time anew
LEAST, MOST = 0.004, 0.4  # share of the image that a region's box takes
NARROWEST = 5  # pixels at `SHORTEST`
COMPACT = 0.45  # share of its box that a region fills, holes included
RING = 3  # pixels around a box with which its inside is compared
SAME = 0.6  # boxes that overlap more than this (IoU) are one region
_ROUNDS = 10
_EVERY = 5  # every so many-th pixel decides on the main colours


def find_regions(image: Image.Image, limit: int = 20) -> Float[np.ndarray, "r 4"]:
    """Boxes of the regions that stand out most, best first.

    A region counts more the better it fills its box and the more its colour differs from what surrounds the box. Those
    at a corner of the image are taken for background.

    Args:
        image: upright RGB.
        limit: the most boxes.

    Returns:
        xyxy in [0, 1] of the image; possibly none.
    """
    scale = min(SHORTEST / min(image.size), LONGEST / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    colours = ndimage.gaussian_filter(_to_lab(np.asarray(image.resize(size, Image.Resampling.BILINEAR))), (1, 1, 0))
    found = sorted((one for count in COLOURS for one in _connected(colours, count)), key=lambda one: (-one[0], *one[1]))
    kept: list[np.ndarray] = []
    for _, corners in found:
        box = np.array(corners) / (*size, *size)
        if len(kept) < limit and all(_overlap(box, other) <= SAME for other in kept):
            kept.append(box)
    return np.array(kept, np.float64).reshape(-1, 4)


def _connected(colours: Float[np.ndarray, "h w 3"], count: int) -> Iterator[tuple[float, tuple[int, int, int, int]]]:
    """Score and corners (x0, y0, x1, y1) of every region after a division into so many colours."""
    height, width, _ = colours.shape
    nearest = _divided(colours, count)
    for colour in range(count):
        labels, _ = ndimage.label(ndimage.binary_opening(nearest == colour))
        for number, place in enumerate(ndimage.find_objects(labels), 1):
            rows, columns = place
            tall, wide = rows.stop - rows.start, columns.stop - columns.start
            borders = (rows.start == 0) + (columns.start == 0) + (rows.stop == height) + (columns.stop == width)
            if min(tall, wide) < NARROWEST or borders > 1 or not LEAST <= tall * wide / (height * width) <= MOST:
                continue
            region = labels[place] == number
            filled = ndimage.binary_fill_holes(region).mean()
            if filled >= COMPACT:
                around = colours[
                    max(0, rows.start - RING) : rows.stop + RING, max(0, columns.start - RING) : columns.stop + RING
                ]
                contrast = np.linalg.norm(around.mean((0, 1)) - colours[place][region].mean(0))
                yield float(filled * (1 + contrast / 20)), (columns.start, rows.start, columns.stop, rows.stop)


def _divided(colours: Float[np.ndarray, "h w 3"], count: int) -> np.ndarray:
    """The nearest main colour of every pixel; main colours by k-means, begun at quantiles of lightness."""
    pixels = colours.reshape(-1, 3)
    sample = pixels[::_EVERY]
    order = np.argsort(sample[:, 0], kind="stable")
    centres = sample[order[((np.arange(count) + 0.5) / count * len(order)).astype(int)]]
    for _ in range(_ROUNDS):
        nearest = _nearest(sample, centres)
        for number in range(count):
            if (mine := nearest == number).any():
                centres[number] = sample[mine].mean(0)
    return _nearest(pixels, centres).reshape(colours.shape[:2])


def _nearest(pixels: Float[np.ndarray, "n 3"], centres: Float[np.ndarray, "k 3"]) -> np.ndarray:
    distance: np.ndarray = (centres**2).sum(1) - 2 * pixels @ centres.T
    return distance.argmin(1)


def _to_lab(rgb: np.ndarray) -> Float[np.ndarray, "h w 3"]:
    """sRGB of 8 bits as CIE L*a*b* (white point D65), in which equal distances look alike."""
    linear = np.where(rgb > 10, ((rgb / 255 + 0.055) / 1.055) ** 2.4, rgb / (255 * 12.92))
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.moveaxis(np.cbrt(linear @ (to_xyz / to_xyz.sum(1, keepdims=True)).T), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def _overlap(box: np.ndarray, other: np.ndarray) -> float:
    """IoU of two boxes, xyxy."""
    sides = np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2])
    inside = float(np.prod(np.clip(sides, 0, None)))
    return inside / float(np.prod(box[2:] - box[:2]) + np.prod(other[2:] - other[:2]) - inside)
