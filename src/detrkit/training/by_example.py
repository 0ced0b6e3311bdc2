"""How well a one-shot detector finds by example on a split of annotated images, and the report of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from detrkit.data.annotations import Annotations
from detrkit.errors import MissingExtraError, UsageError
from detrkit.evaluation.calibration import Reliability, reliability, threshold_spread
from detrkit.one_shot.finder import Finder
from detrkit.one_shot.protocol import DRAWS, OneShotEvaluation, evaluate_one_shot, judge
from detrkit.one_shot.saved import ONE_SHOT, calibration_of
from detrkit.predict import Detector
from detrkit.training.validation import draw_samples
from detrkit.visualize.page import document, embed, table
from detrkit.visualize.plots import plot_reliability

SHOTS = 1
"""Exemplars for each question in the protocol."""

THRESHOLD = 0.5
"""Least score of what the report's pictures show: a place that is rather right than wrong, where scores are honest."""

SAMPLES = 6
"""Pictures in the report."""

HEADLINES = (("AP50_seen", "AP50, seen classes"), ("AP50_unseen", "AP50, unseen classes"), ("ece", "Calibration error"))

MEANINGS = {
    "AP50_seen": "found by example at IoU 0.50, mean over the classes that training showed",
    "AP50_unseen": "the same of classes that training never showed",
    "AP_seen": "mean over IoU 0.50 to 0.95 of the classes that training showed",
    "AP_unseen": "the same of classes that training never showed",
    "ratio": "AP50_unseen / AP50_seen",
    "ece": "how far scores are from the share that is right, absent classes asked for too; 0 is honest",
    "threshold_spread": "how much the precision from score 0.5 on differs between questions",
}
"""What the figures say; where there are several draws, some have a spread over them, which ends in `_std`."""


@dataclass(frozen=True, eq=False)
class ByExample:
    """Figures of a one-shot detector with what they were computed from.

    Attributes:
        evaluation: what was found for all draws, and its average precision.
        reliability: how often detections of similar score are right, all draws together.
        spread: how much the precision from score 0.5 on differs between questions (`threshold_spread`).
        shots: exemplars for each question.
        is_calibrated: whether the detector knows how to make probabilities of its scores.
    """

    evaluation: OneShotEvaluation
    reliability: Reliability
    spread: float
    shots: int
    is_calibrated: bool

    @property
    def figures(self) -> dict[str, float]:
        """All of them by name, with the honesty of the scores: `ece` and `threshold_spread`; NaN where undefined."""
        metrics = self.evaluation.metrics
        return {**metrics.figures, "ece": self.reliability.ece, "threshold_spread": self.spread}

    def to_json(self) -> dict[str, Any]:
        """All of it as plain JSON values; undefined figures are None."""
        figures = {name: value if math.isfinite(value) else None for name, value in self.figures.items()}
        return {
            **self.evaluation.metrics.to_json(),
            "figures": figures,
            "shots": self.shots,
            "calibrated": self.is_calibrated,
            "left_out": self.evaluation.left_out,
        }


def evaluate_by_example(
    detector: Detector,
    annotations: Annotations,
    *,
    draws: int = DRAWS,
    shots: int = SHOTS,
    ensemble: bool = False,
    batch_size: int = 8,
    workers: int = 0,
    on_image: Callable[[], None] | None = None,
) -> ByExample:
    """Ask each image for each class that it holds, shown by other images (CoAE, Hsieh et al., NeurIPS 2019).

    Args:
        detector: one that was trained on episodes; the classes whose names it knows are the seen ones.
        annotations: a split.
        draws: draws of exemplars; the same ones for every detector.
        shots: exemplars for each question.
        ensemble: refused, as only the last layer is compared with the exemplars.
        batch_size: at least 1; one image is searched at a time, for all that it is asked.
        workers: processes that load images.
        on_image: called after each image that is loaded; an image is loaded twice at most.

    Raises:
        DataError: an image cannot be read, or nothing can be asked.
        UsageError: a number that makes no sense, `ensemble`, or a detector that was not trained on episodes.
    """
    if detector.one_shot is None:
        raise UsageError("The model was not trained to find by example", remedy="Evaluate it without draws and shots.")
    for name, number in (("draws", draws), ("shots", shots), ("batch_size", batch_size)):
        if number < 1:
            raise UsageError(f"Bad value for {name}", got=number, expected="at least 1")
    if ensemble:
        raise UsageError(
            "Of a model that finds by example only the last decoder layer answers", where="ensemble", remedy="Leave it."
        )
    told = (detector.about or {}).get(ONE_SHOT) or {}
    known = set(told.get("seen") or ())
    found = evaluate_one_shot(
        Finder(detector.one_shot, calibration=detector.calibration),
        annotations,
        sizes=detector.image_size,
        seen=[label for label, category in enumerate(annotations.categories) if category.name in known],
        draws=draws,
        shots=shots,
        ask_absent=True,
        workers=workers,
        on_image=on_image,
    )
    judged = judge(found)
    return ByExample(
        found,
        reliability(judged.scores, judged.right),
        threshold_spread(judged.scores, judged.right, judged.question),
        shots,
        calibration_of(detector.about) is not None,
    )


