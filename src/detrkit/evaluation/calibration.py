"""Honest scores: a calibration that makes them probabilities, and figures of how far they are from being so."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from detrkit.errors import UsageError

TEMPERATURES = (0.05, 20.0)
"""The least and the greatest temperature that a fit gives."""


class Calibration(NamedTuple):
    """A probability for each logit: sigmoid(logit / temperature + shift). `Calibration(1.0, 0.0)` changes nothing.

    `temperature` is above 0, so that the order of detections stays.
    """

    temperature: float
    shift: float

    def apply(self, logits: np.ndarray) -> np.ndarray:
        """The probabilities, float64, of logits of any shape."""
        raised = np.asarray(logits, np.float64) / self.temperature + self.shift
        probabilities: np.ndarray = np.exp(-np.logaddexp(0.0, -raised))
        return probabilities


class Reliability(NamedTuple):
    """How often detections of similar score are right. Means over bins without a score are NaN.

    Attributes:
        edges: (bins + 1,) from 0 to 1. Bin i holds edges[i] <= score < edges[i + 1]; the last one 1 as well.
        confidence: (bins,) mean score.
        accuracy: (bins,) share that is right.
        counts: (bins,) int64.
        ece: expected calibration error, the mean of |accuracy − confidence| over all scores; NaN without any
            (Naeini et al., AAAI 2015; Guo et al., ICML 2017, equation 3).
    """

    edges: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    counts: np.ndarray
    ece: float


def fit_calibration(logits: np.ndarray, right: np.ndarray) -> Calibration:
    """Find temperature and shift of maximum likelihood.

    Platt scaling: Platt, "Probabilistic Outputs for Support Vector Machines" (1999), with his smoothed targets
    (n₊ + 1) / (n₊ + 2) and 1 / (n₋ + 2), so that separable data give finite numbers. The slope is written as a
    temperature (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017) and held within `TEMPERATURES`:
    where high logits are no more often right than low ones it is the greatest.

    Args:
        logits: (k,) finite.
        right: (k,) bool, the detection found what it was to find.

    Raises:
        UsageError: shapes that do not fit together, no logit, a logit that is not finite, logits that are all the
            same, none that is right, or none that is wrong.
    """
    from scipy.optimize import minimize
    from scipy.special import expit, logit

    logits, right = np.asarray(logits, np.float64), np.asarray(right, bool)
    _check_columns(logits=logits, right=right)
    for bad, what in (
        (not len(logits), "There is no detection to calibrate on"),
        (not np.isfinite(logits).all(), "A logit is not a finite number"),
        (not right.any(), "No detection is right, so there is nothing to calibrate on"),
        (right.all(), "No detection is wrong, so there is nothing to calibrate on"),
        (len(logits) > 0 and np.ptp(logits) == 0, "All logits are the same, so no temperature can be told"),
    ):
        if bad:
            raise UsageError(
                what,
                got=f"{len(logits)} logits, {int(np.isfinite(logits).sum())} finite, {int(right.sum())} right",
                expected="finite logits that differ, some right and some wrong",
                remedy="Take more images, or leave the scores as they are: Calibration(1.0, 0.0).",
            )
    positives = int(right.sum())
    targets = np.where(right, (positives + 1) / (positives + 2), 1 / (len(right) - positives + 2))
    # Slope and shift of raw logits are almost collinear; those of standardised ones are not.
    middle, scale = logits.mean(), logits.std()
    standard = (logits - middle) / scale

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        activations = values[0] * standard + values[1]
        error = expit(activations) - targets
        nll = (np.logaddexp(0.0, activations) - targets * activations).mean()
        return float(nll), np.array([(error * standard).mean(), error.mean()])

    low, high = TEMPERATURES
    start = np.array([np.clip(1.0, scale / high, scale / low), logit(positives / len(right))])
    bounds = [(scale / high, scale / low), (None, None)]
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-14, "gtol": 1e-9})
    slope, shift = float(found.x[0] / scale), float(found.x[1])
    return Calibration(1 / slope, shift - slope * float(middle))


def reliability(scores: np.ndarray, right: np.ndarray, bins: int = 10) -> Reliability:
    """Put scores into bins of equal width and compare each bin's mean score with the share that is right.

    Args:
        scores: (k,) in [0, 1].
        right: (k,) bool.
        bins: how many.

    Raises:
        UsageError: shapes that do not fit together, a score outside [0, 1], or no bin.
    """
    scores, right = _checked(scores, right)
    if bins < 1:
        raise UsageError("There is no bin", where="bins", got=bins, expected="at least 1")
    edges = np.linspace(0.0, 1.0, bins + 1)
    index = np.clip(np.searchsorted(edges, scores, side="right") - 1, 0, bins - 1)
    counts = np.bincount(index, minlength=bins).astype(np.int64)
    full = np.where(counts > 0, counts, np.nan)
    confidence = np.bincount(index, scores, bins) / full
    accuracy = np.bincount(index, right, bins) / full
    gaps = counts * np.abs(accuracy - confidence)
    ece = float(np.nansum(gaps) / len(scores)) if len(scores) else float("nan")
    return Reliability(edges, confidence, accuracy, counts, ece)


def threshold_spread(scores: np.ndarray, right: np.ndarray, groups: np.ndarray, threshold: float = 0.5) -> float:
    """How differently one threshold works for different exemplars: the spread of precision over groups.

    The precision of a group is the share of its detections with score >= `threshold` that are right. Groups without
    such a detection have none and do not count. Every other group counts the same, however many detections it has.

    Args:
        scores: (k,) in [0, 1].
        right: (k,) bool.
        groups: (k,) integers; detections of one question have the same.
        threshold: lowest score that counts.

    Returns:
        The standard deviation of the precisions, with the number of groups − 1 in the denominator; 0 would be the same
        precision for all. NaN where fewer than two groups count.

    Raises:
        UsageError: shapes that do not fit together, or a score outside [0, 1].
    """
    scores, right = _checked(scores, right)
    groups = np.asarray(groups)
    _check_columns(scores=scores, groups=groups)
    shown = scores >= threshold
    _, members = np.unique(groups[shown], return_inverse=True)
    if not len(members) or members.max() < 1:
        return float("nan")
    precision = np.bincount(members, right[shown]) / np.bincount(members)
    return float(precision.std(ddof=1))


def _checked(scores: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, right = np.asarray(scores, np.float64), np.asarray(right, bool)
    _check_columns(scores=scores, right=right)
    outside = ~((scores >= 0) & (scores <= 1))
    if outside.any():
        row = int(np.flatnonzero(outside)[0])
        raise UsageError(
            "A score is no probability", where=f"scores[{row}]", got=f"{scores[row]:g}", expected="a number from 0 to 1"
        )
    return scores, right


def _check_columns(**columns: np.ndarray) -> None:
    shapes = [column.shape for column in columns.values()]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1:
        raise UsageError(
            "The columns do not fit together",
            where=" and ".join(columns),
            got=" and ".join(str(shape) for shape in shapes),
            expected="(k,) each",
        )
