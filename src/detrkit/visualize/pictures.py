"""Detections drawn on images, with Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from detrkit.data.images import open_image
from detrkit.errors import UsageError
from detrkit.structures import Detections
from detrkit.visualize.colours import INK, PAPER, Colour, colour_of, colours_apart, ink_on
from detrkit.visualize.fonts import font_of, written
from detrkit.visualize.labels import Label, place_labels, shorten
from detrkit.visualize.tint import tint

ImageLike: TypeAlias = Image.Image | np.ndarray | Path | str
"""Whatever `open_image` takes, which is what can be predicted on."""


def draw(
    image: ImageLike,
    detections: Detections,
    *,
    threshold: float = 0.0,
    longest_side: int | None = None,
    scores: bool = True,
    dashed: np.ndarray | None = None,
) -> Image.Image:
    """Draw boxes, labels, scores and, where present, masks.

    Colours tell classes apart, and where there are masks each thing from the others.

    Args:
        image: the upright image that the detections belong to; it is not changed.
        detections: boxes in pixels of that image.
        threshold: detections below this score are left out.
        longest_side: resize the picture to this many pixels first, so that lines and letters suit that size.
        scores: write the scores beside the names.
        dashed: (n,) bool, detections whose outline is dashed, to set them apart.

    Raises:
        DataError: the file is missing or cannot be decoded, or an array is no image.
        UsageError: the detections belong to an image of another size.
    """
    picture, scale = opened_at(image, longest_side, detections.image_size, detections.source)
    dashes = np.zeros(len(detections), bool) if dashed is None else dashed
    shown = detections.scores >= threshold
    detections, dashes = detections[shown], dashes[shown]
    order = np.argsort(-detections.scores, kind="stable")
    detections, dashes = detections[order], dashes[order]
    width = line_width(picture)
    boxes = detections.boxes.astype(np.float64) * scale
    has_mask = np.zeros(len(detections), bool)
    colours = [colour_of(int(label)) for label in detections.labels]
    if detections.segments is not None:
        has_mask = detections.segments.areas() > 0
        colours = colours_apart(detections.labels, boxes)
        picture = tint(picture, detections.segments, colours, width)
    pen = ImageDraw.Draw(picture)
    for row in range(len(detections))[::-1]:
        # A mask says where a thing ends; its box only ties the label to it, unless it is to be set apart.
        line = max(1, width // 2) if has_mask[row] and not dashes[row] else width
        _draw_box(pen, boxes[row], colours[row], line, bool(dashes[row]))
    texts = [
        f"{name}: {score:.2f}" if scores else name
        for name, score in zip(detections.names, detections.scores, strict=True)
    ]
    draw_labels(picture, texts, detections.names, boxes, colours)
    return picture


def line_width(picture: Image.Image) -> int:
    """Width of a box's outline in pixels: it grows with the picture."""
    return max(1, round(math.sqrt(picture.width * picture.height) / 280))


def opened_at(
    image: ImageLike, longest_side: int | None, size: tuple[int, int], source: str
) -> tuple[Image.Image, float]:
    """An image that has `size` (height, width; 0 where not known), resized to `longest_side`, and by which factor."""
    picture = open_image(image)
    height, width = size
    if (height or width) and (width, height) != picture.size:
        raise UsageError(
            "What is to be drawn belongs to an image of another size",
            where=source,
            got=f"an image of {picture.width} × {picture.height}",
            expected=f"{width} × {height}",
            remedy="Give the original, upright image.",
        )
    if longest_side is None:
        return picture, 1.0
    scale = longest_side / max(picture.size)
    resized = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(resized, Image.Resampling.LANCZOS), scale


def _draw_box(pen: ImageDraw.ImageDraw, box: np.ndarray, colour: Colour, width: int, dashed: bool) -> None:
    x0, y0, x1, y1 = (round(float(value)) for value in box)
    x1, y1 = max(x0, x1 - 1), max(y0, y1 - 1)
    # A thin dark rim keeps a light colour visible on a light background, and the other way round.
    rim = 1 if width > 1 else 0
    if not dashed:
        if rim:
            pen.rectangle((x0 - rim, y0 - rim, x1 + rim, y1 + rim), outline=INK, width=width + 2 * rim)
        pen.rectangle((x0, y0, x1, y1), outline=colour, width=width)
        return
    for start, stop in _dashes((x0, y0, x1, y1), 4 * width + 2, 3 * width + 2):
        low = (min(start[0], stop[0]), min(start[1], stop[1]))
        high = (max(start[0], stop[0]) + width - 1, max(start[1], stop[1]) + width - 1)
        pen.rectangle((low[0] - rim, low[1] - rim, high[0] + rim, high[1] + rim), fill=INK)
        pen.rectangle((*low, *high), fill=colour)


