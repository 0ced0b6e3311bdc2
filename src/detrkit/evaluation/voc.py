"""Pascal VOC average precision (Everingham et al., IJCV 2010 and 2015) at IoU 0.5.

Differs from COCO's AP50 in three ways: a detection is compared with the box that it overlaps most, free or not; boxes
marked difficult are neither found nor missed; and precision is read at 11 recalls (2007) or at every one (2010
to 2012). VOC's own data know no crowds. As in COCO, one takes the detections that lie in it by half of their own area:
those that overlap no other box of their class enough.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from detrkit.data.annotations import Annotations
from detrkit.evaluation.columns import Found
from detrkit.evaluation.matching import Pairs


def voc_figures(annotations: Annotations, found: Found, pairs: Pairs) -> Iterator[tuple[str, float]]:
    """Yield VOC07 and VOC12, the means over the classes that have boxes.

    Args:
        annotations: n images; difficult and crowd boxes are ignored.
        found: their detections.
        pairs: from `overlapping_pairs` at IoU 0.5.
    """
    table = voc_per_class(annotations, found, pairs)
    for column, name in enumerate(("VOC07", "VOC12")):
        defined = table[~np.isnan(table[:, column]), column]
        yield name, float(defined.mean()) if defined.size else float("nan")


def voc_per_class(annotations: Annotations, found: Found, pairs: Pairs) -> np.ndarray:
    """The 11-point and the all-point average precision of each class, (c, 2); NaN where a class has no box."""
    skipped = annotations.difficult | annotations.crowd
    verdict = _verdicts(annotations, found, pairs, skipped)
    table = np.full((len(annotations.categories), 2), np.nan)
    for label in range(len(table)):
        positives = int((~skipped[annotations.labels == label]).sum())
        if not positives:
            continue
        rows = np.flatnonzero((found.labels == label) & (verdict >= 0))
        rows = rows[np.argsort(-found.scores[rows], kind="stable")]
        hits = np.cumsum(verdict[rows])
        precision = hits / np.arange(1, len(rows) + 1)
        table[label] = eleven_point(hits, precision, positives), all_point(hits, precision, positives)
    return table


def _verdicts(annotations: Annotations, found: Found, pairs: Pairs, skipped: np.ndarray) -> np.ndarray:
    """For each detection: 1 found a box first, 0 is wrong or came second, −1 does not count."""
    same = found.labels[pairs.found] == annotations.labels[pairs.truth]
    rows, truths, overlap = (column[same] for column in pairs)
    verdict = np.zeros(len(found.scores), np.int64)
    best = np.lexsort((truths, -overlap, annotations.crowd[truths], rows))
    first = best[np.unique(rows[best], return_index=True)[1]]
    rows, truths = rows[first], truths[first]
    verdict[rows[skipped[truths]]] = -1
    rows, truths = rows[~skipped[truths]], truths[~skipped[truths]]
    by_score = np.argsort(-found.scores[rows], kind="stable")
    winners = by_score[np.unique(truths[by_score], return_index=True)[1]]
    verdict[rows[winners]] = 1
    return verdict


def eleven_point(hits: np.ndarray, precision: np.ndarray, positives: int) -> float:
    """VOC 2007: the mean, over recalls 0, 0.1, …, 1, of the best precision at that recall or beyond.

    Args:
        hits: (k,) true positives among the first 1 … k detections by falling score.
        precision: (k,) of the same detections.
        positives: boxes to be found, at least 1.
    """
    # In whole numbers: 3 of 10 must reach recall 0.3, which floats deny.
    reached = [precision[hits * 10 >= tenth * positives] for tenth in range(11)]
    return float(sum(float(part.max()) for part in reached if part.size) / 11)


def all_point(hits: np.ndarray, precision: np.ndarray, positives: int) -> float:
    """VOC 2010 to 2012: the area under the precision made falling, arguments as in `eleven_point`."""
    if not len(hits):
        return 0.0
    falling = np.maximum.accumulate(precision[::-1])[::-1]
    gained = np.diff(hits, prepend=0) > 0
    return float(falling[gained].sum() / positives)
