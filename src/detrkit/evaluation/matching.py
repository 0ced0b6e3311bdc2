"""Which detection found which ground-truth box, at one IoU: the base of counts, thresholds, confusions and pages.

Pairs that overlap enough are few, so they are found once, with arrays, and then settled one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from detrkit.data.annotations import Annotations
from detrkit.evaluation.columns import Found

PAIRS_AT_ONCE = 1 << 19
"""Pairs of detection and ground truth that are compared in one go; bounds the memory, changes no result."""


class Pairs(NamedTuple):
    """Detections and ground-truth boxes of one image that overlap enough, whatever their labels.

    `found` and `truth` are rows of the columns, `iou` is their overlap (of the detection's area for crowd), all (p,).
    """

    found: np.ndarray
    truth: np.ndarray
    iou: np.ndarray


class Matches(NamedTuple):
    """The ground truth of each detection.

    `truth` is (k,) int64, the row of the ground-truth box that it found, −1 for none; `ignored` is (k,) bool, True
    where the detection lies on a crowd of its class and counts neither as right nor as wrong.
    """

    truth: np.ndarray
    ignored: np.ndarray

    @property
    def right(self) -> np.ndarray:
        """(k,) bool: the detection found a box of its class."""
        found: np.ndarray = (self.truth >= 0) & ~self.ignored
        return found


def overlapping_pairs(annotations: Annotations, found: Found, iou: float = 0.5) -> Pairs:
    """All pairs of a detection and a ground-truth box of the same image whose IoU is at least `iou`."""
    parts = [
        _overlaps(annotations, found, first, last, iou) for first, last in _portions(annotations.offsets, found.images)
    ]
    if not parts:
        return Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))
    return Pairs(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _portions(offsets: np.ndarray, images: np.ndarray) -> Iterator[tuple[int, int]]:
    ends = np.cumsum(np.diff(offsets)[images])
    first = 0
    while first < len(images):
        done = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, done + PAIRS_AT_ONCE, side="right")))
        yield first, last
        first = last


def _overlaps(annotations: Annotations, found: Found, first: int, last: int, iou: float) -> Pairs:
    images = found.images[first:last]
    starts, counts = annotations.offsets[images], np.diff(annotations.offsets)[images]
    rows = np.repeat(np.arange(first, last), counts)
    truths = np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(len(rows))
    a, b = found.boxes[rows], annotations.boxes[truths]
    side = np.clip(np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2]), 0, None)
    intersection = side[:, 0] * side[:, 1]
    area = (a[:, 2] - a[:, 0]) * (a[:, 3] - a[:, 1])
    other = (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])
    union = np.where(annotations.crowd[truths], area, area + other - intersection)
    overlap = intersection / np.maximum(union, np.finfo(np.float64).tiny)
    near = overlap >= iou
    return Pairs(rows[near], truths[near], overlap[near])


def match(annotations: Annotations, found: Found, pairs: Pairs) -> Matches:
    """Match within each class as COCO does: by falling score, each detection takes the free box it overlaps most.

    A crowd takes any number of detections, and only those that no other box of their class is free for.
    """
    return _settle(annotations, found, pairs, found.labels[pairs.found] == annotations.labels[pairs.truth])


def match_across(annotations: Annotations, found: Found, pairs: Pairs, matches: Matches, threshold: float) -> Matches:
    """Match across classes what `match` left over: detections that saw a box and named it wrong.

    Only detections of at least `threshold` count; boxes that such a one of their own class found are taken. Returns the
    new matches alone.
    """
    shown = found.scores >= threshold
    taken = np.zeros(len(annotations.boxes), bool)
    taken[matches.truth[shown & matches.right]] = True
    open_pairs = (shown & (matches.truth < 0))[pairs.found] & ~(taken | annotations.crowd)[pairs.truth]
    return _settle(annotations, found, pairs, open_pairs)


def _settle(annotations: Annotations, found: Found, pairs: Pairs, chosen: np.ndarray) -> Matches:
    rows, truths, overlap = (column[chosen] for column in pairs)
    crowd = annotations.crowd
    order = np.lexsort((-truths, -overlap, crowd[truths], rows, -found.scores[rows]))
    matched = np.full(len(found.scores), -1, np.int64)
    ignored = np.zeros(len(found.scores), bool)
    taken = np.zeros(len(annotations.boxes), bool)
    for row, truth in zip(rows[order].tolist(), truths[order].tolist(), strict=True):
        if matched[row] < 0 and not taken[truth]:
            matched[row] = truth
            ignored[row] = taken_by_many = bool(crowd[truth])
            taken[truth] = not taken_by_many
    return Matches(matched, ignored)
