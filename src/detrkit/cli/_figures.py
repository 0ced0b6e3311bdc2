"""Evaluation figures as text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from detrkit.cli._terminal import share, table

if TYPE_CHECKING:
    from detrkit.evaluation.run import Metrics
    from detrkit.training.by_example import ByExample

_MEANINGS = {
    "AP": "mean over IoU 0.50 to 0.95 and over classes (COCO)",
    "AP50": "at IoU 0.50",
    "AP75": "at IoU 0.75",
    "APs": "objects below 32² pixels",
    "APm": "objects between",
    "APl": "objects above 96² pixels",
    "AR1": "recall, 1 detection an image",
    "AR10": "recall, 10 detections an image",
    "AR100": "recall, 100 detections an image",
    "ARs": "recall of objects below 32² pixels",
    "ARm": "recall of objects between",
    "ARl": "recall of objects above 96² pixels",
    "VOC07": "Pascal VOC 2007, 11 points, IoU 0.50",
    "VOC12": "Pascal VOC 2010 to 2012, whole curve, IoU 0.50",
}


def figures_text(metrics: Metrics) -> str:
    """All overall figures, and a table of the classes."""
    rows = [(name, share(value), _MEANINGS.get(name, "")) for name, value in metrics.figures.items()]
    return f"{table([('figure', 'value', 'meaning'), *rows], 'lrl')}\n\n{per_class_text(metrics)}"


def per_class_text(metrics: Metrics) -> str:
    """One line a class: AP, and the threshold of the best F1 with what it gives."""
    heading = ("class", "boxes", "AP", "AP50", "threshold", "F1", "precision", "recall")
    rows = [
        (
            one.name,
            f"{one.boxes:,}",
            *map(share, (one.ap, one.ap50, one.threshold, one.f1, one.precision, one.recall)),
        )
        for one in metrics.per_class
    ]
    note = "threshold: the score at which F1 is best on these images; F1, precision and recall are given there"
    return f"{table([heading, *rows])}\n{note}"


def figures_document(metrics: Metrics) -> dict[str, Any]:
    """The same for programs, without curves."""
    whole = metrics.to_json()
    return {name: whole[name] for name in ("figures", "images", "boxes", "per_class")} | {
        "threshold": metrics.threshold
    }


def by_example_text(found: ByExample) -> str:
    """The figures of a model that finds by example, a table of the classes, and what was not asked."""
    from detrkit.training.by_example import MEANINGS

    figures, metrics = found.figures, found.evaluation.metrics
    rows = [
        (name, share(value), share(figures.get(f"{name}_std", math.nan)), MEANINGS.get(name, ""))
        for name, value in figures.items()
        if not name.endswith("_std")
    ]
    classes = [
        (one.name, "seen" if one.seen else "unseen", f"{one.boxes:,}", share(one.ap50), share(one.ap50_std))
        for one in metrics.per_class
    ]
    notes = ["±: standard deviation over the draws of exemplars"]
    if found.evaluation.left_out:
        listed = ", ".join(f"{name} {number:,}" for name, number in found.evaluation.left_out.items())
        notes.append(f"not asked for want of an exemplar, all draws together, and counted as missed: {listed}")
    if not found.is_calibrated:
        notes.append("scores say how alike a place is, and are no probabilities: the model was never calibrated")
    return "\n".join(
        [
            table([("figure", "value", "±", "meaning"), *rows], "lrrl"),
            "",
            table([("class", "in training", "boxes", "AP50", "±"), *classes], "llrrr"),
            *notes,
        ]
    )
