"""One image cut into segments: what panoptic segmentation answers, and how files hold it.

Kirillov et al., "Panoptic Segmentation" (CVPR 2019): each pixel belongs to one segment at most; a thing is one segment
for each instance, stuff is one segment for all there is of it.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64, UInt8
from PIL import Image

from detrkit.errors import UsageError
from detrkit.masks import RunLengths
from detrkit.structures import Category


@dataclass(frozen=True, eq=False)
class PanopticMap:
    """One image cut into `k` segments.

    Attributes:
        ids: (h, w) int32, 0 where nothing is said, else 1 + the row of the segment.
        labels: (k,) int64, rows of `categories`.
        scores: (k,) float32 in [0, 1].
        categories: the category table that the labels point into.
        image_size: height and width of the original image in pixels.
        source: the file that the image came from, where there is one.

    Raises:
        UsageError: columns that do not fit together, segments without a row, or labels without a category.
    """

    ids: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    categories: tuple[Category, ...]
    image_size: tuple[int, int]
    source: str = ""

    def __post_init__(self) -> None:
        if self.ids.shape != tuple(self.image_size) or self.labels.shape != self.scores.shape or self.labels.ndim != 1:
            raise UsageError(
                "The columns of a panoptic map do not fit together",
                where=self.source,
                got=f"ids {self.ids.shape}, labels {self.labels.shape}, scores {self.scores.shape}",
                expected=f"{tuple(self.image_size)}, (k,), (k,)",
            )
        for values, lowest, highest, what in (
            (self.ids, 0, len(self.labels), "A pixel of a panoptic map belongs to a segment that it lacks"),
            (self.labels, 0, len(self.categories) - 1, "A segment has a label that the category table lacks"),
        ):
            if values.size and not lowest <= values.min() <= values.max() <= highest:
                raise UsageError(
                    what,
                    where=self.source,
                    got=f"values from {values.min()} to {values.max()}",
                    expected=f"{lowest} to {highest}",
                )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def names(self) -> list[str]:
        """The category name of each segment."""
        return [self.categories[label].name for label in self.labels]

    @property
    def areas(self) -> Int64[np.ndarray, " k"]:
        """Pixels of each segment."""
        return np.bincount(self.ids.ravel(), minlength=len(self) + 1)[1:].astype(np.int64)

    @property
    def segments(self) -> RunLengths:
        """The mask of each segment."""
        return RunLengths.joined([RunLengths.encode((self.ids == row)[None]) for row in range(1, len(self) + 1)])

    def to_coco(self, image_id: int, file_name: str) -> dict[str, Any]:
        """COCO's panoptic results for the image: its segments, whose pixels stand in the PNG file of the given name.

        Segments without a pixel are left out, as COCO's tools refuse them.
        """
        from scipy.ndimage import find_objects

        places: list[Any] = find_objects(self.ids, len(self))
        segments = []
        for row, (place, area) in enumerate(zip(places, self.areas, strict=True)):
            if place is None:
                continue
            down, across = place
            category = self.categories[self.labels[row]]
            segments.append(
                {
                    "id": row + 1,
                    "category_id": int(category.id),
                    "isthing": int(category.is_thing),
                    "iscrowd": 0,
                    "bbox": [across.start, down.start, across.stop - across.start, down.stop - down.start],
                    "area": int(area),
                    "score": float(self.scores[row]),
                }
            )
        return {"image_id": int(image_id), "file_name": file_name, "segments_info": segments}

    def to_png(self) -> bytes:
        """A PNG file as COCO's panoptic tools read it: the id of a pixel's segment is R + 256 G + 256² B."""
        buffer = io.BytesIO()
        Image.fromarray(ids_to_rgb(self.ids)).save(buffer, "PNG")
        return buffer.getvalue()


def ids_to_rgb(ids: Int32[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """Colours that hold ids below 256³: R + 256 G + 256² B."""
    return np.stack([ids & 255, ids >> 8 & 255, ids >> 16 & 255], -1).astype(np.uint8)
