"""Masks laid over a picture: a veil of colour, and a line along the edge."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool
from PIL import Image

from detrkit.masks import RunLengths
from detrkit.visualize.colours import Colour

VEIL = 0.42
"""How much of a tinted pixel is colour."""


def tint(picture: Image.Image, segments: RunLengths, colours: Sequence[Colour], line: int) -> Image.Image:
    """A picture with masks over it, the first on top.

    Args:
        picture: of any size that has the shape of the masks' image.
        segments: masks; those that are not known or empty are left out.
        colours: one for each mask.
        line: width of the line along each mask's edge, in pixels.
    """
    from hotcoco import mask

    owners = np.zeros((picture.height, picture.width), np.int32)
    edges = np.zeros_like(owners)
    boxes = segments.boxes()
    rows = np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(1))[::-1].tolist()
    if not rows:
        return picture.copy()
    places = []
    for row in rows:
        size = [int(side) for side in segments.sizes[row]]
        pixels = np.asarray(mask.decode({"size": size, "counts": segments.counts(row)}), bool)
        down, across, shape = _cropped(pixels, boxes[row], picture.size)
        owners[down, across][shape] = row + 1
        edges[down, across][shape] = 0
        edges[down, across][outline(shape, line)] = row + 1
        places.append((down.start, across.start, down.stop, across.stop))
    # Nothing else of a large picture is touched.
    (top, left), (bottom, right) = np.min(places, 0)[:2].tolist(), np.max(places, 0)[2:].tolist()
    part = picture.crop((left, top, right, bottom))
    part = veiled(part, owners[top:bottom, left:right], colours, VEIL)
    tinted = picture.copy()
    tinted.paste(lined(part, edges[top:bottom, left:right], colours), (left, top))
    return tinted


def veiled(picture: Image.Image, owners: np.ndarray, colours: Sequence[Colour], veil: float) -> Image.Image:
    """A picture whose pixels are mixed with colours: where `owners` (h, w) is above 0, with that colour, from 1."""
    mixed = Image.blend(picture, _flat(owners, colours), veil)
    return Image.composite(mixed, picture, Image.fromarray(owners > 0))


def lined(picture: Image.Image, edges: np.ndarray, colours: Sequence[Colour]) -> Image.Image:
    """A picture with pixels of pure colour: where `edges` (h, w) is above 0, of that colour, from 1."""
    return Image.composite(_flat(edges, colours), picture, Image.fromarray(edges > 0))


def _flat(numbers: np.ndarray, colours: Sequence[Colour]) -> Image.Image:
    table = np.array([(0, 0, 0), *colours], np.uint8)
    return Image.fromarray(np.take(table, numbers, axis=0, mode="clip"))  # a third of the time of `table[numbers]`


def outline(mask: Bool[np.ndarray, "h w"], line: int) -> Bool[np.ndarray, "h w"]:
    """The pixels of a mask that lie within `line` pixels of its edge."""
    inner = mask
    for _ in range(line):
        around = np.pad(inner, 1)
        inner = inner & around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
    return mask & ~inner


def _cropped(
    pixels: Bool[np.ndarray, "h w"], box: np.ndarray, size: tuple[int, int]
) -> tuple[slice, slice, Bool[np.ndarray, "_ _"]]:
    """Where a mask lies in a picture of the given width and height, and its pixels there."""
    places, cells = [], []
    for axis in (0, 1):
        source, target = pixels.shape[axis], size[1 - axis]
        start, stop = (float(box[end + 1 - axis]) * target / source for end in (0, 2))
        place = np.arange(max(0, int(start)), min(target, int(np.ceil(stop))))
        places.append(slice(int(place[0]), int(place[-1]) + 1))
        cells.append(((place + 0.5) * source / target).astype(np.int64))
    down, across = places
    return down, across, pixels[cells[0][0] : cells[0][-1] + 1][np.ix_(cells[0] - cells[0][0], cells[1])]