def _dashes(box: tuple[int, int, int, int], dash: int, gap: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    x0, y0, x1, y1 = box
    pieces = []
    for x in range(x0, x1 + 1, dash + gap):
        end = min(x + dash, x1)
        pieces += [((x, y0), (end, y0)), ((x, y1), (end, y1))]
    for y in range(y0, y1 + 1, dash + gap):
        end = min(y + dash, y1)
        pieces += [((x0, y), (x0, end)), ((x1, y), (x1, end))]
    return pieces


def draw_labels(
    picture: Image.Image,
    texts: Sequence[str],
    names: Sequence[str],
    boxes: np.ndarray,
    colours: Sequence[Colour],
    *,
    centred: bool = False,
) -> None:
    """Write a text beside each box, or in its middle, the most important first; the mere name where it is too long."""
    pen = ImageDraw.Draw(picture)
    letters = max(10.0, math.sqrt(picture.width * picture.height) / 38)
    margin = max(2, round(line_width(picture) * 1.5))
    labels, fonts = [], []
    for text, name, box in zip(texts, names, boxes, strict=True):
        font = font_of(letters, text)
        fonts.append(font)
        fitting = shorten(written(text), written(name), font, picture.width - 2 * margin)
        left, top, right, bottom = font.getbbox(fitting)
        size = (round(right - left) + 2 * margin, round(bottom - top) + 2 * margin)
        if centred:
            x, y = (box[:2] + box[2:]) / 2
            box = (x - size[0] / 2, y + size[1] / 2, x + size[0] / 2, y + size[1] / 2)
        labels.append(Label(fitting, size, (margin - left, margin - top), (box[0], box[1], box[2], box[3])))
    placed = place_labels(labels, picture.size, line_width(picture))
    for label, font, (x, y), colour in reversed(list(zip(labels, fonts, placed, colours, strict=True))):
        if not label.text:
            continue
        pen.rectangle((x, y, x + label.size[0] - 1, y + label.size[1] - 1), fill=colour)
        pen.text((x + label.origin[0], y + label.origin[1]), label.text, fill=ink_on(colour), font=font)


def side_by_side(
    image: ImageLike,
    truth: Detections,
    found: Detections,
    *,
    threshold: float = 0.0,
    longest_side: int | None = None,
    missed: np.ndarray | None = None,
    wrong: np.ndarray | None = None,
) -> Image.Image:
    """Ground truth on the left, predictions on the right, under a heading each.

    Args:
        image: the upright image.
        truth: its ground truth, as from `truth_of`.
        found: its detections.
        threshold: detections below this score are left out.
        longest_side: resize each half to this many pixels first.
        missed: (n,) bool, ground truth to be dashed.
        wrong: (n,) bool, detections to be dashed.

    Raises:
        DataError, UsageError: as in `draw`.
    """
    picture = open_image(image)
    left = draw(picture, truth, longest_side=longest_side, scores=False, dashed=missed)
    right = draw(picture, found, threshold=threshold, longest_side=longest_side, dashed=wrong)
    shown = int((found.scores >= threshold).sum())
    return mosaic([left, right], 2, [f"Ground truth ({len(truth)})", f"Predictions ({shown})"])


def mosaic(images: Sequence[Image.Image], columns: int, captions: Sequence[str] = ()) -> Image.Image:
    """Put pictures in a grid on white, each shrunk to the cell where it is larger than the median picture.

    Args:
        images: at least one.
        columns: pictures in a row, at least 1.
        captions: one for each picture, written above it, or none at all.

    Raises:
        UsageError: no picture, no column, or a number of captions that is not the number of pictures.
    """
    if not images or columns < 1:
        raise UsageError("A mosaic needs pictures and columns", got=f"{len(images)} pictures in {columns} columns")
    if captions and len(captions) != len(images):
        raise UsageError("Captions and pictures differ in number", got=f"{len(captions)} and {len(images)}")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    width, height = (int(np.median([picture.size[axis] for picture in images])) for axis in (0, 1))
    gap = max(4, round(width / 60))
    font = font_of(max(11.0, math.sqrt(width * height) / 30), " ".join(captions))
    top, bottom = font.getbbox("Ag")[1::2]
    line = round(bottom - top) + gap if captions else 0
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + line + gap) + gap), PAPER)
    pen = ImageDraw.Draw(sheet)
    for index, picture in enumerate(images):
        x, y = gap + index % columns * (width + gap), gap + index // columns * (height + line + gap)
        if captions:
            pen.text((x, y - top), shorten(written(captions[index]), "", font, width), fill=INK, font=font)
        cell = (
            ImageOps.contain(picture, (width, height)) if picture.width > width or picture.height > height else picture
        )
        sheet.paste(cell, (x + (width - cell.width) // 2, y + line + (height - cell.height) // 2))
    return sheet
