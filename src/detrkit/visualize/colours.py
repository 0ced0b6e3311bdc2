"""Colours that people tell apart."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

Colour: TypeAlias = tuple[int, int, int]

PALETTE: tuple[Colour, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (213, 94, 0),
    (0, 158, 115),
    (240, 228, 66),
    (204, 121, 167),
    (0, 114, 178),
)
"""Colours that people with any colour vision tell apart (Okabe and Ito, 2008), black left out."""

PAPER, INK = (255, 255, 255), (33, 37, 41)

SHADES = ((255, 0.0), (255, 0.5), (0, 0.4))
"""The turns of the palette: as it is, lighter, darker. What a channel is moved to, and how far."""


def colour_of(label: int) -> Colour:
    """The colour of a label. Beyond seven labels the palette comes again, lighter and then darker."""
    base = PALETTE[label % len(PALETTE)]
    goal, share = SHADES[label // len(PALETTE) % len(SHADES)]
    red, green, blue = (round(channel + (goal - channel) * share) for channel in base)
    return red, green, blue


def ink_on(colour: Colour) -> Colour:
    """Black or white, whichever reads better on a colour (relative luminance as in WCAG 2)."""
    linear = [(value / 255 / 12.92 if value <= 10 else ((value / 255 + 0.055) / 1.055) ** 2.4) for value in colour]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (0, 0, 0) if luminance > 0.179 else (255, 255, 255)


def colours_apart(labels: np.ndarray, boxes: np.ndarray) -> list[Colour]:
    """A colour for each of several things in one picture: that of its label where it is free.

    Else it is the next colour that no neighbour has, as long as there is one, and that the fewest others have.

    Args:
        labels: (n,) the first choose first.
        boxes: (n, 4) xyxy; things whose boxes touch are neighbours.
    """
    count = len(PALETTE) * len(SHADES)
    low, high = np.maximum(boxes[:, None, :2], boxes[None, :, :2]), np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    neighbours = (low <= high).all(-1)
    chosen = np.zeros(len(labels), np.int64)
    used = np.zeros(count, np.int64)
    for row, label in enumerate(labels.tolist()):
        near = np.bincount(chosen[:row][neighbours[row, :row]], minlength=count)
        order = (label + np.arange(count)) % count
        chosen[row] = order[np.lexsort((used[order], near[order]))[0]]
        used[chosen[row]] += 1
    return [colour_of(int(one)) for one in chosen]
