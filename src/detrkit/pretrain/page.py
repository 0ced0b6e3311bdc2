"""The page of a pre-training: what the detector finds on held-out images, in one self-contained HTML file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64, UInt8
from numpy import ndarray
from PIL import Image
from torch import Tensor

from detrkit.boxes import cxcywh_to_xyxy
from detrkit.errors import UsageError
from detrkit.pretrain.figures import LARGE, SMALL, alarms, answers
from detrkit.pretrain.up_detr import PatchPredictions
from detrkit.structures import NORMALIZATION_MEAN, NORMALIZATION_STD, PatchBatch
from detrkit.visualize.page import document, embed, jpeg
from detrkit.visualize.patches import patch_sheet

HEADLINES = (
    ("recall50", "Found, IoU 0.5"),
    ("recall75", "Found, IoU 0.75"),
    ("recall50_small", "Small ones found"),
    ("consistency", "Looks where it is told"),
)

MEANINGS = {
    "recall50": "share of patches found with an overlap (IoU) of at least 0.50",
    "recall75": "share of patches found with an overlap (IoU) of at least 0.75",
    "recall50_small": f"recall50 of patches below {SMALL} of the image, as the root of the area's share",
    "recall50_medium": f"recall50 of patches from {SMALL} to {LARGE}",
    "recall50_large": f"recall50 of patches from {LARGE}",
    "iou": "mean overlap of where patches are found with where they were cut",
    "consistency": "share of patches for which the best of all boxes comes from queries that were shown the patch",
    "chance": "what consistency would be if queries did not look at what they are shown",
    "feature_cosine": "likeness of the feature that is told with the patch's own",
    "feature_cosine_other": "likeness of the feature that is told with those of the image's other patches",
    "region_recall50": "share of regions that stand out which one of the best scored boxes overlaps by half, unasked",
    "region_iou": "mean overlap of these regions with the nearest of those boxes",
    "box_spread": "how much the places found in an image vary; 1 is as much as the true ones, 0 is one place for all",
    "feature_spread": "mean distance of the features of different patches; 0 is one feature for all",
}

JPEG_QUALITY = 85


class Sheet(NamedTuple):
    """A picture for the page, the image's name, and what is said under it."""

    name: str
    picture: Image.Image
    caption: str = ""


DRAWN = 8
"""The most patches of an image that a picture shows; more would hide each other."""


def patch_sheets(
    found: PatchPredictions, batch: PatchBatch, group: Int64[Tensor, " n"], num_classes: int
) -> list[Sheet]:
    """A picture for each image of a batch, with the first few of its patches; captions count all of them.

    Args:
        found: predictions for the batch.
        batch: what was asked.
        group: the group of each query, as of `UpDetr.group`.
        num_classes: of the detector's config.

    Raises:
        UsageError, NonFiniteError: as of `figures.answers`.
    """
    answered = answers(found, batch, group, num_classes)
    sheets = []
    for row, name in enumerate(batch.names):
        inside = ~batch.padding[row]
        height, width = int(inside.any(1).sum()), int(inside.any(0).sum())
        scale = torch.tensor([width, height, width, height])
        iou, patches = answered.iou[row].cpu(), _pixels(batch.patches[row, :DRAWN])
        picture = patch_sheet(
            _pixels(batch.images[row : row + 1, :, :height, :width])[0],
            list(patches),
            (cxcywh_to_xyxy(batch.boxes[row, :DRAWN]).cpu() * scale).numpy(),
            (cxcywh_to_xyxy(answered.boxes[row, :DRAWN]).cpu() * scale).numpy(),
            answered.scores[row, :DRAWN].cpu().numpy(),
            iou[:DRAWN].numpy(),
        )
        caption = f"{int((iou >= 0.5).sum())} of {len(iou)} found, mean IoU {float(iou.mean()):.2f}"
        sheets.append(Sheet(name, picture, caption))
    return sheets


def _pixels(images: Float[Tensor, "n 3 h w"]) -> UInt8[ndarray, "n h w 3"]:
    """Normalised images as RGB again."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (NORMALIZATION_MEAN, NORMALIZATION_STD))
    return ((images.float().cpu() * std + mean) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def write_patch_page(
    folder: Path,
    title: str,
    sheets: Sequence[Sheet],
    figures: Mapping[str, float],
    sentence: str,
    plots: Sequence[Path] = (),
) -> Path:
    """Write `report.html`, which holds all its pictures.

    Args:
        folder: where to; it is made where it does not exist.
        title: the heading.
        sheets: pictures of a few held-out images, as from `patch_sheets`.
        figures: of `PatchFigures.result`. Where they are alarming, the page says so.
        sentence: what it comes to, as from `conclusion`.
        plots: PNG files to embed.

    Returns:
        The file.

    Raises:
        UsageError: the folder cannot be written, or a plot cannot be read.
    """
    file = Path(folder) / "report.html"
    try:
        html = document(title, [_summary(title, figures, sentence), _plots(plots), _sheets(sheets), _all(figures)])
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(html, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"The page cannot be written ({error.strerror})", where=error.filename or file) from error
    return file


def _summary(title: str, figures: Mapping[str, float], sentence: str) -> str:
    cards = "".join(
        f"<div><dt>{label}</dt><dd>{_figure(figures[name], 2)}</dd></div>"
        for name, label in HEADLINES
        if name in figures
    )
    warnings = "".join(f'<p class="note">{escape(warning)}</p>' for warning in alarms(figures))
    return f'<h1>{escape(title)}</h1>\n<p>{escape(sentence)}</p>\n{warnings}<dl class="headline">{cards}</dl>'


def _plots(plots: Sequence[Path]) -> str:
    if not plots:
        return ""
    images = "".join(
        f'<img alt="{escape(path.stem.replace("_", " "))}" src="{embed(path.read_bytes(), "png")}">' for path in plots
    )
    return f'<h2>Curves</h2>\n<div class="plots">{images}</div>'


def _sheets(sheets: Sequence[Sheet]) -> str:
    if not sheets:
        return ""
    shown = []
    for sheet in sheets:
        name = escape(sheet.name)
        image = (
            f'<img alt="{name}: patches, where they were cut and where they are found. {escape(sheet.caption)}" '
            f'loading="lazy" src="{embed(jpeg(sheet.picture, JPEG_QUALITY), "jpeg")}">'
        )
        said = f"<strong>{escape(sheet.caption)}</strong> · {name}" if sheet.caption else name
        shown.append(f"<figure>{image}<figcaption>{said}</figcaption></figure>")
    return (
        "<h2>Held-out images</h2>\n<p>Each patch has a colour and a number. The thin outline is where it was cut, the "
        f"thick one where the detector finds it.</p>\n{''.join(shown)}"
    )


def _all(figures: Mapping[str, float]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{_figure(value, 4)}</td>'
        f'<td class="words">{escape(MEANINGS.get(name, ""))}</td></tr>'
        for name, value in figures.items()
    )
    return (
        '<h2>All figures</h2>\n<div class="scroll"><table><caption>A dash means undefined: there is no such patch, or '
        'nothing of the kind is told.</caption><thead><tr><th scope="col">Figure</th><th scope="col">Value</th>'
        f'<th scope="col" style="text-align:left">Meaning</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _figure(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"
