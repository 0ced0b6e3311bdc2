"""Which class was taken for which."""

from __future__ import annotations

import numpy as np

from detrkit.data.annotations import Annotations
from detrkit.evaluation.columns import Found
from detrkit.evaluation.matching import Matches, Pairs, match_across


def confusion_matrix(
    annotations: Annotations, found: Found, pairs: Pairs, matches: Matches, threshold: float
) -> np.ndarray:
    """Count (true class, found class) over the detections of at least `threshold`.

    Detections are first matched within their class, so that the diagonal is the count of true positives; what is left
    is matched across classes. Crowd boxes and the detections on them do not count.

    Args:
        annotations: n images.
        found: their detections.
        pairs: from `overlapping_pairs`.
        matches: from `match`, of the same pairs.
        threshold: lowest score that counts.

    Returns:
        (c + 1, c + 1) int64. Rows are true classes, columns found classes; the last row is the background that was
        taken for an object, the last column the objects that were missed.
    """
    classes = len(annotations.categories)
    across = match_across(annotations, found, pairs, matches, threshold)
    truth = np.where(matches.truth >= 0, matches.truth, across.truth)
    counted = (found.scores >= threshold) & ~matches.ignored
    rows = np.append(annotations.labels, classes)[truth]
    matrix = np.zeros((classes + 1, classes + 1), np.int64)
    np.add.at(matrix, (rows[counted], found.labels[counted]), 1)
    missed = ~annotations.crowd
    missed[truth[counted & (truth >= 0)]] = False
    np.add.at(matrix, (annotations.labels[missed], classes), 1)
    return matrix
