import json
import math
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
from evaluation.cases import annotations_of, detections_of, random_set

from detrkit.errors import DataError, UsageError
from detrkit.evaluation import evaluate
from detrkit.evaluation.one_shot import Question, draw_questions, merge, one_shot_metrics

SMALL, LARGE, FAR = [0, 0, 10, 10], [20, 20, 60, 60], [70, 70, 95, 95]


class Boxes(NamedTuple):
    boxes: np.ndarray
    scores: np.ndarray


def answer(*rows):
    return Boxes(
        np.array([box for box, _ in rows], np.float32).reshape(-1, 4),
        np.array([score for _, score in rows], np.float32),
    )


def three_images(**keywords):
    return annotations_of([[SMALL, LARGE], [LARGE, FAR], [SMALL, FAR]], [[0, 1], [1, 1], [0, 2]], classes=4, **keywords)


def photographs():
    random = np.random.default_rng(0)
    labels = [random.integers(0, 3, int(random.integers(0, 6))).tolist() for _ in range(40)]
    return annotations_of([[SMALL] * len(image) for image in labels], labels, classes=3)


def image_of(annotations, row):
    return int(np.searchsorted(annotations.offsets, row, side="right")) - 1


def test_every_image_is_asked_about_each_class_that_it_holds_and_no_other():
    questions = draw_questions(three_images(), draw=0, seed=0)
    assert [(one.image, one.label) for one in questions.asked] == [(0, 0), (0, 1), (1, 1), (2, 0)]
    assert questions.left_out == {"class 2": 1}  # its only box lies in the image that would be asked
    assert [one.exemplars for one in questions.asked[:1]] == [(4,)]
    assert questions.asked[2].exemplars == (1,)


@pytest.mark.parametrize("shots", [1, 3, 50])
def test_exemplars_are_distinct_boxes_of_the_class_in_other_images(shots):
    annotations = photographs()
    for one in draw_questions(annotations, draw=1, seed=2, shots=shots).asked:
        owners = {image_of(annotations, row) for row in one.exemplars}
        there = np.flatnonzero(annotations.labels == one.label)
        elsewhere = [row for row in there if image_of(annotations, row) != one.image]
        assert set(one.exemplars) <= set(elsewhere)
        assert one.image not in owners
        assert len(one.exemplars) == len(set(one.exemplars)) == min(shots, len(elsewhere))


def test_exemplars_are_drawn_evenly():
    annotations = annotations_of([[SMALL], [SMALL, LARGE], [FAR]], [[0], [0, 0], [0]], classes=1)
    drawn = Counter(draw_questions(annotations, draw=draw, seed=5).asked[0].exemplars for draw in range(600))
    assert set(drawn) == {(1,), (2,), (3,)}
    assert min(drawn.values()) > 150


def test_the_draw_depends_on_seed_draw_image_and_label_alone():
    annotations = photographs()
    asked = draw_questions(annotations, draw=0, seed=0, shots=2).asked
    assert asked == draw_questions(annotations, draw=0, seed=0, shots=2).asked
    assert asked != draw_questions(annotations, draw=1, seed=0, shots=2).asked
    assert asked != draw_questions(annotations, draw=0, seed=1, shots=2).asked
    part = draw_questions(annotations, draw=0, seed=0, shots=2, labels=[2]).asked
    assert part == tuple(one for one in asked if one.label == 2)


def test_each_image_and_each_class_has_its_own_draw():
    pairs = annotations_of([[SMALL, LARGE]] * 20, [[0, 1]] * 20)
    asked = draw_questions(pairs, draw=0, seed=0).asked
    images = np.array([[image_of(pairs, one.exemplars[0]) for one in asked[label::2]] for label in (0, 1)])
    assert (images[0] == images[1]).mean() < 0.5
    assert len(set(images[0].tolist())) > 5


def test_crowd_is_neither_present_nor_an_exemplar():
    annotations = three_images(crowd=[[True, False], [False, False], [False, False]])
    questions = draw_questions(annotations, draw=0, seed=0)
    assert [(one.image, one.label) for one in questions.asked] == [(0, 1), (1, 1)]
    assert questions.left_out == {"class 0": 1, "class 2": 1}


def test_small_exemplars_are_not_shown_but_small_boxes_are_asked_for():
    annotations = three_images(size=(100, 200))
    kept = draw_questions(annotations, draw=0, seed=0, smallest=0.1)
    assert kept.left_out == {"class 2": 1}
    questions = draw_questions(annotations, draw=0, seed=0, smallest=0.3)
    # Of class 1, the box of 25 pixels is too small, so image 0 has no exemplar left but the other one of image 1.
    assert questions.left_out == {"class 0": 2, "class 2": 1}
    assert questions.asked == (Question(0, 1, (2,)), Question(1, 1, (1,)))


