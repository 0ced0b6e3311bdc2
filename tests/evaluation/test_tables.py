"""Counts, thresholds and confusions."""

from dataclasses import replace

import numpy as np
import pytest
from evaluation.cases import annotations_of, detections_of, random_set

from detrkit.evaluation import best_and_worst, evaluate, matching, score_images
from detrkit.evaluation.columns import flatten, only_things
from detrkit.evaluation.thresholds import best_f1
from detrkit.structures import Category


def test_best_threshold_by_hand():
    # Shown 1, 2, 3, 4: right 1, 1, 2, 2 of 2 boxes. F1 is 2/3, 1/2, 4/5, 2/3.
    point = best_f1(np.array([0.9, 0.8, 0.7, 0.6]), np.array([True, False, True, False]), 2)
    assert point == pytest.approx((0.7, 0.8, 2 / 3, 1.0))


def test_tied_scores_are_shown_together():
    point = best_f1(np.array([0.5, 0.5, 0.5]), np.array([True, False, False]), 1)
    assert point == pytest.approx((0.5, 0.5, 1 / 3, 1.0))


def test_best_threshold_equals_trying_all():
    random = np.random.default_rng(0)
    for _ in range(50):
        scores, right = np.round(random.random(30), 1), random.random(30) < 0.4
        positives = int(right.sum()) + int(random.integers(1, 9))
        tried = [2 * right[scores >= t].sum() / ((scores >= t).sum() + positives) for t in np.unique(scores)]
        assert best_f1(scores, right, positives).f1 == pytest.approx(max(tried))


def test_confusion_by_hand():
    truth = [[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10]]
    annotations = annotations_of([truth], [[0, 1, 0, 0]], crowd=[[False, False, False, True]])
    rows = [
        ([0, 0, 10, 10], 0, 0.9),  # right
        ([0, 0, 10, 10], 0, 0.8),  # again: background
        ([20, 0, 30, 10], 0, 0.7),  # wrong name
        ([80, 80, 90, 90], 1, 0.6),  # nothing there
        ([60, 0, 70, 10], 0, 0.6),  # on a crowd: does not count
        ([40, 0, 50, 10], 0, 0.1),  # below the threshold: missed
    ]
    metrics = evaluate(annotations, detections_of(annotations, [rows]), threshold=0.5)
    np.testing.assert_array_equal(metrics.confusion, [[1, 0, 1], [1, 0, 0], [1, 1, 0]])
    assert metrics.threshold == 0.5


def test_the_best_threshold_does_not_mind_detections_on_a_crowd():
    annotations = annotations_of(
        [[[0, 0, 10, 10], [20, 0, 30, 10], [50, 50, 90, 90]]], [[0, 0, 0]], crowd=[[False, False, True]]
    )
    on_crowd = [([50 + 5 * k, 50, 60 + 5 * k, 90], 0, 0.7) for k in range(5)]
    rows = [([0, 0, 10, 10], 0, 0.9), *on_crowd, ([20, 0, 30, 10], 0, 0.5)]
    metrics = evaluate(annotations, detections_of(annotations, [rows]))
    assert metrics.threshold == metrics.per_class[0].threshold == 0.5


def test_stuff_takes_nothing_of_the_things_with_it():
    boxes = [[[0, 0, 10, 10], [20, 0, 30, 10]], [[0, 0, 10, 10], [20, 0, 35, 10]]]
    flags = {"crowd": [[False, True], [True, False]], "difficult": [[True, True], [False, True]]}
    annotations = annotations_of(boxes, [[0, 1], [1, 1]], **flags)
    annotations = replace(annotations, categories=(Category(0, "sky", False), Category(1, "cat")))
    rows = [[([0, 0, 10, 10], 0, 0.9), ([20, 0, 30, 10], 1, 0.8)], [([0, 0, 10, 10], 1, 0.7)]]
    things, found = only_things(annotations, flatten(annotations, detections_of(annotations, rows)))
    assert things.offsets.tolist() == [0, 1, 3]
    assert things.boxes.tolist() == [boxes[0][1], *boxes[1]]
    assert things.areas.tolist() == [100, 100, 150]
    assert things.crowd.tolist() == [True, True, False]
    assert things.difficult.tolist() == [True, False, True]
    assert (found.images.tolist(), found.labels.tolist()) == ([0, 1], [1, 1])
    assert found.scores.tolist() == pytest.approx([0.8, 0.7])
    assert found.boxes.tolist() == [[20, 0, 30, 10], [0, 0, 10, 10]]


