"""The page of a doctor's diagnosis: each finding in words, with pictures of the worst."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from detrkit.data.annotations import Annotations
from detrkit.data.doctor import Diagnosis, Finding, Place
from detrkit.data.doctor.kinds import SEVERITIES
from detrkit.data.images import open_image
from detrkit.errors import DataError, UsageError
from detrkit.structures import Category, Detections
from detrkit.visualize.colours import PAPER
from detrkit.visualize.page import document, embed, jpeg, table
from detrkit.visualize.pictures import draw, mosaic
from detrkit.visualize.truth import truth_of

PICTURES_SHOWN, PLACES_LISTED = 3, 20
"""Of each finding."""

SIDE = 520
"""Pixels of a picture's longer side."""

MOST_MARGIN = 0.3
"""A box outside its image is shown so far, as a share of the image's side."""

_COLUMNS = ' style="grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr))"'
"""A single picture stays as small as three."""

_VERDICTS = {
    "clean": "Nothing is wrong with this data set.",
    "repairable": "Some of it is wrong and can be repaired: detrkit doctor DATA --fix OUT writes a clean copy.",
    "broken": "Some of it is wrong in a way that a person has to mend.",
}


def write_diagnosis(diagnosis: Diagnosis, out: str | Path, *, title: str = "") -> Path:
    """Write `report.html`, which holds all its pictures.

    Args:
        diagnosis: of `detrkit.doctor`.
        out: the folder to write into; it is made where it does not exist.
        title: the heading; by default it names the data set.

    Returns:
        The file.

    Raises:
        UsageError: the folder cannot be written.
    """
    file = Path(out) / "report.html"
    title = title or f"Diagnosis of {diagnosis.path}"
    sections = [
        _summary(diagnosis, title),
        _overview(diagnosis),
        *(_section(diagnosis, one) for one in diagnosis.findings),
    ]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(document(title, sections), encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"The page cannot be written ({error.strerror})", where=error.filename or file) from error
    return file


def _summary(diagnosis: Diagnosis, title: str) -> str:
    counts = {name: sum(one.severity == name for one in diagnosis.findings) for name in reversed(SEVERITIES)}
    headline = {
        "Verdict": diagnosis.verdict,
        "Broken": str(counts["broken"]),
        "Repairable": str(counts["repairable"]),
        "Notes": str(counts["note"]),
    }
    cards = "".join(
        f"<div><dt>{label}</dt><dd>{escape(value.capitalize())}</dd></div>" for label, value in headline.items()
    )
    undecoded = "" if diagnosis.looked else " Images were not decoded: damaged ones and copies are not found so."
    return (
        f"<h1>{escape(title)}</h1>\n<p>{escape(_VERDICTS[diagnosis.verdict] + undecoded)}</p>\n"
        f'<dl class="headline">{cards}</dl>'
    )


def _overview(diagnosis: Diagnosis) -> str:
    seen = diagnosis.resolution
    splits = [
        (
            name,
            f"{told['images']:,}",
            f"{told['boxes']:,}",
            f"{told['most_boxes']:,}",
            "–" if told["median_side"] is None else f"{told['median_side']:.0f}",
            "–" if told["below_a_token"] is None else f"{told['below_a_token']:.1%}",
        )
        for name, told in diagnosis.figures()
    ]
    findings = [
        (one.kind, one.severity, one.split, f"{one.count:,}", one.said or one.meaning) for one in diagnosis.findings
    ]
    words = (
        f"Format {diagnosis.format}. Held against {seen.model}: {seen.queries} queries, images resized to "
        f"{seen.image_size} pixels, of which one token covers {seen.token} × {seen.token}. Sides are roots of areas."
    )
    heads = ("Split", "Images", "Boxes", "Most in an image", "Median side", "Below one token")
    listed = table(("Finding", "Severity", "Split", "Count", "What"), findings, words=(1, 2, 4)) if findings else ""
    return f"<h2>Splits</h2>\n<p>{escape(words)}</p>\n{table(heads, splits)}\n<h2>Findings</h2>\n{listed}"


