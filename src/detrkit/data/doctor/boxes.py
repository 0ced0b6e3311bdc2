"""What is wrong with the boxes of a split, as far as numbers show it: no image is opened."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from detrkit.data.annotations import Annotations, Stated
from detrkit.data.columns import TOLERANCE
from detrkit.data.doctor.findings import Finding, Place, is_loss
from detrkit.data.doctor.readings import Misread, misread

MENDED = ("non-finite-box", "degenerate-box", "inverted-box", "outside-box")
"""The problems that reading mends box by box; the doctor tells them with what the file states."""

WHOLE, SHARE_WHOLE = 0.02, 0.95
"""A coordinate this near a whole number is one; and the share of boxes with such corners where pixels are counted."""

FEWEST_AT_EDGE, PEAK = 10, 5
"""Boxes that begin at pixel 1, and how many times more they are than those that begin at 2, 3, 4 or 5, where pixel 1 is
the border of the image."""

SAME_SHARE, SAME_PIXELS = 0.02, 0.5
"""Two boxes are the same where no side differs by more than this share of the shorter side, or so many pixels."""

FARTHEST = 64
"""Boxes of an image with nearly the same left side that are compared with each other."""


class Shift(NamedTuple):
    """How coordinates that count from 1 become such that count from 0: what is to be subtracted of each of the four,
    and the boxes (rows of the stated ones) that begin at pixel 1, which give it away.
    """

    subtract: np.ndarray
    at_edge: np.ndarray


class BoxReport(NamedTuple):
    """What the numbers show, for the findings and for the mending: `found` are the boxes as stated, `misread` the
    images whose boxes are meant otherwise, `shift` is None where pixels count from 0, `repeated` are rows of the
    annotations' boxes, each the same as an earlier one, and `contradicting` pairs (k, 2) of rows with two classes.
    """

    found: Stated
    misread: list[Misread]
    shift: Shift | None
    repeated: np.ndarray
    contradicting: np.ndarray

    @property
    def elsewhere(self) -> np.ndarray:
        """Rows of the images whose boxes are meant otherwise."""
        return _rows(self.misread)


def report(annotations: Annotations, format: str) -> BoxReport:
    """Look through the boxes of a split that is written in `format`."""
    found = annotations.stated()
    other = misread(annotations, found, format)
    elsewhere = _rows(other)
    plain = ~np.isin(found.images, elsewhere)
    repeated, contradicting = _alike(annotations, elsewhere)
    return BoxReport(found, other, shift_of(annotations, found, plain), repeated, contradicting)


def _rows(misread: Sequence[Misread]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *(one.images for one in misread)])


def shift_of(annotations: Annotations, found: Stated, plain: np.ndarray) -> Shift | None:
    """Whether pixels seem to be counted from 1.

    Boxes that touch the left or upper border begin at 0. Where they are whole numbers, none begins at 0, and far more
    begin at 1 than at any other small number, the border is 1. Files that are made of Pascal VOC's say xmax or
    xmin + width of the last pixel's column, which is the width of the image or one more: that decides what is shifted.

    Args:
        annotations: a split.
        found: its boxes as stated.
        plain: (m,) bool, those that are read as they are meant.
    """
    boxes = np.where(np.isfinite(found.boxes), found.boxes, np.nan)
    whole = plain & (np.abs(boxes - np.round(boxes)) <= WHOLE).all(1)
    if whole.sum() < SHARE_WHOLE * plain.sum() or not whole.any():
        return None
    low = np.round(boxes[whole, :2])
    at = [int((low == pixel).sum()) for pixel in range(6)]
    if at[0] > 0 or at[1] < FEWEST_AT_EDGE or at[1] < PEAK * max(1.0, float(np.mean(at[2:]))):
        return None
    beyond = np.round(boxes[whole, 2:]) - annotations.image_sizes[found.images[whole]][:, ::-1]
    both = (beyond == 1).sum() > (beyond == 0).sum()
    rows = np.flatnonzero(whole)[(low == 1).any(1)]
    return Shift(np.array([1.0, 1.0, both, both]), rows)


def _alike(annotations: Annotations, elsewhere: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes that are the same as another of their image; those of images in `elsewhere` are not judged."""
    images = np.repeat(np.arange(len(annotations)), np.diff(annotations.offsets))
    rows = np.flatnonzero(~annotations.crowd & ~np.isin(images, elsewhere))
    boxes, images, labels = annotations.boxes[rows], images[rows], annotations.labels[rows]
    order = np.lexsort((boxes[:, 0], images))
    rows, boxes, images, labels = rows[order], boxes[order], images[order], labels[order]
    side = (boxes[:, 2:] - boxes[:, :2]).min(1, initial=np.inf)
    near = np.maximum(SAME_PIXELS, SAME_SHARE * side)
    pairs = [np.zeros((0, 2), np.int64)]
    for step in range(1, min(len(rows), FARTHEST)):  # neighbours in the order of their left sides
        first, second = slice(None, -step), slice(step, None)
        close = (images[first] == images[second]) & (boxes[second, 0] - boxes[first, 0] <= near[first])
        if not close.any():
            break
        same = np.flatnonzero(close)
        same = same[(np.abs(boxes[same + step] - boxes[same]) <= near[same, None]).all(1)]
        pairs.append(np.stack([same, same + step], 1))
    found = np.concatenate(pairs)
    agree = labels[found[:, 0]] == labels[found[:, 1]]
    ordered = np.sort(rows[found], 1)
    return np.unique(ordered[agree, 1]), ordered[~agree]


