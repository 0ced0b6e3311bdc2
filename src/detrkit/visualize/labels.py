"""Where the labels of boxes go: inside the picture, beside their box, and off each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from PIL import ImageFont


class Label(NamedTuple):
    """A text with its frame.

    `size` is the frame's width and height; `origin` is where the text starts inside it; `box` is the box that it names,
    xyxy. All in pixels of the picture.
    """

    text: str
    size: tuple[int, int]
    origin: tuple[float, float]
    box: tuple[float, float, float, float]


def shorten(text: str, plain: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int | float) -> str:
    """The text if it fits into `width` pixels, else `plain` if that does, else its beginning and an ellipsis."""
    if font.getlength(text) <= width:
        return text
    text = plain or text
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…" if text else ""


def place_labels(labels: Sequence[Label], size: tuple[int, int], line: int) -> list[tuple[int, int]]:
    """The top left corner of each label's frame; labels that come first choose first.

    Args:
        labels: the most important first.
        size: the picture's width and height.
        line: width of the boxes' outline.

    Returns:
        For each label the corner that covers least of the labels placed before it: on top of its box, else inside it,
        below it or at its right, and never outside the picture (unless it is larger than the picture).
    """
    taken: list[tuple[int, int, int, int]] = []
    corners = []
    for label in labels:
        width, height = label.size
        x0, y0, x1, y1 = (round(float(value)) for value in label.box)
        choices = [
            (x0, y0 - height),
            (x0 + line, y0 + line),
            (x1 - width, y0 - height),
            (x0, y1),
            (x1 - width - line, y1 - height - line),
            (x1 - width, y1),
        ]
        frames = []
        for x, y in choices:
            x = max(0, min(x, size[0] - width))
            y = max(0, min(y, size[1] - height))
            frames.append((x, y, x + width, y + height))
        wanted_outside = [y < 0 or y + height > size[1] for _, y in choices]
        costs = [
            (sum(_overlap(frame, other) for other in taken), pushed)
            for frame, pushed in zip(frames, wanted_outside, strict=True)
        ]
        best = frames[min(range(len(frames)), key=costs.__getitem__)]
        taken.append(best)
        corners.append(best[:2])
    return corners


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> int:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0