def _section(diagnosis: Diagnosis, finding: Finding) -> str:
    said = f"{finding.said} {finding.meaning[:1].upper()}{finding.meaning[1:]}.".strip()
    heading = f"{finding.severity} · {escape(finding.split)} · {finding.count:,}"
    word = "Place" if len(finding.places) == 1 else "Places"
    places = "".join(f"<li>{escape(str(place))}</li>" for place in finding.places[:PLACES_LISTED])
    more = len(finding.places) - PLACES_LISTED
    rest = f'<p class="soft">and {more:,} more</p>' if more > 0 else ""
    pictures = "".join(_pictures(diagnosis, finding.places))
    return (
        f'<h2>{escape(finding.kind)} <span class="soft">· {heading}</span></h2>\n<p>{escape(said)}</p>\n'
        f'<p class="note">{escape(finding.remedy)}</p>\n<div class="plots"{_COLUMNS}>{pictures}</div>\n'
        f"<details><summary>{word}</summary><ul>{places}</ul>{rest}</details>"
    )


def _pictures(diagnosis: Diagnosis, places: Sequence[Place]) -> list[str]:
    """Pictures of the first few places that can be shown; an image is shown once, with all its boxes of this kind."""
    together: dict[tuple[str, int], list[Place]] = {}
    for place in places:
        if place.image >= 0 and place.split in diagnosis.splits:
            key = (place.split, place.image)
            if key in together or len(together) < PICTURES_SHOWN:
                together.setdefault(key, []).append(place)
    shown = []
    for group in together.values():
        try:
            picture = _picture(diagnosis, group)
        except (DataError, UsageError) as error:
            shown.append(f'<p class="note">This image cannot be shown. {escape(str(error))}</p>')
            continue
        caption = escape(
            f"{Path(group[0].where).name}: {group[0].said}" if group[0].said else Path(group[0].where).name
        )
        data = embed(jpeg(picture), "jpeg")
        shown.append(
            f'<figure><img alt="{caption}" loading="lazy" src="{data}"><figcaption>{caption}</figcaption></figure>'
        )
    return shown


def _picture(diagnosis: Diagnosis, group: Sequence[Place]) -> Image.Image:
    first = group[0]
    part = diagnosis.splits[first.split]
    if first.beside is not None:
        its_split, its_row = first.beside
        other = diagnosis.splits[its_split]
        return mosaic([_drawn(part, first.image), _drawn(other, its_row)], 1, [first.split, its_split])
    if first.boxes is not None and first.meant is not None:
        pictures = [outlined(part, first.image, boxes) for boxes in (first.boxes, first.meant)]
        return mosaic(pictures, 1, ["As they stand", "As they may be meant"])
    boxes = [place.boxes for place in group if place.boxes is not None]
    return outlined(part, first.image, np.concatenate(boxes)) if boxes else _drawn(part, first.image)


def _drawn(part: Annotations, row: int) -> Image.Image:
    """An image with all its boxes."""
    truth = truth_of(part, row)
    picture = open_image(part.path(row))
    height, width = truth.image_size
    if (width, height) != picture.size:  # what is annotated belongs to another size
        return outlined(part, row, truth.boxes.astype(np.float64))
    return draw(picture, truth, longest_side=SIDE, scores=False)


def outlined(part: Annotations, row: int, boxes: np.ndarray) -> Image.Image:
    """An image with some boxes as they are stated, and a margin where they leave it.

    Args:
        part: the split.
        row: the image.
        boxes: (k, 4) xyxy in pixels; those that are not finite are left out.

    Raises:
        DataError: the image cannot be decoded.
    """
    picture = open_image(part.path(row))
    boxes = boxes[np.isfinite(boxes).all(1)] if len(boxes) else boxes.reshape(0, 4)
    boxes = np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])], 1)
    sides = np.array(picture.size, np.float64)
    most = np.ceil(MOST_MARGIN * sides)
    before = np.clip(-boxes[:, :2].min(0, initial=0.0), 0, most)
    after = np.clip(boxes[:, 2:].max(0, initial=0.0) - sides, 0, most)
    size = np.ceil(sides + before + after).astype(int)
    corner = np.ceil(before).astype(int)
    if corner.any() or tuple(size) != picture.size:
        canvas = Image.new("RGB", (int(size[0]), int(size[1])), PAPER)
        canvas.paste(picture, (int(corner[0]), int(corner[1])))
        picture = canvas
    limit = np.tile(np.array(picture.size, np.float64), 2)
    shown = np.clip(boxes + np.tile(corner, 2), 0, limit).astype(np.float32)
    count = len(shown)
    found = Detections(
        shown,
        np.ones(count, np.float32),
        np.full(count, 2, np.int64),
        (Category(0, ""), Category(1, ""), Category(2, "")),
        (picture.height, picture.width),
        str(part.path(row)),
    )
    return draw(picture, found, longest_side=SIDE, scores=False)