def test_a_rightly_named_detection_wins_over_a_stronger_wrong_name():
    annotations = annotations_of([[[0, 0, 10, 10]]], [[0]])
    rows = [([0, 0, 10, 10], 1, 0.9), ([0, 0, 10, 10], 0, 0.8)]
    metrics = evaluate(annotations, detections_of(annotations, [rows]), threshold=0.5)
    np.testing.assert_array_equal(metrics.confusion, [[1, 0, 0], [0, 0, 0], [0, 1, 0]])


def test_sums_of_the_confusion_matrix():
    for seed in range(40):
        annotations, detections = random_set(seed)
        metrics = evaluate(annotations, detections, threshold=0.3)
        boxes = np.bincount(annotations.labels[~annotations.crowd], minlength=len(annotations.categories))
        np.testing.assert_array_equal(metrics.confusion[:-1].sum(1), boxes)
        assert metrics.confusion[-1, -1] == 0
        if not annotations.crowd.any():
            shown = np.concatenate([one.labels[one.scores >= np.float32(0.3)] for one in detections])
            shown_counts = np.bincount(shown, minlength=len(annotations.categories))
            np.testing.assert_array_equal(metrics.confusion[:, :-1].sum(0), shown_counts)


def test_per_class_figures_average_to_the_whole():
    annotations, detections = random_set(4)
    metrics = evaluate(annotations, detections)
    defined = [one.ap for one in metrics.per_class if not np.isnan(one.ap)]
    assert np.mean(defined) == pytest.approx(metrics.figures["AP"])
    assert np.nanmean(metrics.precision) == pytest.approx(metrics.figures["AP50"])


def test_the_diagonal_is_what_the_class_table_says():
    annotations, detections = random_set(5)
    for one, row in zip(evaluate(annotations, detections).per_class, range(9), strict=False):
        if not np.isnan(one.threshold):
            confusion = evaluate(annotations, detections, threshold=one.threshold).confusion
            assert confusion[row, row] == pytest.approx(one.recall * one.boxes)


def test_portions_change_nothing(monkeypatch):
    annotations, detections = random_set(6)
    whole = evaluate(annotations, detections, voc=True)
    monkeypatch.setattr(matching, "PAIRS_AT_ONCE", 7)
    parts = evaluate(annotations, detections, voc=True)
    assert whole.to_json() == parts.to_json()


def test_images_are_scored_and_ranked():
    box = [0, 0, 10, 10]
    annotations = annotations_of([[box, [50, 50, 60, 60]], [box], [], []], [[0, 1], [0], [], []])
    rows = [[(box, 0, 0.9)], [(box, 0, 0.9)], [(box, 1, 0.9)], [(box, 1, 0.1)]]
    scores = score_images(annotations, detections_of(annotations, rows), 0.5)
    assert [score.f1 for score in scores] == pytest.approx([2 / 3, 1, 0, np.nan], nan_ok=True)
    assert scores[0].missed.tolist() == [False, True]
    assert scores[2].wrong.tolist() == [True]
    assert scores[0].errors == 1
    best, worst = best_and_worst(scores, 5)
    assert [score.index for score in best] == [1, 0]
    assert [score.index for score in worst] == [2]


def test_a_detection_prefers_a_free_box_to_the_crowd_around_it():
    # All of the detection lies in the crowd, but only 64 % of it overlaps the box.
    annotations = annotations_of([[[0, 0, 50, 50], [2, 0, 12, 10]]], [[0, 0]], crowd=[[True, False]])
    metrics = evaluate(annotations, detections_of(annotations, [[([0, 0, 10, 10], 0, 0.9)]]), threshold=0.5)
    np.testing.assert_array_equal(metrics.confusion[0], [1, 0, 0])


def test_detections_on_a_crowd_are_no_errors_of_an_image():
    annotations = annotations_of([[[0, 0, 50, 50]]], [[0]], crowd=[[True]])
    (score,) = score_images(annotations, detections_of(annotations, [[([0, 0, 10, 10], 0, 0.9)]]), 0.5)
    assert score.errors == 0
    assert np.isnan(score.f1)
    assert len(score.missed) == 0
