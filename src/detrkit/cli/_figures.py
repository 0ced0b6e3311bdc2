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


_PANOPTIC = {"all": "", "things": "_things", "stuff": "_stuff"}
"""What panoptic quality is a mean over, and the ending of its figures' names."""


def figures_text(metrics: Metrics) -> str:
    """All overall figures, those of masks beside those of boxes, and tables of the classes."""
    figures = metrics.figures
    quality = {f"{name}{ending}" for name in ("PQ", "SQ", "RQ") for ending in _PANOPTIC.values()}
    names = [name for name in figures if not name.startswith("mask_") and name not in quality]
    columns = [("figure", *names), ("value", *(share(figures[name]) for name in names))]
    if "mask_AP" in figures:
        masks = [share(figures[f"mask_{name}"]) if f"mask_{name}" in figures else "" for name in names]
        columns = [columns[0], ("boxes", *columns[1][1:]), ("masks", *masks)]
    columns.append(("meaning", *(_MEANINGS.get(name, "") for name in names)))
    parts = [table(list(zip(*columns, strict=True)), "l" + "r" * (len(columns) - 2) + "l"), per_class_text(metrics)]
    if "PQ" in figures:
        parts.append(panoptic_text(metrics))
    return "\n\n".join(parts)


def panoptic_text(metrics: Metrics) -> str:
    """Panoptic quality over all classes, things and stuff, and of each class that occurs."""
    overall = [
        (group, *(share(metrics.figures[f"{name}{ending}"]) for name in ("PQ", "SQ", "RQ")))
        for group, ending in _PANOPTIC.items()
    ]
    classes = [
        (
            one.name,
            "thing" if one.is_thing else "stuff",
            f"{one.segments:,}",
            share(one.pq),
            share(one.sq),
            share(one.rq),
        )
        for one in metrics.panoptic
        if not math.isnan(one.pq)
    ]
    note = "PQ: panoptic quality, SQ × RQ; SQ: mean IoU of the segments found; RQ: F1 of finding them, IoU above 0.50"
    return "\n".join(
        [
            table([("segments", "PQ", "SQ", "RQ"), *overall]),
            "",
            table([("class", "kind", "segments", "PQ", "SQ", "RQ"), *classes], "llrrrr"),
            note,
        ]
    )


def per_class_text(metrics: Metrics) -> str:
    """One line a class: AP, and the threshold of the best F1 with what it gives; stuff is left out."""
    has_masks = "mask_AP" in metrics.figures
    masks = ("mask AP", "mask AP50") if has_masks else ()
    heading = ("class", "boxes", "AP", "AP50", *masks, "threshold", "F1", "precision", "recall")
    rows = [
        (
            one.name,
            f"{one.boxes:,}",
            *map(share, (one.ap, one.ap50)),
            *(map(share, (one.mask_ap, one.mask_ap50)) if has_masks else ()),
            *map(share, (one.threshold, one.f1, one.precision, one.recall)),
        )
        for one in metrics.things
    ]
    note = "threshold: the score at which F1 is best on these images; F1, precision and recall are given there"
    return f"{table([heading, *rows])}\n{note}"


def figures_document(metrics: Metrics) -> dict[str, Any]:
    """The same for programs, without curves."""
    whole = metrics.to_json()
    names = ("figures", "images", "boxes", "per_class", "panoptic")
    return {name: whole[name] for name in names if name in whole} | {"threshold": metrics.threshold}


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
