"""What annotation files say about masks, as run lengths: polygons, and runs of both of COCO's forms.

Polygons are drawn by COCO's own rule, so a mask has exactly the pixels that evaluators give it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from detrkit.data.annotations import Masks
from detrkit.data.images import MAX_PIXELS
from detrkit.masks import RunLengths

FINDINGS = ("", "missing-mask", "malformed-mask", "mask-size-mismatch")
"""What can be found of a mask: nothing wrong, or the problem for which it is not known."""

LONGEST_OUTLINE = 2_000_000
"""Pixels of the outlines of one mask, inside its image. Drawing walks along them and keeps 80 bytes for each."""

SHORTEST_POLYGON = 6
"""Numbers: three corners. A part of less has no area, and is no part of its mask."""


class MaskColumn(NamedTuple):
    """Masks as a file lists them, in the order of its boxes: `findings` (m,) uint8 are rows of `FINDINGS`."""

    masks: Masks
    findings: np.ndarray


@runtime_checkable
class MaskParts(Protocol):
    """Takes what a file says about the masks of its objects, batch by batch."""

    def add(self, segmentations: Sequence[Any], sizes: Sequence[tuple[int, int]]) -> None:
        """Take a batch.

        Args:
            segmentations: what the file says of each object, whatever it is.
            sizes: height and width in pixels of each object's image, 0 where not known.
        """
        ...

    def column(self) -> MaskColumn:
        """All batches as one; they are given away."""
        ...


class Segmentations:
    """Masks that stand in the annotation file itself; run lengths are kept of them. See `MaskParts`."""

    def __init__(self) -> None:
        self.parts: list[RunLengths] = []
        self.findings: list[np.ndarray] = []

    def add(self, segmentations: Sequence[Any], sizes: Sequence[tuple[int, int]]) -> None:
        """Take a batch: polygons or runs as `encode` takes them, or anything else."""
        counts, findings = [], np.zeros(len(segmentations), np.uint8)
        for row, (segmentation, (height, width)) in enumerate(zip(segmentations, sizes, strict=True)):
            found = encode(segmentation, height, width)
            if isinstance(found, str):
                findings[row] = FINDINGS.index(found)
            counts.append(b"" if isinstance(found, str) else found)
        pairs = [{"size": size, "counts": one} for size, one in zip(sizes, counts, strict=True)]
        if pairs:
            self.parts.append(RunLengths.from_coco(pairs))
            self.findings.append(findings)

    def column(self) -> MaskColumn:
        """All batches as one; they are given away."""
        parts, self.parts = self.parts, []
        return MaskColumn(RunLengths.joined(parts), np.concatenate([np.zeros(0, np.uint8), *self.findings]))


def encode(segmentation: Any, height: int, width: int) -> bytes | str:
    """One segmentation of a COCO file as compressed runs, or the problem for which there are none.

    Args:
        segmentation: a list of polygons (x, y, x, y, … in pixels), or an object with `size` and `counts`, compressed or
            a list of runs; anything else is a problem.
        height: of the image, in pixels.
        width: of the image, in pixels.

    Returns:
        The runs as bytes, or the name of the problem.
    """
    counts = segmentation.get("counts") if isinstance(segmentation, dict) else segmentation
    if counts is None or counts == [] or counts == "":
        return "missing-mask"
    if not 0 < height * width <= MAX_PIXELS:
        return "malformed-mask"  # what its size is no one knows, or it is more than any image may have
    try:
        if isinstance(segmentation, dict):
            return _of_runs(counts, segmentation.get("size"), height, width)
        return _of_polygons(segmentation, height, width)
    except (TypeError, ValueError, OverflowError):
        return "malformed-mask"


def _of_runs(counts: Any, size: Any, height: int, width: int) -> bytes | str:
    from hotcoco import mask

    if not isinstance(size, list) or len(size) != 2 or not isinstance(counts, str | list):
        return "malformed-mask"
    if size != [height, width]:
        return "mask-size-mismatch"
    runs: Any = mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    # Runs that end early, as text that was cut off, are refused by nobody; those that fill the image overflow a
    # smaller one, which is.
    try:
        mask.area({"size": [1, height * width - 1], "counts": runs["counts"]})
    except ValueError:
        return bytes(runs["counts"])
    return "malformed-mask"


def _of_polygons(polygons: Any, height: int, width: int) -> bytes | str:
    from hotcoco import mask

    if not all(map(_is_outline, polygons)):
        return "malformed-mask"
    polygons = [polygon for polygon in polygons if len(polygon) >= SHORTEST_POLYGON]
    if not polygons or _outline(polygons, height, width) > LONGEST_OUTLINE:
        return "malformed-mask"
    runs: Any = mask.frPyObjects(polygons, height, width)
    return bytes((runs[0] if len(runs) == 1 else mask.merge(runs))["counts"])


def _outline(polygons: list[Any], height: int, width: int) -> float:
    """The most pixels that the outlines can have inside the image; only estimated, and more, for few corners."""
    corners = sum(map(len, polygons)) // 2
    if corners * max(height, width) <= LONGEST_OUTLINE:
        return float(corners * max(height, width))
    steps = 0.0
    for polygon in polygons:
        inside = np.clip(np.array(polygon, np.float64).reshape(-1, 2), 0, (width, height))
        steps += float(np.abs(inside - np.roll(inside, 1, 0)).max(1).sum())
    return steps


def _is_outline(polygon: Any) -> bool:
    """Whether it is a flat list of finite numbers, two for each corner."""
    if not isinstance(polygon, list) or len(polygon) % 2:
        return False
    return set(map(type, polygon)) <= {int, float} and bool(np.isfinite(sum(polygon)))
