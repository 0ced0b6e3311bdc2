"""How well each single image went, so that the best and the worst can be looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from detrkit.data.annotations import Annotations
from detrkit.evaluation.columns import flatten, only_things
from detrkit.evaluation.matching import match, overlapping_pairs
from detrkit.structures import Detections


@dataclass(frozen=True, eq=False)
class ImageScore:
    """The outcome for one image at IoU 0.5 and one score threshold.

    Attributes:
        index: its position in the annotations.
        f1: harmonic mean of precision and recall; NaN where nothing was to be found and nothing was.
        right: detections that found a box of their class.
        wrong: (n,) bool over all detections of the image: shown, but wrong or second.
        missed: (t,) bool over its ground truth without crowds and stuff: not found.
    """

    index: int
    f1: float
    right: int
    wrong: np.ndarray
    missed: np.ndarray

    @property
    def errors(self) -> int:
        """False detections and missed boxes together."""
        return int(self.wrong.sum() + self.missed.sum())


def score_images(annotations: Annotations, detections: Sequence[Detections], threshold: float) -> list[ImageScore]:
    """Score every image; detections below `threshold` and stuff are left out.

    Raises:
        DataError: detections that do not belong to the annotations.
    """
    everything = flatten(annotations, detections)
    annotations, found = only_things(annotations, everything)
    matches = match(annotations, found, overlapping_pairs(annotations, found))
    shown = (found.scores >= threshold) & ~matches.ignored
    hit = np.zeros(len(annotations.boxes), bool)
    hit[matches.truth[shown & matches.right]] = True
    is_thing = np.array([category.is_thing for category in annotations.categories], bool)[everything.labels]
    false = np.zeros(len(everything.labels), bool)
    false[is_thing] = shown & ~matches.right
    ends = np.searchsorted(everything.images, np.arange(len(annotations) + 1))
    right = np.bincount(found.images[shown & matches.right], minlength=len(annotations))
    scored = []
    for index in range(len(annotations)):
        rows = annotations.rows(index)
        wrong = false[ends[index] : ends[index + 1]]
        missed = ~hit[rows][~annotations.crowd[rows]]
        hits = int(right[index])
        total = 2 * hits + int(wrong.sum()) + int(missed.sum())
        scored.append(ImageScore(index, 2 * hits / total if total else float("nan"), hits, wrong, missed))
    return scored


def best_and_worst(scores: Sequence[ImageScore], count: int) -> tuple[list[ImageScore], list[ImageScore]]:
    """Up to `count` images of the highest and of the lowest F1, none in both, none with nothing in it.

    Among equals, more objects found make a better image and more errors a worse one.
    """
    ranked = sorted(
        (score for score in scores if not np.isnan(score.f1)),
        key=lambda score: (-score.f1, -score.right, score.errors, score.index),
    )
    best = ranked[: min(count, -(-len(ranked) // 2))]
    return best, ranked[len(best) :][-count:][::-1]