def test_both_sides_of_an_exemplar_are_large_enough():
    annotations = annotations_of([[[0, 0, 90, 10]], [[0, 0, 10, 90]], [LARGE]], [[0], [0], [0]])
    asked = draw_questions(annotations, draw=0, seed=0, shots=3, smallest=0.2).asked
    assert [one.exemplars for one in asked] == [(2,), (2,)]


def test_small_exemplars_cannot_be_told_where_sizes_are_unknown():
    annotations = three_images(size=(0, 0))
    assert draw_questions(annotations, draw=0, seed=0).asked
    with pytest.raises(DataError, match=r"0\.png.*size of an image is not known.*smallest=0"):
        draw_questions(annotations, draw=0, seed=0, smallest=0.1)


def test_a_file_that_is_listed_twice_is_no_exemplar_for_itself():
    part = three_images().select([0, 0, 1])
    questions = draw_questions(part, draw=0, seed=0)
    assert [(one.image, one.label) for one in questions.asked] == [(0, 1), (1, 1), (2, 1)]
    assert all(set(one.exemplars) <= {4, 5} for one in questions.asked[:2])
    assert questions.left_out == {"class 0": 2}


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"shots": 0}, "shots.*got 0.*at least 1"),
        ({"draw": -1}, "draw.*got -1"),
        ({"seed": -1}, "seed.*got -1"),
        ({"smallest": 1.5}, r"smallest.*got 1\.5.*from 0 to 1"),
        ({"labels": [4]}, "labels.*no such category.*got 4.*0 to 3"),
    ],
)
def test_questions_that_make_no_sense_are_refused(keywords, message):
    with pytest.raises(UsageError, match=message):
        draw_questions(three_images(), **{"draw": 0, "seed": 0, **keywords})


def test_no_box_no_question():
    empty = annotations_of([[], []], [[], []])
    assert draw_questions(empty, draw=0, seed=0) == ((), {})
    assert [len(one) for one in merge(empty, [], [])] == [0, 0]


def test_answers_of_an_image_are_put_together_by_score():
    annotations = three_images(size=(80, 100))
    asked = [Question(0, 1, (2,)), Question(2, 0, (0,)), Question(0, 0, (4,))]
    merged = merge(annotations, asked, [answer((LARGE, 0.5), (FAR, 0.9)), answer((SMALL, 0.3)), answer((SMALL, 0.7))])
    assert merged[0].labels.tolist() == [1, 0, 1]
    np.testing.assert_allclose(merged[0].scores, [0.9, 0.7, 0.5])
    assert merged[0].boxes.tolist() == [FAR, SMALL, LARGE]
    assert merged[0].image_size == (80, 100)
    assert merged[0].source == "0.png"
    assert [len(one) for one in merged] == [3, 0, 1]
    assert merged[1].boxes.shape == (0, 4)
    assert merge(annotations, asked[:1], [merged[0]])[0].labels.tolist() == [1, 1, 1]  # Detections are answers too


@pytest.mark.parametrize(
    ("asked", "answers", "error", "message"),
    [
        ([Question(0, 0, ())], [], UsageError, "differ in number; got 1 and 0"),
        ([Question(0, 0, ())] * 2, [answer()] * 2, UsageError, "image 0 and category 0.*asked twice"),
        ([Question(3, 0, ())], [answer()], UsageError, "image 3 and category 0.*annotations lack"),
        ([Question(0, 4, ())], [answer()], UsageError, "image 0 and category 4.*annotations lack"),
        ([Question(0, 0, ())], [Boxes(np.zeros((2, 4)), np.zeros(1))], DataError, r"image 0.*\(2, 4\).*\(1,\)"),
    ],
)
def test_answers_that_belong_to_no_question_are_refused(asked, answers, error, message):
    with pytest.raises(error, match=message):
        merge(three_images(), asked, answers)


