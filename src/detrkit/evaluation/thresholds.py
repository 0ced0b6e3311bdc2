"""The score threshold at which precision and recall balance best, and what they are there."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class OperatingPoint(NamedTuple):
    """What happens where only detections of at least `threshold` are shown. NaN where undefined."""

    threshold: float
    f1: float
    precision: float
    recall: float


def best_f1(scores: np.ndarray, right: np.ndarray, positives: int) -> OperatingPoint:
    """The threshold of the highest F1; the highest threshold among equals.

    Args:
        scores: (k,) of the detections that count.
        right: (k,) bool, the detection found a box.
        positives: boxes to be found.

    Returns:
        A point of NaN where there is no box to be found; F1 and recall 0 with threshold NaN where none was found.
    """
    nan = float("nan")
    if positives == 0:
        return OperatingPoint(nan, nan, nan, nan)
    if not right.any():
        return OperatingPoint(nan, 0.0, 0.0 if len(scores) else nan, 0.0)
    order = np.argsort(-scores, kind="stable")
    falling, hits = scores[order], np.cumsum(right[order])
    # A threshold shows all detections of equal score or none: only the last of each run is a real choice.
    choices = np.flatnonzero(np.append(falling[1:] != falling[:-1], True))
    shown = choices + 1
    f1 = 2 * hits[choices] / (shown + positives)
    best = int(np.argmax(f1))
    hit = hits[choices[best]]
    return OperatingPoint(
        float(falling[choices[best]]), float(f1[best]), float(hit / shown[best]), float(hit / positives)
    )