def kinds_of(boxes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Which of `MENDED` befell each stated box, as a number: `rows` says which of them are left."""
    with np.errstate(invalid="ignore"):
        inverted = (boxes[:, 2:] < boxes[:, :2]).any(1)
    left = np.where(inverted, MENDED.index("inverted-box"), MENDED.index("outside-box"))
    gone = np.where(np.isfinite(boxes).all(1), MENDED.index("degenerate-box"), MENDED.index("non-finite-box"))
    return np.where(rows < 0, gone, left)


def findings(annotations: Annotations, split: str, told: BoxReport, format: str) -> Iterator[Finding]:
    """What `report` found in a split that is written in `format`, in words."""
    for other in told.misread:
        yield _misread_finding(annotations, split, told.found, other, format)
    if told.shift is not None:
        both = " The far corner counts from 1 as well." if told.shift.subtract[2] else ""
        said = f"{len(told.shift.at_edge):,} boxes begin at pixel 1 and none at pixel 0, so that 1 must be the border."
        places = list(box_places(annotations, split, told.found, told.shift.at_edge))
        yield Finding.of("one-based-boxes", split, places, said + both)
    yield from _mended_findings(annotations, split, told)
    images = np.repeat(np.arange(len(annotations)), np.diff(annotations.offsets))
    plain = Stated(images, annotations.boxes, annotations.labels, np.arange(len(annotations.boxes)))
    if len(told.repeated):
        yield Finding.of("repeated-box", split, list(box_places(annotations, split, plain, told.repeated)))
    if len(told.contradicting):
        names = [category.name for category in annotations.categories]
        first = box_places(annotations, split, plain, told.contradicting[:, 0])
        both_names = (sorted(names[plain.labels[row]] for row in pair) for pair in told.contradicting)
        places = [
            place._replace(said=f"{place.said}, {' and '.join(pair)}")
            for place, pair in zip(first, both_names, strict=True)
        ]
        yield Finding.of("contradicting-boxes", split, places)


def _misread_finding(annotations: Annotations, split: str, found: Stated, other: Misread, format: str) -> Finding:
    kind = "normalised-boxes" if other.reading.multiplied else "box-format"
    images = len(other.images)
    now, then = other.boxes - other.outside, other.boxes - other.left
    said = (
        f"Of {other.boxes:,} boxes of {images:,} image{'' if images == 1 else 's'}, {now:,} fit into their images as "
        f"they stand, and {then:,} if they are read as {other.reading}."
    )
    places: list[Place] = []
    for image in other.images:
        rows = np.flatnonzero(found.images == image) if len(places) < 20 else np.zeros(0, np.int64)
        sizes = np.broadcast_to(annotations.image_sizes[image], (len(rows), 2))
        meant = other.reading.boxes(found.boxes[rows], sizes, format)
        said_here = f"{numbers(found.boxes[rows[0]])} may mean {numbers(meant[0])}" if len(rows) else ""
        places.append(Place(str(annotations.path(int(image))), said_here, split, int(image), found.boxes[rows], meant))
    return Finding.of(kind, split, places, said, count=other.boxes)


def _mended_findings(annotations: Annotations, split: str, told: BoxReport) -> Iterator[Finding]:
    """Boxes that reading changed or left out, apart from those that are explained already."""
    if (mended := annotations.mended) is None:
        return
    explained = np.isin(mended.images, told.elsewhere)
    if told.shift is not None:
        explained |= _beyond(annotations, mended) <= 1 + TOLERANCE
    kinds = kinds_of(mended.boxes, mended.rows)
    for number, kind in enumerate(MENDED):
        rows = np.flatnonzero((kinds == number) & ~explained)
        if not len(rows):
            continue
        if kind == "outside-box":
            rows = rows[np.argsort(-_beyond(annotations, mended)[rows], kind="stable")]
        lost = len(rows) if mended.rows[rows[0]] < 0 else 0
        severe = is_loss(lost, len(annotations.boxes) + lost)
        said = f"{lost:,} of {len(annotations.boxes) + lost:,} boxes are lost so." if severe else ""
        places = list(box_places(annotations, split, mended, rows))
        yield Finding.of(kind, split, places, said, severity="broken" if severe else None)


def _beyond(annotations: Annotations, found: Stated) -> np.ndarray:
    """By how many pixels each stated box leaves its image; infinite where it has no area or is not finite."""
    sizes = annotations.image_sizes[found.images][:, ::-1]
    with np.errstate(invalid="ignore"):
        far = np.concatenate([-found.boxes[:, :2], found.boxes[:, 2:] - sizes], 1).max(1, initial=0.0)
        whole = np.isfinite(found.boxes).all(1) & (found.boxes[:, 2:] > found.boxes[:, :2]).all(1)
    return np.where(whole, far, np.inf)


def box_places(
    annotations: Annotations, split: str, found: Stated, rows: Sequence[int] | np.ndarray
) -> Iterator[Place]:
    """The images of some stated boxes, with the numbers of each."""
    for row in rows:
        image = int(found.images[row])
        where = str(annotations.path(image))
        yield Place(where, numbers(found.boxes[row]), split, image, found.boxes[row][None])


def numbers(box: np.ndarray) -> str:
    """A box as it is told: its two corners."""
    return "[" + ", ".join(f"{value:g}" for value in np.round(box, 2)) + "]"
