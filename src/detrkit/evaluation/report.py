"""The files that an evaluation leaves behind: figures for programs, a table, plots, and a page for people."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path

from detrkit.data.annotations import Annotations
from detrkit.errors import DataError, MissingExtraError, UsageError
from detrkit.evaluation.images import ImageScore, best_and_worst, score_images
from detrkit.evaluation.page import Example, page
from detrkit.evaluation.run import Metrics
from detrkit.structures import Detections
from detrkit.visualize import plot_confusion, plot_pr, side_by_side, truth_of
from detrkit.visualize.page import jpeg

IMAGES_SHOWN = 6
EXAMPLE_SIDE = 600


def write_report(
    metrics: Metrics,
    annotations: Annotations,
    detections: Sequence[Detections],
    out: Path,
    *,
    title: str = "Evaluation",
    images_shown: int = IMAGES_SHOWN,
) -> list[Path]:
    """Write metrics.json, per_class.csv, pr_curves.png, confusion.png and report.html.

    The page holds all its images. Without matplotlib the plots are left out, which the page says.

    Args:
        metrics: from `evaluate`, of the same annotations and detections.
        annotations: the split, n images.
        detections: n entries; entry i belongs to image i.
        out: the folder to write into; it is made where it does not exist.
        title: heading of the page.
        images_shown: how many best and how many worst images, each.

    Returns:
        The files written.

    Raises:
        DataError: detections that do not belong to the annotations.
        UsageError: metrics of another set of images, or a folder that cannot be written.
    """
    if metrics.images != len(annotations):
        raise UsageError(
            "The metrics belong to other annotations",
            got=f"metrics of {metrics.images} images",
            expected=f"{len(annotations)} images",
        )
    scores = score_images(annotations, detections, metrics.threshold)
    out = Path(out)
    written = [out / "metrics.json", out / "per_class.csv"]
    try:
        out.mkdir(parents=True, exist_ok=True)
        written[0].write_text(json.dumps(metrics.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        _write_table(metrics, written[1])
        plots = _write_plots(metrics, out)
        best, worst = best_and_worst(scores, images_shown)
        shown = [
            [_example(annotations, detections, score, metrics.threshold) for score in group] for group in (best, worst)
        ]
        html = out / "report.html"
        html.write_text(page(metrics, title, plots, shown[0], shown[1]), encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"The report cannot be written ({error.strerror})", where=error.filename or out) from error
    return [*written, *plots, html]


def _write_table(metrics: Metrics, path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "boxes", "AP", "AP50", "threshold", "F1", "precision", "recall"])
        for one in metrics.per_class:
            values = (one.ap, one.ap50, one.threshold, one.f1, one.precision, one.recall)
            writer.writerow([one.name, one.boxes, *("" if math.isnan(value) else f"{value:.6f}" for value in values)])


def _write_plots(metrics: Metrics, out: Path) -> list[Path]:
    names = [one.name for one in metrics.per_class]
    try:
        return [
            plot_pr(metrics.recall, metrics.precision, names, out / "pr_curves.png"),
            plot_confusion(metrics.confusion, names, out / "confusion.png"),
        ]
    except MissingExtraError:
        return []


def _example(
    annotations: Annotations, detections: Sequence[Detections], score: ImageScore, threshold: float
) -> Example:
    truth, found = truth_of(annotations, score.index), detections[score.index]
    name = annotations.file_names[score.index]
    try:
        picture = side_by_side(
            annotations.path(score.index),
            truth,
            found,
            threshold=threshold,
            longest_side=EXAMPLE_SIDE,
            missed=score.missed,
            wrong=score.wrong,
        )
    except (DataError, UsageError) as error:
        return Example(name, score, None, str(error))
    return Example(name, score, jpeg(picture), "")
