"""The one in-memory form of an annotated data set: a few flat arrays, whatever format the files had.

A list of dicts costs gigabytes for a COCO-sized set, and every loader worker copies it (reference counts touch each
page). Arrays cost tens of megabytes and are shared between forked workers untouched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Protocol, overload, runtime_checkable

import numpy as np

from detrkit.data.problems import Problems
from detrkit.masks import RunLengths
from detrkit.structures import Category


class Strings(Sequence[str]):
    """An immutable list of strings in two arrays: the UTF-8 bytes, and where each string begins."""

    def __init__(self, values: Iterable[str]):
        encoded = [value.encode("utf-8", "surrogateescape") for value in values]
        self.offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(value) for value in encoded], out=self.offsets[1:])
        self.bytes = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = int(index) + (len(self) if index < 0 else 0)
        if not 0 <= position < len(self):
            raise IndexError(index)
        start, stop = self.offsets[position : position + 2]
        return self.bytes[start:stop].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[position] for position in range(len(self)))


@runtime_checkable
class Masks(Protocol):
    """The masks of objects, one a row, kept small: as run lengths, or as places in files of pictures."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: np.ndarray | slice) -> Masks:
        """Some of them, in the order that is asked for."""
        ...

    @property
    def known(self) -> np.ndarray:
        """Which of them are known (m,), as far as can be told without opening a file."""
        ...

    def encoded(self, rows: slice) -> RunLengths:
        """The masks of the objects of one image as run lengths; those that are not known have none.

        Raises:
            DataError: a file that holds them cannot be read; it is named.
        """
        ...


class Stated(NamedTuple):
    """Boxes as the files state them, in columns: `images` (k,) rows of the images; `boxes` (k, 4) xyxy in pixels, which
    may be any numbers; `labels` (k,) rows of the category table; `rows` (k,) which box of the annotations became of
    each, -1 where it was left out.
    """

    images: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    rows: np.ndarray

    def select(self, kept: np.ndarray) -> Stated:
        """Some of them."""
        return Stated(*(column[kept] for column in self))

    def follow(self, images: np.ndarray, rows: np.ndarray) -> Stated:
        """The same after a choice: the new row of each image and of each box, -1 where it is gone."""
        became = np.where(self.rows < 0, -1, rows[self.rows] if len(rows) else -1)
        return self._replace(images=images[self.images], rows=became).select(images[self.images] >= 0)


@dataclass(frozen=True, eq=False, repr=False)
class Annotations:
    """One split of an annotated data set, in columns. `n` images, `m` boxes; the boxes of image i are
    `offsets[i]:offsets[i + 1]`.

    Attributes:
        root: the folder that file names are relative to.
        file_names: n relative paths with forward slashes.
        image_ids: (n,) int64, as the files say it, or 1 … n where the format has no ids.
        image_sizes: (n, 2) int32, height and width of the upright image in pixels; 0 where not known.
        offsets: (n + 1,) int64.
        boxes: (m, 4) float64, xyxy in pixels of the upright image, 0-based, inside the image, of positive area.
        labels: (m,) int64, rows of `categories`.
        areas: (m,) float64, the object's area in pixels: as the file says it, else of its mask where that was read,
            else of its box.
        crowd: (m,) bool, one box around many objects: never a target, ignored in evaluation.
        difficult: (m,) bool, Pascal VOC's flag: trained on, ignored in VOC evaluation.
        categories: the table from label to (id, name).
        problems: what was wrong with the files, counted.
        source: the format and the path that this was read from, for messages.
        masks: m masks in pixels of the upright image, where they were asked for and there are any.
        mended: what the files say of the boxes that were changed or left out on reading; None where there are none.
    """

    root: Path
    file_names: Strings
    image_ids: np.ndarray
    image_sizes: np.ndarray
    offsets: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    difficult: np.ndarray
    categories: tuple[Category, ...]
    problems: Problems = field(default_factory=Problems)
    source: str = ""
    masks: Masks | None = None
    mended: Stated | None = None

    def __repr__(self) -> str:
        return f"<Annotations {self.summary()}, from {self.source or self.root}>"

    def __len__(self) -> int:
        return len(self.file_names)

    def path(self, index: int) -> Path:
        """The image file of image `index`."""
        return self.root / self.file_names[index]

    def rows(self, index: int) -> slice:
        """Where the boxes of image `index` lie in the box columns."""
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))

    def stated(self) -> Stated:
        """All boxes as the files state them, sorted by image: those that reading mended or left out as they were."""
        images = np.repeat(np.arange(len(self)), np.diff(self.offsets))
        plain = Stated(images, self.boxes, self.labels, np.arange(len(self.boxes)))
        if self.mended is None:
            return plain
        kept = self.mended.rows >= 0
        boxes = self.boxes.copy()
        boxes[self.mended.rows[kept]] = self.mended.boxes[kept]
        lost = self.mended.select(~kept)
        joined = Stated(*map(np.concatenate, zip(plain._replace(boxes=boxes), lost, strict=True)))
        return joined.select(np.argsort(joined.images, kind="stable"))

    def select(self, indices: np.ndarray | Sequence[int]) -> Annotations:
        """The images of the given indices, in that order, with their boxes."""
        chosen = np.asarray(indices, np.int64).reshape(-1)
        counts = self.offsets[chosen + 1] - self.offsets[chosen]
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        rows = np.repeat(self.offsets[chosen] - offsets[:-1], counts) + np.arange(offsets[-1])
        m = len(self.boxes)
        return replace(
            self,
            file_names=Strings(self.file_names[int(index)] for index in chosen),
            image_ids=self.image_ids[chosen],
            image_sizes=self.image_sizes[chosen],
            offsets=offsets,
            boxes=self.boxes[rows],
            labels=self.labels[rows],
            areas=self.areas[rows],
            crowd=self.crowd[rows],
            difficult=self.difficult[rows],
            masks=None if self.masks is None else self.masks[rows],
            mended=None if self.mended is None else self.mended.follow(_places(chosen, len(self)), _places(rows, m)),
        )

    def summary(self) -> str:
        """One line: images, boxes, classes, images without boxes."""
        empty = int((np.diff(self.offsets) == 0).sum())
        return (
            f"{len(self):,} images, {len(self.boxes):,} boxes, {len(self.categories)} classes, "
            f"{empty:,} images without boxes"
        )


def _places(chosen: np.ndarray, count: int) -> np.ndarray:
    """Where each of `count` things stands among the chosen ones, -1 where it does not."""
    places = np.full(count, -1, np.int64)
    places[chosen] = np.arange(len(chosen))
    return places
