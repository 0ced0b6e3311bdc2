"""The files that an evaluation leaves behind: figures for programs, a table, plots, and a page for people."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from detrkit.data.annotations import Annotations
from detrkit.errors import DataError, MissingExtraError, UsageError
from detrkit.evaluation.images import ImageScore, best_and_worst, score_images
from detrkit.evaluation.page import Example, page
from detrkit.evaluation.run import Metrics
from detrkit.panoptic import PanopticMap
from detrkit.structures import Detections
from detrkit.visualize import (
    compare,
    compare_panoptic,
    mosaic,
    plot_confusion,
    plot_pr,
)
from detrkit.visualize.page import jpeg

IMAGES_SHOWN = 6
EXAMPLE_SIDE = 600


def write_report(
    metrics: Metrics,
    annotations: Annotations,
    detections: Sequence[Detections],
    out: Path,
    *,
    panoptic: Sequence[PanopticMap] | None = None,
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
        panoptic: n entries, the images cut into segments, which are shown below the detections.
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
            [
                _example(
                    annotations,
                    detections[score.index],
                    None if panoptic is None else panoptic[score.index],
                    score,
                    metrics.threshold,
                )
                for score in group
            ]
            for group in (best, worst)
        ]
        html = out / "report.html"
        html.write_text(page(metrics, title, plots, shown[0], shown[1]), encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"The report cannot be written ({error.strerror})", where=error.filename or out) from error
    return [*written, *plots, html]


def _write_table(metrics: Metrics, path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        names = ["class", "boxes", "AP", "AP50", "threshold", "F1", "precision", "recall"]
        names += ["mask_AP", "mask_AP50"] if "mask_AP" in metrics.figures else []
        names += ["segments", "PQ", "SQ", "RQ"] if metrics.panoptic else []
        writer.writerow(names)
        for row, one in enumerate(metrics.per_class):
            values: list[int | float] = [one.boxes, one.ap, one.ap50, one.threshold, one.f1, one.precision, one.recall]
            values += [one.mask_ap, one.mask_ap50] if "mask_AP" in names else []
            if metrics.panoptic:
                quality = metrics.panoptic[row]
                values += [quality.segments, quality.pq, quality.sq, quality.rq]
            writer.writerow([one.name, *map(_cell, values)])


def _cell(value: int | float) -> str:
    if isinstance(value, int):
        return str(value)
    return "" if math.isnan(value) else f"{value:.6f}"


def _write_plots(metrics: Metrics, out: Path) -> list[Path]:
    names = [one.name for one in metrics.things]
    rows = [row for row in range(len(metrics.per_class)) if metrics.is_thing(row)]
    cells = [*rows, len(metrics.per_class)]
    try:
        return [
            plot_pr(metrics.recall, metrics.precision[rows], names, out / "pr_curves.png"),
            plot_confusion(metrics.confusion[np.ix_(cells, cells)], names, out / "confusion.png"),
        ]
    except MissingExtraError:
        return []


def _example(
    annotations: Annotations, found: Detections, segments: PanopticMap | None, score: ImageScore, threshold: float
) -> Example:
    name = annotations.file_names[score.index]
    is_thing = np.array([annotations.categories[label].is_thing for label in found.labels], bool)
    try:
        picture = compare(
            annotations,
            score.index,
            found[is_thing],
            threshold=threshold,
            longest_side=EXAMPLE_SIDE,
            missed=score.missed,
            wrong=score.wrong[is_thing],
        )
        if segments is not None:
            below = compare_panoptic(annotations, score.index, segments, longest_side=EXAMPLE_SIDE)
            picture = mosaic([picture, below], 1)
    except (DataError, UsageError) as error:
        return Example(name, score, None, str(error))
    return Example(name, score, jpeg(picture), "")
