"""One-shot detection: a model is shown an object and finds all that are like it. The questions, and their figures.

Protocol: Hsieh et al., "One-Shot Object Detection with Co-Attention and Co-Excitation" (NeurIPS 2019):
each image of a split is asked about each class that it holds, the exemplars are a seeded draw from other images, and
average precision is the mean over five draws. Classes that training showed no box of are the unseen ones.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from detrkit.data.annotations import Annotations
from detrkit.data.dataset import random_stream
from detrkit.errors import DataError, UsageError
from detrkit.evaluation.columns import flatten
from detrkit.evaluation.run import Metrics, evaluate
from detrkit.structures import Detections

_EXEMPLAR_STREAM = 10  # streams 1 to 9 shuffle, augment, drop out, cut patches, make views and place features


class Question(NamedTuple):
    """Where in image `image` are objects of category `label`?

    `image` and `label` count in the annotations that are asked about; `exemplars` are rows of the box columns of the
    annotations that the exemplars were drawn from.
    """

    image: int
    label: int
    exemplars: tuple[int, ...]


class Questions(NamedTuple):
    """One draw of questions.

    `asked` are in the order of images, then of labels. `left_out` counts for each category by name the images that
    hold it and are not asked about it, because there is no exemplar for them; other categories do not appear.
    """

    asked: tuple[Question, ...]
    left_out: dict[str, int]


@runtime_checkable
class Answer(Protocol):
    """What a model answers to one question; `Detections` are one."""

    @property
    def boxes(self) -> np.ndarray:
        """(k, 4), xyxy in pixels of the original, upright image."""

    @property
    def scores(self) -> np.ndarray:
        """(k,) in [0, 1]."""


@dataclass(frozen=True)
class OneShotClass:
    """How well one class is found from exemplars. Undefined figures are NaN.

    Attributes:
        name: the category.
        seen: whether training showed boxes of it.
        boxes: its ground-truth boxes, crowd left out.
        ap50: AP at IoU 0.5, mean over the draws.
        ap50_std: its standard deviation over the draws (n − 1 in the denominator).
    """

    name: str
    seen: bool
    boxes: int
    ap50: float
    ap50_std: float


@dataclass(frozen=True)
class OneShotMetrics:
    """The outcome of some draws of exemplars.

    Attributes:
        figures: AP50_seen, AP50_unseen, AP_seen, AP_unseen: the mean over the classes that have boxes, then over the
            draws. AP50_seen_std, AP50_unseen_std: standard deviation over the draws (n − 1 in the denominator; NaN for
            one draw). ratio: AP50_unseen / AP50_seen. In [0, 1] but for the ratio; NaN where undefined.
        per_class: one entry for each category that was asked about, in the table's order.
        draws: how many draws.
        questions: pairs of an image and a class that it holds; so many questions a complete draw has.
    """

    figures: dict[str, float]
    per_class: tuple[OneShotClass, ...]
    draws: int
    questions: int

    def to_json(self) -> dict[str, Any]:
        """All of it as plain JSON values; undefined figures are None."""
        return {
            "figures": _defined(self.figures),
            "draws": self.draws,
            "questions": self.questions,
            "per_class": [_defined(vars(one)) for one in self.per_class],
        }


def draw_questions(
    annotations: Annotations,
    *,
    draw: int,
    seed: int,
    shots: int = 1,
    labels: Collection[int] | None = None,
    smallest: float = 0.0,
) -> Questions:
    """Ask each image about each category that it holds, with exemplars drawn at random from other files.

    Crowd boxes make no category present and are no exemplars. The exemplars of a question depend on (seed, draw,
    image, label) and on the boxes to choose from, not on the other questions.

    Args:
        annotations: the split that is asked about, n images.
        draw: number of the draw.
        seed: of all draws.
        shots: exemplars for each question, drawn without replacement; all there are where there are fewer.
        labels: the categories to ask about; by default all.
        smallest: a box is an exemplar only if both its sides are at least this share of its image's shorter side.

    Raises:
        UsageError: no shot, a negative draw or seed, a share outside [0, 1], or an unknown label.
        DataError: `smallest` is above 0 and the size of an image is not known.
    """
    for name, number, least in (("draw", draw, 0), ("seed", seed, 0), ("shots", shots, 1)):
        if number < least:
            raise UsageError("The number is too small", where=name, got=number, expected=f"at least {least}")
    if not 0 <= smallest <= 1:
        raise UsageError("The share makes no sense", where="smallest", got=smallest, expected="a number from 0 to 1")
    images, classes = _asked(annotations, labels)
    candidates = _candidates(annotations, set(classes.tolist()), smallest)
    files = np.unique(list(annotations.file_names), return_inverse=True)[1]
    owner = files[_image_of_box(annotations)]
    asked: list[Question] = []
    left_out: dict[str, int] = {}
    for image, label in zip(images.tolist(), classes.tolist(), strict=True):
        rows = candidates[label]
        rows = rows[owner[rows] != files[image]]
        if not len(rows):
            name = annotations.categories[label].name
            left_out[name] = left_out.get(name, 0) + 1
            continue
        rng = random_stream(_EXEMPLAR_STREAM, seed, draw, image, label)
        drawn = rng.choice(rows, min(shots, len(rows)), replace=False)
        asked.append(Question(image, label, tuple(drawn.tolist())))
    return Questions(tuple(asked), left_out)


def merge(annotations: Annotations, questions: Sequence[Question], answers: Sequence[Answer]) -> list[Detections]:
    """Put the answers to all questions of an image together.

    Args:
        annotations: the split that was asked about, n images.
        questions: of one draw.
        answers: as many; answer i belongs to question i.

    Returns:
        n entries, by falling score, with the category asked for as label; empty ones for images without a question.

    Raises:
        UsageError: questions and answers differ in number, a question is about an image or a category that there is
            not, or two ask the same image about the same category.
        DataError: boxes and scores of an answer do not fit together.
    """
    if len(questions) != len(answers):
        raise UsageError("Questions and answers differ in number", got=f"{len(questions)} and {len(answers)}")
    parts: list[dict[int, Answer]] = [{} for _ in range(len(annotations))]
    for question, answer in zip(questions, answers, strict=True):
        where = f"the question about image {question.image} and category {question.label}"
        if not (0 <= question.image < len(parts) and 0 <= question.label < len(annotations.categories)):
            raise UsageError("A question is about what the annotations lack", where=where)
        if question.label in parts[question.image]:
            raise UsageError(
                "A question is asked twice", where=where, remedy="Merge the answers of one draw at a time."
            )
        if answer.scores.ndim != 1 or answer.boxes.shape != (len(answer.scores), 4):
            raise DataError(
                "Boxes and scores of an answer do not fit together",
                where=where,
                got=f"boxes {answer.boxes.shape}, scores {answer.scores.shape}",
                expected="(k, 4), (k,)",
            )
        parts[question.image][question.label] = answer
    return [_merged(annotations, index, part) for index, part in enumerate(parts)]


def one_shot_metrics(
    annotations: Annotations, draws: Sequence[Sequence[Detections]], seen: Collection[int]
) -> OneShotMetrics:
    """Compare the answers of some draws with ground truth, for seen and for unseen classes.

    A class is found or missed in the images that hold it and nowhere else. A question that was left out, for want of an
    exemplar, was not answered: the boxes that it was about are missed.

    Args:
        annotations: the split that was asked about, n images.
        draws: for each draw the n entries of `merge`.
        seen: labels that training showed boxes of; the others are unseen.

    Raises:
        UsageError: no draw, an unknown label, or a detection of a class in an image that it was not to be asked about.
        DataError: detections that do not belong to the annotations or hold impossible values.
    """
    if not draws:
        raise UsageError("There is no draw to evaluate", expected="the detections of at least one")
    images, classes = _asked(annotations, None)
    _check_labels(annotations, seen, "seen")
    outcomes: list[Metrics] = []
    for number, detections in enumerate(draws):
        _check_asked(annotations, number, detections, images, classes)
        outcomes.append(evaluate(annotations, detections))
    known = np.isin(np.arange(len(annotations.categories)), list(seen))
    table = np.array([[(one.ap50, one.ap) for one in outcome.per_class] for outcome in outcomes])
    table = table.reshape(len(outcomes), len(known), 2)
    figures = dict(_figures(table, known))
    per_class = tuple(
        OneShotClass(
            one.name,
            bool(known[label]),
            one.boxes,
            _mean(table[:, label, 0]),
            _spread(table[:, label, 0]),
        )
        for label, one in enumerate(outcomes[0].per_class)
    )
    return OneShotMetrics(figures, per_class, len(outcomes), len(images))


def _asked(annotations: Annotations, labels: Collection[int] | None) -> tuple[np.ndarray, np.ndarray]:
    """Each pair of an image and one of the categories that it holds: the images and the labels, (p,) each, in order."""
    classes = max(1, len(annotations.categories))
    kept = ~annotations.crowd
    if labels is not None:
        _check_labels(annotations, labels, "labels")
        kept &= np.isin(annotations.labels, list(labels))
    images, present = np.divmod(
        np.unique(_image_of_box(annotations)[kept] * classes + annotations.labels[kept]), classes
    )
    return images, present


def _image_of_box(annotations: Annotations) -> np.ndarray:
    return np.repeat(np.arange(len(annotations)), np.diff(annotations.offsets))


def _check_labels(annotations: Annotations, labels: Collection[int], where: str) -> None:
    for label in labels:
        if not 0 <= label < len(annotations.categories):
            raise UsageError(
                "There is no such category",
                where=where,
                got=label,
                expected=f"labels from 0 to {len(annotations.categories) - 1}",
            )


def _candidates(annotations: Annotations, labels: Collection[int], smallest: float) -> dict[int, np.ndarray]:
    """The boxes that can be exemplars of each label, as rows of the columns."""
    fit = ~annotations.crowd
    if smallest > 0:
        shorter = annotations.image_sizes.min(1)
        if (shorter == 0).any():
            index = int(np.flatnonzero(shorter == 0)[0])
            raise DataError(
                "The size of an image is not known, so small exemplars cannot be told",
                where=annotations.path(index),
                remedy="State width and height in the annotations, or allow exemplars of any size (smallest=0).",
            )
        sides = (annotations.boxes[:, 2:] - annotations.boxes[:, :2]).min(1)
        fit &= sides >= smallest * shorter[_image_of_box(annotations)]
    return {label: np.flatnonzero(fit & (annotations.labels == label)) for label in labels}


def _merged(annotations: Annotations, index: int, part: dict[int, Answer]) -> Detections:
    boxes = np.concatenate([np.zeros((0, 4), np.float32), *(answer.boxes for answer in part.values())])
    scores = np.concatenate([np.zeros(0, np.float32), *(answer.scores for answer in part.values())])
    labels = np.repeat(np.array(list(part), np.int64), [len(answer.scores) for answer in part.values()])
    height, width = annotations.image_sizes[index].tolist()
    order = np.argsort(-scores, kind="stable")
    return Detections(
        boxes[order],
        scores[order],
        labels[order],
        annotations.categories,
        (height, width),
        str(annotations.path(index)),
    )


def _check_asked(
    annotations: Annotations, draw: int, detections: Sequence[Detections], images: np.ndarray, labels: np.ndarray
) -> None:
    found = flatten(annotations, detections)
    classes = len(annotations.categories)
    stray = ~np.isin(found.images * classes + found.labels, images * classes + labels)
    if stray.any():
        row = int(np.flatnonzero(stray)[0])
        index = int(found.images[row])
        raise UsageError(
            f"A detection is of the class {annotations.categories[found.labels[row]].name!r}, which this image was not "
            "to be asked about",
            where=f"draw {draw}, image {index} ({annotations.file_names[index]})",
            got=f"{int(stray.sum())} such detections in the draw",
            expected="detections of the classes that the image holds",
            remedy="Answer the questions of draw_questions, and put them together with merge.",
        )


def _figures(table: np.ndarray, seen: np.ndarray) -> Iterator[tuple[str, float]]:
    """Yield the figures by name from AP50 and AP (last axis) of each draw and class, (draws, classes, 2)."""
    rows = {"seen": table[:, seen], "unseen": table[:, ~seen]}
    mean50 = {name: np.array([_mean(draw[:, 0]) for draw in part]) for name, part in rows.items()}
    for name, values in mean50.items():
        yield f"AP50_{name}", _mean(values)
        yield f"AP50_{name}_std", _spread(values)
    for name, part in rows.items():
        yield f"AP_{name}", _mean(np.array([_mean(draw[:, 1]) for draw in part]))
    base = _mean(mean50["seen"])
    yield "ratio", _mean(mean50["unseen"]) / base if base > 0 else float("nan")


def _mean(values: np.ndarray) -> float:
    """Mean of what is defined; NaN where nothing is."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else float("nan")


def _spread(values: np.ndarray) -> float:
    """Standard deviation over draws; NaN where it is undefined."""
    return float(values.std(ddof=1)) if len(values) > 1 else float("nan")


def _defined(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
