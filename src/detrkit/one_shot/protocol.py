"""How well a model finds by example, as CoAE measures it: every image is asked for each class that it holds.

Hsieh et al., "One-Shot Object Detection with Co-Attention and Co-Excitation" (NeurIPS 2019), section 4.1; five draws of
exemplars, which are fixed by a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from detrkit.boxes import xyxy_to_cxcywh
from detrkit.data.annotations import Annotations
from detrkit.data.dataset import boxes_in_file, random_stream
from detrkit.data.files import annotated_frame
from detrkit.data.loading import LoadedImage, load_images
from detrkit.errors import DataError
from detrkit.evaluation.calibration import Calibration, Reliability, fit_calibration, reliability, threshold_spread
from detrkit.evaluation.columns import flatten
from detrkit.evaluation.matching import match, overlapping_pairs
from detrkit.evaluation.one_shot import OneShotMetrics, Question, Questions, draw_questions, merge, one_shot_metrics
from detrkit.one_shot.finder import Finder, Shown, seek
from detrkit.postprocess import Scored
from detrkit.structures import Detections

DRAWS = 5
"""Draws of exemplars in the protocol."""

_ABSENT_STREAM = 13

SMALLEST = 0.04
"""Boxes with a side below this share of their image's shorter one are no exemplars: there is nothing to see in them."""


@dataclass(frozen=True, eq=False)
class OneShotEvaluation:
    """Figures with what they were computed from.

    Attributes:
        metrics: AP50 of seen and unseen classes, mean and spread over the draws.
        annotations: what was asked about.
        draws: for each draw the detections of every image.
        left_out: questions for which there was no exemplar, by class, all draws together.
        absent: where each image was also asked for a class that it does not hold: the image and the score of each
            detection, (k,) each. None of them is right. They enter calibration, not AP.
    """

    metrics: OneShotMetrics
    annotations: Annotations
    draws: tuple[list[Detections], ...]
    left_out: dict[str, int]
    absent: tuple[np.ndarray, np.ndarray]


class Judged(NamedTuple):
    """All detections of some draws, (k,) each: score, whether it is right, and the question that it answers."""

    scores: np.ndarray
    right: np.ndarray
    question: np.ndarray


def evaluate_one_shot(
    finder: Finder,
    annotations: Annotations,
    *,
    sizes: tuple[int, int],
    seen: Collection[int],
    seed: int = 0,
    draws: int = DRAWS,
    shots: int = 1,
    ask_absent: bool = False,
    workers: int = 0,
    on_image: Callable[[], None] | None = None,
) -> OneShotEvaluation:
    """Ask about every class of every image.

    Args:
        finder: a model, and how it is used.
        annotations: a split; exemplars come from its other images.
        sizes: shorter side at which images are seen, and limit of the longer, in pixels.
        seen: labels of the classes that training knew.
        seed: of the draws.
        draws: how many.
        shots: exemplars for each question.
        ask_absent: also ask each image for one seen class that it does not hold, as people do who search a folder.
        workers: processes that load images.
        on_image: called after each image that is loaded; every image is loaded twice.

    Raises:
        DataError: an image cannot be read, or nothing can be asked.
    """
    asked = [
        draw_questions(annotations, draw=draw, seed=seed, shots=shots, smallest=_smallest(annotations))
        for draw in range(draws)
    ]
    if not any(one.asked for one in asked):
        raise DataError(
            "Nothing can be asked: no class is in two images",
            where=annotations.source or annotations.root,
            got=f"{len(annotations)} images, {len(annotations.boxes)} boxes",
        )
    tell = on_image or (lambda: None)
    extra = _absent_questions(annotations, asked, seen, seed) if ask_absent else Questions((), {})
    asked.append(extra)
    shown = _shown(finder, annotations, asked, sizes, workers, tell)
    *answers, wrong = _answers(finder, annotations, asked, shown, sizes, workers, tell)
    asked.pop()
    found = tuple(merge(annotations, one.asked, part) for one, part in zip(asked, answers, strict=True))
    images = np.repeat([question.image for question in extra.asked], [len(one.scores) for one in wrong]).astype(int)
    absent = (images, np.concatenate([np.zeros(0), *(one.scores for one in wrong)]))
    left_out: dict[str, int] = {}
    for one in asked:
        for name, count in one.left_out.items():
            left_out[name] = left_out.get(name, 0) + count
    return OneShotEvaluation(one_shot_metrics(annotations, found, seen), annotations, found, left_out, absent)


def judge(found: OneShotEvaluation) -> Judged:
    """Which detections are right (IoU 0.5), those on crowds left out; also of classes that are absent."""
    annotations, columns = found.annotations, []
    images, classes = len(annotations), len(annotations.categories)
    for number, detections in enumerate(found.draws):
        flat = flatten(annotations, detections)
        matches = match(annotations, flat, overlapping_pairs(annotations, flat))
        question = (number * images + flat.images) * classes + flat.labels
        kept = ~matches.ignored
        columns.append((flat.scores[kept], matches.right[kept], question[kept]))
    absent, scores = found.absent
    question = (len(found.draws) * images + absent) * classes
    columns.append((scores, np.zeros(len(scores), bool), question))
    return Judged(*(np.concatenate(column) for column in zip(*columns, strict=True)))


