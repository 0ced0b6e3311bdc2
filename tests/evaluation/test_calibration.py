import math

import numpy as np
import pytest

from detrkit.errors import UsageError
from detrkit.evaluation.calibration import TEMPERATURES, Calibration, fit_calibration, reliability, threshold_spread


def sigmoid(values):
    return 1 / (1 + np.exp(-values))


def sample(count, temperature, shift, seed=0):
    """Logits and outcomes for which this calibration is the right one."""
    random = np.random.default_rng(seed)
    honest = random.normal(-1, 2, count)
    return temperature * (honest - shift), random.random(count) < sigmoid(honest)


def likelihood(logits, right, temperature, shift):
    """Platt's smoothed log-likelihood, written out."""
    positives, negatives = right.sum(), (~right).sum()
    targets = np.where(right, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    chance = sigmoid(logits / temperature + shift)
    return (targets * np.log(chance) + (1 - targets) * np.log(1 - chance)).sum()


@pytest.mark.parametrize(("temperature", "shift"), [(1.0, 0.0), (0.5, -2.0), (3.0, 4.0), (10.0, 0.3)])
def test_the_fit_finds_temperature_and_shift(temperature, shift):
    found = fit_calibration(*sample(40_000, temperature, shift))
    assert found.temperature == pytest.approx(temperature, rel=0.03)
    assert found.shift == pytest.approx(shift, abs=0.06)


@pytest.mark.parametrize("seed", range(3))
def test_no_other_calibration_is_likelier(seed):
    logits, right = sample(60, 2.0, 1.0, seed)
    found = fit_calibration(logits, right)
    best = likelihood(logits, right, *found)
    for factor, step in [(1.01, 0), (0.99, 0), (1, 0.01), (1, -0.01), (1.01, 0.01), (0.99, 0.01), (1.5, 0.5)]:
        assert likelihood(logits, right, found.temperature * factor, found.shift + step) < best


def test_separable_outcomes_give_finite_numbers():
    found = fit_calibration(np.array([-2.0, -1.0, 3.0, 4.0]), np.array([False, False, True, True]))
    np.testing.assert_allclose(found.apply(np.array([-1.5, 3.5])), [0.25, 0.75], atol=0.02)  # Platt: 1/4 and 3/4


def test_the_temperature_stays_within_bounds():
    logits, right = sample(500, 1.0, 0.0)
    assert fit_calibration(-logits, right).temperature == pytest.approx(TEMPERATURES[1])
    assert fit_calibration(logits / 1000, right).temperature == pytest.approx(TEMPERATURES[0])


def test_logits_far_from_zero_and_close_together_are_fitted():
    logits, right = sample(2000, 0.1, 0.0)
    near, far = fit_calibration(logits, right), fit_calibration(logits - 40, right)
    assert far.temperature == pytest.approx(near.temperature, rel=1e-4)
    np.testing.assert_allclose(far.apply(logits - 40), near.apply(logits), atol=1e-4)


def test_a_calibration_is_applied_as_it_says():
    logits = np.array([[-800.0, 0.0], [3.0, 800.0]], np.float32)
    np.testing.assert_allclose(Calibration(1.0, 0.0).apply(logits), [[0, 0.5], [sigmoid(3.0), 1]], atol=1e-12)
    np.testing.assert_allclose(Calibration(2.0, -1.0).apply(np.array([6.0])), sigmoid(2.0))


def test_calibrated_scores_are_honest():
    logits, right = sample(20_000, 3.0, 1.0)
    found = fit_calibration(logits, right)
    assert reliability(sigmoid(logits), right).ece > 0.1
    assert reliability(found.apply(logits), right).ece < 0.015


@pytest.mark.parametrize(
    ("logits", "right", "message"),
    [
        ([], [], "no detection to calibrate on.*got 0 logits"),
        ([1.0, math.nan], [True, False], "not a finite number.*2 logits, 1 finite"),
        ([1.0, math.inf], [True, False], "not a finite number"),
        ([1.0, 2.0], [False, False], "No detection is right.*0 right"),
        ([1.0, 2.0], [True, True], "No detection is wrong.*2 right"),
        ([1.0, 1.0], [True, False], "All logits are the same"),
        ([1.0, 2.0], [True], r"logits and right.*do not fit together.*\(2,\) and \(1,\)"),
        ([[1.0, 2.0]], [[True, False]], r"do not fit together.*\(1, 2\)"),
    ],
)
def test_what_cannot_be_fitted_is_named(logits, right, message):
    with pytest.raises(UsageError, match=message):
        fit_calibration(np.array(logits), np.array(right, bool))


def test_reliability_by_hand():
    scores = np.array([0.0, 0.1, 0.5, 0.75, 0.9, 1.0])
    right = np.array([False, True, True, True, False, True])
    found = reliability(scores, right, bins=4)
    np.testing.assert_array_equal(found.edges, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_array_equal(found.counts, [2, 0, 1, 3])
    np.testing.assert_allclose(found.confidence, [0.05, math.nan, 0.5, 2.65 / 3])
    np.testing.assert_allclose(found.accuracy, [0.5, math.nan, 1, 2 / 3])
    assert found.ece == pytest.approx((2 * 0.45 + 0.5 + 3 * (2.65 - 2) / 3) / 6)


def test_no_score_has_no_error():
    found = reliability(np.array([]), np.array([], bool))
    assert math.isnan(found.ece)
    assert found.counts.tolist() == [0] * 10
    assert np.isnan(found.accuracy).all()


def test_threshold_spread_by_hand():
    #                 question 7: 1 of 2    question 3: 1 of 1   question 5: none is shown
    scores = np.array([0.5, 0.9, 0.1,       0.8, 0.49,           0.2])  # fmt: skip
    right = np.array([True, False, False,   True, False,         True])  # fmt: skip
    groups = np.array([7, 7, 7,             3, 3,                5])  # fmt: skip
    assert threshold_spread(scores, right, groups) == pytest.approx(np.std([0.5, 1.0], ddof=1))
    assert threshold_spread(scores, right, groups, threshold=0.0) == pytest.approx(np.std([1 / 3, 0.5, 1.0], ddof=1))
    assert math.isnan(threshold_spread(scores, right, groups, threshold=0.85))
    assert math.isnan(threshold_spread(scores, right, groups, threshold=1.0))


@pytest.mark.parametrize("score", [-0.1, 1.1, math.nan])
def test_scores_that_are_no_probabilities_are_refused(score):
    scores, right = np.array([0.5, score]), np.array([True, False])
    with pytest.raises(UsageError, match=r"scores\[1\].*no probability"):
        reliability(scores, right)
    with pytest.raises(UsageError, match=r"scores\[1\].*no probability"):
        threshold_spread(scores, right, np.zeros(2, np.int64))


def test_columns_that_do_not_fit_together_are_refused():
    with pytest.raises(UsageError, match=r"scores and right.*\(2,\) and \(3,\)"):
        reliability(np.zeros(2), np.zeros(3, bool))
    with pytest.raises(UsageError, match=r"scores and groups.*\(2,\) and \(3,\)"):
        threshold_spread(np.zeros(2), np.zeros(2, bool), np.zeros(3, np.int64))
    with pytest.raises(UsageError, match=r"no bin.*got 0"):
        reliability(np.zeros(2), np.zeros(2, bool), bins=0)
