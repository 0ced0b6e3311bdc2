"""The page of an evaluation: one self-contained HTML file, readable by people and by screen readers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from detrkit.evaluation.images import ImageScore
from detrkit.evaluation.run import Metrics
from detrkit.visualize.page import document, embed

HEADLINES = {
    "AP": "AP",
    "AP50": "AP50",
    "AP75": "AP75",
    "AR100": "AR100",
    "mask_AP": "AP of masks",
    "mask_AP50": "AP50 of masks",
    "PQ": "PQ",
    "PQ_things": "PQ of things",
    "PQ_stuff": "PQ of stuff",
}
"""The figures on top of the page, those of them that there are, and what they are called there."""

MEANINGS = {
    "AP": "mean over IoU 0.50 to 0.95: found, and outlined exactly",
    "AP50": "found, with an overlap (IoU) of at least 0.50",
    "AP75": "found, with an overlap (IoU) of at least 0.75",
    "APs": "AP of small objects, below 32 × 32 pixels",
    "APm": "AP of medium objects",
    "APl": "AP of large objects, from 96 × 96 pixels",
    "AR1": "recall with one detection an image and class",
    "AR10": "recall with 10 detections an image and class",
    "AR100": "recall with 100 detections an image and class",
    "ARs": "AR100 of small objects",
    "ARm": "AR100 of medium objects",
    "ARl": "AR100 of large objects",
    "VOC07": "Pascal VOC 2007 average precision, 11 recalls",
    "VOC12": "Pascal VOC 2012 average precision, all recalls",
    "PQ": "panoptic quality, SQ × RQ in each class: each pixel to the right segment",
    "SQ": "segmentation quality: mean overlap (IoU) of the segments found",
    "RQ": "recognition quality: F1 of finding a segment, with an overlap above 0.50",
}

KINDS = {"_things": "of things alone", "_stuff": "of stuff alone"}


class Example(NamedTuple):
    """An image on the page: its file name, how it went, its JPEG, and where there is none, why."""

    name: str
    score: ImageScore
    jpeg: bytes | None
    trouble: str


def page(metrics: Metrics, title: str, plots: Sequence[Path], best: Sequence[Example], worst: Sequence[Example]) -> str:
    """The whole page as HTML.

    Args:
        metrics: what is reported.
        title: the heading.
        plots: PNG files to embed; none where matplotlib is missing.
        best: images that went well, best first.
        worst: images that went badly, worst first.
    """
    sections = [
        _summary(metrics, title),
        _classes(metrics),
        _segments(metrics),
        _plots(plots),
        _examples(
            "Worst images",
            "Where it goes wrong most: the lowest F1 first. Look here for missing labels, odd images and rare objects.",
            worst,
        ),
        _examples("Best images", "The highest F1 first.", best),
        _all_figures(metrics),
    ]
    return document(title, sections)


def _summary(metrics: Metrics, title: str) -> str:
    cards = "".join(
        f"<div><dt>{label}</dt><dd>{_figure(metrics.figures[name])}</dd></div>"
        for name, label in HEADLINES.items()
        if name in metrics.figures
    )
    shown = int(metrics.confusion[:, :-1].sum())
    right = int(metrics.confusion.diagonal().sum())
    confused = int(metrics.confusion[:-1, :-1].sum()) - right
    missed, false = int(metrics.confusion[:-1, -1].sum()), int(metrics.confusion[-1, :-1].sum())
    words = (
        f"{_count(metrics.images, 'image', 'images')} with {_count(metrics.boxes, 'object', 'objects')} of "
        f"{_count(len(metrics.per_class), 'class', 'classes')}. Where only detections that score at least "
        f"{metrics.threshold:.2f} are shown, {right:,} of the {metrics.boxes:,} objects are found and rightly named, "
        f"{_count(confused, 'is', 'are')} found under a wrong name, {_count(missed, 'is', 'are')} missed, "
        f"and {_count(false, 'detection', 'detections')} of {shown:,} "
        f"{'shows' if false == 1 else 'show'} nothing that is there, or show{'s' if false == 1 else ''} it again."
    )
    return f'<h1>{escape(title)}</h1>\n<p>{words}</p>\n<dl class="headline">{cards}</dl>'


def _classes(metrics: Metrics) -> str:
    has_masks = "mask_AP" in metrics.figures
    rows = []
    for one in metrics.things:
        masks = f"<td>{_figure(one.mask_ap)}</td>{_bar(one.mask_ap50)}" if has_masks else ""
        rows.append(
            f'<tr><th scope="row">{escape(one.name)}</th><td>{one.boxes:,}</td><td>{_figure(one.ap)}</td>'
            f"{_bar(one.ap50)}{masks}<td>{_figure(one.precision)}</td>"
            f"<td>{_figure(one.recall)}</td><td>{_figure(one.f1)}</td><td>{_figure(one.threshold)}</td></tr>"
        )
    masks_head = ("AP of masks", "AP50 of masks") if has_masks else ()
    heads = ("Class", "Objects", "AP", "AP50", *masks_head, "Precision", "Recall", "F1", "Threshold")
    return (
        '<h2>Classes</h2>\n<div class="scroll"><table><caption>Precision, recall and F1 hold at the score threshold of '
        "the last column, which is the best one for that class on these images. A dash means: no object of this class "
        "here, or none found.</caption><thead><tr>"
        + "".join(f'<th scope="col">{head}</th>' for head in heads)
        + "</tr></thead><tbody>"
        + "".join(rows)
        + "</tbody></table></div>"
    )


def _segments(metrics: Metrics) -> str:
    if not metrics.panoptic:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escape(one.name)}</th><td>{"thing" if one.is_thing else "stuff"}</td>'
        f"<td>{one.segments:,}</td>{_bar(one.pq)}<td>{_figure(one.sq)}</td><td>{_figure(one.rq)}</td>"
        f"<td>{one.missed:,}</td><td>{one.false:,}</td></tr>"
        for one in metrics.panoptic
        if not math.isnan(one.pq)
    )
    heads = ("Class", "Kind", "Segments", "PQ", "SQ", "RQ", "Missed", "False")
    return (
        '<h2>Segments</h2>\n<div class="scroll"><table><caption>Panoptic quality (PQ) is how exactly segments are '
        "outlined (SQ) times how well they are found (RQ). Classes without any segment, true or predicted, are left "
        "out.</caption><thead><tr>"
        + "".join(f'<th scope="col">{head}</th>' for head in heads)
        + f"</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _plots(plots: Sequence[Path]) -> str:
    if not plots:
        return (
            '<h2>Curves</h2>\n<p class="note">The plots are missing because matplotlib is not installed. '
            "Install it with <code>pip install 'detrkit[plot]'</code> and evaluate again.</p>"
        )
    images = "".join(
        f'<img alt="{escape(path.stem.replace("_", " "))}" src="{embed(path.read_bytes(), "png")}">' for path in plots
    )
    return f'<h2>Curves and confusions</h2>\n<div class="plots">{images}</div>'


def _examples(heading: str, words: str, examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    figures = []
    for example in examples:
        said = _outcome(example.score)
        name = escape(example.name)
        if example.jpeg is None:
            shown = f'<p class="note">This image cannot be shown. {escape(example.trouble)}</p>'
        else:
            alt = f"{name}: ground truth left, predictions right. {said}"
            shown = f'<img alt="{alt}" loading="lazy" src="{embed(example.jpeg, "jpeg")}">'
        caption = f"<strong>F1 {example.score.f1:.2f}</strong> · {said} · {name}"
        figures.append(f"<figure>{shown}<figcaption>{caption}</figcaption></figure>")
    return (
        f"<h2>{heading}</h2>\n<p>{words} Dashed outlines are the errors: on the left objects that were missed, on the "
        f"right detections that are wrong.</p>\n{''.join(figures)}"
    )


def _outcome(score: ImageScore) -> str:
    wrong = int(score.wrong.sum())
    found = f"{score.right} of {_count(len(score.missed), 'object', 'objects')} found"
    return f"{found}, {_count(wrong, 'detection', 'detections')} wrong" if wrong else f"{found}, nothing wrong"


def _all_figures(metrics: Metrics) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{_figure(value, 4)}</td>'
        f'<td class="words">{escape(_meaning(name))}</td></tr>'
        for name, value in metrics.figures.items()
    )
    return (
        '<h2>All figures</h2>\n<div class="scroll"><table><caption>From 0 to 1, higher is better. A dash means '
        'undefined: there is no such object.</caption><thead><tr><th scope="col">Figure</th><th scope="col">Value</th>'
        f'<th scope="col" style="text-align:left">Meaning</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _meaning(name: str) -> str:
    if name.startswith("mask_"):
        return f"of masks: {MEANINGS.get(name.removeprefix('mask_'), '')}"
    for ending, kind in KINDS.items():
        if name.endswith(ending):
            return f"{name.removesuffix(ending)} {kind}"
    return MEANINGS.get(name, "")


def _bar(value: float) -> str:
    """A cell with a figure, and a bar of its length behind."""
    return f'<td class="ap" style="--share:{0 if math.isnan(value) else 100 * value:.1f}%">{_figure(value)}</td>'


def _figure(value: float, digits: int = 3) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"
