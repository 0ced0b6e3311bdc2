import json
import math
from dataclasses import replace

import numpy as np
import pytest
from evaluation.cases import annotations_of, detections_of, pycocotools_figures, random_set

from detrkit.errors import DataError, UsageError
from detrkit.evaluation import evaluate, figures

COCO_NAMES = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]


SETS = 150
MORE = [pytest.param(first, marks=pytest.mark.slow) for first in range(SETS, 300, 50)]


@pytest.mark.parametrize("first", [*range(0, SETS, 50), *MORE])
def test_equals_pycocotools_on_random_sets(first):
    for seed in range(first, first + 50):
        annotations, detections = random_set(seed)
        ours = dict(figures(annotations, detections))
        assert list(ours) == COCO_NAMES
        theirs = pycocotools_figures(annotations, detections)
        np.testing.assert_allclose(
            list(ours.values()), np.where(theirs == -1, np.nan, theirs), rtol=0, atol=1e-9, err_msg=f"set {seed}"
        )


def test_the_random_sets_hold_what_trips_evaluators():
    sets = [random_set(seed) for seed in range(SETS)]
    assert any(annotations.crowd.any() for annotations, _ in sets)
    assert any((annotations.image_ids == 0).any() for annotations, _ in sets)
    assert any((np.diff(annotations.image_ids) < 0).any() for annotations, _ in sets)
    assert any(len(one) > 100 for _, detections in sets for one in detections)
    assert any(len(np.unique(one.scores)) < len(one) for _, detections in sets for one in detections)
    assert any((np.diff(annotations.offsets) == 0).any() for annotations, _ in sets)
    assert any(len(set(annotations.labels)) < len(annotations.categories) for annotations, _ in sets)
    assert any(not sum(len(one) for one in detections) for _, detections in sets)


def test_perfect_detections_have_ap_one():
    annotations = annotations_of([[[0, 0, 10, 10], [20, 20, 60, 60]], [[5, 5, 50, 50]]], [[0, 1], [0]])
    detections = detections_of(
        annotations, [[([0, 0, 10, 10], 0, 0.9), ([20, 20, 60, 60], 1, 0.8)], [([5, 5, 50, 50], 0, 0.7)]]
    )
    metrics = evaluate(annotations, detections, voc=True)
    assert metrics.figures["AP"] == pytest.approx(1)
    assert metrics.figures["VOC07"] == pytest.approx(1)
    assert metrics.figures["VOC12"] == pytest.approx(1)
    assert metrics.images == 2
    assert metrics.boxes == 3
    assert metrics.precision.shape == (2, 101)
    assert metrics.recall.shape == (101,)


def test_image_order_does_not_change_figures():
    annotations, detections = random_set(11)
    order = np.arange(len(annotations))[::-1]
    turned = dict(figures(annotations.select(order), [detections[index] for index in order], voc=True))
    straight = dict(figures(annotations, detections, voc=True))
    for name in COCO_NAMES:
        assert turned[name] == pytest.approx(straight[name], abs=1e-12, nan_ok=True)


def test_an_image_taken_twice_counts_twice():
    annotations = annotations_of([[[0, 0, 10, 10]]], [[0]]).select([0, 0])
    detections = detections_of(annotations, [[([0, 0, 10, 10], 0, 0.9)], []])
    assert dict(figures(annotations, detections))["AR100"] == pytest.approx(0.5)


def test_undefined_figures_are_nan_and_null():
    annotations = annotations_of([[]], [[]])
    metrics = evaluate(annotations, detections_of(annotations, [[([0, 0, 5, 5], 0, 0.5)]]), voc=True)
    assert all(math.isnan(value) for value in metrics.figures.values())
    written = json.loads(json.dumps(metrics.to_json(), allow_nan=False))
    assert written["figures"]["AP"] is None
    assert written["per_class"][0]["threshold"] is None
    assert written["curves"]["precision"][0][0] is None


def test_no_detections_at_all_is_zero():
    annotations = annotations_of([[[0, 0, 10, 10]]], [[1]])
    metrics = evaluate(annotations, detections_of(annotations, [[]]))
    assert metrics.figures["AP"] == 0
    assert math.isnan(metrics.per_class[0].ap)
    assert metrics.per_class[1].ap == 0
    assert metrics.per_class[1].f1 == 0
    assert metrics.confusion[1, 2] == 1


def test_a_data_set_without_categories_is_undefined():
    annotations = annotations_of([[]], [[]], classes=0)
    metrics = evaluate(annotations, detections_of(annotations, [[]]))
    assert math.isnan(metrics.figures["AP"])
    assert metrics.confusion.shape == (1, 1)


def _broken():
    annotations = annotations_of([[[0, 0, 10, 10]], []], [[0], []])
    good = detections_of(annotations, [[([0, 0, 10, 10], 0, 0.9)], [([0, 0, 10, 10], 1, 0.5)]])
    return annotations, good


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.array([2])}, r"image 1 \(1.png\).*label that the category table lacks.*from 0 to 1"),
        ({"labels": np.array([-1])}, "label that the category table lacks"),
        ({"scores": np.array([np.nan], np.float32)}, r"image 1 .*not a finite number"),
        ({"boxes": np.array([[0, 0, np.inf, 1]], np.float32)}, "not a finite number"),
        ({"boxes": np.array([[9, 0, 1, 1]], np.float32)}, "corners swapped"),
        ({"boxes": np.zeros((2, 4), np.float32)}, "do not fit together"),
        ({"categories": ()}, r"another category table.*no category.*class 0, class 1"),
    ],
)
def test_impossible_detections_are_named(change, message):
    annotations, good = _broken()
    with pytest.raises(DataError, match=message):
        evaluate(annotations, [good[0], replace(good[1], **change)])


def test_missing_entries_are_refused():
    annotations, good = _broken()
    with pytest.raises(DataError, match=r"1 entries.*expected 2"):
        evaluate(annotations, good[:1])


def test_an_empty_split_is_refused():
    annotations = annotations_of([], [])
    with pytest.raises(DataError, match="no image to evaluate"):
        evaluate(annotations, [])


def test_an_impossible_threshold_is_refused():
    annotations, good = _broken()
    with pytest.raises(UsageError, match=r"threshold.*1\.5"):
        evaluate(annotations, good, threshold=1.5)