class Calibrated(NamedTuple):
    """A calibration, and what it does to scores that it was not fitted to.

    `before` and `after` are of one half of the images, the calibration of the other; the one that is kept is of all.
    `spread` is how much the precision at score 0.5 differs between questions, before and after.
    """

    calibration: Calibration
    before: Reliability
    after: Reliability
    spread: tuple[float, float]


def calibrate(found: OneShotEvaluation) -> Calibrated:
    """Make probabilities of scores that are sigmoids of logits.

    Args:
        found: answers of a finder without calibration on held-out images.

    Raises:
        UsageError: there is nothing right, or nothing wrong, to learn from.
    """
    annotations, judged = found.annotations, judge(found)
    logits = np.log(np.clip(judged.scores, 1e-6, 1 - 1e-6)) - np.log1p(-np.clip(judged.scores, 1e-6, 1 - 1e-6))
    image = judged.question // len(annotations.categories) % len(annotations)
    first = image % 2 == 0
    held_out = fit_calibration(logits[first], judged.right[first])
    scores = held_out.apply(logits[~first])
    right, question = judged.right[~first], judged.question[~first]
    spread = tuple(threshold_spread(each, right, question) for each in (judged.scores[~first], scores))
    return Calibrated(
        fit_calibration(logits, judged.right),
        reliability(judged.scores[~first], right),
        reliability(scores, right),
        (spread[0], spread[1]),
    )


def _absent_questions(
    annotations: Annotations, asked: Sequence[Questions], seen: Collection[int], seed: int
) -> Questions:
    """Ask each image for a seen class that it does not hold, with an exemplar that some question has."""
    rows = np.array(sorted({row for one in asked for question in one.asked for row in question.exemplars}), np.int64)
    by_label = {label: rows[annotations.labels[rows] == label].tolist() for label in sorted(seen)}
    extra = []
    for image in range(len(annotations)):
        held = set(annotations.labels[annotations.rows(image)].tolist())
        free = [label for label, candidates in by_label.items() if candidates and label not in held]
        if free:
            rng = random_stream(_ABSENT_STREAM, seed, image)
            label = free[int(rng.integers(len(free)))]
            extra.append(Question(image, label, (int(rng.choice(by_label[label])),)))
    return Questions(tuple(extra), {})


def _smallest(annotations: Annotations) -> float:
    return SMALLEST if (annotations.image_sizes > 0).all() else 0.0


def _shown(
    finder: Finder,
    annotations: Annotations,
    asked: Sequence[Questions],
    sizes: tuple[int, int],
    workers: int,
    tell: Callable[[], None],
) -> dict[int, Shown]:
    """What the model keeps of every box that is an exemplar of some question, by its row."""
    wanted = sorted({row for one in asked for question in one.asked for row in question.exemplars})
    owner = np.searchsorted(annotations.offsets, wanted, side="right") - 1
    by_image: dict[int, list[int]] = {}
    for row, index in zip(wanted, owner.tolist(), strict=True):
        by_image.setdefault(index, []).append(row)
    images = list(by_image)
    shown: dict[int, Shown] = {}
    for image in _loaded(annotations, images, sizes, workers):
        index = images[image.index]
        rows = by_image[index]
        height, width = image.original
        boxes, _ = boxes_in_file(annotations.boxes[rows], _stated(annotations, index), image.original)
        inside = torch.from_numpy(boxes / (width, height, width, height)).float()
        looked = finder.show(image.tensor.to(finder.device), xyxy_to_cxcywh(inside))
        shown.update({row: looked.select([number]) for number, row in enumerate(rows)})
        tell()
    return shown


def _answers(
    finder: Finder,
    annotations: Annotations,
    asked: Sequence[Questions],
    shown: dict[int, Shown],
    sizes: tuple[int, int],
    workers: int,
    tell: Callable[[], None],
) -> list[list[_Pixels]]:
    """The answers to all questions of all draws; an image is encoded once."""
    by_image: dict[int, list[tuple[int, int, Question]]] = {}
    for draw, one in enumerate(asked):
        for number, question in enumerate(one.asked):
            by_image.setdefault(question.image, []).append((draw, number, question))
    answers: list[dict[int, _Pixels]] = [{} for _ in asked]
    images = sorted(by_image)
    for image in _loaded(annotations, images, sizes, workers):
        index = images[image.index]
        questions = by_image[index]
        sought = [seek(Shown.joined([shown[row] for row in one.exemplars])) for _, _, one in questions]
        frame = annotated_frame(_stated(annotations, index), image.original)
        for (draw, number, _), found in zip(
            questions, finder.search(image.tensor.to(finder.device), sought), strict=True
        ):
            answers[draw][number] = _in_pixels(found, frame)
        tell()
    return [[part[number] for number in sorted(part)] for part in answers]


class _Pixels(NamedTuple):
    boxes: np.ndarray
    scores: np.ndarray


def _in_pixels(found: Scored, frame: tuple[int, int]) -> _Pixels:
    height, width = frame
    boxes: Tensor = found.boxes * found.boxes.new_tensor([width, height, width, height])
    return _Pixels(boxes.float().cpu().numpy(), found.scores.float().cpu().numpy())


def _stated(annotations: Annotations, index: int) -> tuple[int, int]:
    height, width = annotations.image_sizes[index].tolist()
    return height, width


def _loaded(
    annotations: Annotations, images: Sequence[int], sizes: tuple[int, int], workers: int
) -> Iterator[LoadedImage]:
    paths = [annotations.path(index) for index in images]
    return load_images(paths, shortest=sizes[0], longest=sizes[1], workers=workers)
