"""Evaluation figures as text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from detrkit.cli._terminal import share, table

if TYPE_CHECKING:
    from detrkit.evaluation.run import Metrics

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
