"""Pictures of random query patch detection: where patches were cut from an image, and where a detector finds them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from detrkit.data.images import open_image
from detrkit.errors import UsageError
from detrkit.visualize.colours import INK, PAPER, Colour, colour_of, ink_on
from detrkit.visualize.fonts import font_of
from detrkit.visualize.labels import Label, place_labels
from detrkit.visualize.pictures import ImageLike

IMAGE_SIDE = 560
THUMBNAIL_SIDE = 88
MOST_COLUMNS = 5
FRAME, THIN = 4, 2
GAP = 10
LETTERS = 13.0


def patch_sheet(
    image: ImageLike,
    patches: Sequence[ImageLike],
    boxes: np.ndarray,
    found_boxes: np.ndarray,
    scores: np.ndarray,
    ious: np.ndarray,
) -> Image.Image:
    """An image with its patches beside it, each in a colour of its own.

    In the image a thin outline says where a patch was cut and a thick one, with the patch's number, where it is found.
    Under each patch stand the overlap of the two (IoU) and the score.

    Args:
        image: the upright image.
        patches: p pieces of it, as the detector saw them.
        boxes: (p, 4) where they were cut, xyxy in pixels of the image.
        found_boxes: (p, 4) where they are found, likewise.
        scores: (p,) in [0, 1].
        ious: (p,) in [0, 1].

    Raises:
        DataError, UsageError: an image as in `open_image`, or as many boxes, scores or overlaps as there are no
            patches.
    """
    count = len(patches)
    shapes = [np.shape(value) for value in (boxes, found_boxes, scores, ious)]
    if count == 0 or shapes != [(count, 4), (count, 4), (count,), (count,)]:
        raise UsageError("Patches and what is said of them differ in number", got=f"{count} patches, {shapes}")
    picture = open_image(image)
    scale = IMAGE_SIDE / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    _draw_places(picture, boxes * scale, found_boxes * scale)
    cards = [
        _card(open_image(patch), number, float(iou), float(score))
        for number, (patch, iou, score) in enumerate(zip(patches, ious, scores, strict=True))
    ]
    card_width, card_height = cards[0].size
    rows = max(-(-count // MOST_COLUMNS), min(count, (height + GAP) // (card_height + GAP)), 1)
    columns = -(-count // rows)
    sheet_height = max(height, rows * (card_height + GAP) - GAP)
    sheet = Image.new("RGB", (width + columns * (card_width + GAP) + 2 * GAP, sheet_height + 2 * GAP), PAPER)
    sheet.paste(picture, (GAP, GAP))
    for number, card in enumerate(cards):
        row, column = divmod(number, columns)
        sheet.paste(card, (width + 2 * GAP + column * (card_width + GAP), GAP + row * (card_height + GAP)))
    return sheet


def _draw_places(picture: Image.Image, boxes: np.ndarray, found_boxes: np.ndarray) -> None:
    pen = ImageDraw.Draw(picture)
    # Large ones first, so that small ones stay visible.
    order = np.argsort(-np.prod(boxes[:, 2:] - boxes[:, :2], axis=1), kind="stable")
    for number in order:
        _outline(pen, found_boxes[number], colour_of(int(number)), FRAME, picture.size)
    for number in order:
        _outline(pen, boxes[number], colour_of(int(number)), THIN, picture.size)
    font = font_of(LETTERS)
    labels = []
    for number in order[::-1]:
        text = str(number + 1)
        left, top, right, bottom = font.getbbox(text)
        size = (round(right - left) + 8, round(bottom - top) + 6)
        labels.append(Label(text, size, (4 - left, 3 - top), tuple(found_boxes[number].tolist())))
    for number, label, (x, y) in zip(order[::-1], labels, place_labels(labels, picture.size, FRAME), strict=True):
        colour = colour_of(int(number))
        frame = (x, y, x + label.size[0] - 1, y + label.size[1] - 1)
        pen.rectangle(frame, fill=colour, outline=INK)
        pen.text((x + label.origin[0], y + label.origin[1]), label.text, fill=ink_on(colour), font=font)


def _outline(pen: ImageDraw.ImageDraw, box: np.ndarray, colour: Colour, width: int, size: tuple[int, int]) -> None:
    """A rectangle inside the picture between dark rims, without which light colours vanish on a light image."""
    x0, y0, x1, y1 = (min(max(round(float(value)), 1), size[axis % 2] - 2) for axis, value in enumerate(box))
    x1, y1 = max(x0, x1), max(y0, y1)
    pen.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=INK, width=width + 2)
    pen.rectangle((x0, y0, x1, y1), outline=colour, width=width)


def _card(patch: Image.Image, number: int, iou: float, score: float) -> Image.Image:
    """A patch in a frame of its colour, with its number, and under it the overlap and the score."""
    colour, font = colour_of(number), font_of(LETTERS)
    side = THUMBNAIL_SIDE + 2 * FRAME
    line = math.ceil(LETTERS * 1.3)
    card = Image.new("RGB", (side, side + 2 * line + 2), PAPER)
    pen = ImageDraw.Draw(card)
    pen.rectangle((0, 0, side - 1, side - 1), fill=colour)
    thumbnail = ImageOps.pad(patch, (THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BICUBIC, color=PAPER)
    card.paste(thumbnail, (FRAME, FRAME))
    text = str(number + 1)
    left, top, right, bottom = font.getbbox(text)
    pen.rectangle((0, 0, round(right - left) + 8, round(bottom - top) + 6), fill=colour)
    pen.text((4 - left, 3 - top), text, fill=ink_on(colour), font=font)
    pen.text((0, side + 1), f"IoU {iou:.2f}", fill=INK, font=font)
    pen.text((0, side + 1 + line), f"score {score:.2f}", fill=INK, font=font)
    return card