def test_figures_of_draws():
    annotations = three_images()
    right = [([*SMALL], 0, 0.9), ([*LARGE], 1, 0.8)]
    first = detections_of(annotations, [right, [(LARGE, 1, 0.9), (FAR, 1, 0.7)], [(SMALL, 0, 0.6), (FAR, 2, 0.6)]])
    second = detections_of(annotations, [right, [(LARGE, 1, 0.9), (FAR, 1, 0.7)], [(FAR, 0, 0.99), (SMALL, 2, 0.6)]])
    metrics = one_shot_metrics(annotations, [first, second], seen=[0, 1])
    # The second draw finds one of two boxes of class 0 behind a wrong one, and none of class 2.
    half = 0.5 * 51 / 101
    seen = [1.0, (half + 1) / 2]
    assert metrics.figures["AP50_seen"] == pytest.approx(np.mean(seen))
    assert metrics.figures["AP50_seen_std"] == pytest.approx(np.std(seen, ddof=1))
    assert metrics.figures["AP50_unseen"] == pytest.approx(0.5)
    assert metrics.figures["AP50_unseen_std"] == pytest.approx(math.sqrt(0.5))
    assert metrics.figures["AP_seen"] == pytest.approx(np.mean(seen))
    assert metrics.figures["AP_unseen"] == pytest.approx(0.5)
    assert metrics.figures["ratio"] == pytest.approx(0.5 / np.mean(seen))
    assert (metrics.draws, metrics.questions) == (2, 5)
    assert [(one.name, one.seen, one.boxes) for one in metrics.per_class] == [
        ("class 0", True, 2),
        ("class 1", True, 3),
        ("class 2", False, 1),
        ("class 3", False, 0),
    ]
    assert metrics.per_class[0].ap50 == pytest.approx((1 + half) / 2)
    assert metrics.per_class[1].ap50_std == 0
    assert metrics.per_class[2].ap50_std == pytest.approx(math.sqrt(0.5))
    assert math.isnan(metrics.per_class[3].ap50)


def test_ap_and_ap50_are_those_of_evaluate():
    annotations, detections = random_set(8)
    held = [
        set(annotations.labels[rows][~annotations.crowd[rows]])
        for rows in map(annotations.rows, range(len(annotations)))
    ]
    kept = [one[np.isin(one.labels, sorted(labels))] for one, labels in zip(detections, held, strict=True)]
    figures = evaluate(annotations, kept).figures
    assert 0 < figures["AP"] < figures["AP50"] < 1
    metrics = one_shot_metrics(annotations, [kept], seen=range(len(annotations.categories)))
    assert metrics.figures["AP50_seen"] == pytest.approx(figures["AP50"])
    assert metrics.figures["AP_seen"] == pytest.approx(figures["AP"])


def test_undefined_figures_are_nan_and_null():
    annotations = three_images()
    metrics = one_shot_metrics(annotations, [detections_of(annotations, [[], [], []])], seen=[0, 1, 2])
    assert metrics.figures["AP50_seen"] == 0
    for name in ("AP50_seen_std", "AP50_unseen", "AP50_unseen_std", "AP_unseen", "ratio"):
        assert math.isnan(metrics.figures[name])
    written = json.loads(json.dumps(metrics.to_json(), allow_nan=False))
    assert written["figures"]["ratio"] is None
    assert written["figures"]["AP50_seen"] == 0
    assert written["per_class"][0] == {"name": "class 0", "seen": True, "boxes": 2, "ap50": 0.0, "ap50_std": None}


def test_answers_without_a_question_are_refused():
    annotations = three_images()
    draws = [detections_of(annotations, [[], [], []]), detections_of(annotations, [[], [(SMALL, 0, 0.1)], []])]
    with pytest.raises(UsageError, match=r"draw 1, image 1 \(1\.png\).*'class 0'.*got 1 such"):
        one_shot_metrics(annotations, draws, seen=[0])


def test_a_crowd_alone_is_not_to_be_asked_about():
    annotations = three_images(crowd=[[True, False], [False, False], [False, False]])
    with pytest.raises(UsageError, match=r"image 0.*'class 0'"):
        one_shot_metrics(annotations, [detections_of(annotations, [[(SMALL, 0, 0.9)], [], []])], seen=[0])


def test_draws_that_cannot_be_evaluated_are_refused():
    annotations = three_images()
    with pytest.raises(UsageError, match="no draw"):
        one_shot_metrics(annotations, [], seen=[0])
    with pytest.raises(UsageError, match=r"seen.*no such category.*got 9"):
        one_shot_metrics(annotations, [detections_of(annotations, [[], [], []])], seen=[9])
    with pytest.raises(DataError, match="differ in number"):
        one_shot_metrics(annotations, [[]], seen=[0])


def test_from_questions_to_figures():
    annotations = photographs()
    draws = []
    for draw in range(2):
        asked = draw_questions(annotations, draw=draw, seed=0).asked
        truth = [annotations.rows(one.image) for one in asked]
        boxes = [
            annotations.boxes[rows][annotations.labels[rows] == one.label]
            for one, rows in zip(asked, truth, strict=True)
        ]
        answers = [Boxes(found.astype(np.float32), np.full(len(found), 0.5, np.float32)) for found in boxes]
        draws.append(merge(annotations, asked, answers))
    metrics = one_shot_metrics(annotations, draws, seen=[0, 1])
    assert metrics.figures["AP_seen"] == metrics.figures["AP_unseen"] == pytest.approx(1)
    assert metrics.figures["AP50_unseen_std"] == 0
    assert metrics.questions == len(asked)
