"""The protocol: every image is asked for each class that it holds, and honest scores are told from others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from one_shot.squares import draw, small
from torch import Tensor

from detrkit.boxes import cxcywh_to_xyxy
from detrkit.data.annotations import Annotations, Strings
from detrkit.data.images import open_image
from detrkit.data.transforms import to_tensor
from detrkit.errors import DataError, UsageError
from detrkit.evaluation.calibration import Calibration
from detrkit.evaluation.one_shot import draw_questions, one_shot_metrics
from detrkit.one_shot.finder import Finder, Shown
from detrkit.one_shot.protocol import OneShotEvaluation, calibrate, evaluate_one_shot, judge
from detrkit.postprocess import Scored
from detrkit.structures import Category, Detections

SIZE, SIDE = (96, 128), 24
COLOURS = ("red", "blue", "green")
SCENES = (
    [("red", 8, 12), ("blue", 80, 50)],
    [("red", 10, 8), ("red", 60, 62), ("blue", 92, 10)],
    [("blue", 40, 40), ("red", 90, 60)],
    [("green", 20, 30)],
    [],
)
"""Green is in one image alone, so that there is no exemplar for it."""


def annotated(root: Path) -> Annotations:
    for index, squares in enumerate(SCENES):
        draw(list(squares), seed=index, side=SIDE, size=SIZE).save(root / f"{index}.png")
    flat = [(name, x, y) for squares in SCENES for name, x, y in squares]
    count = len(flat)
    return Annotations(
        root=root,
        file_names=Strings(f"{index}.png" for index in range(len(SCENES))),
        image_ids=np.arange(1, len(SCENES) + 1),
        image_sizes=np.full((len(SCENES), 2), SIZE, np.int32),
        offsets=np.concatenate([[0], np.cumsum([len(squares) for squares in SCENES])]).astype(np.int64),
        boxes=np.array([(x, y, x + SIDE, y + SIDE) for _, x, y in flat], np.float64),
        labels=np.array([COLOURS.index(name) for name, _, _ in flat], np.int64),
        areas=np.full(count, SIDE**2, np.float64),
        crowd=np.zeros(count, bool),
        difficult=np.zeros(count, bool),
        categories=tuple(Category(number + 1, name) for number, name in enumerate(COLOURS)),
    )


@pytest.fixture
def data(tmp_path: Path) -> Annotations:
    return annotated(tmp_path)


class Knowing(Finder):
    """A finder that knows the truth: of an image by its corner pixels, of an example by the colour in its middle.

    Args:
        annotations: the truth.
        wrong: what it answers besides, as boxes xyxy in [0, 1].
    """

    device = torch.device("cpu")

    def __init__(self, annotations: Annotations, wrong: Tensor | None = None):
        super().__init__(small())
        self.annotations, self.wrong = annotations, torch.zeros(0, 4) if wrong is None else wrong
        self.images = [to_tensor(open_image(annotations.path(index))) for index in range(len(annotations))]
        self.searched: list[int] = []
        self.asked: list[tuple[int, int]] = []
        self.shown = 0

    def _which(self, image: Tensor) -> int:
        return next(index for index, one in enumerate(self.images) if torch.equal(one, image))

    def show(self, image: Tensor, boxes: Tensor) -> Shown:
        self.shown += 1
        index = self._which(image)
        rows = self.annotations.rows(index)
        height, width = self.annotations.image_sizes[index]
        truth = torch.from_numpy(self.annotations.boxes[rows] / [width, height, width, height]).float()
        labels = []
        for box in cxcywh_to_xyxy(boxes):
            (row,) = ((truth - box).abs().amax(1) < 1e-4).nonzero()[:, 0].tolist()
            labels.append(int(self.annotations.labels[rows][row]))
        looks = torch.nn.functional.one_hot(torch.tensor(labels), len(self.annotations.categories)).float()
        return Shown(looks, looks, torch.full((len(labels), 2), 24.0))

    def search(self, image: Tensor, sought) -> list[Scored]:
        index = self._which(image)
        self.searched.append(index)
        rows = self.annotations.rows(index)
        height, width = self.annotations.image_sizes[index]
        truth = torch.from_numpy(self.annotations.boxes[rows] / [width, height, width, height]).float()
        answers = []
        for number, one in enumerate(sought):
            label = int(one.looks[0].argmax())
            self.asked.append((index, label))
            boxes = truth[torch.from_numpy(self.annotations.labels[rows] == label)]
            scores = torch.cat([torch.full((len(boxes),), 0.9), torch.full((len(self.wrong),), 0.3)])
            boxes = torch.cat([boxes, self.wrong])
            answers.append(Scored(boxes, scores, torch.full((len(boxes),), number)))
        return answers


def evaluated(finder, data: Annotations, **options):
    settings = {"sizes": (96, 128), "seen": [0], "draws": 3, **options}
    return evaluate_one_shot(finder, data, **settings)


def test_who_knows_everything_is_right_about_everything(data: Annotations):
    finder, ticks = Knowing(data), []
    found = evaluated(finder, data, on_image=lambda: ticks.append(1))
    figures = found.metrics.figures
    assert figures["AP50_seen"] == figures["AP_seen"] == pytest.approx(1)
    # Blue is found; green, of which nothing could be shown, is missed.
    assert figures["AP50_unseen"] == pytest.approx(0.5)
    assert [(one.name, one.seen) for one in found.metrics.per_class] == [
        ("red", True),
        ("blue", False),
        ("green", False),
    ]
    assert found.metrics.per_class[1].ap50 == pytest.approx(1)
    assert found.left_out == {"green": 3}  # once a draw
    assert len(found.draws) == 3
    assert sorted(finder.searched) == [0, 1, 2]  # an image is searched once for all draws
    assert len(ticks) == finder.shown + len(finder.searched)
    judged = judge(found)
    assert judged.right.all()
    assert len(judged.scores) == 3 * 7


def test_the_same_seed_asks_the_same(data: Annotations):
    first, again = (evaluated(Knowing(data), data, seed=4) for _ in range(2))
    for ours, theirs in zip(first.draws, again.draws, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert np.array_equal(one.boxes, other.boxes)
    assert first.metrics.figures == pytest.approx(again.metrics.figures, nan_ok=True)


def test_wrong_answers_are_told_from_right_ones_and_each_question_by_itself(data: Annotations):
    found = evaluated(Knowing(data, WRONG), data)
    judged = judge(found)
    assert (judged.right == (judged.scores > 0.5)).all()
    asked = [len(draw_questions(data, draw=number, seed=0, smallest=0.04).asked) for number in range(3)]
    assert len(np.unique(judged.question)) == sum(asked)
    assert (~judged.right).sum() == sum(asked)


def test_crowds_are_neither_asked_about_nor_right_nor_wrong(data: Annotations):
    crowd = data.crowd.copy()
    crowd[3] = True  # the second red square of image 1
    crowded = replace(data, crowd=crowd)
    judged = judge(evaluated(Knowing(crowded), crowded))
    assert judged.right.all()
    assert len(judged.scores) == 3 * 6  # of the seven that are found, one is not judged


HELD = {(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)}
"""Which image holds which class that can be asked for."""


def test_images_are_asked_for_a_seen_class_that_they_do_not_hold(data: Annotations):
    finder = Knowing(data)
    evaluated(finder, data, seen=[0], ask_absent=True)
    assert set(finder.asked) == HELD | {(3, 0), (4, 0)}
    assert len(finder.asked) == 3 * len(HELD) + 2  # once, not once a draw
    assert sorted(finder.searched) == [0, 1, 2, 3, 4]
    both = set()
    for seed in range(4):
        finder = Knowing(data)
        evaluated(finder, data, seen=[0, 1, 2], seed=seed, ask_absent=True)
        both |= set(finder.asked) - HELD
    assert both == {(3, 0), (3, 1), (4, 0), (4, 1)}  # green, of which nothing can be shown, is not among them
    finder = Knowing(data)
    evaluated(finder, data, seen=[0])
    assert set(finder.asked) == HELD


def test_an_image_that_holds_a_crowd_of_a_class_does_hold_it(data: Annotations):
    crowd, labels = data.crowd.copy(), data.labels.copy()
    crowd[-1], labels[-1] = True, 0  # the square of image 3: now a crowd of red ones
    crowded, finder = replace(data, crowd=crowd, labels=labels), Knowing(data)
    evaluated(finder, crowded, seen=[0], ask_absent=True)
    assert set(finder.asked) - HELD == {(4, 0)}


WRONG = torch.tensor([[0.4, 0.85, 0.5, 0.99]])


def test_nothing_that_is_absent_is_right_and_average_precision_does_not_ask(data: Annotations):
    plain, found = (evaluated(Knowing(data, WRONG), data, ask_absent=absent) for absent in (False, True))
    images, scores = found.absent
    assert images.tolist() == [3, 4]
    assert scores.tolist() == pytest.approx([0.3, 0.3])
    assert not len(plain.absent[0])
    assert found.metrics.figures == pytest.approx(plain.metrics.figures, nan_ok=True)
    assert found.left_out == plain.left_out
    assert len(found.draws) == len(plain.draws) == 3
    before, judged = judge(plain), judge(found)
    assert len(judged.scores) == len(before.scores) + 2
    assert judged.right.sum() == before.right.sum()
    assert not judged.right[-2:].any()
    assert len(np.unique(judged.question)) == len(np.unique(before.question)) + 2  # they are questions of their own


def test_boxes_of_a_scaled_image_are_answered_in_the_frame_of_the_annotations(data: Annotations):
    doubled = replace(data, boxes=data.boxes * 2, image_sizes=data.image_sizes * 2, areas=data.areas * 4)
    found = evaluated(Knowing(doubled), doubled)
    assert found.metrics.figures["AP50_seen"] == pytest.approx(1)
    assert found.draws[0][0].boxes.max() > 128


def test_a_real_finder_is_measured(data: Annotations):
    finder = Finder(small(), calibration=Calibration(2.0, -1.0))
    found = evaluated(finder, data, shots=2, workers=1)
    assert 0 <= found.metrics.figures["AP50_seen"] <= 1
    alone = evaluated(finder, data, shots=2)
    for ours, theirs in zip(found.draws[0], alone.draws[0], strict=True):
        np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-5)
    assert max(len(one.exemplars) for one in draw_questions(data, draw=0, seed=0, shots=2).asked) == 2


def test_tiny_boxes_are_no_exemplars(data: Annotations):
    boxes = data.boxes.copy()
    blue = data.labels == 1
    boxes[blue, 2:] = boxes[blue, :2] + 3  # 3 of 96 pixels
    found = evaluated(Knowing(replace(data, boxes=boxes)), replace(data, boxes=boxes))
    assert found.left_out == {"blue": 9, "green": 3}


def test_what_cannot_be_evaluated_is_refused(data: Annotations, tmp_path: Path):
    lone = data.select([3])
    with pytest.raises(DataError, match=r"no class is in two images.*got 1 images, 1 boxes"):
        evaluated(Knowing(lone), lone)
    finder = Knowing(data)
    data.path(1).write_bytes(data.path(1).read_bytes()[:80])
    with pytest.raises(DataError, match=r"1\.png"):
        evaluated(finder, data)


def scored(data: Annotations, rng: np.random.Generator, count: int = 60) -> list[list[Detections]]:
    """Detections whose scores promise far too much: three in ten are right, and most say that they are."""
    draws = []
    for _ in range(2):
        images = []
        for index in range(len(data)):
            rows = data.rows(index)
            truth, labels = data.boxes[rows], data.labels[rows]
            if not len(truth):
                images.append(
                    Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), labels, data.categories, SIZE)
                )
                continue
            chosen = rng.integers(0, len(truth), count)
            right = rng.random(count) < 0.3
            boxes = np.where(right[:, None], truth[chosen], [0.0, 0, 5, 5]).astype(np.float32)
            logits = rng.normal(np.where(right, 4.0, 2.0), 1.0)
            scores = (1 / (1 + np.exp(-logits))).astype(np.float32)
            images.append(Detections(boxes, scores, labels[chosen], data.categories, SIZE))
        draws.append(images)
    return draws


def promising(data: Annotations, rng: np.random.Generator) -> OneShotEvaluation:
    draws, none = scored(data, rng), (np.zeros(0, np.int64), np.zeros(0))
    return OneShotEvaluation(one_shot_metrics(data, draws, [0]), data, tuple(draws), {}, none)


def test_a_calibration_makes_scores_honest(data: Annotations, rng: np.random.Generator):
    found = promising(data, rng)
    made = calibrate(found)
    assert made.before.ece > 0.3
    assert made.after.ece < 0.1
    assert made.before.counts.sum() == made.after.counts.sum()
    judged = judge(found)
    held_out = (judged.question // len(data.categories) % len(data)) % 2 == 1
    assert made.before.counts.sum() == held_out.sum()  # measured on one half of the images
    assert 0 < held_out.sum() < len(held_out)
    logits = np.log(judged.scores) - np.log1p(-judged.scores)
    honest = made.calibration.apply(logits)
    assert abs(honest.mean() - judged.right.mean()) < 0.02
    assert judged.scores.mean() > judged.right.mean() + 0.3
    assert all(np.isfinite(made.spread))


def test_a_calibration_learns_of_what_is_absent(data: Annotations, rng: np.random.Generator):
    found = promising(data, rng)
    images = np.repeat(np.arange(len(data)), 60)
    absent = replace(found, absent=(images, np.full(len(images), 0.999)))
    plain, made = calibrate(found), calibrate(absent)
    logits = np.log([0.999]) - np.log1p([-0.999])
    assert made.calibration.apply(logits) < plain.calibration.apply(logits) - 0.2
    assert made.before.counts.sum() == plain.before.counts.sum() + 2 * 60  # of images 1 and 3, which are held out


def test_there_is_nothing_to_calibrate_where_all_is_right(data: Annotations):
    with pytest.raises(UsageError, match="No detection is wrong"):
        calibrate(evaluated(Knowing(data), data))