def refuse_draws(draws: int, shots: int) -> None:
    """Refuse what only a model that finds by example understands.

    Raises:
        UsageError: a number is not the usual one.
    """
    for name, number, usual in (("draws", draws, DRAWS), ("shots", shots, SHOTS)):
        if number != usual:
            raise UsageError(
                "Exemplars are drawn only for a model that was trained to find by example",
                where=name,
                got=number,
                remedy=f"Leave {name} out, or train one: detrkit train DATA --task one-shot --out RUN",
            )


def write_report(found: ByExample, out: Path, *, title: str) -> list[Path]:
    """Write metrics.json, reliability.png, samples.jpg and report.html.

    The page holds all its images. Without matplotlib the plot is left out, which the page says.

    Args:
        found: from `evaluate_by_example`.
        out: the folder to write into; it is made where it does not exist.
        title: heading of the page.

    Returns:
        The files written.

    Raises:
        UsageError: a folder that cannot be written.
    """
    written = [out / "metrics.json"]
    try:
        out.mkdir(parents=True, exist_ok=True)
        written[0].write_text(json.dumps(found.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        pictures = [*_plot(found, out / "reliability.png"), *_samples(found, out / "samples.jpg")]
        html = out / "report.html"
        html.write_text(_page(found, title, pictures), encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"The report cannot be written ({error.strerror})", where=error.filename or out) from error
    return [*written, *pictures, html]


def _plot(found: ByExample, file: Path) -> list[Path]:
    try:
        return [plot_reliability({"scores": found.reliability}, file)]
    except MissingExtraError:
        return []


def _samples(found: ByExample, file: Path) -> list[Path]:
    """Some of the images in which something was found: those could be read."""
    detections = found.evaluation.draws[0]
    answered = [index for index, one in enumerate(detections) if len(one)]
    if not answered:
        return []
    shown = found.evaluation.annotations.select(answered)
    draw_samples(shown, [detections[index] for index in answered], SAMPLES, file, THRESHOLD)
    return [file]


def _page(found: ByExample, title: str, pictures: list[Path]) -> str:
    figures, metrics = found.figures, found.evaluation.metrics
    cards = "".join(f"<div><dt>{words}</dt><dd>{_figure(figures[name])}</dd></div>" for name, words in HEADLINES)
    classes = [
        (one.name, "seen" if one.seen else "unseen", f"{one.boxes:,}", _figure(one.ap50), _figure(one.ap50_std))
        for one in metrics.per_class
    ]
    said = [
        (name, _figure(value), _figure(figures.get(f"{name}_std", math.nan)), MEANINGS.get(name, ""))
        for name, value in figures.items()
        if not name.endswith("_std")
    ]
    sections = [
        f'<h1>{escape(title)}</h1>\n<p>{_summary(found)}</p>\n<dl class="headline">{cards}</dl>',
        "<h2>Classes</h2>" + table(("Class", "In training", "Objects", "AP50", "±"), classes),
        "<h2>All figures</h2>" + table(("Figure", "Value", "±", "Meaning"), said),
        *(_picture(file) for file in pictures),
    ]
    if not any(file.suffix == ".png" for file in pictures):
        sections.append(
            '<p class="note">The plot is missing because matplotlib is not installed. '
            "Install it with <code>pip install 'detrkit[plot]'</code> and evaluate again.</p>"
        )
    return document(title, sections)


def _summary(found: ByExample) -> str:
    metrics, left_out = found.evaluation.metrics, found.evaluation.left_out
    shown = "one object" if found.shots == 1 else f"up to {found.shots} objects"
    words = [
        f"{metrics.questions:,} questions: each image is searched for each class that it holds, of which other images "
        f"show {shown}; {metrics.draws} draws of exemplars. ± is the standard deviation over the draws."
    ]
    if left_out:
        names = ", ".join(f"{escape(name)} ({count:,})" for name, count in left_out.items())
        words.append(f"Not asked for want of an exemplar, all draws together, and counted as missed: {names}.")
    if not found.is_calibrated:
        words.append("The model was never calibrated: its scores say how alike a place is, and are no probabilities.")
    return " ".join(words)


def _picture(file: Path) -> str:
    kind, words = ("png", "Scores") if file.suffix == ".png" else ("jpeg", "Images")
    caption = (
        "The share of detections that is right, over their score; honest scores lie on the diagonal."
        if kind == "png"
        else f"Annotated on the left; found from score {THRESHOLD:g} on, in the first draw, on the right."
    )
    image = f'<img alt="{escape(caption)}" src="{embed(file.read_bytes(), kind)}">'
    return f"<h2>{words}</h2>\n<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def _figure(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"
